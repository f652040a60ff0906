"""The equations of solver steps, as coefficients of one update that suits them all.

The step graph knows no sampler. With x the state, m the network's output at (x, timestep), h the history
register and z fresh noise from N(0, I), it computes for each lane, in float32:

    x0  = clip(px x + pm m, lo, hi)
    x'  = a x + b x0 + c h + d m + s z
    h'  = e x + f x0 + g h
    eps = ex x + em m                     (reported, never clipped)

Everything here is about a step from level (alpha, sigma) to level (alpha', sigma'), where
x = alpha x0 + sigma eps. Let r = (sigma' / alpha') / (sigma / alpha), the ratio of the noise-to-signal ratios,
and let the step replace the share eta of the noise that it can. Then (DDIM, arXiv 2010.02502, eq. 12 and 16)

    x'  = alpha' x0 + k eps + s z,   s = eta sigma' sqrt(1 - r^2),   k = sqrt(sigma'^2 - s^2),

and all first-order samplers are this equation. They differ in eta, and in the eps they use where x0 is clipped:

* `ddim` keeps the network's own eps, as diffusers does by default;
* the others use (x - alpha x0) / sigma, the eps that agrees with the clipped x0. With eta 0 that is `euler`, on
  the probability-flow ODE in X = x / alpha over sigma / alpha (Karras et al., arXiv 2206.00364, algorithm 1
  without churn); with any eta, `euler-ancestral` (k-diffusion); with eta 1, `ddpm` with the posterior's own
  variance (arXiv 2006.11239, eq. 7).

`dpmpp-2m` and `dpmpp-2m-sde` (DPM-Solver++, arXiv 2211.01095, algorithm 2, and its SDE form) are that step, at
eta 0 and 1, with x0 extrapolated by the x0 before it. `heun` (arXiv 2206.00364, algorithm 1) is the trapezoidal
rule in X.

r = sigma' alpha / (alpha' sigma) never divides by the noisier level's alpha, so a terminal alpha of 0
(which `Schedule` allows where v or x0 is predicted) needs no special case but in `heun`, which says its own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from latentd_server.schedules import CLEAN, SMALLEST_LEVEL, Prediction, Schedule

HEUN_SMALLEST_ALPHA = 0.005
"""Below this, where sigma / alpha is above 200, a step of `heun` is one of `euler`."""


class Row(NamedTuple):
    """The coefficients of one evaluation; the module's docstring says what each multiplies."""

    px: float
    pm: float
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    s: float = 0.0
    e: float = 0.0
    f: float = 0.0
    g: float = 0.0
    ex: float = 0.0
    em: float = 0.0
    lo: float = -math.inf
    hi: float = math.inf


class Evaluation(NamedTuple):
    """One evaluation of the denoiser and the update that follows it."""

    timestep: int  # what the network is told
    row: Row
    ends_step: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """One solver step: from `current` to `following`; `previous` is where the step before began, if there was one."""

    schedule: Schedule
    previous: int | None
    current: int
    following: int
    eta: float


def ddim(step: Step) -> Iterator[Evaluation]:
    """The first-order step with the network's own eps."""
    alpha, kept, fresh = _noise_split(step)
    told = estimate(step.schedule, *step.schedule.level(step.current))
    yield Evaluation(step.current, told._replace(a=kept * told.ex, b=alpha, d=kept * told.em, s=fresh))


def first_order(step: Step) -> Iterator[Evaluation]:
    """The first-order step with the eps that agrees with the clipped x0."""
    yield Evaluation(step.current, _first_order_row(step))


def multistep(step: Step) -> Iterator[Evaluation]:
    """DPM-Solver++(2M): x0 is replaced by x0 + q (x0 - h), where h holds the x0 of the step before.

    q = (lambda' - lambda) / (2 (lambda - lambda_before)), lambda = log(alpha / sigma). The first step has no x0
    before it and the last an infinite lambda': both are of first order. q is 0 after a terminal alpha of 0.
    """
    row = _first_order_row(step)
    extrapolation = 0.0
    if step.previous is not None and step.following != CLEAN:
        log_snrs = [_log_snr(*step.schedule.level(t)) for t in (step.previous, step.current, step.following)]
        extrapolation = (log_snrs[2] - log_snrs[1]) / (2 * (log_snrs[1] - log_snrs[0]))
    yield Evaluation(step.current, row._replace(b=row.b * (1 + extrapolation), c=-row.b * extrapolation, f=1.0))


def heun(step: Step) -> Iterator[Evaluation]:
    """Two evaluations: Euler's predictor, whose half step waits in h, and the other half at where it led.

    In X = x / alpha, dX / dv = (X - x0) / v with v = sigma / alpha. The last step, whose end has no derivative, is
    Euler's, and so is a step from where v is above 200. There dX / dv is constant but for s^2 / 2 v^2 (s^2 the data's
    variance), so that Euler is exact, while the rule's error grows with v: on a cosine schedule, which begins at
    v = 20,000, ten steps would end with ten times the data's spread. EDM, from which this comes, begins at v = 80.
    """
    alpha, sigma = step.schedule.level(step.current)
    alpha_next, sigma_next = step.schedule.level(step.following)
    predictor = _first_order_row(step)
    if step.following == CLEAN or alpha < HEUN_SMALLEST_ALPHA:
        yield Evaluation(step.current, predictor)
        return
    change = sigma_next / alpha_next - sigma / alpha
    half = alpha_next * change / 2
    to_derivative = half * alpha / sigma
    yield Evaluation(
        step.current,
        predictor._replace(e=alpha_next / alpha + to_derivative / alpha, f=-to_derivative),
        ends_step=False,
    )
    from_derivative = half * alpha_next / sigma_next
    corrector = estimate(step.schedule, alpha_next, sigma_next)
    yield Evaluation(step.following, corrector._replace(a=from_derivative / alpha_next, b=-from_derivative, c=1.0))


def inversion(schedule: Schedule, timesteps: Sequence[int]) -> Iterator[Evaluation]:
    """DDIM inversion: the deterministic step with the levels swapped, from clean data up the reverse of `timesteps`.

    As in diffusers' DDIMInverseScheduler the network is told the timestep that the step goes to, because it has never
    seen clean data. Its eps is read at that level, and x0 = (x - sigma eps) / alpha at the level where x is. So the
    latent does not depend on what the network predicts; diffusers, which reads v and x0 at the level where x is,
    differs there (and divides by 0 at clean data for x0).
    """
    rising = timesteps[::-1]
    for source, target in pairwise((CLEAN, *rising)):
        alpha, sigma = schedule.level(source)
        alpha_next, sigma_next = schedule.level(target)
        told = estimate(schedule, alpha_next, sigma_next)
        row = told._replace(
            px=(1 - sigma * told.ex) / alpha,
            pm=-sigma * told.em / alpha,
            a=sigma_next * told.ex,
            b=alpha_next,
            d=sigma_next * told.em,
        )
        yield Evaluation(target, row)


def estimate(schedule: Schedule, alpha: float, sigma: float) -> Row:
    """How the network's output becomes x0 and eps at a level; no update yet."""
    lo, hi = schedule.clip or (-math.inf, math.inf)
    if schedule.prediction == Prediction.PREDICTION_EPSILON:
        return Row(px=1 / alpha, pm=-sigma / alpha, ex=0.0, em=1.0, lo=lo, hi=hi)
    if schedule.prediction == Prediction.PREDICTION_V:
        return Row(px=alpha, pm=-sigma, ex=sigma, em=alpha, lo=lo, hi=hi)
    return Row(px=0.0, pm=1.0, ex=1 / sigma, em=-alpha / sigma, lo=lo, hi=hi)


def _first_order_row(step: Step) -> Row:
    alpha, sigma = step.schedule.level(step.current)
    alpha_next, kept, fresh = _noise_split(step)
    share = kept / sigma
    return estimate(step.schedule, alpha, sigma)._replace(a=share, b=alpha_next - alpha * share, s=fresh)


def _noise_split(step: Step) -> tuple[float, float, float]:
    """(alpha', k, s): the signal, the old noise and the fresh noise after the step."""
    alpha, sigma = step.schedule.level(step.current)
    alpha_next, sigma_next = step.schedule.level(step.following)
    ratio = sigma_next * alpha / (alpha_next * sigma)
    replaced = step.eta**2 * (1 - ratio**2)
    return alpha_next, sigma_next * math.sqrt(1 - replaced), sigma_next * math.sqrt(replaced)


def _log_snr(alpha: float, sigma: float) -> float:
    """The lambda of DPM-Solver, log(alpha / sigma); -inf at a terminal alpha of 0."""
    return math.log(alpha / sigma) if alpha >= SMALLEST_LEVEL else -math.inf
