"""A belief net and its recognition net so small that every expectation is a sum over all states. Pure.

With 4 pixels, units 2 and 1 there are 16 images and 8 hidden states, so that what training estimates from draws can be
had to the last bit of float64, and differentiated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentd_trainer.belief_net import BeliefNet
from latentd_trainer.families.helmholtz import Recognition

PIXELS, LOWER, UPPER = 4, 2, 1
_WEIGHT_SCALE = 1.5  # large enough that hidden units depend on each other once their pixels are seen


@dataclass(frozen=True)
class Machine:
    """p(x, z), q(z | x) and the distribution of the data, all in float64."""

    net: BeliefNet
    recognition: Recognition
    data: Tensor  # [images], p_data(x)

    def log_joint(self) -> Tensor:
        """Return ln p(x, z), [images, states]."""
        x, lower, upper = self._every()
        return self.net.log_joint(x, lower, upper).view(len(self.data), -1)

    def log_q(self) -> Tensor:
        """Return ln q(z | x), [images, states]."""
        return self.recognition.log_posterior(*self._every()).view(len(self.data), -1)

    def log_prior(self) -> Tensor:
        """Return ln p(z), [states]."""
        return self.log_joint().logsumexp(dim=0)

    def log_likelihood(self) -> Tensor:
        """Return ln p(x), [images]."""
        return self.log_joint().logsumexp(dim=1)

    def log_posterior(self) -> Tensor:
        """Return ln p(z | x), [images, states]."""
        return self.log_joint().log_softmax(dim=1)

    def _every(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every image with every hidden state: x, z1 and z2 of [images * states, units]."""
        whole = every_state(PIXELS + LOWER + UPPER)
        return whole[:, :PIXELS], whole[:, PIXELS : PIXELS + LOWER], whole[:, PIXELS + LOWER :]


def random_machine(seed: int) -> Machine:
    """A machine with normal weights, and data with random probabilities."""
    generator = torch.Generator().manual_seed(seed)
    net, recognition = BeliefNet(PIXELS, LOWER, UPPER).double(), Recognition(PIXELS, LOWER, UPPER).double()
    with torch.no_grad():
        for parameter in nn.ModuleList([net, recognition]).parameters():
            parameter.copy_(_WEIGHT_SCALE * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    data = torch.rand(2**PIXELS, generator=generator, dtype=torch.float64)
    return Machine(net, recognition, data / data.sum())


def every_state(units: int) -> Tensor:
    """All states of binary units, the last one changing fastest: [2 ** units, units] f64."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)


def divergence(log_one: Tensor, log_other: Tensor) -> Tensor:
    """KL(one || other) in nats over the last axis, from logarithms of probabilities."""
    return (log_one.exp() * (log_one - log_other)).sum(dim=-1)


def gradient(value: Tensor, module: nn.Module) -> Tensor:
    """Of a number by all parameters of a module, in one vector; 0 for those it does not depend on."""
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


def relative_error(found: Tensor, right: Tensor) -> float:
    """|found - right| / |right| of two vectors."""
    return float((found - right).norm() / right.norm())
