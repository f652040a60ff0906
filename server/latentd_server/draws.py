"""Noise of many rows, drawn in one call: rows do not see each other, so who shares a call does not matter."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentd_server import noise


class Draws:
    """Rows of noise that are wanted, in the order in which they are asked for."""

    def __init__(self) -> None:
        self._seeds: list[int] = []
        self._samples: list[int] = []
        self._steps: list[int] = []
        self._words: list[int] = []

    def __len__(self) -> int:
        return len(self._seeds)

    def want(self, word: int, seed: int, samples: Sequence[int], steps: Sequence[int]) -> None:
        """Ask for one row for each of `samples` and `steps`; `word` is `noise.word`'s."""
        count = len(samples)
        self._seeds += [seed] * count
        self._samples += samples
        self._steps += steps
        self._words += [word] * count

    def draw(self, size: int, *, uniform: bool = False) -> NDArray[np.float32]:
        """All that was asked for: [k, size] f32."""
        fields = np.array([self._seeds, self._samples, self._steps, self._words], np.int64)
        seeds, samples, steps, words = fields
        return (noise.uniforms if uniform else noise.normals)(seeds, samples, steps, words, size)
