"""Samplers against exact solutions: Gaussian data, whose ideal denoiser is affine, so that every chain is too.

For data N(MEAN, SPREAD^2) the probability-flow ODE carries x = alpha MEAN + sqrt(alpha^2 SPREAD^2 + sigma^2) w with w
constant, and mean and variance go through a table's coefficients in closed form: nothing here is drawn.
"""

import math

import numpy as np
import pytest
from latentd_server import samplers, solvers
from latentd_server.schedules import Prediction, Schedule

MEAN, SPREAD = 0.3, 0.5
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def geometric(count: int) -> Schedule:
    """Levels with sigma / alpha evenly spaced in its logarithm, from 1e-4 to 40, so that steps are of one size."""
    ratios = np.geomspace(1e-4, 40, count)
    alphas = 1 / np.sqrt(1 + ratios**2)
    return Schedule(alphas, ratios * alphas, Prediction.PREDICTION_V)


def ideal(schedule: Schedule, timestep: int) -> tuple[float, float]:
    """(slope, offset) of the ideal network's output in x."""
    alpha, sigma = schedule.level(timestep)
    slope = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    x0 = np.array([slope, MEAN * (1 - alpha * slope)])
    eps = (np.array([1, 0]) - alpha * x0) / sigma
    outputs = {
        Prediction.PREDICTION_EPSILON: eps,
        Prediction.PREDICTION_V: alpha * eps - sigma * x0,
        Prediction.PREDICTION_SAMPLE: x0,
    }
    return tuple(outputs[schedule.prediction])


def outcome(schedule: Schedule, evaluations, start: tuple[float, float]) -> tuple[float, float]:
    """(mean, standard deviation) of x after these evaluations, from those at the start."""
    mean, covariance = np.array([start[0], 0.0]), np.diag([start[1] ** 2, 0.0])  # of (x, h)
    for evaluation in evaluations:
        k = evaluation.row
        slope, offset = ideal(schedule, evaluation.timestep)
        estimate = np.array([k.px + k.pm * slope, k.pm * offset])  # x0, in x and 1
        step = np.array([[k.a + k.b * estimate[0] + k.d * slope, k.c], [k.e + k.f * estimate[0], k.g]])
        mean = step @ mean + np.array([k.b * estimate[1] + k.d * offset, k.f * estimate[1]])
        covariance = step @ covariance @ step.T + np.diag([k.s**2, 0])
    return float(mean[0]), float(np.sqrt(covariance[0, 0]))


def marginal(schedule: Schedule, timestep: int) -> tuple[float, float]:
    """(mean, standard deviation) of x_t."""
    alpha, sigma = schedule.level(timestep)
    return alpha * MEAN, float(np.sqrt((alpha * SPREAD) ** 2 + sigma**2))


def spread_error(sampler: str, steps: int) -> float:
    """How far, relatively, the samples' standard deviation is from the data's after so many equal steps."""
    schedule = geometric(2049)
    timesteps = tuple(range(2048, -1, -2048 // steps))
    evaluations = samplers.descent_evaluations(schedule, sampler, timesteps, samplers.SAMPLERS[sampler].eta)
    _, spread = outcome(schedule, evaluations, marginal(schedule, 2048))
    return abs(spread / SPREAD - 1)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        ("ddim", 1),
        ("euler", 1),
        ("heun", 2),
        ("dpmpp-2m", 2),
        ("ddpm", 1),
        ("euler-ancestral", 1),
        ("dpmpp-2m-sde", 2),
    ],
)
def test_order(sampler, order):
    """Doubling the steps divides the error by 2^order: the ODE solvers' own order, the SDE solvers' weak one."""
    errors = [spread_error(sampler, steps) for steps in (64, 128, 256)]
    measured = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.abs(measured - order).max() < 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("sampler", "error_at_50", "error_at_200"),
    [
        ("ddim", 0.06, 0.016),
        ("euler", 0.06, 0.016),
        ("heun", 0.009, 0.0013),
        ("dpmpp-2m", 0.002, 0.0005),
        ("ddpm", 0.12, 0.036),
        ("euler-ancestral", 0.12, 0.036),
        ("dpmpp-2m-sde", 0.031, 0.006),
    ],
)
def test_samples_have_the_data_s_distribution(sampler, error_at_50, error_at_200, kind, prediction, make_schedule):
    """From pure noise, mean and spread of the samples come as close to the data's as the method's order lets them."""
    schedule = make_schedule(kind, prediction)
    eta = samplers.SAMPLERS[sampler].eta
    for steps, allowed in ((50, error_at_50), (200, error_at_200)):
        evaluations = samplers.descent_evaluations(schedule, sampler, schedule.spaced_timesteps(steps), eta)
        mean, spread = outcome(schedule, evaluations, (0, 1))
        assert abs(mean - MEAN) < 1e-3  # the start, N(0, 1), is not quite the linear schedule's noisiest level
        assert abs(spread / SPREAD - 1) < allowed


@pytest.mark.parametrize("steps", [5, 10])
def test_heun_begins_with_euler_where_the_signal_is_gone(steps, make_schedule):
    """Few steps of `heun` beat as many of `euler` on a cosine schedule too, whose sigma / alpha begins at 20,000."""
    schedule = make_schedule("cosine", "v_prediction")
    errors = {}
    for sampler in ("heun", "euler"):
        evaluations = samplers.descent_evaluations(schedule, sampler, schedule.spaced_timesteps(steps), 0.0)
        errors[sampler] = abs(outcome(schedule, evaluations, (0, 1))[1] / SPREAD - 1)
    assert errors["heun"] < errors["euler"] / 2


def test_inversion_finds_the_latent(make_schedule):
    """Encoding nears the exact latent of the ODE at first order, by the same way whatever the network predicts."""
    errors = []
    for steps in (50, 100, 200):
        outcomes = []
        for prediction in PREDICTIONS:
            schedule = make_schedule("linear", prediction)
            evaluations = solvers.inversion(schedule, schedule.spaced_timesteps(steps))
            outcomes.append(outcome(schedule, evaluations, (MEAN, SPREAD)))
        np.testing.assert_allclose(outcomes[1:], [outcomes[0]] * 2, rtol=1e-12)
        errors.append(math.dist(outcomes[0], marginal(schedule, 999)))
    assert np.abs(np.log2(np.array(errors[:-1]) / np.array(errors[1:])) - 1).max() < 0.2


def test_decoding_undoes_encoding(make_schedule, walk):
    """Encode, then Decode with `ddim`, returns the data with an error that falls as 1 / steps."""
    schedule = make_schedule("linear")
    x = np.linspace(-1, 1, 21)

    def network(x, timestep):
        slope, offset = ideal(schedule, timestep)
        return slope * x + offset

    errors = []
    for steps in (50, 100, 200):
        timesteps = schedule.spaced_timesteps(steps)
        latent = walk(samplers.inversion(schedule, timesteps), network, x)[-1]
        again = walk(samplers.descent(schedule, "ddim", timesteps), network, latent)[-1]
        errors.append(np.abs(again - x).max())
    assert errors[0] < 0.1
    assert np.abs(np.log2(np.array(errors[:-1]) / np.array(errors[1:])) - 1).max() < 0.2
