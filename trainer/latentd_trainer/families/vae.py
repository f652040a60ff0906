"""Variational autoencoder, conditioned on the class.

Kingma, Welling: Auto-encoding variational Bayes, arXiv 1312.6114.

    model        p(z) = N(0, I), p(x | z, y) by the decoder; q(z | x) = N(m, diag s^2) by the encoder
    bound        ln p(x | y) >= E_q ln p(x | z, y) - KL(q(z | x) || p(z))                      (eq. 3)
    gradient     z = m + s * eps, eps ~ N(0, I)                                               (eq. 4)
    KL           1/2 sum_j (m_j^2 + s_j^2 - 1 - ln s_j^2)                                      (appendix B)
    likelihood   each pixel is a logistic variable with its own location and scale, rounded to the data's levels:
                 P(x) = F((x + d - mu) / s) - F((x - d - mu) / s), F the logistic function, d half a level;
                 the outer levels take the tails (PixelCNN++, arXiv 1701.05517, section 2.1)
    free bits    a latent dimension's KL, averaged over the batch, counts from `free_bits` nats on, which keeps
                 dimensions from falling silent (arXiv 1606.04934, appendix C.8); the KL grows to full weight over a
                 warm-up (arXiv 1602.02282)
    IWAE         ln p(x | y) >= ln 1/K sum_k w_k, w = p(x | z, y) p(z) / q(z | x)              (arXiv 1509.00519, eq. 8)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from latentd.v1 import model_pb2, tensor_pb2
from torch import Tensor, nn
from torch.nn import functional

from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Family, Moment, below, outside, setting
from latentd_trainer.families.noise import normal
from latentd_trainer.families.sizes import PyramidSettings
from latentd_trainer.nets import ImageToVector, VectorToImage, row_log
from latentd_trainer.optimization import Average, Updater, warm_up_then_cosine
from latentd_trainer.pyramid import Pyramid
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Meaning, Role, ServingSpec, Source, bound_on_mass

LARGEST_LOG_VARIANCE = 8.0
LOG_SCALE_RANGE = (-6.0, 2.0)
_OF_ALL_PRESETS = {
    "batch_size": 128,
    "learning_rate": 5e-4,
    "warm_up_steps": 2000,
    "weight_decay": 0.01,
    "blocks": 1,
    "attention_levels": "1",
    "hidden": 256,
    "free_bits": 0.05,
    "average_decay": 0.9995,
}
PRESETS = {
    "28x28": _OF_ALL_PRESETS | {"steps": 50_000, "width": 32, "multipliers": "1,2,4", "latent": 32},
    "32x32": _OF_ALL_PRESETS | {"steps": 150_000, "width": 64, "multipliers": "1,2,4,4", "latent": 128},
    "32x32-large": _OF_ALL_PRESETS
    | {
        "steps": 300_000,
        "width": 96,
        "multipliers": "1,2,4,4",
        "blocks": 2,
        "attention_heads": 4,
        "latent": 256,
    },
}
"""Of 4.5, 11.1 and 35.6 million parameters."""
_LN_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class VaeConfig(PyramidSettings):
    """Settings of VAE training; the defaults are the recipe for digits."""

    steps: int = setting(1000, "training steps")
    batch_size: int = setting(64, "images a step, over all processes")
    learning_rate: float = setting(2e-3, "peak rate of AdamW")
    warm_up_steps: int = setting(50, "steps in which the rate grows from 0, before it falls along a cosine")
    weight_decay: float = setting(0.5, "weight decay of AdamW")
    clip_norm: float = setting(50.0, "largest norm of a gradient")
    width: int = setting(48, "channels of the networks at full size, a multiple of 8")
    blocks: int = setting(0, "residual blocks at each level, beside the convolution that leads to it")
    hidden: int = setting(128, "width of the encoder's linear layer")
    latent: int = setting(8, "dimensions of z")
    free_bits: float = setting(0.3, "nats of each latent dimension's KL that cost nothing")
    kl_warm_up: float = setting(
        0.05, "share of the steps in which the KL's weight grows from 0 to 1; while it is low z takes over the class"
    )
    average_decay: float = setting(0.998, "decay of the moving average of the weights, which is what is served")

    def __post_init__(self) -> None:
        problems = below(
            self,
            steps=1,
            batch_size=1,
            learning_rate=0,
            warm_up_steps=0,
            weight_decay=0,
            clip_norm=0,
            hidden=1,
            latent=1,
            free_bits=0,
        )
        problems += self.pyramid_problems()
        problems += outside(self, kl_warm_up=(0, 1), average_decay=(0, 1))
        if problems:
            raise ValueError("; ".join(problems))


def reparameterise(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    """Draw z = mean + exp(log_variance / 2) eps, all [n, d] f32."""
    return mean + (0.5 * log_variance).exp() * eps


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) of each dimension in nats, [n, d] f32."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def normal_log_density(value: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Natural logarithm of N(value; mean, exp(log_variance) I) in nats: [n, d] f32 -> [n]."""
    squared = (value - mean).square() * (-log_variance).exp()
    return -0.5 * (squared + log_variance + _LN_TWO_PI).sum(dim=1)


def discretized_logistic_log_likelihood(images: Tensor, location: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """Log likelihood ln P(images) of each image in nats, over all its pixels: three times [n, C, H, W] f32 -> [n].

    With a = (x - d - mu) / s and b = (x + d - mu) / s, F(b) - F(a) = F(b) F(-a) (1 - exp(a - b)) is exact and
    subtracts no two numbers of equal size.
    """
    half = 1 / (levels - 1)
    inverse_scale = (-log_scale).exp()
    upper, lower = (images + half - location) * inverse_scale, (images - half - location) * inverse_scale
    width = torch.tanh(half * inverse_scale)  # 1 - exp(-2 w) = 2 tanh(w) / (1 + tanh(w)), exact for small w too
    log_below, log_above = _log_sigmoid(upper), _log_sigmoid(-lower)
    log_middle = log_below + log_above + row_log(2 * width / (1 + width))
    inner = torch.where(images > 1 - half, log_above, log_middle)
    return torch.where(images < -1 + half, log_below, inner).flatten(1).sum(dim=1)


def discretized_logistic_mean(location: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """Mean of the discretised logistic at each pixel, [n, C, H, W] f32; holds `levels` values a pixel for a moment.

    E x = -1 + 2 d sum_k P(x > level k), for all levels but the last.
    """
    half = 1 / (levels - 1)
    edges = -1 + half * (2 * torch.arange(levels - 1, device=location.device) + 1)
    above = torch.sigmoid((location[..., None] - edges) * (-log_scale).exp()[..., None])
    return -1 + 2 * half * above.sum(dim=-1)


def discretized_logistic_draw(location: Tensor, log_scale: Tensor, uniform: Tensor, levels: int) -> Tensor:
    """A draw at each pixel from uniform numbers in [0, 1) by the inverse of F, rounded to the levels in range.

    Three times [n, C, H, W] f32 -> the same.
    """
    inside = uniform.clamp(1e-7, 1 - 1e-7)
    value = location + log_scale.exp() * row_log(inside / (1 - inside))
    top = levels - 1
    return ((value + 1) * (top / 2)).round().clamp(0, top) * (2 / top) - 1


def _log_sigmoid(x: Tensor) -> Tensor:
    return x.clamp(max=0) - row_log(1 + (-x.abs()).exp())


class Encoder(nn.Module):
    """Images to the mean and log variance of q(z | x): [n, C, H, W] -> [n, latent], [n, latent]."""

    def __init__(self, pyramid: Pyramid, hidden: int, latent: int) -> None:
        super().__init__()
        self.trunk = ImageToVector(pyramid, hidden, nn.SiLU())
        self.head = nn.Linear(hidden, 2 * latent)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        mean, log_variance = self.head(self.trunk(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)


class Decoder(nn.Module):
    """z and labels to location and log scale of every pixel: [n, latent], [n] -> [n, C, H, W], [n, C, H, W]."""

    def __init__(self, pyramid: Pyramid, hidden: int, latent: int, class_count: int) -> None:
        super().__init__()
        # Of unit scale from the start: a quiet label lets z learn to carry the class, and then draws from the prior
        # show another class than the one asked for.
        self.embed_label = nn.Embedding(class_count, 2 * hidden)
        self.mix = nn.Linear(latent, hidden)
        self.trunk = VectorToImage(hidden, pyramid, 2 * pyramid.shape[0])

    def forward(self, latent: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        scale, shift = self.embed_label(label).chunk(2, dim=1)
        hidden = functional.silu(self.mix(latent) * (1 + scale) + shift)
        location, log_scale = self.trunk(hidden).chunk(2, dim=1)
        return location, (log_scale - 2).clamp(*LOG_SCALE_RANGE)


class SampleGraph(nn.Module):
    """What is served as the decoder: (latent, label, uniform) -> mean and draw of p(x | z, y)."""

    def __init__(self, decoder: nn.Module, levels: int) -> None:
        super().__init__()
        self.decoder, self.levels = decoder, levels

    def forward(self, latent: Tensor, label: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        location, log_scale = self.decoder(latent, label)
        mean = discretized_logistic_mean(location, log_scale, self.levels)
        return mean, discretized_logistic_draw(location, log_scale, uniform, self.levels)


class LogWeightGraph(nn.Module):
    """What is served as the scorer: (sample, label, eps) -> ln w of one draw, a bound on ln p(x | y) in the mean."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, levels: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.levels = encoder, decoder, levels

    def forward(self, sample: Tensor, label: Tensor, noise: Tensor) -> Tensor:
        """See the class."""
        mean, log_variance = self.encoder(sample)
        latent = reparameterise(mean, log_variance, noise)
        location, log_scale = self.decoder(latent, label)
        log_likelihood = discretized_logistic_log_likelihood(sample, location, log_scale, self.levels)
        log_prior = normal_log_density(latent, torch.zeros_like(latent), torch.zeros_like(latent))
        return log_likelihood + log_prior - normal_log_density(latent, mean, log_variance)


class VariationalFamily(Family):
    """What is served as a VAE, however it was trained: an encoder, a decoder with a likelihood, and their bound.

    `config` has `latent`, the dimensions of z.
    """

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """The `Encoder` that is served."""

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The `Decoder` that is served."""

    def sample(self, labels: Tensor, seed: int, *, draw: bool = False) -> Tensor:
        """See `Family.sample`; the mean of p(x | z, y), or a draw from it."""
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn((len(labels), self.config.latent), generator=generator)
        uniform = torch.rand((len(labels), *self.info.shape), generator=generator)
        decoder = self.decoder
        device = next(decoder.parameters()).device
        with torch.no_grad():
            location, log_scale = (part.cpu() for part in decoder(latent.to(device), labels.to(device)))
        if draw:
            return discretized_logistic_draw(location, log_scale, uniform, self.info.levels)
        return discretized_logistic_mean(location, log_scale, self.info.levels)

    @torch.no_grad()
    def importance_weighted_bound(self, images: Tensor, labels: Tensor, draws: int, seed: int) -> Tensor:
        """IWAE-K bound on ln p(x | y) of each image in nats; K = 1 is the ELBO's one-draw estimate.

        Args:
            images: [n, C, H, W] f32.
            labels: [n] i64.
            draws: K.
            seed: for all draws.

        Returns:
            [n] f32.
        """
        generator = torch.Generator().manual_seed(seed)
        scorer = LogWeightGraph(self.encoder, self.decoder, self.info.levels)
        device = next(scorer.parameters()).device
        images, labels = images.to(device), labels.to(device)
        weights = []
        for _ in range(draws):
            noise = torch.randn((len(images), self.config.latent), generator=generator)
            weights.append(scorer(images, labels, noise.to(device)).cpu())
        return torch.stack(weights).logsumexp(dim=0) - math.log(draws)

    @torch.no_grad()
    def latent_divergences(self, images: Tensor) -> Tensor:
        """KL(q(z_j | x) || p(z_j)) of each image and dimension in nats, [n, C, H, W] f32 -> [n, latent] f32."""
        encoder = self.encoder
        return kl_to_standard_normal(*encoder(images.to(next(encoder.parameters()).device))).cpu()

    def serving_spec(self) -> ServingSpec:
        """A decoder with mean and draw, an encoder that needs no label, and a scorer of one draw."""
        shape, latent = self.info.shape, (self.config.latent,)
        encoder, decoder = self.encoder, self.decoder
        label = GraphInput("label", Source.SOURCE_CLASS_LABEL, (), tensor_pb2.DATA_TYPE_INT64)
        graphs = (
            Graph(
                role=Role.ROLE_DECODER,
                module=SampleGraph(decoder, self.info.levels).eval(),
                inputs=(
                    GraphInput("latent", Source.SOURCE_LATENT, latent),
                    label,
                    GraphInput("uniform", Source.SOURCE_UNIFORM_NOISE, shape),
                ),
                outputs=(
                    GraphOutput("mean", Meaning.MEANING_SAMPLE, shape),
                    GraphOutput("draw", Meaning.MEANING_SAMPLE_DRAW, shape),
                ),
            ),
            Graph(
                role=Role.ROLE_ENCODER,
                module=encoder,
                inputs=(GraphInput("sample", Source.SOURCE_SAMPLE, shape),),
                outputs=(
                    GraphOutput("latent_mean", Meaning.MEANING_LATENT_MEAN, latent),
                    GraphOutput("latent_log_variance", Meaning.MEANING_LATENT_LOG_VARIANCE, latent),
                ),
            ),
            Graph(
                role=Role.ROLE_SCORER,
                module=LogWeightGraph(encoder, decoder, self.info.levels).eval(),
                inputs=(
                    GraphInput("sample", Source.SOURCE_SAMPLE, shape),
                    label,
                    GraphInput("noise", Source.SOURCE_NORMAL_NOISE, latent),
                ),
                outputs=(GraphOutput("log_weight", Meaning.MEANING_EVIDENCE_LOWER_BOUND, ()),),
            ),
        )
        return ServingSpec(
            family=model_pb2.Model.FAMILY_VAE,
            graphs=graphs,
            methods=(
                model_pb2.Model.METHOD_SAMPLE,
                model_pb2.Model.METHOD_ENCODE,
                model_pb2.Model.METHOD_DECODE,
                model_pb2.Model.METHOD_SCORE,
            ),
            sample_shape=shape,
            latent_shape=latent,
            description=(
                f"Class-conditional variational autoencoder: {self.config.latent} latent dimensions, discretised "
                f"logistic likelihood on {self.info.levels} levels."
            ),
            reference_uri="https://arxiv.org/abs/1312.6114",
            likelihood=bound_on_mass(
                f"Of images of {self.info.levels} levels given their class, from draws of q(latent given sample)."
            ),
        )


class Vae(VariationalFamily):
    """Encoder and decoder under one optimiser, and their average."""

    config_type = VaeConfig
    presets = PRESETS
    config: VaeConfig

    def __init__(self, config: VaeConfig, info: DataInfo) -> None:
        super().__init__(config, info)
        sizes = (config.pyramid(info.shape), config.hidden, config.latent)
        self.networks = nn.ModuleDict({"encoder": Encoder(*sizes), "decoder": Decoder(*sizes, len(info.class_names))})
        optimizer = torch.optim.AdamW(
            self.networks.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.modules = {"networks": self.networks}
        self.averages = {"networks": Average(self.networks, config.average_decay)}
        self.updaters = {"networks": Updater(self.networks, optimizer, config.clip_norm)}

    def step(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """One step of AdamW on the bound. Losses in nats: `loss`, and without free bits `reconstruction` and `kl`."""
        eps = normal(batch, moment, self.config.latent)
        with moment.autocast():
            mean, log_variance = (part.float() for part in self.networks["encoder"](batch.images))
            latent = reparameterise(mean, log_variance, eps)
            location, log_scale = (part.float() for part in self.networks["decoder"](latent, batch.labels))
        log_likelihood = discretized_logistic_log_likelihood(batch.images, location, log_scale, self.info.levels)
        reconstruction = -log_likelihood.mean()
        kl = kl_to_standard_normal(mean, log_variance).mean(dim=0)
        # The floor is on the mean over the global batch; below it a dimension has no gradient.
        costs = moment.shard.mean(kl) > self.config.free_bits
        floored = torch.where(costs, kl, self.config.free_bits).sum()
        warm_up = self.config.kl_warm_up * moment.step_count
        weight = min(1.0, (moment.step + 1) / warm_up) if warm_up else 1.0
        loss = reconstruction + weight * floored
        factor = warm_up_then_cosine(moment.step, moment.step_count, self.config.warm_up_steps)
        self.updaters["networks"].apply(loss, moment.shard, factor)
        self.averages["networks"].update(moment.step)
        return {"loss": loss.detach(), "reconstruction": reconstruction.detach(), "kl": kl.sum().detach()}

    @property
    def encoder(self) -> nn.Module:
        """See `VariationalFamily`; the average."""
        return self.averages["networks"].module.get_submodule("encoder")

    @property
    def decoder(self) -> nn.Module:
        """See `VariationalFamily`; the average."""
        return self.averages["networks"].module.get_submodule("decoder")
