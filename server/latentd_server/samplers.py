"""Samplers by name, and what they do as tables of numbers: one row for each evaluation of the denoiser.

The equations are in `solvers.py`; here they are checked, put in order, rounded to float32 and kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentd_server import solvers
from latentd_server.schedules import CLEAN, Schedule
from latentd_server.solvers import Evaluation, Row, Step

COLUMNS = Row._fields
"""What the columns of `Table.coefficients` are."""


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
    def begins(self) -> NDArray[np.bool_]:
        """[E] bool: whether a step begins with the evaluation; samplers of several evaluations a step end it later."""
        return _read_only(np.concatenate([[True], np.diff(self.completed_steps[:-1], prepend=0) > 0]))

    @cached_property
    def stochastic(self) -> NDArray[np.bool_]:
        """[E] bool: whether the evaluation's update adds fresh noise."""
        return _read_only(self.coefficients[:, COLUMNS.index("s")] != 0)


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


SAMPLERS = {
    "ddim": Sampler(solvers.ddim, eta=0.0, takes_eta=True),
    "ddpm": Sampler(solvers.first_order, eta=1.0),
    "dpmpp-2m": Sampler(solvers.multistep, eta=0.0),
    "dpmpp-2m-sde": Sampler(solvers.multistep, eta=1.0),
    "euler": Sampler(solvers.first_order, eta=0.0),
    "euler-ancestral": Sampler(solvers.first_order, eta=1.0, takes_eta=True),
    "heun": Sampler(solvers.heun, eta=0.0),
}
"""By wire name; `latentd.names.SAMPLERS` lists the same."""


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
    return estimates(schedule)[current]


@lru_cache(maxsize=64)
def estimates(schedule: Schedule) -> tuple[Table, ...]:
    """One evaluation without a step, x' = x, for each of the T timesteps."""
    timesteps = range(schedule.timestep_count)
    whole = Table.of(Evaluation(t, solvers.estimate(schedule, *schedule.level(t))._replace(a=1.0)) for t in timesteps)
    one = [slice(t, t + 1) for t in timesteps]
    return tuple(Table(whole.timesteps[t], whole.coefficients[t], np.ones(1, np.int32), 1) for t in one)


def descent_evaluations(schedule: Schedule, sampler: str, timesteps: Sequence[int], eta: float) -> Iterator[Evaluation]:
    """What `descent` tabulates, in float64."""
    walk = zip((None, *timesteps[:-1]), timesteps, (*timesteps[1:], CLEAN), strict=True)
    for previous, current, following in walk:
        yield from SAMPLERS[sampler].take(Step(schedule, previous, current, following, eta))


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
    return Table.of(solvers.inversion(schedule, timesteps))


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
