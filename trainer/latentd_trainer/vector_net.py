"""The denoiser of vectors, for diffusion over latents that have no height and width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentd_trainer.unet import sinusoids


class VectorBlock(nn.Module):
    """x + f(x), with scale and shift set by the condition (FiLM, arXiv 1709.07871).

    [n, width] and condition [n, width] -> [n, width].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.film = nn.Linear(width, 2 * width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """See the class."""
        scale, shift = self.film(condition).chunk(2, dim=1)
        result: Tensor = x + self.second(functional.silu(self.first(x) * (1 + scale) + shift))
        return result


class VectorNet(nn.Module):
    """Residual blocks conditioned on timestep and label.

    Args:
        length: elements of a vector.
        width: of the blocks.
        blocks: how many.
        timestep_count: timesteps are 0 .. timestep_count - 1.
        class_count: labels are 0 .. class_count - 1, and -1 for no label.
    """

    def __init__(self, length: int, width: int, blocks: int, timestep_count: int, class_count: int) -> None:
        super().__init__()
        self.class_count = class_count
        self.timesteps: Tensor
        self.register_buffer("timesteps", sinusoids(timestep_count, width // 2), persistent=False)
        self.embed_timestep = nn.Sequential(nn.Linear(width // 2, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_label = nn.Embedding(class_count + 1, width)
        self.first = nn.Linear(length, width)
        self.blocks = nn.ModuleList(VectorBlock(width) for _ in range(blocks))
        self.last = nn.Linear(width, length)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """Predict from x_t ([n, length] f32), t ([n] i64) and the label ([n] i64, -1 for none); the shape of x_t."""
        known = torch.where(label < 0, self.class_count, label)
        condition = functional.silu(self.embed_timestep(self.timesteps[timestep]) + self.embed_label(known))
        h = self.first(x)
        for block in self.blocks:
            h = block(h, condition)
        result: Tensor = self.last(functional.silu(h))
        return result
