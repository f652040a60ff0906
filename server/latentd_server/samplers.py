"""Samplers as tables of numbers: one row of coefficients for each evaluation of the denoiser.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


COLUMNS = Row._fields
"""What the columns of `Table.coefficients` are."""


class Evaluation(NamedTuple):
    """One evaluation of the denoiser and the update that follows it."""

    timestep: int  # what the network is told
    row: Row
    ends_step: bool = True


@dataclass(frozen=True, eq=False)
class Table:
    """What a lane does at each of its E evaluations. Arrays are read-only.

    Attributes:
        timesteps: [E] i64, what the network is told.
        coefficients: [E, len(COLUMNS)] f32, computed in float64. All finite but the bounds lo and hi, which are
            -inf and inf where nothing is clipped.
        completed_steps: [E] i32, solver steps done once the evaluation is.
        step_count: Solver steps in all.
    """

    timesteps: NDArray[np.int64]
    coefficients: NDArray[np.float32]
    completed_steps: NDArray[np.int32]
    step_count: int

    @classmethod
    def of(cls, evaluations: Iterable[Evaluation]) -> "Table":
        """The table of these evaluations, in order."""
        timesteps, rows, ends = zip(*evaluations, strict=True)
        completed = np.cumsum(ends, dtype=np.int32)
        return cls(
            timesteps=_read_only(np.array(timesteps, dtype=np.int64)),
            coefficients=_read_only(np.array(rows, dtype=np.float64).astype(np.float32)),
            completed_steps=_read_only(completed),
            step_count=int(completed[-1]),
        )

    @cached_property
    def stochastic(self) -> NDArray[np.bool_]:
        """[E] bool: whether the evaluation's update adds fresh noise."""
        return _read_only(self.coefficients[:, COLUMNS.index("s")] != 0)


@dataclass(frozen=True, slots=True)
class Step:
    """One solver step: from `current` to `following`; `previous` is where the step before began, if there was one."""

    schedule: Schedule
    previous: int | None
    current: int
    following: int
    eta: float


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a sampler takes a step.

    Attributes:
        take: The evaluations of one step.
        eta: Share of the noise that a step replaces, unless the caller chooses.
        takes_eta: Whether the caller may choose.
    """

    take: Callable[[Step], Iterator[Evaluation]]
    eta: float
    takes_eta: bool = False


def default_eta(sampler: str) -> float | None:
    """The eta a sampler uses when none is given, or None if it takes none.

    Raises:
        ValueError: there is no such sampler.
    """
    known = _sampler(sampler)
    return known.eta if known.takes_eta else None


def step_rows(
    schedule: Schedule, sampler: str, previous: int | None, current: int, following: int, eta: float | None = None
) -> Table:
    """The evaluations of one solver step from `current` to `following` (-1: clean data).

    `previous` is the timestep before `current`, None at the first step; multistep samplers use it. `descent` is
    the concatenation of these, so that a loop driven step by step gives the very same rows.

    Raises:
        ValueError: says what is allowed.
    """
    path = (current,) if previous is None else (previous, current)
    _check_falling(schedule, path)
    _check_following(current, following)
    return _step_table(schedule, sampler, previous, current, following, _resolved_eta(sampler, eta))


def descent(schedule: Schedule, sampler: str, timesteps: Sequence[int], eta: float | None = None) -> Table:
    """The whole walk down `timesteps`, which fall strictly, and on to clean data.

    Raises:
        ValueError: says what is allowed.
    """
    _check_falling(schedule, timesteps)
    return _descent_table(schedule, sampler, tuple(timesteps), _resolved_eta(sampler, eta))


def inversion(schedule: Schedule, timesteps: Sequence[int]) -> Table:
    """DDIM inversion from clean data up the reverse of `timesteps`, the list that `descent` walks down.

    The deterministic DDIM step with the levels swapped, as diffusers' DDIMInverseScheduler does it: the network is
    told the timestep that the step goes to, because it has never seen clean data. Its eps is read at that level, and
    x0 = (x - sigma eps) / alpha at the level where x is. So the latent does not depend on what the network predicts;
    diffusers, which reads v and x0 at the level where x is, differs there (and divides by 0 at clean data for x0).

    Raises:
        ValueError: says what is allowed.
    """
    _check_falling(schedule, timesteps)
    return _inversion_table(schedule, tuple(timesteps))


def single_step(schedule: Schedule, current: int, following: int | None, eta: float | None = None) -> Table:
    """One DDIM(eta) step, eta 0 by default; with `following` None only the estimates, x' = x.

    Raises:
        ValueError: says what is allowed.
    """
    resolved_eta = _resolved_eta("ddim", eta)
    if following is not None:
        return step_rows(schedule, "ddim", None, current, following, resolved_eta)
    _check_falling(schedule, (current,))
    return Table.of([Evaluation(current, _estimate(schedule, *schedule.level(current))._replace(a=1.0))])


def descent_evaluations(schedule: Schedule, sampler: str, timesteps: Sequence[int], eta: float) -> Iterator[Evaluation]:
    """What `descent` tabulates, in float64."""
    walk = zip((None, *timesteps[:-1]), timesteps, (*timesteps[1:], CLEAN), strict=True)
    for previous, current, following in walk:
        yield from SAMPLERS[sampler].take(Step(schedule, previous, current, following, eta))


def inversion_evaluations(schedule: Schedule, timesteps: Sequence[int]) -> Iterator[Evaluation]:
    """What `inversion` tabulates, in float64."""
    rising = timesteps[::-1]
    for source, target in pairwise((CLEAN, *rising)):
        alpha, sigma = schedule.level(source)
        alpha_next, sigma_next = schedule.level(target)
        told = _estimate(schedule, alpha_next, sigma_next)
        row = told._replace(
            px=(1 - sigma * told.ex) / alpha,
            pm=-sigma * told.em / alpha,
            a=sigma_next * told.ex,
            b=alpha_next,
            d=sigma_next * told.em,
        )
        yield Evaluation(target, row)


@lru_cache(maxsize=4096)
def _step_table(
    schedule: Schedule, sampler: str, previous: int | None, current: int, following: int, eta: float
) -> Table:
    return Table.of(SAMPLERS[sampler].take(Step(schedule, previous, current, following, eta)))


@lru_cache(maxsize=256)
def _descent_table(schedule: Schedule, sampler: str, timesteps: tuple[int, ...], eta: float) -> Table:
    return Table.of(descent_evaluations(schedule, sampler, timesteps, eta))


@lru_cache(maxsize=256)
def _inversion_table(schedule: Schedule, timesteps: tuple[int, ...]) -> Table:
    return Table.of(inversion_evaluations(schedule, timesteps))


def _ddim(step: Step) -> Iterator[Evaluation]:
    alpha, kept, fresh = _noise_split(step)
    estimate = _estimate(step.schedule, *step.schedule.level(step.current))
    yield Evaluation(step.current, estimate._replace(a=kept * estimate.ex, b=alpha, d=kept * estimate.em, s=fresh))


def _first_order(step: Step) -> Iterator[Evaluation]:
    yield Evaluation(step.current, _first_order_row(step))


def _multistep(step: Step) -> Iterator[Evaluation]:
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


def _heun(step: Step) -> Iterator[Evaluation]:
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
    corrector = _estimate(step.schedule, alpha_next, sigma_next)
    yield Evaluation(step.following, corrector._replace(a=from_derivative / alpha_next, b=-from_derivative, c=1.0))


SAMPLERS = {
    "ddim": Sampler(_ddim, eta=0.0, takes_eta=True),
    "ddpm": Sampler(_first_order, eta=1.0),
    "dpmpp-2m": Sampler(_multistep, eta=0.0),
    "dpmpp-2m-sde": Sampler(_multistep, eta=1.0),
    "euler": Sampler(_first_order, eta=0.0),
    "euler-ancestral": Sampler(_first_order, eta=1.0, takes_eta=True),
    "heun": Sampler(_heun, eta=0.0),
}
"""By wire name; `latentd.names.SAMPLERS` lists the same."""


def _estimate(schedule: Schedule, alpha: float, sigma: float) -> Row:
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
    return _estimate(step.schedule, alpha, sigma)._replace(a=share, b=alpha_next - alpha * share, s=fresh)


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


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array


def _sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise ValueError(f"must be one of {', '.join(SAMPLERS)}, not {name!r}")
    return SAMPLERS[name]


def _resolved_eta(sampler: str, eta: float | None) -> float:
    known = _sampler(sampler)
    if eta is None:
        return known.eta
    if not known.takes_eta:
        takers = ", ".join(name for name, other in SAMPLERS.items() if other.takes_eta)
        raise ValueError(f"eta must be unset for {sampler}; the samplers that take one are {takers}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 (deterministic) to 1 (ancestral), not {eta}")
    return float(eta)


def _check_falling(schedule: Schedule, timesteps: Sequence[int]) -> None:
    last = schedule.timestep_count - 1
    if not timesteps:
        raise ValueError("at least one timestep is needed")
    if outside := [t for t in timesteps if not 0 <= t <= last]:
        raise ValueError(f"timesteps must be from 0 to {last}, not {outside[0]}")
    for earlier, later in pairwise(timesteps):
        if later >= earlier:
            raise ValueError(f"timesteps must fall strictly; {later} follows {earlier}")


def _check_following(current: int, following: int) -> None:
    if not CLEAN <= following < current:
        raise ValueError(f"the next timestep must be from -1 (clean data) to {current - 1}, not {following}")
