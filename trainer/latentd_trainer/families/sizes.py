"""The settings that size a family's networks."""

from __future__ import annotations

from dataclasses import dataclass

from latentd_trainer.families import setting
from latentd_trainer.pyramid import Pyramid, halvings

_GROUPS = 8  # of the group norms; every number of channels is a multiple


@dataclass(frozen=True)
class PyramidSettings:
    """The settings from which a family builds its pyramid. The defaults are the recipe for digits."""

    width: int = setting(32, "channels of the networks at full size, a multiple of 8")
    multipliers: str = setting(
        "1,2", "channels at each level as multiples of width, from full size down by halves; the last holds below"
    )
    blocks: int = setting(1, "residual blocks at each level, on the way down and on the way up")
    attention_levels: str = setting("", "levels that have attention, as 1,2; 0 is full size")
    attention_heads: int = setting(2, "heads of the attention; they divide the width")

    def pyramid_problems(self) -> list[str]:
        """A sentence for each of these settings that is not allowed for images of any size."""
        problems = []
        if self.width < _GROUPS or self.width % _GROUPS:
            problems.append(f"width={self.width}: must be a multiple of {_GROUPS}")
        if 0 in (_numbers(self.multipliers) or [0]):
            problems.append(f"multipliers={self.multipliers!r}: must be whole numbers from 1, as 1,2,2")
        if _numbers(self.attention_levels) is None:
            problems.append(
                f"attention_levels={self.attention_levels!r}: must be whole numbers from 0, as 1,2, or empty"
            )
        if self.blocks < 0:
            problems.append(f"blocks={self.blocks}: must be at least 0")
        if self.attention_heads < 1 or self.width % self.attention_heads:
            problems.append(f"attention_heads={self.attention_heads}: must divide the width, {self.width}")
        return problems

    def pyramid(self, shape: tuple[int, int, int]) -> Pyramid:
        """The pyramid for images of `shape`, (C, H, W).

        Raises:
            ValueError: no network takes this shape, or it has fewer levels than the settings speak of.
        """
        depth = halvings(shape)
        multipliers, attention = _numbers(self.multipliers) or [], frozenset(_numbers(self.attention_levels) or [])
        problems = []
        if len(multipliers) > depth + 1:
            problems.append(
                f"multipliers={self.multipliers!r}: at most {depth + 1} for images of {shape[1]} x {shape[2]}"
            )
        if max(attention, default=0) > depth:
            problems.append(
                f"attention_levels={self.attention_levels!r}: at most {depth} for images of {shape[1]} x {shape[2]}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        channels = tuple(self.width * multipliers[min(level, len(multipliers) - 1)] for level in range(depth + 1))
        return Pyramid(shape, channels, self.blocks, attention, self.attention_heads)


def _numbers(text: str) -> list[int] | None:
    """`1,2` as numbers; None if it is something else."""
    try:
        numbers = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        return None
    return numbers if all(number >= 0 for number in numbers) else None
