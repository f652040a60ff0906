"""The convolutional networks of the families, sized by the images they are for.

Served rows must come out with the same bytes in every batch. ONNX Runtime's CPU kernels give that for everything
used here: group norms, SiLU, tables read by index instead of sines, and `row_log` for logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentd_trainer.pyramid import Pyramid

_ALIGNMENT = 16


def norm(channels: int) -> nn.GroupNorm:
    """Group normalisation in 8 groups (arXiv 1803.08494): nothing in it depends on the rest of the batch."""
    return nn.GroupNorm(8, channels)


def in_whole_vectors(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """An elementwise function, with results that do not depend on where in a batch a row stands.

    Vectorised kernels compute the last few elements of an array in another way, some ulps off. Rows padded (with ones)
    to a whole number of vectors keep every element in the vector part.
    """
    rows = values.flatten(1)
    width = rows.shape[1]
    padded = functional.pad(rows, (0, -width % _ALIGNMENT), value=1.0)
    return function(padded)[:, :width].reshape(values.shape)


def row_log(values: Tensor) -> Tensor:
    """Natural logarithm; see `in_whole_vectors`."""
    return in_whole_vectors(torch.log, values)


def row_sum(values: Tensor) -> Tensor:
    """The sum of each row, [n, width] -> [n], in an order that does not depend on where in a batch the row stands.

    Kernels add up a row in vectors from the first aligned element on; padded rows are all aligned alike.
    """
    return functional.pad(values, (0, -values.shape[1] % _ALIGNMENT)).sum(dim=1)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts as zero, so that its block starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + f(x), with the scale and shift of the second norm set by the condition (FiLM, arXiv 1709.07871).

    [n, inputs, h, w] and condition [n, condition_width] -> [n, outputs, h, w].
    """

    def __init__(self, inputs: int, outputs: int, condition_width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.film = nn.Linear(condition_width, 2 * outputs)
        self.norm = norm(outputs)
        self.second = nn.Sequential(nn.SiLU(), zeroed(nn.Conv2d(outputs, outputs, 3, padding=1)))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """See the class."""
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        result: Tensor = self.skip(x) + self.second(h)
        return result


class Attention(nn.Module):
    """x + self-attention over all positions, [n, channels, h, w] -> the same (arXiv 1706.03762)."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.project = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        _, channels, height, width = x.shape
        packed = self.query_key_value(self.norm(x)).reshape(-1, 3 * self.heads, channels // self.heads, height * width)
        query, key, value = packed.transpose(2, 3).chunk(3, dim=1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = x + self.project(mixed.transpose(2, 3).reshape(-1, channels, height, width))
        return result


class PreActivationBlock(nn.Module):
    """x + f(x) without a condition, [n, channels, h, w] -> the same (arXiv 1603.05027)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            norm(channels),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = x + self.layers(x)
        return result


def _inside_level(pyramid: Pyramid, level: int) -> list[nn.Module]:
    """The residual blocks and the attention that a level holds beside what leads into it."""
    channels = pyramid.channels[level]
    layers: list[nn.Module] = [PreActivationBlock(channels) for _ in range(pyramid.blocks)]
    if level in pyramid.attention:
        layers.append(Attention(channels, pyramid.heads))
    return layers


class ImageToVector(nn.Module):
    """Convolutions that halve the image down to its smallest map, then a linear layer: [n, C, H, W] -> [n, outputs].

    Args:
        pyramid: sizes of the levels.
        outputs: length of the vector.
        activation: after every layer.
    """

    def __init__(self, pyramid: Pyramid, outputs: int, activation: nn.Module) -> None:
        super().__init__()
        height, breadth = pyramid.smallest_map
        layers: list[nn.Module] = [nn.Conv2d(pyramid.shape[0], pyramid.channels[0], 3, padding=1), activation]
        layers += _inside_level(pyramid, 0)
        for level, (wide, narrow) in enumerate(pairwise(pyramid.channels), start=1):
            layers += [nn.Conv2d(wide, narrow, 3, stride=2, padding=1), activation, *_inside_level(pyramid, level)]
        channels = pyramid.channels[-1]
        layers += [nn.Conv2d(channels, channels, 3, padding=1), activation, nn.Flatten()]
        layers += [nn.Linear(channels * height * breadth, outputs), activation]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.layers(images)
        return result


class VectorToImage(nn.Module):
    """A linear layer to the smallest map, then convolutions that double it: [n, inputs] -> [n, outputs, H, W].

    Args:
        inputs: length of the vector.
        pyramid: sizes of the levels.
        outputs: channels that come out.
    """

    def __init__(self, inputs: int, pyramid: Pyramid, outputs: int) -> None:
        super().__init__()
        channels, width = pyramid.channels, pyramid.channels[0]
        self.map_shape: Sequence[int] = (channels[-1], *pyramid.smallest_map)
        self.spread = nn.Linear(inputs, math.prod(self.map_shape))
        layers: list[nn.Module] = [norm(channels[-1]), nn.SiLU(), *_inside_level(pyramid, pyramid.depth)]
        for level in reversed(range(pyramid.depth)):
            narrow, wide = channels[level + 1], channels[level]
            layers += [nn.ConvTranspose2d(narrow, wide, 4, stride=2, padding=1), norm(wide), nn.SiLU()]
            layers += _inside_level(pyramid, level)
        layers += [nn.Conv2d(width, width, 3, padding=1), norm(width), nn.SiLU()]
        layers += [nn.Conv2d(width, outputs, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, vector: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.layers(self.spread(vector).reshape(-1, *self.map_shape))
        return result
