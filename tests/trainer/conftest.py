"""Tiny networks of the three families, untrained, that export in a second or two each."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentd.v1 import model_pb2, tensor_pb2
from latentd_trainer.checkpoint import RunRecord
from latentd_trainer.data import DataInfo
from latentd_trainer.export import write_bundle
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Meaning, Role, ServingSpec, Source
from torch import Tensor, nn

SHAPE = (1, 4, 4)
LATENT = 4
CLASSES = ("zero", "one", "two")
TIMESTEPS = 20
I64 = tensor_pb2.DATA_TYPE_INT64


class TinyDecoder(nn.Module):
    """Latents and labels to a mean and, from uniform noise, a draw."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(len(CLASSES), 16)
        self.layers = nn.Sequential(nn.Linear(LATENT + 16, 16), nn.SiLU(), nn.Linear(16, 16), nn.Tanh())

    def mean(self, z: Tensor, y: Tensor) -> Tensor:
        return self.layers(torch.cat([z, self.labels(y)], 1)).reshape(-1, *SHAPE)

    def forward(self, z: Tensor, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(z, y)
        return mean, torch.where(u < 0.5, mean - 0.125, mean + 0.125)


class TinyGenerator(TinyDecoder):
    """The decoder without its draw."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.mean(z, y)


class TinyEncoder(nn.Module):
    """Samples and labels to mean and log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(len(CLASSES), 16)
        self.layers = nn.Linear(16, 2 * LATENT)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return self.layers(x.flatten(1) + self.labels(y)).chunk(2, 1)


class TinyBound(nn.Module):
    """One draw's bound, some hundred nats large."""

    def __init__(self, encoder: TinyEncoder, decoder: TinyDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor, y: Tensor, e: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x, y)
        z = mean + torch.exp(log_variance / 2) * e
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        return -50 * (self.decoder.mean(z, y) - x).square().sum((1, 2, 3)) - divergence


class TinyCritic(nn.Module):
    """Samples and labels to P(real)."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(len(CLASSES), 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid((x.flatten(1) * self.labels(y)).sum(1))


class TinyDenoiser(nn.Module):
    """A residual block with group normalisation; timesteps and labels by table, label -1 in row 0."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.labels = nn.Embedding(TIMESTEPS, 8), nn.Embedding(len(CLASSES) + 1, 8)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        condition = (self.times(t) + self.labels(y + 1))[:, :, None, None]
        return self.last(nn.functional.silu(self.norm(self.first(x) + condition)))


Z = GraphInput("z", Source.SOURCE_LATENT, (LATENT,))
X = GraphInput("x", Source.SOURCE_SAMPLE, SHAPE)
Y = GraphInput("y", Source.SOURCE_CLASS_LABEL, (), I64)
MEAN = GraphOutput("sample", Meaning.MEANING_SAMPLE, SHAPE)
DRAW = GraphOutput("draw", Meaning.MEANING_SAMPLE_DRAW, SHAPE)


def vae_spec() -> ServingSpec:
    """Decoder with a draw, encoder, one-draw bound."""
    torch.manual_seed(0)
    decoder, encoder = TinyDecoder().eval(), TinyEncoder().eval()
    u = GraphInput("u", Source.SOURCE_UNIFORM_NOISE, SHAPE)
    e = GraphInput("e", Source.SOURCE_NORMAL_NOISE, (LATENT,))
    return ServingSpec(
        family=model_pb2.Model.FAMILY_VAE,
        graphs=[
            Graph(
                Role.ROLE_DECODER, decoder, [Z, Y, u], [MEAN, GraphOutput("draw", Meaning.MEANING_SAMPLE_DRAW, SHAPE)]
            ),
            Graph(
                Role.ROLE_ENCODER,
                encoder,
                [X, Y],
                [
                    GraphOutput("mean", Meaning.MEANING_LATENT_MEAN, (LATENT,)),
                    GraphOutput("log_variance", Meaning.MEANING_LATENT_LOG_VARIANCE, (LATENT,)),
                ],
            ),
            Graph(
                Role.ROLE_SCORER,
                TinyBound(encoder, decoder).eval(),
                [X, Y, e],
                [GraphOutput("bound", Meaning.MEANING_EVIDENCE_LOWER_BOUND, ())],
            ),
        ],
        methods=[
            model_pb2.Model.METHOD_SAMPLE,
            model_pb2.Model.METHOD_ENCODE,
            model_pb2.Model.METHOD_DECODE,
            model_pb2.Model.METHOD_SCORE,
        ],
        sample_shape=SHAPE,
        latent_shape=(LATENT,),
        description="A tiny VAE.",
        reference_uri="https://arxiv.org/abs/1312.6114",
    )


def gan_spec() -> ServingSpec:
    """Generator and critic."""
    torch.manual_seed(1)
    return ServingSpec(
        family=model_pb2.Model.FAMILY_GAN,
        graphs=[
            Graph(Role.ROLE_DECODER, TinyGenerator().eval(), [Z, Y], [MEAN]),
            Graph(
                Role.ROLE_SCORER,
                TinyCritic().eval(),
                [X, Y],
                [GraphOutput("real", Meaning.MEANING_REAL_PROBABILITY, ())],
            ),
        ],
        methods=[model_pb2.Model.METHOD_SAMPLE, model_pb2.Model.METHOD_DECODE, model_pb2.Model.METHOD_SCORE],
        sample_shape=SHAPE,
        latent_shape=(LATENT,),
        description="A tiny GAN.",
        reference_uri="https://arxiv.org/abs/1406.2661",
    )


def diffusion_spec() -> ServingSpec:
    """A v-predicting denoiser on a cosine schedule."""
    torch.manual_seed(2)
    angles = (np.arange(TIMESTEPS) + 1) / (TIMESTEPS + 1) * np.pi / 2
    return ServingSpec(
        family=model_pb2.Model.FAMILY_DIFFUSION,
        graphs=[
            Graph(
                Role.ROLE_DENOISER,
                TinyDenoiser().eval(),
                [X, GraphInput("t", Source.SOURCE_TIMESTEP, (), I64), Y],
                [GraphOutput("prediction", Meaning.MEANING_PREDICTION, SHAPE)],
            )
        ],
        methods=[
            model_pb2.Model.METHOD_SAMPLE,
            model_pb2.Model.METHOD_ENCODE,
            model_pb2.Model.METHOD_DECODE,
            model_pb2.Model.METHOD_DENOISE,
            model_pb2.Model.METHOD_SCORE,
        ],
        sample_shape=SHAPE,
        sample_levels=17,
        latent_shape=SHAPE,
        description="A tiny diffusion model.",
        reference_uri="https://arxiv.org/abs/2006.11239",
        diffusion=model_pb2.DiffusionSpec(
            alphas=np.cos(angles),
            sigmas=np.sin(angles),
            samplers=["ddim", "ddpm"],
            prediction=model_pb2.DiffusionSpec.PREDICTION_V,
            clip_denoised=True,
            default_step_count=10,
            guidance_supported=True,
        ),
    )


TINY_SPECS: dict[str, Callable[[], ServingSpec]] = {"vae": vae_spec, "gan": gan_spec, "diffusion": diffusion_spec}


@pytest.fixture(scope="session")
def tiny_specs() -> dict[str, Callable[[], ServingSpec]]:
    """Builders of one small serving spec for each family; every call gives equal weights."""
    return TINY_SPECS


@pytest.fixture(scope="session")
def tiny_record() -> Callable[[str], RunRecord]:
    """How the tiny model of a family claims to have been trained."""

    def record(family: str) -> RunRecord:
        info = DataInfo("tiny", SHAPE, 17, CLASSES, (0.5, 0.25, 0.25), "0" * 64)
        return RunRecord(family, {"width": 8}, "/home/of/the/data", info, 0, "float32", 1, 1, {"torch": "2.13.0"})

    return record


@pytest.fixture(scope="session")
def write_tiny(
    tiny_record: Callable[[str], RunRecord],
) -> Callable[..., Path]:
    """Export the tiny model of a family, or the given spec, as version 1 of `tiny-FAMILY` under a models directory."""

    def write(
        models: Path, family: str, spec: ServingSpec | None = None, record: RunRecord | None = None, **options: Any
    ) -> Path:
        return write_bundle(
            spec or TINY_SPECS[family](),
            record or tiny_record(family),
            datetime(2026, 1, 2, tzinfo=UTC),
            models=models,
            name=f"tiny-{family}",
            **options,
        )

    return write


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    """A models directory with the three tiny bundles; not to be changed."""
    models = tmp_path_factory.mktemp("models")
    for family in TINY_SPECS:
        write_tiny(models, family)
    return models
