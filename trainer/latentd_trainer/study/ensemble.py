"""Networks of one shape, one for each seed, trained side by side: at this size that costs little more than one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Perceptrons with SiLU between their layers: [seeds, n, widths[0]] f32 -> [seeds, n, widths[-1]] f32.

    Member k sees row k of the first axis alone, and its weights depend on seed k alone. Weights are normal with
    variance 1 / inputs, biases zero.
    """

    def __init__(self, widths: Sequence[int], generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for width, following in itertools.pairwise(widths):
            self.weights.append(normal((width, following), generators) / math.sqrt(width))
            self.biases.append(torch.zeros(len(generators), 1, following))

    def forward(self, rows: Tensor) -> Tensor:
        """See the class."""
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            rows = torch.baddbmm(bias, rows, weight)
            rows = rows if index == last else nn.functional.silu(rows)
        return rows


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A source of numbers for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Normal numbers, N(0, 1), [seeds, *shape] f32, row k from generator k."""
    return torch.stack([torch.randn(shape, generator=each) for each in generators])


def uniform(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform numbers in [0, 1), [seeds, *shape] f32, row k from generator k."""
    return torch.stack([torch.rand(shape, generator=each) for each in generators])
