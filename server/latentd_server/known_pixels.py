"""Elements of samples that are given, for inpainting (ADR 25). Pure.

Before every step the known part of a state is a draw from q(x_t | known) = N(alpha_t known, sigma_t^2 I), and after the
last the known elements themselves (Lugmayr et al., RePaint, arXiv 2201.09865, eq. 8a, 8c). What is known is selected,
never multiplied with a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentd_server.samplers import Table
from latentd_server.schedules import Schedule

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What is known of the samples of a job. The first axis of arrays is the lane, or 1 for all of them."""

    values: Array  # [1 or n, *sample] f32
    mask: Array  # [1 or n, *sample] bool, where they are known
    levels: Sequence[tuple[float, float] | None]  # alpha and sigma before each evaluation; None in the midst of a step

    def noised(self, lanes: slice, position: int, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """The known part of lanes before an evaluation that begins a step, [k, *sample] f32, by noise of that shape."""
        level = self.levels[position]
        assert level is not None
        alpha, sigma = level
        return np.float32(alpha) * _rows(self.values, lanes) + np.float32(sigma) * noise

    def masks(self, lanes: slice) -> Array:
        """Where lanes are known, [1 or k, *sample] bool."""
        return _rows(self.mask, lanes)

    def put_into(self, samples: NDArray[np.float32], lanes: slice) -> Array:
        """Samples of lanes, [k, *sample] f32, with what is known of them in its place."""
        return np.where(self.masks(lanes), _rows(self.values, lanes), samples)

    def of(self, lanes: Array) -> "Known":
        """What is known of some of the lanes, [k] i64; shares no memory with the others."""
        values, mask = (each[lanes] if len(each) > 1 else each.copy() for each in (self.values, self.mask))
        return replace(self, values=values, mask=mask)


def levels(schedule: Schedule, table: Table) -> list[tuple[float, float] | None]:
    """The level of the state before each evaluation of a walk that begins a step; see `Known.levels`."""
    return [
        schedule.level(timestep) if begins else None
        for timestep, begins in zip(table.timesteps.tolist(), table.begins.tolist(), strict=True)
    ]


def _rows(values: Array, lanes: slice) -> Array:
    return values if len(values) == 1 else values[lanes]
