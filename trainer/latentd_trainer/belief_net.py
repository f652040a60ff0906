"""Directed nets of binary units over binary pixels, with two hidden layers; what the belief-net families share.

Neal: Connectionist learning of belief networks, Artificial Intelligence 56 (1992).

    model        p(x, z1, z2) = p(z2) p(z1 | z2) p(x | z1), every factor a product over units of Bernoulli
                 distributions with P(unit = 1 | above) = s(weights . above + bias), s the logistic function  (eq. 1)
    posterior    p(z | x) has no closed form, for units with a common child depend on each other once it is seen; a
                 unit's conditional has one (eq. 4):
                 ln P(z_j = 1 | rest) / P(z_j = 0 | rest) = its own logit + sum over its children c of
                 ln p(c | z_j = 1, rest) - ln p(c | z_j = 0, rest)
    Gibbs        draw each unit from that conditional in turn; in the long run states come from p(z | x)

Images are [n, C, H, W] in [-1, 1]; a pixel counts as 1 from the middle of the range on. Hidden states are [n, units]
of 0 and 1, the lower layer z1 before the upper z2.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from latentd_trainer.nets import row_log

_LARGEST_BELOW_ONE = 1 - 2**-24  # in float32, and on the grid of uniform noise


def binary_pixels(images: Tensor) -> Tensor:
    """Images [n, C, H, W] in [-1, 1] as [n, pixels] f32 of 0 and 1."""
    return (images.flatten(1) >= 0).float()


def softplus(x: Tensor) -> Tensor:
    """Return ln(1 + e^x) of [n, width], the same for a row in every batch."""
    return x.clamp(min=0) + row_log(1 + (-x.abs()).exp())


def log_probability(units: Tensor, logits: Tensor) -> Tensor:
    """Natural logarithm of the probability of binary units under their logits: [n, k] f32 -> [n] f32, in nats."""
    return (units * logits - softplus(logits)).sum(dim=1)


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
        """Return ln p(x, z1, z2): [n, pixels], [n, lower], [n, upper] f32 -> [n] f32, in nats."""
        given = log_probability(x, self.bottom(lower).float()) + log_probability(lower, self.middle(upper).float())
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

    def sweep(self, x: Tensor, lower: Tensor, upper: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw every hidden unit once from its conditional: all of z1, then all of z2.

        Args:
            x: [n, pixels] f32 of 0 and 1.
            lower: [n, lower], the state of z1.
            upper: [n, upper], the state of z2.
            uniform: [n, lower + upper] in [0, 1).

        Returns:
            z1, z2, and P(unit = 1 | rest) as each unit was drawn, [n, lower + upper].
        """
        lower_uniform, upper_uniform = self.layers(uniform)
        lower, lower_odds = _sweep_layer(self.bottom, x, lower, self.middle(upper), lower_uniform)
        prior = self.top.expand_as(upper)
        upper, upper_odds = _sweep_layer(self.middle, lower, upper, prior, upper_uniform)
        return lower, upper, torch.cat([lower_odds, upper_odds], dim=1)


def _sweep_layer(
    below: nn.Linear, children: Tensor, units: Tensor, prior: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw the units of one layer in turn, given the layer below and their logits from above.

    The logits of the children follow each unit as it changes. One loop in an exported graph, for unrolled it would
    have a dozen operators for each unit and sweep.
    """
    weight = below.weight.t()  # [units, children]
    evidence = children @ below.weight + prior  # [n, units], what is linear in a child's state, and the prior

    def draw_unit(logits: Tensor, unit: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        row, state, given, point = unit
        off = logits - state[:, None] * row
        chance = torch.sigmoid(given - (softplus(off + row) - softplus(off)).sum(dim=1))
        drawn = (point < chance).float()
        return off + drawn[:, None] * row, torch.stack([drawn, chance])

    each = (weight, units.t(), evidence.t(), uniform.t())
    if torch.compiler.is_exporting():
        _, results = scan(draw_unit, below(units), each)
    else:
        logits, found = below(units), []
        for unit in zip(*each, strict=True):
            logits, result = draw_unit(logits, unit)
            found.append(result)
        results = torch.stack(found)
    return results[:, 0].t(), results[:, 1].t()


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

    def states(self, x: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last z1 and z2, and the averaged conditionals; x is [n, pixels], uniform [n, 1 + sweeps, units]."""
        lower, upper = self.net.dream(uniform[:, 0])
        kept = []
        for number in range(1, self.sweeps + 1):
            lower, upper, chances = self.net.sweep(x, lower, upper, uniform[:, number])
            if 2 * number > self.sweeps:
                kept.append(chances)
        return lower, upper, torch.stack(kept).mean(dim=0)

    def forward(self, sample: Tensor, uniform: Tensor) -> Tensor:
        """See the class."""
        return self.states(binary_pixels(sample), uniform)[2]


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
        x: [n, pixels] f32 of 0 and 1.

    Returns:
        [n] f32 in nats, and [n, lower + upper] f32.
    """
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=sum(net.units))), device=x.device)
    lower, upper = net.layers(states)
    joint = torch.stack([net.log_joint(row.expand(len(states), -1), lower, upper) for row in x])  # [n, states]
    log_likelihood = joint.logsumexp(dim=1)
    return log_likelihood, (joint - log_likelihood[:, None]).exp() @ states
