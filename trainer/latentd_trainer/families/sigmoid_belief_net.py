"""Sigmoid belief net with two hidden layers, learnt by Gibbs sampling.

Neal: Connectionist learning of belief networks, Artificial Intelligence 56 (1992). Learnt on binarised pixels.

    model        p(x, z1, z2), see `belief_net`
    learning     follow E over p(z | x) of grad ln p(x, z), which is the gradient of ln p(x); z is drawn by a few
                 sweeps of Gibbs sampling with the pixels held
    posterior    P(unit = 1 | x), averaged over a fixed number of sweeps
    bound        Let q be the product of those averages. Given the sweeps, p(x, z) / q(z) with z ~ q has the mean
                 p(x), so ln p(x) >= E ln p(x, z) - ln q(z), however many sweeps there were; K draws are joined as
                 in IWAE (arXiv 1509.00519, eq. 8). q knows nothing of how units depend on each other, so the bound
                 is loose where they do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from latentd.v1 import model_pb2
from torch import Tensor, nn

from latentd_trainer.belief_net import BeliefNet, DecoderGraph, Gibbs, binary_pixels, sample_images
from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Family, Moment, below, setting
from latentd_trainer.nets import row_log, row_sum
from latentd_trainer.optimization import Updater, warm_up_then_cosine
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Meaning, Role, ServingSpec, Source, bound_on_mass

_SMALLEST_PROBABILITY = 0.01
"""Of a unit being on, or off, under the bound's q: a short chain's averages say 0 and 1 too soon."""


@dataclass(frozen=True)
class SigmoidBeliefNetConfig:
    """Settings of training a sigmoid belief net; the defaults are the recipe for digits."""

    steps: int = setting(2000, "training steps")
    batch_size: int = setting(64, "images a step, over all processes")
    learning_rate: float = setting(1e-2, "peak rate of Adam, which falls along a cosine")
    sweeps: int = setting(3, "Gibbs sweeps over all hidden units in each training step")
    served_sweeps: int = setting(8, "Gibbs sweeps of the served encoder and scorer")
    lower: int = setting(32, "units of z1, the layer above the pixels")
    upper: int = setting(12, "units of z2, the layer on top")

    def __post_init__(self) -> None:
        problems = below(self, steps=1, batch_size=1, learning_rate=0, sweeps=1, served_sweeps=1, lower=1, upper=1)
        if problems:
            raise ValueError("; ".join(problems))


class LogWeightGraph(nn.Module):
    """What is served as the scorer: (sample, chain noise, draw noise) -> ln p(x, z) - ln q(z), z ~ q, [n]."""

    def __init__(self, gibbs: Gibbs) -> None:
        super().__init__()
        self.gibbs = gibbs

    def forward(self, sample: Tensor, chain: Tensor, uniform: Tensor) -> Tensor:
        """See the class."""
        net = self.gibbs.net
        x = binary_pixels(sample)
        probability = self.gibbs.states(x, chain)[1].clamp(_SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
        states = (uniform < probability).float()
        lower, upper = net.layers(states)
        log_posterior = row_sum(row_log(torch.where(states > 0, probability, 1 - probability)))
        return net.log_joint(x, lower, upper) - log_posterior


class SigmoidBeliefNet(Family):
    """The net and its Adam."""

    config_type = SigmoidBeliefNetConfig
    config: SigmoidBeliefNetConfig

    def __init__(self, config: SigmoidBeliefNetConfig, info: DataInfo) -> None:
        super().__init__(config, info)
        self.net = BeliefNet(math.prod(info.shape), config.lower, config.upper)
        self.chain = Gibbs(self.net, config.sweeps)
        self.modules = {"net": self.net}
        self.averages = {}
        optimizer = torch.optim.Adam(self.net.parameters(), config.learning_rate, fused=True)
        self.updaters = {"net": Updater(self.net, optimizer)}

    def step(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Gibbs sampling, then one step of Adam. Loss: `loss`, -ln p(x, z) in nats, which is no bound on ln p(x)."""
        x = binary_pixels(batch.images)
        if moment.step == 0:
            self.net.start_at(moment.shard.mean(x.mean(dim=0)), len(x) * moment.shard.count)
        whole = torch.rand((len(x) * moment.shard.count, *self.chain.noise_shape), generator=moment.generator)
        with torch.no_grad():
            states, _ = self.chain.states(x, moment.shard.rows(whole).to(x.device))
        with moment.autocast():
            loss = -self.net.log_joint(x, *self.net.layers(states)).mean()
        self.updaters["net"].apply(loss, moment.shard, warm_up_then_cosine(moment.step, moment.step_count, 0))
        return {"loss": loss.detach()}

    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """See `Family.sample`; E(x | z1) of ancestral samples, whatever the labels."""
        return sample_images(self.net, self.info.shape, len(labels), seed)

    def serving_spec(self) -> ServingSpec:
        """The net as decoder, Gibbs sampling as encoder and, with one draw, as scorer."""
        shape, units = self.info.shape, (self.config.lower + self.config.upper,)
        gibbs = Gibbs(self.net, self.config.served_sweeps)
        sample = GraphInput("sample", Source.SOURCE_SAMPLE, shape)
        chain = GraphInput("chain", Source.SOURCE_UNIFORM_NOISE, gibbs.noise_shape)
        graphs = (
            Graph(
                role=Role.ROLE_DECODER,
                module=DecoderGraph(self.net, shape).eval(),
                inputs=(
                    GraphInput("latent", Source.SOURCE_LATENT, units),
                    GraphInput("uniform", Source.SOURCE_UNIFORM_NOISE, shape),
                ),
                outputs=(
                    GraphOutput("mean", Meaning.MEANING_SAMPLE, shape),
                    GraphOutput("draw", Meaning.MEANING_SAMPLE_DRAW, shape),
                ),
            ),
            Graph(
                role=Role.ROLE_ENCODER,
                module=gibbs.eval(),
                inputs=(sample, chain),
                outputs=(GraphOutput("probability", Meaning.MEANING_LATENT_PROBABILITY, units),),
            ),
            Graph(
                role=Role.ROLE_SCORER,
                module=LogWeightGraph(gibbs).eval(),
                inputs=(sample, chain, GraphInput("uniform", Source.SOURCE_UNIFORM_NOISE, units)),
                outputs=(GraphOutput("log_weight", Meaning.MEANING_EVIDENCE_LOWER_BOUND, ()),),
            ),
        )
        return ServingSpec(
            family=model_pb2.Model.FAMILY_SIGMOID_BELIEF_NET,
            graphs=graphs,
            methods=(
                model_pb2.Model.METHOD_SAMPLE,
                model_pb2.Model.METHOD_ENCODE,
                model_pb2.Model.METHOD_DECODE,
                model_pb2.Model.METHOD_SCORE,
            ),
            sample_shape=shape,
            latent_shape=units,
            latent_range=(0.0, 1.0),
            class_conditional=False,
            description=(
                f"Sigmoid belief net learnt by Gibbs sampling: {self.config.lower} and {self.config.upper} binary "
                f"hidden units, whose posterior is estimated by {self.config.served_sweeps} sweeps. It models "
                "binarised pixels; its scores are of those, and its bound counts binary pixels."
            ),
            reference_uri="https://doi.org/10.1016/0004-3702(92)90065-6",
            likelihood=bound_on_mass(
                "Of pixels made black or white, so not to be compared with models of grey levels; from states drawn by "
                "the marginals that Gibbs sampling finds."
            ),
        )
