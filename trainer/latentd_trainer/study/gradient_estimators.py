"""Two unbiased estimates of one gradient: through the reparametrized draw, and by the score function.

Kingma, Welling, arXiv 1312.6114, sections 2.2 and 2.4; Williams, Machine Learning 8 (1992), for the score function.

    wanted         d/dm_1 E f(z), z ~ N(m, s^2 I) in d dimensions, f(z) = |z|^2 / 2; it is m_1
    reparametrized d/dm_1 f(m + s e) = m_1 + s e_1, of variance s^2 in any number of dimensions
    score function f(z) d/dm_1 ln N(z; m, s^2 I) = f(z) e_1 / s, of variance
                   (|m|^4 + s^4 (d + 2)(d + 4) + 2 |m|^2 s^2 (d + 2)) / 4 s^2 + |m|^2 + 2 m_1^2 - m_1^2
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentd_trainer import plots
from latentd_trainer.families.vae import normal_log_density, reparameterise
from latentd_trainer.report import figure_text, table
from latentd_trainer.study.section import Criterion, Picture, Section, Settings

_DIMENSIONS = (1, 2, 4, 8, 16, 32)
_DRAWS = 50_000
_MEAN, _DEVIATION = 0.5, 0.7


def reparametrized(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    """d/dm_1 |m + s eps|^2 / 2 for each draw: [d], [d], [n, d] f64 -> [n]."""
    each = mean.expand_as(eps).clone().requires_grad_()
    cost = 0.5 * reparameterise(each, log_variance, eps).square().sum()
    (found,) = torch.autograd.grad(cost, each)
    return found[:, 0]


def score_function(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    """f(z) d/dm_1 ln N(z; m, s^2 I) for each draw: [d], [d], [n, d] f64 -> [n]."""
    each = mean.expand_as(eps).clone().requires_grad_()
    z = reparameterise(mean, log_variance, eps)
    cost = 0.5 * z.square().sum(dim=1)
    (found,) = torch.autograd.grad((cost * normal_log_density(z, each, log_variance)).sum(), each)
    return found[:, 0]


def score_function_variance(mean: Tensor, deviation: float) -> float:
    """In closed form, for one deviation in all dimensions."""
    d, squared, first = len(mean), float(mean.square().sum()), float(mean[0])
    s2 = deviation**2
    even = squared**2 + s2**2 * (d + 2) * (d + 4) + 2 * squared * s2 * (d + 2)
    return even / (4 * s2) + squared + 2 * first**2 - first**2


def study(settings: Settings) -> Section:
    """Mean and variance of both estimates by the number of dimensions, drawn and in closed form."""
    settings.tell("draws")
    log_variance = torch.tensor(2 * math.log(_DEVIATION), dtype=torch.float64)
    figures: dict[str, float] = {"reparametrized/closed": _DEVIATION**2}
    for dimensions in _DIMENSIONS:
        generator = torch.Generator().manual_seed(settings.seed)
        eps = torch.randn((_DRAWS, dimensions), generator=generator, dtype=torch.float64)
        mean = torch.full((dimensions,), _MEAN, dtype=torch.float64)
        for name, of in (("reparametrized", reparametrized), ("score-function", score_function)):
            draws = of(mean, log_variance.expand(dimensions), eps)
            figures[f"{name}/{dimensions}"] = float(draws.var())
            figures[f"{name}-bias/{dimensions}"] = float(draws.mean() - _MEAN) / float(draws.std()) * math.sqrt(_DRAWS)
        figures[f"score-function-closed/{dimensions}"] = score_function_variance(mean, _DEVIATION)
    figures |= {
        "bias": max(abs(value) for name, value in figures.items() if "-bias/" in name),
        "reparametrized/error": max(abs(figures[f"reparametrized/{d}"] / _DEVIATION**2 - 1) for d in _DIMENSIONS),
        "score-function/error": max(
            abs(figures[f"score-function/{d}"] / figures[f"score-function-closed/{d}"] - 1) for d in _DIMENSIONS
        ),
        "ratio/first": figures[f"score-function/{_DIMENSIONS[0]}"] / figures[f"reparametrized/{_DIMENSIONS[0]}"],
        "ratio/last": figures[f"score-function/{_DIMENSIONS[-1]}"] / figures[f"reparametrized/{_DIMENSIONS[-1]}"],
    }
    criteria = (
        Criterion(
            "Both are unbiased: standard errors between their means and the gradient, at most", "bias", "<=", 4.0
        ),
        Criterion("the reparametrized variance is s² (largest relative error)", "reparametrized/error", "<=", 0.05),
        Criterion("the score function's is its closed form (same)", "score-function/error", "<=", 0.1),
        Criterion("which is larger in one dimension (ratio)", "ratio/first", ">", 1.0),
        Criterion(f"and far larger in {_DIMENSIONS[-1]} (ratio)", "ratio/last", ">", 100.0),
    )
    columns = ("reparametrized", "score-function", "score-function-closed")
    rows = [[str(d), *(figure_text(figures[f"{name}/{d}"]) for name in columns)] for d in _DIMENSIONS]
    return Section(
        title="Reparametrized gradients",
        claim="A gradient through z = m + s eps varies far less than the score function's estimate of the same "
        "gradient, which is why a VAE trains on one draw an image (Kingma, Welling 2014, section 2.4).",
        measured=f"E|z|²/2 of z ~ N(m, s²I) with m = {_MEAN:g} in each dimension and s = {_DEVIATION:g}, "
        f"differentiated by m's first element; {_DRAWS} draws, through the VAE's own functions.",
        figures=figures,
        criteria=criteria,
        body=table(["dimensions", "reparametrized", "score function", "score function, closed form"], rows)
        + "\n\nVariances of one draw's estimate. The score function needs no gradient of f, so that it serves where z "
        "is discrete, as in belief nets; baselines, which lower its variance, are not used here.",
        pictures=(
            Picture(
                "gradient-estimators.png",
                "Variance of one draw's estimate by the number of dimensions; lines are closed forms.",
                _picture(_DIMENSIONS, figures),
            ),
        ),
    )


def _picture(dimensions: Sequence[int], figures: dict[str, float]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    closed = {
        "score-function": [figures[f"score-function-closed/{d}"] for d in dimensions],
        "reparametrized": [figures["reparametrized/closed"]] * len(dimensions),
    }
    for (name, line), color in zip(closed.items(), ("tab:red", "tab:blue"), strict=True):
        axes.loglog(dimensions, line, color=color)
        axes.loglog(dimensions, [figures[f"{name}/{d}"] for d in dimensions], "o", color=color, label=name)
    axes.set(xlabel="dimensions of z", ylabel="variance")
    axes.legend(frameon=False)
    return plots.png(figure)
