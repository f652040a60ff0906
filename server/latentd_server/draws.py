"""Noise of many rows, drawn in one call: rows do not see each other, so who shares a call does not matter."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latentd_server import noise
from latentd_server.noise import Purpose

_STEP = noise.word(Purpose.STEP)
_MOST_AHEAD = 8  # steps
_AT_ONCE = 16_384  # numbers; a draw of fewer costs little less


class Draws:
    """Rows of noise that are wanted, in the order in which they are asked for."""

    def __init__(self) -> None:
        self._runs: list[noise.Run] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def want(self, word: int, seed: int, samples: Sequence[int], steps: Sequence[int]) -> None:
        """Ask for one row for each of `samples` and `steps`; `word` is `noise.word`'s."""
        self._runs += noise.runs(word, seed, samples, steps)
        self._count += len(samples)

    def draw(self, size: int, *, uniform: bool = False) -> NDArray[np.float32]:
        """All that was asked for: [k, size] f32."""
        return (noise.uniforms if uniform else noise.normals)(self._runs, size)


@dataclass(slots=True)
class StepNoise:
    """The step noise of one lane, drawn for some evaluations ahead."""

    seed: int
    sample: int
    first_step: int  # number of the draw at evaluation 0
    evaluations: int
    _position: int = 0  # that `_rows` begin at
    _rows: list[NDArray[np.float32]] = field(default_factory=list)

    def has(self, position: int) -> bool:
        """Whether the noise of an evaluation has been drawn."""
        return 0 <= position - self._position < len(self._rows)

    def at(self, position: int) -> NDArray[np.float32]:
        """The noise of an evaluation, [size] f32."""
        return self._rows[position - self._position]

    def ask(self, draws: Draws, position: int, ahead: int) -> int:
        """Ask for what is missing of `ahead` evaluations from `position` on, and let go of those before; how many."""
        if self.has(position):
            del self._rows[: position - self._position]
        else:
            self._rows.clear()
        self._position = position
        missing = range(position + len(self._rows), min(position + ahead, self.evaluations))
        steps = [self.first_step + each for each in missing]
        draws.want(_STEP, self.seed, [self.sample] * len(steps), steps)
        return len(steps)

    def take(self, rows: NDArray[np.float32]) -> None:
        """What was asked for, [k, size] f32."""
        self._rows.extend(row.copy() for row in rows)  # a view would keep the rows of all other lanes alive


def draw_steps(lanes: Sequence[tuple[StepNoise, int]], draws: Draws, size: int) -> NDArray[np.float32]:
    """Draw what `draws` asks for already, and with it noise for lanes about to take these evaluations.

    A draw of few numbers costs nearly as much as one of many, so where one is made at all, every lane gets noise for
    some evaluations ahead.

    Returns:
        [k, size] f32, what was asked for before.
    """
    before = len(draws)
    if not before and all(lane.has(position) for lane, position in lanes):
        return np.empty((0, size), np.float32)
    ahead = max(1, min(_MOST_AHEAD, _AT_ONCE // (size * max(1, len(lanes)))))
    counts = [lane.ask(draws, position, ahead) for lane, position in lanes]
    values = draws.draw(size)
    done = before
    for (lane, _), count in zip(lanes, counts, strict=True):
        lane.take(values[done : done + count])
        done += count
    return values[:before]
