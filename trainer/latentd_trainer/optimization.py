"""How weights change in one step: arithmetic, gradients, learning rate, moving averages."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager

import torch
from torch import nn

from latentd_trainer.shard import Shard

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Arithmetic of the networks while training, by its name on the command line. Weights are always fp32."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Run the networks' forward passes in this precision; nothing changes for fp32."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def warm_up_then_cosine(step: int, step_count: int, warm_up_steps: int) -> float:
    """Factor of the learning rate: up to 1 in a line, then down to 0 along half a cosine (SGDR, arXiv 1608.03983)."""
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    progress = (step - warm_up_steps) / max(1, step_count - warm_up_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


class Updater:
    """One optimiser with what surrounds its step: loss scaling, averaging over processes, gradient clipping."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float = math.inf) -> None:
        self.parameters = list(module.parameters())
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self._peak_rates = [float(group["lr"]) for group in optimizer.param_groups]

    def scale_losses(self, device: torch.device) -> None:
        """Keep small fp16 gradients from rounding to zero, from here on (arXiv 1710.03740, section 3.2)."""
        self.scaler = torch.amp.GradScaler(device.type)

    def apply(self, loss: torch.Tensor, shard: Shard, rate_factor: float = 1.0) -> None:
        """Follow the gradient of `loss` ([] f32, this process's mean) for one step at `rate_factor` x learning rate."""
        for parameter in self.parameters:
            parameter.grad = None
        gradients = torch.autograd.grad(self.scaler.scale(loss), self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        shard.average_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        if math.isfinite(self.clip_norm):
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * rate_factor
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Average:
    """An exponential moving average of a module's weights; what is served.

    The decay starts low, (1 + n) / (10 + n) at update n, so that the first weights are soon forgotten.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.source = source
        self.module = copy.deepcopy(source).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the source's weights, after its step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[torch.Tensor] = list(self.module.parameters())
        weights: list[torch.Tensor] = list(self.source.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
