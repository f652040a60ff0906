"""The studies of normals: both directions of KL, and two estimates of one gradient, against closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from latentd_trainer.study import gradient_estimators, kl_directions
from latentd_trainer.study.kl_directions import Pair
from latentd_trainer.study.section import Settings


def normal_divergence(mean: float, deviation: float, other_mean: float, other_deviation: float) -> float:
    """KL of two normals in closed form."""
    squared = (deviation**2 + (mean - other_mean) ** 2) / other_deviation**2
    return 0.5 * (squared - 1) + math.log(other_deviation / deviation)


def test_divergences_are_those_of_normals_where_the_two_are_one() -> None:
    """With d = 0 both integrals equal the closed form to 1e-10, each in its own direction."""
    pair, place = (
        Pair(0.0, 0.5),
        (torch.tensor(0.4, dtype=torch.float64), torch.tensor(math.log(0.8), dtype=torch.float64)),
    )
    assert kl_directions.inclusive(pair, *place).item() == pytest.approx(normal_divergence(0, 0.5, 0.4, 0.8), abs=1e-10)
    assert kl_directions.exclusive(pair, *place).item() == pytest.approx(normal_divergence(0.4, 0.8, 0, 0.5), abs=1e-10)


def test_the_inclusive_fit_matches_moments() -> None:
    """For N(-3, .25) and N(3, .25): mean 0 and variance 9.25, from a start at either and between."""
    pair = Pair(3.0, 0.5)
    assert kl_directions.moment_match(pair).deviation == pytest.approx(math.sqrt(9.25))
    for found in kl_directions.fits(pair, kl_directions.inclusive, (-1.0, 0.2)):
        assert (found.mean, found.deviation) == pytest.approx((0, math.sqrt(9.25)), abs=1e-6)


def test_the_exclusive_fit_takes_the_mode_it_starts_nearer_to() -> None:
    """A mean of 3 or -3, the one normal's own deviation, and ln 2 nats for the half that is given up."""
    for found, mode in zip(
        kl_directions.fits(Pair(3.0, 0.5), kl_directions.exclusive, (-0.3, 0.3)), (-3, 3), strict=True
    ):
        assert (found.mean, found.deviation, found.divergence) == pytest.approx((mode, 0.5, math.log(2)), abs=1e-5)


def test_the_score_function_s_variance_is_the_integral() -> None:
    """The closed form in one dimension equals Gauss-Hermite quadrature, which is exact for polynomials."""
    points, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    estimate = 0.5 * (1.3 + 0.6 * points) ** 2 * points / 0.6
    mean = weights @ estimate
    assert mean == pytest.approx(1.3)
    found = gradient_estimators.score_function_variance(torch.tensor([1.3]).double(), 0.6)
    assert found == pytest.approx(weights @ estimate**2 - mean**2)


def test_each_draw_s_estimates_are_those_formulas() -> None:
    """m_1 + s e_1 by the reparametrized draw, and f(z) e_1 / s by the score function."""
    eps = torch.randn((7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, deviation = torch.tensor([0.4, -0.2, 1.0], dtype=torch.float64), 0.6
    log_variance = torch.full((3,), 2 * math.log(deviation), dtype=torch.float64)
    z = mean + deviation * eps
    torch.testing.assert_close(gradient_estimators.reparametrized(mean, log_variance, eps), z[:, 0])
    expected = 0.5 * z.square().sum(dim=1) * eps[:, 0] / deviation
    torch.testing.assert_close(gradient_estimators.score_function(mean, log_variance, eps), expected)


@pytest.mark.parametrize("claim", [gradient_estimators, kl_directions])
def test_the_claims_hold(claim, tmp_path: Path) -> None:
    """Inclusive KL covers and exclusive KL seeks a mode; the reparametrized gradient varies least."""
    section = claim.study(Settings(seed=0, quick=True, trained=tmp_path))
    assert section.verdict == "holds"
    assert all(picture.png.startswith(b"\x89PNG") for picture in section.pictures)
