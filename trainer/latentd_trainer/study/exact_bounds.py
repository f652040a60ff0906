"""ln p(x) = ELBO + KL(q || p(z | x)), and what importance weighting adds: by sums over every state, not by draws.

Jordan et al., An introduction to variational methods for graphical models, Machine Learning 37 (1999); Kingma, Welling,
arXiv 1312.6114, eq. 1-3; Burda, Grosse, Salakhutdinov, arXiv 1509.00519, theorem 1. The same sums show the bound on
mutual information that InfoGAN maximises: Chen et al., arXiv 1606.03657, eq. 5.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from latentd_trainer import plots
from latentd_trainer.report import figure_text, table
from latentd_trainer.study.exact_sums import Machine, divergence, random_machine
from latentd_trainer.study.section import Criterion, Picture, Section, Settings

DRAWS = (1, 2, 4, 8)


def elbo(machine: Machine) -> Tensor:
    """E_q ln p(x, z) - ln q(z | x) of every image in nats, [images] f64."""
    log_q = machine.log_q()
    return (log_q.exp() * (machine.log_joint() - log_q)).sum(dim=1)


def reconstruction_less_divergence(machine: Machine, sign: float = -1.0) -> Tensor:
    """E_q ln p(x | z) - KL(q || p(z)) of every image, the ELBO's other form; with a sign of 1 the slip of adding it."""
    log_q, log_prior = machine.log_q(), machine.log_prior()
    reconstruction = (log_q.exp() * (machine.log_joint() - log_prior)).sum(dim=1)
    return reconstruction + sign * divergence(log_q, log_prior)


def prior_counted_twice(machine: Machine) -> Tensor:
    """The slip E_q ln p(x, z) - KL(q || p(z)), [images]: p(z) is in the joint and again in the divergence."""
    log_q, log_prior = machine.log_q(), machine.log_prior()
    return (log_q.exp() * machine.log_joint()).sum(dim=1) - divergence(log_q, log_prior)


def importance_weighted_bound(machine: Machine, draws: int) -> Tensor:
    """E ln 1/K sum_k p(x, z_k) / q(z_k | x) over K = `draws` states drawn from q, exactly, [images] f64.

    The bound depends on how often each state was drawn, so that the expectation is a sum over all such counts, with
    their multinomial probabilities.
    """
    log_q = machine.log_q()
    log_weight = machine.log_joint() - log_q
    counts = _all_counts(draws, log_q.shape[1])
    ways = math.lgamma(draws + 1) - torch.lgamma(counts + 1).sum(dim=1)
    bounds = []
    for q, weight in zip(log_q, log_weight, strict=True):
        probability = (ways + counts @ q).exp()
        bounds.append(probability @ ((counts.log() + weight).logsumexp(dim=1) - math.log(draws)))
    return torch.stack(bounds)


def information(machine: Machine) -> Tensor:
    """I(z; x) under the model, in nats: how much of its hidden states its images tell, [] f64."""
    log_joint = machine.log_joint()
    apart = log_joint.logsumexp(dim=1, keepdim=True) + log_joint.logsumexp(dim=0)
    return (log_joint.exp() * (log_joint - apart)).sum()


def information_bound(machine: Machine) -> Tensor:
    """E_p(x, z) ln q(z | x) + H(z), the bound on I(z; x) that InfoGAN maximises, [] f64."""
    log_prior = machine.log_prior()
    return (machine.log_joint().exp() * machine.log_q()).sum() - (log_prior.exp() * log_prior).sum()


def study(settings: Settings) -> Section:
    """The identities and the slips of one random machine, and its exact IWAE-K."""
    machine = random_machine(settings.seed)
    settings.tell("sums over all states")
    with torch.no_grad():
        log_likelihood, bound = machine.log_likelihood(), elbo(machine)
        gap = divergence(machine.log_q(), machine.log_posterior())
        twice, added = prior_counted_twice(machine), reconstruction_less_divergence(machine, sign=1.0)
        expected_log_prior = machine.log_q().exp() @ machine.log_prior()
        bounds = torch.stack([importance_weighted_bound(machine, count) for count in DRAWS])
        joint_divergence = divergence(
            (machine.data.log()[:, None] + machine.log_q()).flatten(), machine.log_joint().flatten()
        )
        data_entropy = -(machine.data * machine.data.log()).sum()
        data_divergence = divergence(machine.data.log(), log_likelihood)
        told, told_at_least = information(machine), information_bound(machine)
        untold = log_likelihood.exp() @ divergence(machine.log_posterior(), machine.log_q())
    figures = {
        "identity/error": _largest(bound + gap - log_likelihood),
        "identity/smallest-gap": float(gap.min()),
        "forms/error": _largest(reconstruction_less_divergence(machine).detach() - bound),
        "joint/error": abs(float(machine.data @ bound + joint_divergence + data_entropy)),
        "joint/divergence": float(joint_divergence),
        "joint/data-divergence": float(data_divergence),
        "information/nats": float(told),
        "information/bound-error": abs(float(told - told_at_least - untold)),
        "slips/prior-twice-error": _largest(twice - bound - expected_log_prior),
        "slips/prior-twice-falls-short": float((bound - twice).min()),
        "slips/added-divergence-exceeds-likelihood": float((added > log_likelihood).double().mean()),
        "iwae/smallest-rise": float(bounds.diff(dim=0).min()),
        "iwae/one-draw-error": _largest(bounds[0] - bound),
        "iwae/smallest-gap": float((log_likelihood - bounds[-1]).min()),
    } | {f"iwae/{count}": float(machine.data @ each) for count, each in zip(DRAWS, bounds, strict=True)}
    criteria = (
        Criterion("ln p(x) = ELBO + KL(q‖p(z given x)) for each image (largest error)", "identity/error", "<=", 1e-12),
        Criterion("and the divergence is positive (smallest)", "identity/smallest-gap", ">", 0.0),
        Criterion("the ELBO's two forms agree (largest error)", "forms/error", "<=", 1e-12),
        Criterion("the mean ELBO is -KL(p_data q‖p) less the data's entropy (error)", "joint/error", "<=", 1e-12),
        Criterion("that KL bounds KL(p_data‖p)", "joint/divergence", ">=", "joint/data-divergence"),
        Criterion("IWAE-1 is the ELBO (largest error)", "iwae/one-draw-error", "<=", 1e-12),
        Criterion("IWAE-K rises with K for each image (smallest rise)", "iwae/smallest-rise", ">", 0.0),
        Criterion("and stays below ln p(x) (smallest gap)", "iwae/smallest-gap", ">", 0.0),
        Criterion(
            "InfoGAN's bound on I(z; x) falls short by E_p(x) KL(p(z given x)‖q) (error)",
            "information/bound-error",
            "<=",
            1e-12,
        ),
        Criterion(
            "the form with p(x, z) less KL(q‖p(z)) is off by E_q ln p(z) (largest error)",
            "slips/prior-twice-error",
            "<=",
            1e-12,
        ),
        Criterion(
            "the form with plus KL is no bound: share of images where it exceeds ln p(x)",
            "slips/added-divergence-exceeds-likelihood",
            ">",
            0.0,
        ),
    )
    rows = [
        [f"IWAE-{count}", figure_text(float(machine.data @ each))] for count, each in zip(DRAWS, bounds, strict=True)
    ]
    rows += [
        ["ln p(x)", figure_text(float(machine.data @ log_likelihood))],
        ["*slip*: E_q ln p(x, z) - KL(q‖p(z))", figure_text(float(machine.data @ twice))],
        ["*slip*: E_q ln p(x given z) + KL(q‖p(z))", figure_text(float(machine.data @ added))],
    ]
    return Section(
        title="The bound, exactly",
        claim="ln p(x) = ELBO + KL(q(z given x)‖p(z given x)) (Jordan et al. 1999), and IWAE-K tightens the bound with "
        "every K (Burda et al. 2016, theorem 1).",
        measured="A sigmoid belief net of 4 pixels, 2 and 1 hidden units, and a recognition net, both random: sums "
        "over all 16 images and 8 states in float64. IWAE-K is no average over draws but a sum over all outcomes of K "
        "draws.",
        figures=figures,
        criteria=criteria,
        body="Mean over the data, in nats:\n\n" + table(["", "nats"], rows),
        pictures=(
            Picture(
                "exact-bounds.png",
                "How far IWAE-K falls short of ln p(x), for each image; K = 1 is KL(q‖p(z given x)).",
                _picture(log_likelihood - bounds),
            ),
        ),
    )


def _all_counts(draws: int, states: int) -> Tensor:
    """Every way in which `draws` draws fall on the states, [ways, states] f64: stars and bars."""
    places = torch.tensor(list(itertools.combinations(range(draws + states - 1), states - 1)))
    edges = torch.nn.functional.pad(places, (1, 0), value=-1)
    edges = torch.nn.functional.pad(edges, (0, 1), value=draws + states - 1)
    return (edges.diff(dim=1) - 1).double()


def _largest(errors: Tensor) -> float:
    return float(errors.abs().max())


def _picture(gaps: Tensor) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(DRAWS, gaps, color="tab:blue", alpha=0.6)
    axes.set_xticks(DRAWS, list(map(str, DRAWS)))
    axes.minorticks_off()
    axes.set(xlabel="K", ylabel="ln p(x) - IWAE-K, nats")
    return plots.png(figure)
