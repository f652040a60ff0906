"""The U-Net of the diffusion family."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentd_trainer.nets import Attention, ResidualBlock, norm, zeroed
from latentd_trainer.pyramid import Pyramid


class UNet(nn.Module):
    """A U-Net (arXiv 1505.04597) conditioned on timestep and label (DDPM).

    It attends at the smallest level, in the midst of its blocks, and after every block of the pyramid's attention
    levels. Each block on the way up is told what the block of the same place on the way down has made.

    Args:
        pyramid: sizes of the levels, with one block a level at least.
        timestep_count: timesteps are 0 .. timestep_count - 1.
        class_count: labels are 0 .. class_count - 1, and -1 for no label.
    """

    def __init__(self, pyramid: Pyramid, timestep_count: int, class_count: int) -> None:
        super().__init__()
        channels, width, smallest = pyramid.channels, pyramid.channels[0], pyramid.channels[-1]
        condition = 4 * width
        above = [level for level in range(pyramid.depth) for _ in range(pyramid.blocks)]
        self.blocks = pyramid.blocks
        self.class_count = class_count
        self.timesteps: Tensor
        self.register_buffer("timesteps", sinusoids(timestep_count, condition // 2), persistent=False)
        self.embed_timestep = nn.Sequential(
            nn.Linear(condition // 2, condition), nn.SiLU(), nn.Linear(condition, condition)
        )
        self.embed_label = nn.Embedding(class_count + 1, condition)
        self.first = nn.Conv2d(pyramid.shape[0], width, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(channels[level], channels[level], condition) for level in above)
        self.attend_down = nn.ModuleList(_attention(pyramid, level) for level in above)
        self.shrink = nn.ModuleList(
            nn.Conv2d(wide, narrow, 3, stride=2, padding=1) for wide, narrow in pairwise(channels)
        )
        self.middle = nn.ModuleList(ResidualBlock(smallest, smallest, condition) for _ in range(2 * pyramid.blocks))
        self.attention = Attention(smallest, pyramid.heads)
        self.enlarge = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(narrow, wide, 3, padding=1))
            for wide, narrow in pairwise(channels)
        )
        self.up = nn.ModuleList(ResidualBlock(2 * channels[level], channels[level], condition) for level in above)
        self.attend_up = nn.ModuleList(_attention(pyramid, level) for level in above)
        self.last = nn.Sequential(norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, pyramid.shape[0], 3, padding=1)))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """Predict from x_t ([n, C, H, W] f32), t ([n] i64) and the label ([n] i64, -1 for none); the shape of x_t."""
        known = torch.where(label < 0, self.class_count, label)
        condition = self.embed_timestep(self.timesteps[timestep]) + self.embed_label(known)
        condition = functional.silu(condition)
        h = self.first(x)
        skipped: list[Tensor] = []
        down = zip(self.down, self.attend_down, strict=True)
        for shrink in self.shrink:
            for block, attend in islice(down, self.blocks):
                h = attend(block(h, condition))
                skipped.append(h)
            h = shrink(h)
        for block in self.middle[: self.blocks]:
            h = block(h, condition)
        h = self.attention(h)
        for block in self.middle[self.blocks :]:
            h = block(h, condition)
        up = zip(reversed(self.up), reversed(self.attend_up), strict=True)
        for enlarge in reversed(self.enlarge):
            h = enlarge(h)
            for block, attend in islice(up, self.blocks):
                h = attend(block(torch.cat([h, skipped.pop()], dim=1), condition))
        result: Tensor = self.last(h)
        return result


def _attention(pyramid: Pyramid, level: int) -> nn.Module:
    return Attention(pyramid.channels[level], pyramid.heads) if level in pyramid.attention else nn.Identity()


def sinusoids(count: int, width: int) -> Tensor:
    """Position codes of 0 .. count - 1, [count, width] f32: cosines, then sines (arXiv 1706.03762, section 3.5)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()
