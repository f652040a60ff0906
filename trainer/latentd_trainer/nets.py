"""The convolutional networks of the families, sized by the images they are for.

Served rows must come out with the same bytes in every batch. ONNX Runtime's CPU kernels give that for everything
used here: group norms, SiLU, tables read by index instead of sines, and `row_log` for logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

SMALLEST_SIDE = 4
LARGEST_SIDE = 16
_LOG_ALIGNMENT = 16


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


def smallest_map(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width after all `halvings`."""
    factor = 2 ** halvings(shape)
    return shape[1] // factor, shape[2] // factor


def norm(channels: int) -> nn.GroupNorm:
    """Group normalisation in 8 groups (arXiv 1803.08494): nothing in it depends on the rest of the batch."""
    return nn.GroupNorm(8, channels)


def row_log(values: Tensor) -> Tensor:
    """Natural logarithm, with a result that does not depend on where in a batch a row stands.

    Vectorised kernels compute the last few elements of an array in another way, some ulps off. Rows padded to a
    whole number of vectors keep every element in the vector part.
    """
    rows = values.flatten(1)
    width = rows.shape[1]
    padded = functional.pad(rows, (0, -width % _LOG_ALIGNMENT), value=1.0)
    return padded.log()[:, :width].reshape(values.shape)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
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
        self.second = nn.Sequential(nn.SiLU(), _zeroed(nn.Conv2d(outputs, outputs, 3, padding=1)))
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
        self.project = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        _, channels, height, width = x.shape
        packed = self.query_key_value(self.norm(x)).reshape(-1, 3 * self.heads, channels // self.heads, height * width)
        query, key, value = packed.transpose(2, 3).chunk(3, dim=1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = x + self.project(mixed.transpose(2, 3).reshape(-1, channels, height, width))
        return result


class UNet(nn.Module):
    """A U-Net (arXiv 1505.04597) with attention at its smallest maps, conditioned on timestep and label (DDPM).

    Args:
        shape: of the images, (C, H, W).
        width: channels at full size; twice as many below.
        timestep_count: timesteps are 0 .. timestep_count - 1.
        class_count: labels are 0 .. class_count - 1, and -1 for no label.

    Raises:
        ValueError: see `halvings`.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, timestep_count: int, class_count: int) -> None:
        super().__init__()
        depth = halvings(shape)
        widths = [width] + [2 * width] * depth
        condition = 4 * width
        self.class_count = class_count
        self.timesteps: Tensor
        self.register_buffer("timesteps", sinusoids(timestep_count, condition // 2), persistent=False)
        self.embed_timestep = nn.Sequential(
            nn.Linear(condition // 2, condition), nn.SiLU(), nn.Linear(condition, condition)
        )
        self.embed_label = nn.Embedding(class_count + 1, condition)
        self.first = nn.Conv2d(shape[0], width, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(wide, wide, condition) for wide in widths[:-1])
        self.shrink = nn.ModuleList(
            nn.Conv2d(wide, narrow, 3, stride=2, padding=1) for wide, narrow in pairwise(widths)
        )
        self.middle = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], condition) for _ in range(2))
        self.attention = Attention(widths[-1])
        self.enlarge = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(narrow, wide, 3, padding=1))
            for wide, narrow in pairwise(widths)
        )
        self.up = nn.ModuleList(ResidualBlock(2 * wide, wide, condition) for wide in widths[:-1])
        self.last = nn.Sequential(norm(width), nn.SiLU(), _zeroed(nn.Conv2d(width, shape[0], 3, padding=1)))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """Predict from x_t ([n, C, H, W] f32), t ([n] i64) and the label ([n] i64, -1 for none); the shape of x_t."""
        known = torch.where(label < 0, self.class_count, label)
        condition = self.embed_timestep(self.timesteps[timestep]) + self.embed_label(known)
        condition = functional.silu(condition)
        h = self.first(x)
        skipped: list[Tensor] = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, condition)
            skipped.append(h)
            h = shrink(h)
        h = self.middle[0](h, condition)
        h = self.middle[1](self.attention(h), condition)
        for block, enlarge in zip(reversed(self.up), reversed(self.enlarge), strict=True):
            h = block(torch.cat([enlarge(h), skipped.pop()], dim=1), condition)
        result: Tensor = self.last(h)
        return result


def sinusoids(count: int, width: int) -> Tensor:
    """Position codes of 0 .. count - 1, [count, width] f32: cosines, then sines (arXiv 1706.03762, section 3.5)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


class ImageToVector(nn.Module):
    """Convolutions that halve the image down to its smallest map, then a linear layer: [n, C, H, W] -> [n, outputs].

    Args:
        shape: of the images, (C, H, W).
        width: channels at full size; twice as many below.
        outputs: length of the vector.
        activation: after every layer.

    Raises:
        ValueError: see `halvings`.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, outputs: int, activation: nn.Module) -> None:
        super().__init__()
        height, breadth = smallest_map(shape)
        layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1), activation]
        channels = width
        for _ in range(halvings(shape)):
            layers += [nn.Conv2d(channels, 2 * width, 3, stride=2, padding=1), activation]
            channels = 2 * width
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
        shape: of the images, (C, H, W).
        width: channels at full size; twice as many below.
        outputs: channels that come out.

    Raises:
        ValueError: see `halvings`.
    """

    def __init__(self, inputs: int, shape: tuple[int, int, int], width: int, outputs: int) -> None:
        super().__init__()
        height, breadth = smallest_map(shape)
        self.map_shape: Sequence[int] = (2 * width, height, breadth)
        self.spread = nn.Linear(inputs, 2 * width * height * breadth)
        layers: list[nn.Module] = [norm(2 * width), nn.SiLU()]
        channels = 2 * width
        for level in reversed(range(halvings(shape))):
            wide = width if level == 0 else 2 * width
            layers += [nn.ConvTranspose2d(channels, wide, 4, stride=2, padding=1), norm(wide), nn.SiLU()]
            channels = wide
        layers += [nn.Conv2d(channels, width, 3, padding=1), norm(width), nn.SiLU()]
        layers += [nn.Conv2d(width, outputs, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, vector: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.layers(self.spread(vector).reshape(-1, *self.map_shape))
        return result
