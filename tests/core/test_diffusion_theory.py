"""What papers say of diffusion, against Bayes' rule and closed forms. DDPM: arXiv 2006.11239."""

import numpy as np
import pytest
from latentd_server import samplers
from latentd_server.schedules import Schedule

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def test_single_steps_compose_to_the_forward_process(make_schedule, make_betas):
    """Steps of q(x_t | x_{t-1}) = N(sqrt(1 - beta) x, beta) make q(x_t | x_0) = N(alpha x_0, sigma^2) (eq. 2 and 4)."""
    schedule = make_schedule("linear", count=50)
    mean, variance = 1.0, 0.0
    for timestep, beta in enumerate(make_betas("linear", 50)):
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert schedule.level(timestep) == pytest.approx((mean, np.sqrt(variance)), rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [(40, 39), (40, 12)])
def test_a_step_of_ddpm_is_the_posterior(kind, timesteps, make_schedule):
    """The normal (x_s, x_t) given x_0, conditioned on x_t: for neighbours (DDPM, eq. 7), and further apart."""
    schedule = make_schedule(kind, prediction="sample", count=50)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule.level(timestep) for timestep in timesteps)
    covariance = alpha_t / alpha_s * sigma_s**2  # of x_s and x_t given x_0, for x_t = alpha_t / alpha_s x_s + noise
    slope = covariance / sigma_t**2
    expected = (slope, alpha_s - slope * alpha_t, np.sqrt(sigma_s**2 - slope * covariance))
    (first, *_) = samplers.descent_evaluations(schedule, "ddpm", timesteps, eta=1.0)
    assert (first.row.a, first.row.b, first.row.s) == pytest.approx(expected, rel=1e-9)


def test_predictions_are_one_network_with_three_weights(make_schedule):
    """A square error of eps is snr times that of x_0, one of v snr + 1 times (arXiv 2202.00512, section 4)."""
    timestep = 30
    for prediction in PREDICTIONS:
        schedule = make_schedule("cosine", prediction=prediction, count=50)
        alpha, sigma = schedule.level(timestep)
        snr = (alpha / sigma) ** 2
        (told, *_) = samplers.descent_evaluations(schedule, "ddim", (timestep,), eta=0.0)
        weight = 1 / told.row.pm**2  # of the squared error of x_0 in the loss on what the network predicts
        assert weight == pytest.approx({"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[prediction])


def guided_outcome(schedule: Schedule, scale: float, steps: int) -> tuple[float, float]:
    """(mean, deviation) of samples guided from p(x) = N(0, 1) to p(x | y) = N(1, 1/4), by ideal denoisers and DDIM."""
    timesteps = schedule.spaced_timesteps(steps)
    mean, deviation = 0.0, 1.0
    for evaluation in samplers.descent_evaluations(schedule, "ddim", timesteps, eta=0.0):
        alpha, sigma = schedule.level(evaluation.timestep)
        slope, offset = 0.0, 0.0  # of the guided eps in x; each is sigma (x - alpha m) / (alpha^2 s^2 + sigma^2)
        for weight, centre, spread in ((1 - scale, 0.0, 1.0), (scale, 1.0, 0.5)):
            each = sigma / (alpha**2 * spread**2 + sigma**2)
            slope, offset = slope + weight * each, offset - weight * each * alpha * centre
        k = evaluation.row
        x0 = (k.px + k.pm * slope, k.pm * offset)
        gain, shift = k.a + k.b * x0[0] + k.d * slope, k.b * x0[1] + k.d * offset
        mean, deviation = gain * mean + shift, abs(gain) * deviation
    return mean, deviation


def test_guidance_at_scale_one_samples_the_condition(make_schedule):
    """A scale of 1 leaves p(x | y), one of 0 leaves p(x): (1 - w) eps(x) + w eps(x, y)."""
    schedule = make_schedule("cosine")
    assert guided_outcome(schedule, 1.0, 1000) == pytest.approx((1.0, 0.5), rel=0.02)
    assert guided_outcome(schedule, 0.0, 1000) == pytest.approx((0.0, 1.0), rel=0.02, abs=1e-9)


def test_guidance_does_not_sample_the_power_it_is_named_after(make_schedule):
    """At scale 3 samples have mean 1.5, not the 1.2 of p(x)^-2 p(x | y)^3, and .4 of its spread, with any steps."""
    schedule = make_schedule("cosine")
    precision = -2 * 1.0 + 3 * 4.0
    tilted = (3 * 4.0 / precision, precision**-0.5)
    few, many = (guided_outcome(schedule, 3.0, steps) for steps in (500, 1000))
    assert few == pytest.approx(many, rel=0.02)
    assert tilted == pytest.approx((1.2, 0.316), abs=1e-3)
    assert many == pytest.approx((1.5, 0.124), abs=0.01)


def inpainted_mean(schedule: Schedule, steps: int, known: float, correlation: float) -> float:
    """Mean of a pixel beside a known one, both normal, where every state's known part is replaced by q(x_t | known).

    By the ideal denoiser and `ddpm`, whose updates are affine, so that means go through them.
    """
    prior = np.array([[1.0, correlation], [correlation, 1.0]])
    mean = np.zeros(2)
    timesteps = schedule.spaced_timesteps(steps)
    for evaluation in samplers.descent_evaluations(schedule, "ddpm", timesteps, eta=1.0):
        alpha, sigma = schedule.level(evaluation.timestep)
        mean[1] = alpha * known
        eps = sigma * np.linalg.solve(alpha**2 * prior + sigma**2 * np.eye(2), mean)
        k = evaluation.row
        mean = k.a * mean + k.b * (k.px * mean + k.pm * eps) + k.d * eps
    return float(mean[0])


def test_replacing_what_is_known_does_not_sample_what_is_conditioned_on_it(make_schedule):
    """Beside a known 1 at correlation .9 the mean should be .9 and is .63, with 1000 steps; uncorrelated it is 0."""
    schedule = make_schedule("cosine")
    assert inpainted_mean(schedule, 1000, 1.0, 0.0) == pytest.approx(0, abs=1e-9)
    assert inpainted_mean(schedule, 1000, 1.0, 0.9) == pytest.approx(0.63, abs=0.01)
