"""Directed nets of binary units over binary pixels, with two hidden layers; what the belief-net families share.

Neal: Connectionist learning of belief networks, Artificial Intelligence 56 (1992).

    model        p(x, z1, z2) = p(z2) p(z1 | z2) p(x | z1), every factor a product over units of Bernoulli
                 distributions with P(unit = 1 | above) = s(weights . above + bias), s the logistic function
    posterior    p(z | x) has no closed form, for units with a common child depend on each other once it is seen; a
                 unit's conditional has one:
                 ln P(z_j = 1 | rest) / P(z_j = 0 | rest) = its own logit + sum over its children c of
                 ln p(c | z_j = 1, rest) - ln p(c | z_j = 0, rest)
    Gibbs        draw each unit from that conditional in turn; in the long run states come from p(z | x)

Images are [n, C, H, W] in [-1, 1]; a pixel counts as 1 from the middle of the range on. Hidden states are [n, units]
of 0 and 1, the lower layer z1 before the upper z2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from latentd_trainer.nets import in_whole_vectors, row_sum

_LARGEST_BELOW_ONE = 1 - 2**-24  # in float32, and on the grid of uniform noise


def binary_pixels(images: Tensor) -> Tensor:
    """Images [n, C, H, W] in [-1, 1] as [n, pixels] f32 of 0 and 1."""
    return (images.flatten(1) >= 0).float()


def softplus(x: Tensor) -> Tensor:
    """Return ln(1 + e^x) of [n, width], the same for a row in every batch."""
    return x.clamp(min=0) + in_whole_vectors(lambda rows: (1 + (-rows.abs()).exp()).log(), x)


def log_probability(units: Tensor, logits: Tensor) -> Tensor:
    """Natural logarithm of the probability of binary units under their logits: [n, k] -> [n], in nats.

    In the logits' precision, and in float32 where that is less.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return row_sum(units * logits - softplus(logits))


def draw(uniform: Tensor, logits: Tensor) -> Tensor:
    """Units of 0 and 1 from uniform numbers in [0, 1): 1 where s(logit) is above, [n, k] f32."""
    return (uniform < torch.sigmoid(logits)).float()


def unit_of(code: Tensor, logits: Tensor) -> Tensor:
    """Units of 0 and 1 from codes in [0, 1]: 1 above 1 - s(logit), [n, k] f32.

    A code of 0 or 1 stands for itself whatever the logit, and a uniform code makes a draw.
    """
    return (code > torch.sigmoid(-logits).clamp(max=_LARGEST_BELOW_ONE)).float()


class BeliefNet(nn.Module):
    """p(x, z1, z2), from the top down.

    Args:
        pixels: of an image.
        lower: units of z1.
        upper: units of z2.
    """

    def __init__(self, pixels: int, lower: int, upper: int) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.zeros(upper))
        self.middle = nn.Linear(upper, lower)
        self.bottom = nn.Linear(lower, pixels)

    @property
    def units(self) -> tuple[int, int]:
        """Units of z1 and of z2."""
        return self.bottom.in_features, self.middle.in_features

    def layers(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to z1 and what to z2 of something for every hidden unit, [n, lower + upper]."""
        count = self.units[0]
        return whole[:, :count], whole[:, count:]

    def log_joint(self, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Return ln p(x, z1, z2): [n, pixels], [n, lower], [n, upper] -> [n], in nats."""
        given = log_probability(x, self.bottom(lower)) + log_probability(lower, self.middle(upper))
        return given + log_probability(upper, self.top.expand_as(upper))

    def dream(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states from the top down, z1 and z2, from uniform numbers [n, lower + upper] in [0, 1)."""
        lower_uniform, upper_uniform = self.layers(uniform)
        upper = draw(upper_uniform, self.top.expand_as(upper_uniform))
        return draw(lower_uniform, self.middle(upper).float()), upper

    @torch.no_grad()
    def start_at(self, mean: Tensor, count: int) -> None:
        """Let every pixel start at its odds in `count` images with this mean ([pixels] f32 in [0, 1])."""
        on = (mean * count + 0.5) / (count + 1)
        self.bottom.bias.copy_(torch.log(on / (1 - on)))

    def sweep(self, x: Tensor, states: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw every hidden unit in turn from its conditional, z1 before z2, as often as there are uniform numbers for.

        Args:
            x: [n, pixels] f32 of 0 and 1.
            states: [n, lower + upper], of z1 and z2.
            uniform: [n, sweeps, lower + upper] in [0, 1).

        Returns:
            The last states, [n, lower + upper], and P(unit = 1 | rest) as each unit was drawn,
            [n, sweeps, lower + upper].
        """
        count, pixels, (lower, upper) = len(x), x.shape[1], self.units
        sweeps = uniform.shape[1]
        # A unit's children are the pixels, or z1; with the weights to all others at 0, every unit is drawn alike.
        below_lower = nn.functional.pad(self.bottom.weight.t(), (0, lower))
        below_upper = nn.functional.pad(self.middle.weight.t(), (pixels, 0))
        rows = torch.cat([below_lower, below_upper])  # [lower + upper, pixels + lower]
        lower_states, upper_states = self.layers(states)
        logits = torch.cat([self.bottom(lower_states), self.middle(upper_states)], dim=1)
        top = self.top.expand(count, -1)

        def draw_unit(carry: tuple[Tensor, Tensor], unit: tuple[Tensor, Tensor, Tensor]) -> Any:
            states, logits = carry  # the children's logits follow the units as they change
            row, mask, point = unit
            state = (states * mask).sum(dim=1)
            off = logits - state[:, None] * row
            children = torch.cat([x, states[:, :lower]], dim=1)
            own = (torch.cat([logits[:, pixels:], top], dim=1) * mask).sum(dim=1)
            chance = torch.sigmoid(own + row_sum(children * row - softplus(off + row) + softplus(off)))
            drawn = (point < chance).float()
            states = states + (drawn - state)[:, None] * mask
            return (states, off + drawn[:, None] * row), chance

        each = (rows.repeat(sweeps, 1), torch.eye(lower + upper).to(x).repeat(sweeps, 1), uniform.flatten(1).t())
        (states, _), chances = _in_turn(draw_unit, (states, logits), each)
        return states, chances.t().reshape(count, sweeps, lower + upper)


def _in_turn(step: Callable[..., Any], carry: Any, each: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
    """Take `step(carry, one)`, which returns the next carry and a result, with one after another of the first axis.

    In an exported graph this is a loop: unrolled it would be some thirty operators for each unit and sweep. Returns
    the last carry, and the results stacked.
    """
    if torch.compiler.is_exporting():
        final, results = scan(step, carry, each)
        return final, results
    found = []
    for one in zip(*each, strict=True):
        carry, result = step(carry, one)
        found.append(result)
    return carry, torch.stack(found)


class Gibbs(nn.Module):
    """P(unit = 1 | x) of every hidden unit by a fixed number of Gibbs sweeps: (x, uniform) -> [n, lower + upper].

    The chain starts with a draw from the prior. Averaged are the conditionals with which units were drawn, which vary
    less than the draws, over the second half of the sweeps.

    Args:
        net: the net.
        sweeps: of every unit; 1 or more.
    """

    def __init__(self, net: BeliefNet, sweeps: int) -> None:
        super().__init__()
        self.net, self.sweeps = net, sweeps

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Of the uniform numbers a row takes: one for every unit to start with, and one in every sweep."""
        return 1 + self.sweeps, sum(self.net.units)

    def states(self, x: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Last states and averaged conditionals, both [n, units]; x is [n, pixels], uniform [n, 1 + sweeps, units]."""
        start = torch.cat(self.net.dream(uniform[:, 0]), dim=1)
        states, chances = self.net.sweep(x, start, uniform[:, 1:])
        return states, chances[:, self.sweeps // 2 :].mean(dim=1)

    def forward(self, sample: Tensor, uniform: Tensor) -> Tensor:
        """See the class."""
        return self.states(binary_pixels(sample), uniform)[1]


class DecoderGraph(nn.Module):
    """What is served as the decoder: (latent, uniform) -> mean and draw of p(x | z1), in [-1, 1].

    The latent is a code in [0, 1] for every hidden unit, z1 before z2 (`unit_of`): uniform codes make an ancestral
    sample, and codes of 0 and 1 are states. So binary states of both layers, or of the upper one with uniform numbers
    for the lower, are decoded from the top down.
    """

    def __init__(self, net: BeliefNet, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, latent: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        lower_code, upper_code = self.net.layers(latent)
        upper = unit_of(upper_code, self.net.top.expand_as(upper_code))
        lower = unit_of(lower_code, self.net.middle(upper))
        probability = torch.sigmoid(self.net.bottom(lower)).reshape(-1, *self.shape)
        return 2 * probability - 1, 2 * (uniform < probability).float() - 1


def sample_images(net: BeliefNet, shape: tuple[int, int, int], count: int, seed: int) -> Tensor:
    """E(x | z1) of `count` ancestral samples, [n, C, H, W] f32 in [-1, 1], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((count, sum(net.units)), generator=generator).to(net.top.device)
    with torch.no_grad():
        lower, _ = net.dream(uniform)
        return (2 * torch.sigmoid(net.bottom(lower)) - 1).reshape(-1, *shape).cpu()


@torch.no_grad()
def enumerate_posterior(net: BeliefNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """The exact ln p(x) and P(unit = 1 | x), by summing over all hidden states; for tiny nets.

    Args:
        net: of at most some 20 hidden units.
        x: [n, pixels] of 0 and 1, f32, or f64 for a net of that.

    Returns:
        [n] in nats, and [n, lower + upper], both of x's type.
    """
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=sum(net.units))), dtype=x.dtype, device=x.device)
    lower, upper = net.layers(states)
    joint = torch.stack([net.log_joint(row.expand(len(states), -1), lower, upper) for row in x])  # [n, states]
    log_likelihood = joint.logsumexp(dim=1)
    return log_likelihood, (joint - log_likelihood[:, None]).exp() @ states
