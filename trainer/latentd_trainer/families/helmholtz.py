"""Helmholtz machine: a sigmoid belief net, and a recognition net that inverts it.

Dayan, Hinton, Neal, Zemel: The Helmholtz machine, Neural Computation 7 (1995). Learnt on binarised pixels.

    model         p(x, z1, z2), see `belief_net`; q(z1, z2 | x) = q(z1 | x) q(z2 | z1), products of Bernoulli units
    bound         ln p(x) >= E_q ln p(x, z) - ln q(z | x)
    wake-sleep    (Hinton, Dayan, Frey, Neal, Science 268, 1995)
                  wake: z ~ q(. | x), follow the gradient of ln p(x, z), the whole joint
                  sleep: (z, x) ~ p, dreamt from the top down, follow the gradient of ln q(z | x)
    reweighted    (Bornschein, Bengio, arXiv 1406.2751) K states z_k ~ q(. | x), with weights w_k that sum to 1,
                  w_k ~ p(x, z_k) / q(z_k | x)
                  p follows sum_k w_k grad ln p(x, z_k); q follows half of sum_k w_k grad ln q(z_k | x), the
                  wake update, and half of the sleep update
    IWAE          ln p(x) >= ln 1/K sum_k p(x, z_k) / q(z_k | x)                       (arXiv 1509.00519, eq. 8)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from latentd.v1 import model_pb2
from torch import Tensor, nn

from latentd_trainer.belief_net import BeliefNet, DecoderGraph, binary_pixels, draw, log_probability, sample_images
from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Family, Moment, below, setting
from latentd_trainer.optimization import Updater, warm_up_then_cosine
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Meaning, Role, ServingSpec, Source, bound_on_mass

OBJECTIVES = {"ws": "wake-sleep", "rws": "reweighted wake-sleep"}


@dataclass(frozen=True)
class HelmholtzConfig:
    """Settings of training a Helmholtz machine; the defaults are the recipe for digits."""

    steps: int = setting(6000, "training steps")
    batch_size: int = setting(64, "images a step, over all processes")
    learning_rate: float = setting(1e-2, "peak rate of both Adams, which falls along a cosine")
    objective: str = setting("rws", "rws, reweighted wake-sleep, or ws, wake-sleep")
    draws: int = setting(10, "K, states drawn for each image; wake-sleep takes 1")
    lower: int = setting(64, "units of z1, the layer above the pixels")
    upper: int = setting(24, "units of z2, the layer on top")

    def __post_init__(self) -> None:
        problems = below(self, steps=1, batch_size=1, learning_rate=0, draws=1, lower=1, upper=1)
        if self.objective not in OBJECTIVES:
            problems.append(f"objective={self.objective!r}: must be one of {', '.join(OBJECTIVES)}")
        if problems:
            raise ValueError("; ".join(problems))


class Recognition(nn.Module):
    """q(z1 | x) q(z2 | z1), from the bottom up.

    Args:
        pixels: of an image.
        lower: units of z1.
        upper: units of z2.
    """

    def __init__(self, pixels: int, lower: int, upper: int) -> None:
        super().__init__()
        self.first = nn.Linear(pixels, lower)
        self.second = nn.Linear(lower, upper)

    def draw(self, x: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """z1 and z2 from uniform numbers [n, lower + upper] in [0, 1); x is [n, pixels] f32 of 0 and 1."""
        count = self.first.out_features
        lower = draw(uniform[:, :count], self.first(x).float())
        return lower, draw(uniform[:, count:], self.second(lower).float())

    def log_posterior(self, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Return ln q(z1, z2 | x): [n, pixels], [n, lower], [n, upper] -> [n], in nats."""
        return log_probability(lower, self.first(x)) + log_probability(upper, self.second(lower))


class PosteriorGraph(nn.Module):
    """What is served as the encoder: sample -> P(unit = 1 | x), [n, lower + upper].

    Exact for q(z1 | x); for z2 it is q(z2 | z1) at the mean of z1.
    """

    def __init__(self, recognition: Recognition) -> None:
        super().__init__()
        self.recognition = recognition

    def forward(self, sample: Tensor) -> Tensor:
        """See the class."""
        lower = torch.sigmoid(self.recognition.first(binary_pixels(sample)))
        return torch.cat([lower, torch.sigmoid(self.recognition.second(lower))], dim=1)


class LogWeightGraph(nn.Module):
    """What is served as the scorer: (sample, lower noise, upper noise) -> ln p(x, z) - ln q(z | x) of one draw."""

    def __init__(self, net: BeliefNet, recognition: Recognition) -> None:
        super().__init__()
        self.net, self.recognition = net, recognition

    def forward(self, sample: Tensor, lower_uniform: Tensor, upper_uniform: Tensor) -> Tensor:
        """See the class."""
        x = binary_pixels(sample)
        lower, upper = self.recognition.draw(x, torch.cat([lower_uniform, upper_uniform], dim=1))
        return self.net.log_joint(x, lower, upper) - self.recognition.log_posterior(x, lower, upper)


class HelmholtzMachine(Family):
    """The generative and the recognition net, and an Adam for each."""

    config_type = HelmholtzConfig
    config: HelmholtzConfig

    def __init__(self, config: HelmholtzConfig, info: DataInfo) -> None:
        super().__init__(config, info)
        pixels = math.prod(info.shape)
        self.net = BeliefNet(pixels, config.lower, config.upper)
        self.recognition = Recognition(pixels, config.lower, config.upper)
        self.modules = {"generative": self.net, "recognition": self.recognition}
        self.averages = {}
        self.updaters = {
            name: Updater(module, torch.optim.Adam(module.parameters(), config.learning_rate, fused=True))
            for name, module in self.modules.items()
        }

    def step(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """One wake and one sleep phase. Losses in nats: `loss`, the bound's negative, and `sleep`, q's on dreams."""
        x = binary_pixels(batch.images)
        if moment.step == 0:
            self.net.start_at(moment.shard.mean(x.mean(dim=0)), len(x) * moment.shard.count)
        draws = self.config.draws if self.config.objective == "rws" else 1
        repeated = x.repeat_interleave(draws, dim=0)
        with moment.autocast():
            with torch.no_grad():
                lower, upper = self.recognition.draw(repeated, self._uniform(len(x), draws, moment, x))
            log_joint = self.net.log_joint(repeated, lower, upper).view(-1, draws)
            log_posterior = self.recognition.log_posterior(repeated, lower, upper).view(-1, draws)
            log_weight = (log_joint - log_posterior).detach()
            sleep = self._sleep(len(x), moment, x)
        weight = log_weight.softmax(dim=1)
        factor = warm_up_then_cosine(moment.step, moment.step_count, 0)
        recognition = sleep
        if self.config.objective == "rws":
            recognition = 0.5 * sleep - 0.5 * (weight * log_posterior).sum(dim=1).mean()
        self.updaters["generative"].apply(-(weight * log_joint).sum(dim=1).mean(), moment.shard, factor)
        self.updaters["recognition"].apply(recognition, moment.shard, factor)
        bound = log_weight.logsumexp(dim=1) - math.log(draws)
        return {"loss": -bound.mean(), "sleep": sleep.detach()}

    def _sleep(self, count: int, moment: Moment, like: Tensor) -> Tensor:
        """-ln q(z | x) of dreams, in the mean."""
        with torch.no_grad():
            lower, upper = self.net.dream(self._uniform(count, 1, moment, like))
            whole = torch.rand((count * moment.shard.count, like.shape[1]), generator=moment.generator)
            x = draw(moment.shard.rows(whole).to(like.device), self.net.bottom(lower).float())
        return -self.recognition.log_posterior(x, lower, upper).mean()

    def _uniform(self, count: int, draws: int, moment: Moment, like: Tensor) -> Tensor:
        """[count * draws, lower + upper] in [0, 1), this process's part."""
        whole = torch.rand(
            (count * moment.shard.count, draws, self.config.lower + self.config.upper), generator=moment.generator
        )
        return moment.shard.rows(whole).flatten(0, 1).to(like.device)

    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """See `Family.sample`; E(x | z1) of ancestral samples, whatever the labels."""
        return sample_images(self.net, self.info.shape, len(labels), seed)

    @torch.no_grad()
    def importance_weighted_bound(self, images: Tensor, draws: int, seed: int) -> Tensor:
        """IWAE-K bound on ln p(x) of each binarised image in nats; K = 1 is the one-draw estimate of the bound.

        Args:
            images: [n, C, H, W] f32.
            draws: K.
            seed: for all draws.

        Returns:
            [n] f32.
        """
        generator = torch.Generator().manual_seed(seed)
        scorer = LogWeightGraph(self.net, self.recognition)
        images = images.to(self.net.top.device)
        weights = []
        for _ in range(draws):
            uniforms = (torch.rand((len(images), count), generator=generator) for count in self.net.units)
            weights.append(scorer(images, *(each.to(images.device) for each in uniforms)).cpu())
        return torch.stack(weights).logsumexp(dim=0) - math.log(draws)

    def serving_spec(self) -> ServingSpec:
        """The generative net as decoder, the recognition net as encoder, and one draw's weight as scorer."""
        shape, units = self.info.shape, (self.config.lower + self.config.upper,)
        sample = GraphInput("sample", Source.SOURCE_SAMPLE, shape)
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
                module=PosteriorGraph(self.recognition).eval(),
                inputs=(sample,),
                outputs=(GraphOutput("probability", Meaning.MEANING_LATENT_PROBABILITY, units),),
            ),
            Graph(
                role=Role.ROLE_SCORER,
                module=LogWeightGraph(self.net, self.recognition).eval(),
                inputs=(
                    sample,
                    GraphInput("lower_uniform", Source.SOURCE_UNIFORM_NOISE, (self.config.lower,)),
                    GraphInput("upper_uniform", Source.SOURCE_UNIFORM_NOISE, (self.config.upper,)),
                ),
                outputs=(GraphOutput("log_weight", Meaning.MEANING_EVIDENCE_LOWER_BOUND, ()),),
            ),
        )
        return ServingSpec(
            family=model_pb2.Model.FAMILY_HELMHOLTZ_MACHINE,
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
                f"Helmholtz machine trained by {OBJECTIVES[self.config.objective]}: {self.config.lower} and "
                f"{self.config.upper} binary hidden units. It models binarised pixels; its scores are of those, and "
                "its bound counts binary pixels."
            ),
            reference_uri="https://doi.org/10.1162/neco.1995.7.5.889",
            likelihood=bound_on_mass(
                "Of pixels made black or white, so not to be compared with models of grey levels; from states that the "
                "recognition net draws."
            ),
        )
