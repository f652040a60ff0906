"""Denoising diffusion, conditioned on the class.

Ho, Jain, Abbeel: Denoising diffusion probabilistic models, arXiv 2006.11239 (DDPM).

    forward      q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)  (eq. 4)
    loss         E |target - network(alpha_t x_0 + sigma_t eps, t, y)|^2                                        (eq. 14)
    target       eps; or v = alpha_t eps - sigma_t x_0 (Salimans, Ho, arXiv 2202.00512, appendix D); or x_0
    schedules    abar linear in beta (DDPM, section 4); cosine (Nichol, Dhariwal, arXiv 2102.09672, eq. 17)
    guidance     the label is dropped from some rows, so that one network learns p(x | y) and p(x)
                 (Ho, Salimans, arXiv 2207.12598)
    sampling     x_s = alpha_s x_0 + sqrt(sigma_s^2 - tau^2) eps + tau z, with the estimates x_0 and eps at t > s,
                 tau = eta sigma_s / sigma_t sqrt(1 - abar_t / abar_s) (DDIM, arXiv 2010.02502, eq. 12, 16);
                 eta 1 is DDPM, eta 0 draws no noise
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from latentd.names import SAMPLERS
from latentd.v1 import model_pb2, tensor_pb2
from numpy.typing import NDArray
from torch import Tensor

from latentd_trainer.card import OF_LATENTS
from latentd_trainer.contract import schedule_violations
from latentd_trainer.data import DataInfo, LatentsInfo
from latentd_trainer.families import Batch, Family, Moment, below, outside, setting
from latentd_trainer.families.augmentation import mirrored
from latentd_trainer.families.sizes import PyramidSettings
from latentd_trainer.optimization import Average, Updater, warm_up_then_cosine
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Meaning, Role, ServingSpec, Source, no_likelihood
from latentd_trainer.unet import UNet
from latentd_trainer.vector_net import VectorNet

PREDICTIONS = {
    "eps": model_pb2.DiffusionSpec.PREDICTION_EPSILON,
    "v": model_pb2.DiffusionSpec.PREDICTION_V,
    "x0": model_pb2.DiffusionSpec.PREDICTION_SAMPLE,
}
SCHEDULES = ("cosine", "linear")
_OF_ALL_PRESETS = {"batch_size": 128, "learning_rate": 2e-4, "warm_up_steps": 5000, "weight_decay": 0.0}
PRESETS = {
    "28x28": _OF_ALL_PRESETS
    | {
        "steps": 50_000,
        "width": 64,
        "multipliers": "1,2,2",
        "blocks": 2,
        "attention_levels": "1",
        "average_decay": 0.999,
    },
    "32x32": _OF_ALL_PRESETS
    | {
        "steps": 200_000,
        "width": 64,
        "multipliers": "1,2,2,2",
        "blocks": 2,
        "attention_levels": "1",
        "average_decay": 0.9995,
        "mirrored": 0.5,
    },
    "32x32-large": _OF_ALL_PRESETS
    | {
        "steps": 800_000,
        "width": 128,
        "multipliers": "1,2,2,3",
        "blocks": 2,
        "attention_levels": "1,2",
        "attention_heads": 4,
        "average_decay": 0.9999,
        "mirrored": 0.5,
    },
}
"""Of 4.6, 6.8 and 35.4 million parameters. The large one has the size, schedule of steps and rate of DDPM's CIFAR-10
network (appendix B)."""
DEFAULT_SAMPLER = "dpmpp-2m"
"""Measured best on digits: 10 of its steps cover as much as 50, where 10 steps of DDIM lose rare shapes."""


@dataclass(frozen=True)
class DiffusionConfig(PyramidSettings):
    """Settings of diffusion training; the defaults are the recipe for digits."""

    steps: int = setting(1500, "training steps")
    batch_size: int = setting(64, "images a step, over all processes")
    learning_rate: float = setting(2e-3, "peak rate of AdamW")
    warm_up_steps: int = setting(100, "steps in which the rate grows from 0, before it falls along a cosine")
    weight_decay: float = setting(1e-4, "weight decay of AdamW")
    clip_norm: float = setting(1.0, "largest norm of a gradient")
    timestep_count: int = setting(1000, "T, the length of the schedule")
    schedule: str = setting("cosine", "noise schedule: cosine or linear")
    prediction: str = setting("v", "what the network predicts: eps, v or x0")
    label_dropout: float = setting(0.15, "share of rows trained without their label; 0 makes guidance impossible")
    average_decay: float = setting(0.998, "decay of the moving average of the weights, which is what is served")
    vector_width: int = setting(256, "width of the network for latents without height and width, a multiple of 16")
    vector_blocks: int = setting(4, "residual blocks of that network")
    mirrored: float = setting(0.0, "share of images trained on left for right; 0 where that matters, as for digits")

    def __post_init__(self) -> None:
        problems = below(
            self,
            steps=1,
            batch_size=1,
            learning_rate=0,
            warm_up_steps=0,
            weight_decay=0,
            clip_norm=0,
            timestep_count=2,
            blocks=1,
            vector_blocks=1,
        )
        if self.vector_width < 16 or self.vector_width % 16:
            problems.append(f"vector_width={self.vector_width}: must be a multiple of 16")
        if self.schedule not in SCHEDULES:
            problems.append(f"schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}")
        if self.prediction not in PREDICTIONS:
            problems.append(f"prediction={self.prediction!r}: must be one of {', '.join(PREDICTIONS)}")
        problems += self.pyramid_problems()
        problems += outside(self, label_dropout=(0, 1), average_decay=(0, 1), mirrored=(0, 1))
        if not problems:
            problems = [
                f"schedule={self.schedule} with timestep_count={self.timestep_count} cannot be served: {violation}"
                for violation in schedule_violations(self.levels())
            ]
        if problems:
            raise ValueError("; ".join(problems))

    def levels(self) -> model_pb2.DiffusionSpec:
        """Alpha and sigma at every timestep, and what the network predicts."""
        cumulative = cumulative_alphas(self.schedule, self.timestep_count)
        return model_pb2.DiffusionSpec(
            alphas=np.sqrt(cumulative), sigmas=np.sqrt(1 - cumulative), prediction=PREDICTIONS[self.prediction]
        )


def cumulative_alphas(schedule: str, timestep_count: int) -> NDArray[np.float64]:
    """abar_t for t = 0 .. T - 1, least noisy first ([T] f64)."""
    if schedule == "linear":
        scale = 1000 / timestep_count
        betas = np.linspace(scale * 1e-4, scale * 0.02, timestep_count)
    else:
        edges = np.cos((np.arange(timestep_count + 1) / timestep_count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - edges[1:] / edges[:-1]
    return np.cumprod(1 - np.minimum(betas, 0.999))


class Diffusion(Family):
    """A network that predicts the noise in an image or in its latents, its average, and AdamW: a U-Net, or blocks for
    vectors.
    """

    config_type = DiffusionConfig
    presets = PRESETS
    takes_latents = True
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, info: DataInfo) -> None:
        super().__init__(config, info)
        if info.latents is not None and config.mirrored:
            raise ValueError(f"mirrored={config.mirrored}: must be 0, for latents cannot be mirrored")
        network = _network(config, info)
        optimizer = torch.optim.AdamW(
            network.parameters(), config.learning_rate, (0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.network = network
        self.modules = {"denoiser": network}
        self.averages = {"denoiser": Average(network, config.average_decay)}
        self.updaters = {"denoiser": Updater(network, optimizer, config.clip_norm)}
        levels = config.levels()
        self.alphas, self.sigmas = np.array(levels.alphas), np.array(levels.sigmas)

    @property
    def default_step_count(self) -> int:
        """Steps of a walk from noise to data where nobody asks for another number."""
        return min(50, self.config.timestep_count)

    def step(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """One step of AdamW on the loss, at timesteps spread evenly over the global batch. Loss: `loss`."""
        count, generator, rows = len(batch.images) * moment.shard.count, moment.generator, moment.shard.rows
        device = batch.images.device
        # One timestep from each of `count` equal parts of the schedule (VDM, arXiv 2107.00630, appendix I.1).
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        strata = (offset + torch.arange(count, dtype=torch.float64) / count) % 1
        timesteps = (strata[torch.randperm(count, generator=generator)] * self.config.timestep_count).long()
        noise = torch.randn((count, *self.info.trained_shape), generator=generator)
        dropped = torch.rand(count, generator=generator) < self.config.label_dropout
        images = mirrored(batch.images, moment, self.config.mirrored)
        timestep, eps = rows(timesteps).to(device), rows(noise).to(device)
        label = torch.where(rows(dropped).to(device), -1, batch.labels)

        alpha, sigma = (self._at(levels, timestep) for levels in (self.alphas, self.sigmas))
        noisy = alpha * images + sigma * eps
        target = {"eps": eps, "v": alpha * eps - sigma * images, "x0": images}[self.config.prediction]
        with moment.autocast():
            prediction = self.network(noisy, timestep, label)
        loss = (prediction.float() - target).square().mean()
        factor = warm_up_then_cosine(moment.step, moment.step_count, self.config.warm_up_steps)
        self.updaters["denoiser"].apply(loss, moment.shard, factor)
        self.averages["denoiser"].update(moment.step)
        return {"loss": loss.detach()}

    def sample(self, labels: Tensor, seed: int, *, step_count: int | None = None, eta: float = 0.0) -> Tensor:
        """See `Family.sample`; descends in `step_count` steps of DDIM with `eta`, the estimate of x_0 clipped."""
        step_count = step_count or self.default_step_count
        if not 1 <= step_count <= self.config.timestep_count:
            raise ValueError(f"step_count={step_count}: must be from 1 to {self.config.timestep_count}")
        network = self.averages["denoiser"].module
        device = next(network.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        spacing = self.config.timestep_count / step_count
        timesteps = np.round(np.arange(self.config.timestep_count, 0, -spacing)).astype(np.int64)[:step_count] - 1
        alphas, sigmas = np.append(self.alphas[timesteps], 1.0), np.append(self.sigmas[timesteps], 0.0)
        x: Tensor = sigmas[0] * torch.randn((len(labels), *self.info.trained_shape), generator=generator)
        with torch.no_grad():
            for index, t in enumerate(timesteps.tolist()):
                rows = torch.full((len(labels),), t, device=device)
                prediction = network(x.to(device), rows, labels.to(device)).cpu()
                x0, eps = self._estimates(x, prediction, alphas[index], sigmas[index])
                alpha, sigma = alphas[index + 1], sigmas[index + 1]
                fresh = eta * sigma / sigmas[index] * math.sqrt(1 - (alphas[index] / alpha) ** 2)
                x = (
                    alpha * x0
                    + math.sqrt(sigma**2 - fresh**2) * eps
                    + fresh * torch.randn(x.shape, generator=generator)
                )
        return x

    def serving_spec(self) -> ServingSpec:
        """A denoiser; every sampler walks with it, and an image's latent is its noise at the last timestep."""
        shape, latents = self.info.trained_shape, self.info.latents
        denoiser = Graph(
            role=Role.ROLE_DENOISER,
            module=self.averages["denoiser"].module,
            inputs=(
                GraphInput("sample", Source.SOURCE_SAMPLE, shape),
                GraphInput("timestep", Source.SOURCE_TIMESTEP, (), tensor_pb2.DATA_TYPE_INT64),
                GraphInput("label", Source.SOURCE_CLASS_LABEL, (), tensor_pb2.DATA_TYPE_INT64),
            ),
            outputs=(GraphOutput("prediction", Meaning.MEANING_PREDICTION, shape),),
        )
        spec = model_pb2.DiffusionSpec(
            samplers=[DEFAULT_SAMPLER, *(name for name in SAMPLERS if name != DEFAULT_SAMPLER)],
            clip_denoised=True,
            default_step_count=self.default_step_count,
            guidance_supported=self.config.label_dropout > 0,
        )
        spec.MergeFrom(self.config.levels())
        return ServingSpec(
            family=model_pb2.Model.FAMILY_DIFFUSION,
            graphs=(denoiser,),
            methods=(
                model_pb2.Model.METHOD_SAMPLE,
                model_pb2.Model.METHOD_ENCODE,
                model_pb2.Model.METHOD_DECODE,
                model_pb2.Model.METHOD_DENOISE,
                *([model_pb2.Model.METHOD_SCORE] if latents is None else []),
            ),
            sample_shape=self.info.shape,
            sample_levels=self.info.levels if latents is None else 0,
            latent_shape=shape,
            latent_range=None if latents is None else (-latents.bound, latents.bound),
            latent_space=None if latents is None else _space(latents),
            description=(
                f"Class-conditional denoising diffusion model{f' over latents of {latents.model}' if latents else ''}: "
                f"a network that predicts {self.config.prediction}, {self.config.schedule} schedule of "
                f"{self.config.timestep_count} timesteps."
            ),
            reference_uri=f"https://arxiv.org/abs/{'2112.10752' if latents else '2006.11239'}",
            diffusion=spec,
            likelihood=None if latents is None else no_likelihood(OF_LATENTS),
        )

    def _estimates(self, x: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """x_0, clipped to the range of images, and the eps that goes with it."""
        if self.config.prediction == "eps":
            x0 = (x - sigma * prediction) / alpha
        elif self.config.prediction == "v":
            x0 = alpha * x - sigma * prediction
        else:
            x0 = prediction
        bound = 1.0 if self.info.latents is None else self.info.latents.bound
        x0 = x0.clamp(-bound, bound)
        return x0, (x - alpha * x0) / sigma

    def _at(self, levels: NDArray[np.float64], timestep: Tensor) -> Tensor:
        """Each row's alpha or sigma at its timestep, [n, 1 ...] f32, of as many axes as a batch."""
        table = torch.from_numpy(levels.astype(np.float32)).to(timestep.device)
        return table[timestep].reshape(-1, *[1] * len(self.info.trained_shape))


def _network(config: DiffusionConfig, info: DataInfo) -> UNet | VectorNet:
    shape, counts = info.trained_shape, (config.timestep_count, len(info.class_names))
    if len(shape) == 1:
        return VectorNet(shape[0], config.vector_width, config.vector_blocks, *counts)
    if len(shape) != 3:
        raise ValueError(f"latents of shape {list(shape)}: must be vectors, or have channels, height and width")
    return UNet(config.pyramid((shape[0], shape[1], shape[2])), *counts)


def _space(latents: LatentsInfo) -> model_pb2.LatentSpace:
    return model_pb2.LatentSpace(
        decoder=latents.model, decoder_digest=latents.digest, scales=latents.deviations, shifts=latents.means
    )
