"""The sizes of a convolutional network: how often it halves its maps, and what it holds at each of their sizes.

Level 0 is the full size of the images, each level below it half of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_SIDE = 4
LARGEST_SIDE = 16


def halvings(shape: tuple[int, int, int]) -> int:
    """How often a network halves images of this shape, until their shorter side is 4 to 7, or no longer even.

    Raises:
        ValueError: the sides are odd or below 8, or the smallest map they allow is beyond 16 x 16.
    """
    _, height, width = shape
    count = 0
    while height % 2 == width % 2 == 0 and min(height, width) // 2 >= SMALLEST_SIDE:
        height, width, count = height // 2, width // 2, count + 1
    if count == 0 or max(height, width) > LARGEST_SIDE:
        raise ValueError(
            f"images of {shape[1]} x {shape[2]}: both sides must be at least {2 * SMALLEST_SIDE} and even, and halving "
            f"both while they are even must lead to at most {LARGEST_SIDE} x {LARGEST_SIDE} "
            "(8, 16, 28, 32, 48, 64, 128 and 256 do)"
        )
    return count


@dataclass(frozen=True)
class Pyramid:
    """What a network for images of `shape` holds at each level."""

    shape: tuple[int, int, int]  # of the images, (C, H, W)
    channels: tuple[int, ...]  # one for each level, of which there is one more than `halvings`
    blocks: int  # residual blocks a level
    attention: frozenset[int]  # levels that attend to all their positions
    heads: int  # of the attention

    @property
    def depth(self) -> int:
        """Number of the smallest level."""
        return len(self.channels) - 1

    @property
    def smallest_map(self) -> tuple[int, int]:
        """Height and width at the smallest level."""
        return self.shape[1] >> self.depth, self.shape[2] >> self.depth
