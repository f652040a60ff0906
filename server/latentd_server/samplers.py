"""Samplers as tables of numbers: one row of coefficients for each evaluation of the denoiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from latentd_server.schedules import Schedule

COLUMNS = ("px", "pm", "a", "b", "c", "d", "s", "e", "f", "g", "ex", "em", "lo", "hi")
"""What the columns of `Table.coefficients` are."""


@dataclass(frozen=True, eq=False)
class Table:
    """What a lane does at each of its E evaluations. Arrays are read-only.

    Attributes:
        timesteps: [E] i64, what the network is told.
        coefficients: [E, len(COLUMNS)] f32.
        completed_steps: [E] i32, solver steps done once the evaluation is.
        step_count: Solver steps in all.
    """

    timesteps: NDArray[np.int64]
    coefficients: NDArray[np.float32]
    completed_steps: NDArray[np.int32]
    step_count: int

    @cached_property
    def stochastic(self) -> NDArray[np.bool_]:
        """[E] bool: whether the evaluation's update adds fresh noise."""
        raise NotImplementedError


def default_eta(sampler: str) -> float | None:
    """The eta a sampler uses when none is given, or None if it takes none.

    Raises:
        ValueError: there is no such sampler.
    """
    raise NotImplementedError


def step_rows(
    schedule: Schedule, sampler: str, previous: int | None, current: int, following: int, eta: float | None = None
) -> Table:
    """The evaluations of one solver step from `current` to `following` (-1: clean data).

    `previous` is the timestep before `current`, None at the first step; multistep samplers use it. `descent`
    is the concatenation of these, so that a loop driven step by step gives the very same rows.

    Raises:
        ValueError: says what is allowed.
    """
    raise NotImplementedError


def descent(schedule: Schedule, sampler: str, timesteps: Sequence[int], eta: float | None = None) -> Table:
    """The whole walk down `timesteps`, which fall strictly, and on to clean data.

    Raises:
        ValueError: says what is allowed.
    """
    raise NotImplementedError


def inversion(schedule: Schedule, timesteps: Sequence[int]) -> Table:
    """DDIM inversion from clean data up the reverse of `timesteps`, the list that `descent` walks down.

    Raises:
        ValueError: says what is allowed.
    """
    raise NotImplementedError


def single_step(schedule: Schedule, current: int, following: int | None, eta: float | None = None) -> Table:
    """One DDIM(eta) step; with `following` None only the estimates, x' = x.

    Raises:
        ValueError: says what is allowed.
    """
    raise NotImplementedError
