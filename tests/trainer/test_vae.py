"""The VAE's formulas against independent ones."""

import contextlib
import math

import numpy as np
import pytest
import torch
from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Moment
from latentd_trainer.families.vae import (
    Vae,
    VaeConfig,
    discretized_logistic_draw,
    discretized_logistic_log_likelihood,
    discretized_logistic_mean,
    kl_to_standard_normal,
    normal_log_density,
    reparameterise,
)
from latentd_trainer.shard import Shard
from torch import distributions

LEVELS = 17
INFO = DataInfo("tiny", (1, 8, 8), LEVELS, ("a", "b"), (0.5, 0.5), "")


def every_level(levels: int) -> torch.Tensor:
    """Images of one pixel, one for each level: [levels, 1, 1, 1]."""
    return (torch.arange(levels) * 2 / (levels - 1) - 1).reshape(-1, 1, 1, 1).float()


def mass(location: float, log_scale: float, levels: int) -> torch.Tensor:
    """P(level) from the likelihood under test, [levels] f64."""
    x = every_level(levels)
    return (
        discretized_logistic_log_likelihood(x, torch.full_like(x, location), torch.full_like(x, log_scale), levels)
        .double()
        .exp()
    )


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize(("location", "log_scale"), [(0.0, -1.0), (-1.0, -4.0), (0.93, -6.0), (3.0, 0.5)])
def test_the_likelihood_is_a_distribution_over_the_levels(location: float, log_scale: float, levels: int) -> None:
    """The masses of all levels sum to 1, far from the data and at the narrowest scale too."""
    assert mass(location, log_scale, levels).sum().item() == pytest.approx(1, abs=2e-5)


def test_the_likelihood_is_the_difference_of_logistic_functions() -> None:
    """Each level's mass is F(upper edge) - F(lower edge), the outer levels with their tails."""
    location, log_scale = 0.3, -1.5
    edges = (-1 + (2 * np.arange(LEVELS - 1) + 1) / (LEVELS - 1) - location) / math.exp(log_scale)
    cumulative = np.concatenate([[0], 1 / (1 + np.exp(-edges)), [1]])
    np.testing.assert_allclose(mass(location, log_scale, LEVELS).numpy(), np.diff(cumulative), rtol=1e-4)


def test_the_likelihood_of_unlikely_pixels_keeps_its_gradient() -> None:
    """A pixel fifty scales away from its location has a finite likelihood that pulls the location towards it."""
    location = torch.full((1, 1, 1, 1), -1.0, requires_grad=True)
    likelihood = discretized_logistic_log_likelihood(
        torch.ones(1, 1, 1, 1), location, torch.full((1, 1, 1, 1), math.log(0.04)), LEVELS
    )
    (gradient,) = torch.autograd.grad(likelihood.sum(), location)
    assert torch.isfinite(likelihood)
    assert gradient.item() == pytest.approx(1 / 0.04, rel=1e-3)


@pytest.mark.parametrize(("location", "log_scale"), [(0.1, -1.0), (-0.9, -2.5), (2.0, 0.0)])
def test_mean_and_draw_follow_the_likelihood(location: float, log_scale: float) -> None:
    """The mean is the sum of level times mass, and draws hit each level with its mass."""
    probabilities, levels = mass(location, log_scale, LEVELS), every_level(LEVELS).flatten().double()
    one = torch.ones(1, 1, 1, 1)
    mean = discretized_logistic_mean(location * one, log_scale * one, LEVELS)
    assert mean.item() == pytest.approx((probabilities * levels).sum().item(), abs=1e-5)

    count = 100_000
    uniform = ((torch.arange(count) + 0.5) / count).reshape(-1, 1, 1, 1)  # a grid, so that nothing is left to chance
    many = torch.ones(count, 1, 1, 1)
    draws = discretized_logistic_draw(location * many, log_scale * many, uniform, LEVELS)
    shares = torch.bincount(((draws.flatten() + 1) * (LEVELS - 1) / 2).round().long(), minlength=LEVELS) / count
    torch.testing.assert_close(shares.double(), probabilities, atol=2e-5, rtol=0)


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_draws_stay_in_range_at_the_ends_of_the_uniform_numbers(edge: float) -> None:
    """The smallest and the largest uniform number give levels of the data, not infinity."""
    one = torch.ones(1, 1, 1, 1)
    draw = discretized_logistic_draw(0 * one, 0 * one, edge * one, LEVELS)
    assert abs(draw.item()) == 1


def test_kl_is_the_closed_form() -> None:
    """KL to the standard normal equals torch's own."""
    mean, log_variance = torch.randn(5, 3), torch.randn(5, 3)
    ours = kl_to_standard_normal(mean, log_variance)
    oracle = distributions.kl_divergence(
        distributions.Normal(mean, (0.5 * log_variance).exp()), distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(ours, oracle)


def test_reparameterised_draws_have_the_moments_asked_for() -> None:
    """A draw m + s eps has the density N(mean, s^2): its log density equals torch's, and eps = 0 gives the mean."""
    mean, log_variance, eps = torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 2)
    z = reparameterise(mean, log_variance, eps)
    torch.testing.assert_close((z - mean) / (0.5 * log_variance).exp(), eps)
    oracle = distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(z).sum(1)
    torch.testing.assert_close(normal_log_density(z, mean, log_variance), oracle)


@pytest.fixture(name="vae")
def tiny_vae() -> Vae:
    torch.manual_seed(0)
    return Vae(VaeConfig(width=8, hidden=16, latent=2), INFO)


def test_bounds_are_ordered(vae: Vae) -> None:
    """ELBO <= IWAE-10 <= IWAE-100 (Burda et al., theorem 1), and the ELBO agrees with reconstruction minus KL."""
    images = torch.rand(8, 1, 8, 8).mul(16).round() / 8 - 1
    labels = torch.arange(8) % 2
    elbo = torch.stack([vae.importance_weighted_bound(images, labels, 1, seed) for seed in range(50)]).mean()
    ten, many = (vae.importance_weighted_bound(images, labels, draws, 0).mean() for draws in (10, 100))
    assert elbo < ten < many

    networks = vae.averages["networks"].module
    mean, log_variance = networks["encoder"](images)
    draws = [reparameterise(mean, log_variance, torch.randn_like(mean)) for _ in range(50)]
    likelihood = torch.stack(
        [
            discretized_logistic_log_likelihood(images, *networks["decoder"](latent, labels), LEVELS).mean()
            for latent in draws
        ]
    ).mean()
    analytic = likelihood - vae.latent_divergences(images).sum(1).mean()
    assert elbo.item() == pytest.approx(analytic.item(), abs=1.0)


def first_step(**settings: float) -> tuple[dict[str, torch.Tensor], Vae]:
    """A tiny VAE after one step, and the step's losses."""
    torch.manual_seed(0)
    vae = Vae(VaeConfig(width=8, hidden=16, latent=2, batch_size=4, **settings), INFO)
    images = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8)
    moment = Moment(0, 100, torch.Generator().manual_seed(0), Shard(), contextlib.nullcontext)
    return vae.step(Batch(images, torch.tensor([0, 1, 0, 1])), moment), vae


def test_free_bits_are_a_floor_without_gradient() -> None:
    """Below its free bits a dimension's KL costs a constant: the weights move as if the KL had no weight at all."""
    losses, floored = first_step(free_bits=0.3, kl_warm_up=0.0)
    assert losses["kl"] < 0.3
    assert (losses["loss"] - losses["reconstruction"]).item() == pytest.approx(2 * 0.3, abs=1e-4)
    _, weightless = first_step(free_bits=1.0, kl_warm_up=1.0)
    for one, other in zip(floored.networks.parameters(), weightless.networks.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_kl_grows_to_full_weight_over_the_warm_up() -> None:
    """In the first of 20 warm-up steps the KL has a twentieth of its weight, without a warm-up all of it."""
    warming, _ = first_step(free_bits=0.0, kl_warm_up=0.2)
    full, _ = first_step(free_bits=0.0, kl_warm_up=0.0)
    added = (warming["loss"] - warming["reconstruction"]).double()
    assert added.item() == pytest.approx(full["kl"].item() / 20, abs=1e-4)
    assert (full["loss"] - full["reconstruction"]).item() == pytest.approx(full["kl"].item(), abs=1e-4)


def test_settings_out_of_range_are_refused_together() -> None:
    """Every setting that is not allowed is named in one error."""
    with pytest.raises(ValueError, match=r"latent=0: .*; free_bits=-1.*; width=12.*; kl_warm_up=2"):
        VaeConfig(latent=0, free_bits=-1, width=12, kl_warm_up=2)
