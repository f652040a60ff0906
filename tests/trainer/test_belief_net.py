"""Sigmoid belief nets against sums over all of their states, and Gibbs sampling, codes and bounds with them."""

import itertools
import math

import numpy as np
import pytest
import torch
from latentd_trainer.belief_net import (
    BeliefNet,
    DecoderGraph,
    Gibbs,
    binary_pixels,
    enumerate_posterior,
    softplus,
    unit_of,
)
from latentd_trainer.checkpoint import build_family
from latentd_trainer.data import DataInfo
from latentd_trainer.families.helmholtz import HelmholtzMachine, Recognition
from latentd_trainer.families.helmholtz import LogWeightGraph as HelmholtzWeight
from latentd_trainer.families.sigmoid_belief_net import LogWeightGraph as GibbsWeight
from torch import Tensor, nn

PIXELS, LOWER, UPPER = 6, 4, 3
UNITS = LOWER + UPPER


def states(count: int) -> Tensor:
    """All states of `count` binary units, [2 ** count, count]."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)))


def random_net(seed: int = 0, scale: float = 1.5) -> BeliefNet:
    """A 4-3 net with weights large enough that explaining away matters."""
    net = BeliefNet(PIXELS, LOWER, UPPER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return net


def image_of(pixels: Tensor) -> Tensor:
    """Binary pixels [n, 6] as images [n, 1, 2, 3] in [-1, 1]."""
    return (2 * pixels - 1).view(-1, 1, 2, 3)


def test_the_joint_sums_to_one() -> None:
    """Over all 2 ** 13 states of pixels and hidden units, and over all images with the hidden units summed out."""
    net = random_net()
    whole = states(PIXELS + UNITS)
    with torch.no_grad():
        joint = net.log_joint(whole[:, :PIXELS], *net.layers(whole[:, PIXELS:]))
    assert joint.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    log_likelihood, _ = enumerate_posterior(net, states(PIXELS))
    assert log_likelihood.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_joint_is_the_product_of_its_factors() -> None:
    """The logarithm of every unit's Bernoulli probability, by torch's own distributions."""
    net = random_net()
    whole = states(PIXELS + UNITS)[::37]
    x, (lower, upper) = whole[:, :PIXELS], net.layers(whole[:, PIXELS:])

    def log_prob(units: Tensor, logits: Tensor) -> Tensor:
        return torch.distributions.Bernoulli(logits=logits).log_prob(units).sum(dim=1)

    expected = log_prob(upper, net.top) + log_prob(lower, net.middle(upper)) + log_prob(x, net.bottom(lower))
    torch.testing.assert_close(net.log_joint(x, lower, upper), expected)


def test_dreams_have_the_prior_s_frequencies() -> None:
    """States drawn from the top down occur as often as p(z1, z2) says."""
    net = random_net()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.cat(net.dream(torch.rand((40_000, UNITS), generator=generator)), dim=1)
    every = states(UNITS)
    lower, upper = net.layers(every)
    weights = 2 ** torch.arange(UNITS - 1, -1, -1)
    counts = np.bincount((drawn @ weights.float()).long().numpy(), minlength=2**UNITS) / 40_000
    with torch.no_grad():
        log_prior = torch.stack([net.log_joint(x.expand(len(every), -1), lower, upper) for x in states(PIXELS)])
    expected = log_prior.double().logsumexp(dim=0).exp()
    assert np.abs(counts - expected.numpy()).sum() / 2 < 0.02


def test_a_sweep_draws_each_unit_from_its_conditional() -> None:
    """P(unit = 1 | rest), as the sweep has it, is the ratio of joint probabilities with the others as they then are."""
    net = random_net()
    generator = torch.Generator().manual_seed(2)
    x = (torch.rand((5, PIXELS), generator=generator) < 0.5).float()
    before = torch.cat(net.dream(torch.rand((5, UNITS), generator=generator)), dim=1)
    after, chances = net.sweep(x, before, torch.rand((5, 1, UNITS), generator=generator))
    for unit in range(UNITS):
        state = torch.cat([after[:, :unit], before[:, unit:]], dim=1)
        on, off = state.clone(), state.clone()
        on[:, unit], off[:, unit] = 1.0, 0.0
        odds = net.log_joint(x, *net.layers(on)) - net.log_joint(x, *net.layers(off))
        torch.testing.assert_close(chances[:, 0, unit], odds.sigmoid(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gibbs_marginals_are_the_exact_ones(seed: int) -> None:
    """Many chains' P(unit = 1 | x) come within .02 of the sum over all states."""
    net = random_net(seed)
    generator = torch.Generator().manual_seed(seed + 10)
    x = (torch.rand((3, PIXELS), generator=generator) < 0.5).float()
    _, exact = enumerate_posterior(net, x)
    gibbs, chains = Gibbs(net, 40), 1000
    with torch.no_grad():
        uniform = torch.rand((3 * chains, *gibbs.noise_shape), generator=generator)
        found = gibbs(image_of(x.repeat_interleave(chains, dim=0)), uniform).view(3, chains, UNITS).mean(dim=1)
    assert (found - exact).abs().max() < 0.02


def test_the_chain_starts_in_the_prior_and_averages_its_second_half() -> None:
    """With one sweep the answer is that of the sweep; with two it is that of the second."""
    net = random_net()
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand((4, PIXELS), generator=generator) < 0.5).float()
    uniform = torch.rand((4, 3, UNITS), generator=generator)
    states, first = net.sweep(x, torch.cat(net.dream(uniform[:, 0]), dim=1), uniform[:, 1:2])
    torch.testing.assert_close(Gibbs(net, 1)(image_of(x), uniform[:, :2]), first[:, 0])
    _, second = net.sweep(x, states, uniform[:, 2:])
    torch.testing.assert_close(Gibbs(net, 2)(image_of(x), uniform), second[:, 0])


def log_mean(values: Tensor) -> float:
    return float(values.double().logsumexp(dim=0) - math.log(len(values)))


@pytest.mark.parametrize("kind", ["gibbs", "recognition"])
def test_weights_have_the_likelihood_as_their_mean(kind: str) -> None:
    """However poor q is, the mean of p(x, z) / q(z | x) is p(x), and of its logarithm a bound below that."""
    net = random_net(scale=1.0)
    generator = torch.Generator().manual_seed(4)
    x = torch.tensor([[1.0, 0, 1, 1, 0, 0]])
    exact = enumerate_posterior(net, x)[0].item()
    count = 60_000
    images = image_of(x.expand(count, -1))
    with torch.no_grad():
        if kind == "gibbs":
            gibbs = Gibbs(net, 2)
            chain = torch.rand((count, *gibbs.noise_shape), generator=generator)
            weights = GibbsWeight(gibbs)(images, chain, torch.rand((count, UNITS), generator=generator))
        else:
            torch.manual_seed(0)
            uniforms = (torch.rand((count, units), generator=generator) for units in net.units)
            weights = HelmholtzWeight(net, Recognition(PIXELS, LOWER, UPPER))(images, *uniforms)
    assert log_mean(weights) == pytest.approx(exact, abs=0.05)
    assert weights.mean() < exact - 0.01
    fewer = [log_mean(part) for part in weights.view(-1, 10).unbind()][:2000]
    assert float(weights.mean()) < float(np.mean(fewer)) < exact


def test_the_bound_falls_short_by_the_divergence_from_the_posterior() -> None:
    """ELBO = ln p(x) - KL(q || p(z | x)), summed over all states, for every image."""
    net = random_net()
    torch.manual_seed(0)
    recognition = Recognition(PIXELS, LOWER, UPPER)
    every = states(UNITS)
    lower, upper = net.layers(every)
    with torch.no_grad():
        for x in states(PIXELS)[::7]:
            repeated = x.expand(len(every), -1)
            log_joint = net.log_joint(repeated, lower, upper).double()
            log_q = recognition.log_posterior(repeated, lower, upper).double()
            log_likelihood = log_joint.logsumexp(dim=0)
            q = log_q.exp()
            assert q.sum().item() == pytest.approx(1, abs=1e-5)
            elbo = (q * (log_joint - log_q)).sum()
            divergence = (q * (log_q - (log_joint - log_likelihood))).sum()
            assert elbo.item() == pytest.approx((log_likelihood - divergence).item(), abs=1e-5)
            assert divergence > 0


def test_binary_codes_stand_for_themselves_and_uniform_ones_are_draws() -> None:
    """0 and 1 are off and on even under logits where float32 rounds the probability to 0 or 1; the rest is chance."""
    logits = torch.tensor([[-200.0, -20.0, 0.0, 20.0, 200.0]])
    assert unit_of(torch.zeros(1, 5), logits).tolist() == [[0.0] * 5]
    assert unit_of(torch.ones(1, 5), logits).tolist() == [[1.0] * 5]
    uniform = torch.rand((50_000, 1), generator=torch.Generator().manual_seed(5))
    share = unit_of(uniform, torch.full((50_000, 1), 0.8)).mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.01)


def test_the_decoder_goes_from_the_top_down() -> None:
    """States decode to E(x | z1), which z2 does not touch; uniform codes to ancestral samples; draws are fair."""
    net = random_net()
    graph = DecoderGraph(net, (1, 2, 3))
    every = states(UNITS)
    half = torch.full((len(every), 1, 2, 3), 0.5)
    mean, drawn = graph(every, half)
    probability = net.bottom(every[:, :LOWER]).sigmoid()
    torch.testing.assert_close(mean.flatten(1), 2 * probability - 1)
    assert torch.equal(drawn > 0, mean > 0)
    generator = torch.Generator().manual_seed(6)
    code = torch.rand((40_000, UNITS), generator=generator)
    with torch.no_grad():
        sampled, _ = graph(code, torch.zeros(40_000, 1, 2, 3))
    log_likelihood, _ = enumerate_posterior(net, states(PIXELS))
    exact = log_likelihood.exp() @ (2 * states(PIXELS) - 1)
    torch.testing.assert_close(sampled.flatten(1).mean(dim=0), exact, atol=0.02, rtol=0)


def test_pixels_are_binarised_in_the_middle_of_the_range() -> None:
    """The middle itself counts as 1; of 17 levels these are 8 to 16, of 256 they are 128 to 255."""
    for levels, first in ((17, 8), (256, 128), (2, 1)):
        pixels = torch.arange(levels).float() * (2 / (levels - 1)) - 1
        assert binary_pixels(pixels.view(1, 1, 1, -1)).tolist() == [[0.0] * first + [1.0] * (levels - first)]


def test_softplus_is_exact_at_both_ends() -> None:
    """ln(1 + e^x) as torch has it in float64, without overflow or loss."""
    x = torch.tensor([[-100.0, -20, -1, 0, 1, 20, 100]])
    expected = nn.functional.softplus(x.double(), threshold=1000)
    torch.testing.assert_close(softplus(x).double(), expected, rtol=1e-6, atol=1e-7)


def test_pixels_start_at_their_odds() -> None:
    """The bias is the log odds of the images' mean with half an image added either way."""
    net = random_net()
    net.start_at(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 0.5]), 8)
    on = net.bottom.bias.sigmoid() * 9
    torch.testing.assert_close(on, torch.tensor([0.5, 2.5, 4.5, 6.5, 8.5, 4.5]))


def test_a_machine_s_bound_tightens_with_draws() -> None:
    """IWAE-K rises with K towards the exact ln p(x), which it does not pass."""
    info = DataInfo("tiny", (1, 2, 3), 2, ("a",), (1.0,), "0" * 64)
    machine = build_family("helmholtz", {"lower": LOWER, "upper": UPPER}, info, seed=0)
    assert isinstance(machine, HelmholtzMachine)
    machine.net.load_state_dict(random_net(scale=1.0).state_dict())
    images = image_of(states(PIXELS)[::5])
    exact = enumerate_posterior(machine.net, binary_pixels(images))[0].mean()
    bounds = [machine.importance_weighted_bound(images, draws, seed=0).mean() for draws in (1, 10, 2000)]
    assert bounds[0] < bounds[1] < bounds[2]
    assert bounds[2] == pytest.approx(exact.item(), abs=0.05)
