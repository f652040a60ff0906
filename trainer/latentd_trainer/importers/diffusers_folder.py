"""Pipelines that diffusers has saved, as bundles: a UNet2DModel with its scheduler, and an autoencoder if there is one.

A latent diffusion pipeline becomes two bundles. NAME walks over latents of NAME-vae, on the very scale of these, and
its bundle says so (`Model.latent_space`), so that one call to a server gives images.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from huggingface_hub import ModelCard
from latentd.v1 import model_pb2, tensor_pb2

from latentd_trainer import bundle as bundles
from latentd_trainer import export, licenses
from latentd_trainer.card import OF_LATENTS
from latentd_trainer.importers import ImportingError, diffusers_schedulers
from latentd_trainer.importers.diffusers_networks import Denoiser, LatentDecoder, LatentEncoder
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Meaning, Role, ServingSpec, Source, no_likelihood

INDEX = "model_index.json"
_AUTOENCODERS = ("AutoencoderKL", "VQModel")
_AUTOENCODER_PARTS = ("vae", "vqvae")


@dataclass(frozen=True)
class Wishes:
    """What a pipeline's folder does not say."""

    name: str  # of the model
    class_names: tuple[str, ...] = ()  # "0", "1" ... if not given
    unconditional_class: int | None = None  # the row of the class embedding that means no class
    size: tuple[int, int] | None = None  # height and width that the network is run at; its own if not given
    sizes: tuple[tuple[int, int], ...] = ()  # others that a server may be asked for, of a pipeline over pixels
    step_count: int | None = None  # default number of steps
    license: str | None = None  # of the weights; what the folder's model card says if not given
    data_license: str = licenses.UNKNOWN


def run(
    folder: Path, wishes: Wishes, *, models: Path, version: int | None = None, replace: bool = False
) -> tuple[list[Path], list[str]]:
    """Write the bundles of a pipeline; return their directories, and what is served otherwise than diffusers does it.

    Raises:
        ImportingError: it is no pipeline that can be served; the message lists everything found.
        GraphError: see `export.package`.
        BundleError: see `export.package`.
    """
    parts = _parts(folder)
    unet = _unet(folder, parts)
    autoencoder = _autoencoder(folder, parts)
    if autoencoder is not None and wishes.sizes:
        raise ImportingError("sizes: must be empty, for the autoencoder beside the network is made for one size here")
    walk = diffusers_schedulers.read(str(folder / "scheduler"), parts["scheduler"], wishes.step_count)
    classes = _class_names(unet, wishes)
    shape = _shape(unet, wishes)
    said = _model_card(folder)
    origin = partial(
        export.Origin,
        said.dataset,
        class_probabilities=(),
        license=wishes.license or said.license,
        dataset_license=wishes.data_license,
    )
    record: dict[str, Any] = {"imported": "diffusers", "diffusers": diffusers.__version__, "parts": parts}
    written: list[Path] = []
    other: ServingSpec | None = None
    package = partial(export.package, models=models, version=version, replace=replace)
    if autoencoder is not None:
        other = _autoencoder_spec(autoencoder, shape)
        name = f"{wishes.name}-vae"
        written.append(package(other, origin(class_names=(), record=record), name=name))
    denoiser = Denoiser(unet, len(walk.spec.alphas), wishes.unconditional_class)
    spec = _denoiser_spec(denoiser, walk, shape, wishes.sizes)
    if other is not None:
        spec = _over_latents(spec, other, bundles.read(written[0]).model)
    whole = record | {"notes": walk.notes}
    written.append(package(spec, origin(class_names=classes, record=whole), name=wishes.name))
    return written, walk.notes


@dataclass(frozen=True)
class _Said:
    """What a pipeline's model card says of its origin."""

    license: str = licenses.UNKNOWN  # SPDX expression
    dataset: str = ""


def _model_card(folder: Path) -> _Said:
    """The head of `README.md`, where a hub keeps such things.

    Raises:
        ImportingError: there is one, but it cannot be read.
    """
    path = folder / "README.md"
    if not path.exists():
        return _Said()
    try:
        said = ModelCard.load(path).data
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ImportingError(f"{path}: is no model card: {' '.join(str(error).split())}") from error
    datasets = [said.datasets] if isinstance(said.datasets, str) else said.datasets or []
    return _Said(_hub_license(said.license, said.license_name), ", ".join(datasets))


def _hub_license(identifier: str | None, name: str | None) -> str:
    """A hub's word for a licence as an SPDX expression; it has words for some that SPDX does not list."""
    if not identifier or identifier == "unknown":
        return licenses.UNKNOWN
    if identifier == "other":
        return f"LicenseRef-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}" if name else licenses.UNKNOWN
    try:
        return licenses.canonical(identifier)
    except ValueError:
        return f"LicenseRef-{re.sub(r'[^A-Za-z0-9.-]+', '-', identifier)}"


def _parts(folder: Path) -> dict[str, str]:
    """Class names by part of the pipeline."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ImportingError(f"{path}: cannot be read: {error.strerror}; must be a pipeline's folder") from error
    except ValueError as error:
        raise ImportingError(f"{path}: is not JSON: {error}") from error
    parts = {key: value[1] for key, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]}
    problems = []
    if parts.get("unet") != "UNet2DModel":
        problems.append(f"unet: must be a UNet2DModel, is {parts.get('unet', 'absent')}")
    if "scheduler" not in parts:
        problems.append("scheduler: must be there")
    for part, kind in parts.items():
        if part in _AUTOENCODER_PARTS and kind not in _AUTOENCODERS:
            problems.append(f"{part}: must be one of {', '.join(_AUTOENCODERS)}, is {kind}")
        elif part not in ("unet", "scheduler", *_AUTOENCODER_PARTS):
            problems.append(f"{part}: {kind} cannot be served; a UNet2DModel, a scheduler and an autoencoder can")
    if problems:
        raise ImportingError("\n".join(f"{path.name}: {problem}" for problem in problems))
    return parts


def _loaded(kind: str, folder: Path) -> Any:
    try:
        return (
            getattr(diffusers, kind)
            .from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False)
            .eval()
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ImportingError(f"{folder.name}: cannot be loaded: {' '.join(str(error).split())}") from error


def _unet(folder: Path, parts: dict[str, str]) -> Any:
    unet = _loaded(parts["unet"], folder / "unet")
    config = unet.config
    problems = []
    if config.in_channels != config.out_channels:
        problems.append(
            f"takes {config.in_channels} channels and gives {config.out_channels}; it must predict what it is given, "
            "without learned variances"
        )
    if config.time_embedding_type == "fourier":
        problems.append("is told noise levels (fourier time embedding); it must be told timesteps")
    if config.class_embed_type is not None:
        problems.append(f"class_embed_type {config.class_embed_type!r}: must be absent, for classes by number")
    if problems:
        raise ImportingError("\n".join(f"unet: {problem}" for problem in problems))
    return unet


def _autoencoder(folder: Path, parts: dict[str, str]) -> Any | None:
    part = next((part for part in _AUTOENCODER_PARTS if part in parts), None)
    if part is None:
        return None
    autoencoder = _loaded(parts[part], folder / part)
    if autoencoder.config.get("latents_mean") is not None:
        raise ImportingError(f"{part}: latents with a mean and deviation for each channel cannot be served")
    return autoencoder


def _class_names(unet: Any, wishes: Wishes) -> tuple[str, ...]:
    rows, none = unet.config.num_class_embeds or 0, wishes.unconditional_class
    problems = []
    if none is not None and not 0 <= none < rows:
        problems.append(f"the unconditional class must be one of the network's {rows} classes, from 0; got {none}")
    count = rows - (none is not None)
    if wishes.class_names and len(wishes.class_names) != count:
        problems.append(f"{len(wishes.class_names)} class names for {count} classes")
    if problems:
        raise ImportingError("\n".join(problems))
    return wishes.class_names or tuple(map(str, range(count)))


def _shape(unet: Any, wishes: Wishes) -> tuple[int, int, int]:
    size = wishes.size or unet.config.sample_size
    if size is None:
        raise ImportingError("unet: does not say the size of its samples; give one")
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def _denoiser_spec(
    denoiser: Denoiser,
    walk: diffusers_schedulers.Walk,
    shape: tuple[int, int, int],
    sizes: tuple[tuple[int, int], ...],
) -> ServingSpec:
    label = GraphInput("label", Source.SOURCE_CLASS_LABEL, (), tensor_pb2.DATA_TYPE_INT64)
    graph = Graph(
        role=Role.ROLE_DENOISER,
        module=denoiser,
        inputs=(
            GraphInput("sample", Source.SOURCE_SAMPLE, shape),
            GraphInput("timestep", Source.SOURCE_TIMESTEP, (), tensor_pb2.DATA_TYPE_INT64),
            *([label] if denoiser.has_classes else []),
        ),
        outputs=(GraphOutput("prediction", Meaning.MEANING_PREDICTION, shape),),
    )
    walk.spec.guidance_supported = denoiser.unconditional_class is not None
    bound = walk.clip_range or 1.0
    return ServingSpec(
        family=model_pb2.Model.FAMILY_DIFFUSION,
        graphs=(graph,),
        methods=(
            model_pb2.Model.METHOD_SAMPLE,
            model_pb2.Model.METHOD_ENCODE,
            model_pb2.Model.METHOD_DECODE,
            model_pb2.Model.METHOD_DENOISE,
            model_pb2.Model.METHOD_SCORE,
        ),
        sample_shape=shape,
        sample_sizes=sizes,
        latent_shape=shape,
        description="Denoising diffusion model, imported from a diffusers pipeline.",
        reference_uri="https://arxiv.org/abs/2006.11239",
        diffusion=walk.spec,
        sample_range=(-bound, bound),
        sample_levels=256 if bound == 1 else 0,  # diffusers' images are bytes, mapped to -1 .. 1
    )


def _over_latents(spec: ServingSpec, autoencoder: ServingSpec, served: model_pb2.Model) -> ServingSpec:
    """What walks over latents of an autoencoder, whose graphs hold scale and shift; clipping alone bounds latents."""
    return replace(
        spec,
        methods=tuple(method for method in spec.methods if method != model_pb2.Model.METHOD_SCORE),
        sample_levels=0,
        sample_shape=autoencoder.sample_shape,
        sample_range=autoencoder.sample_range,
        latent_range=spec.sample_range if spec.diffusion is not None and spec.diffusion.clip_denoised else None,
        latent_space=model_pb2.LatentSpace(decoder=served.name, decoder_digest=served.digest),
        description="Latent diffusion model, imported from a diffusers pipeline.",
        reference_uri="https://arxiv.org/abs/2112.10752",
        likelihood=no_likelihood(OF_LATENTS),
    )


def _autoencoder_spec(autoencoder: Any, latent: tuple[int, int, int]) -> ServingSpec:
    config = autoencoder.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    shape = (config.in_channels, factor * latent[1], factor * latent[2])
    encoder = LatentEncoder(autoencoder)
    mean = GraphOutput("latent_mean", Meaning.MEANING_LATENT_MEAN, latent)
    log_variance = GraphOutput("latent_log_variance", Meaning.MEANING_LATENT_LOG_VARIANCE, latent)
    graphs = (
        Graph(
            role=Role.ROLE_DECODER,
            module=LatentDecoder(autoencoder),
            inputs=(GraphInput("latent", Source.SOURCE_LATENT, latent),),
            outputs=(GraphOutput("image", Meaning.MEANING_SAMPLE, shape),),
        ),
        Graph(
            role=Role.ROLE_ENCODER,
            module=encoder,
            inputs=(GraphInput("sample", Source.SOURCE_SAMPLE, shape),),
            outputs=(mean, log_variance) if encoder.variational else (mean,),
        ),
    )
    return ServingSpec(
        family=model_pb2.Model.FAMILY_VAE,
        graphs=graphs,
        # No Sample: latents follow the diffusion model beside it, not N(0, I).
        methods=(model_pb2.Model.METHOD_ENCODE, model_pb2.Model.METHOD_DECODE),
        sample_shape=shape,
        latent_shape=latent,
        description="Autoencoder of a latent diffusion model, imported from a diffusers pipeline.",
        reference_uri="https://arxiv.org/abs/2112.10752",
        likelihood=no_likelihood(
            "It was trained to look right and not to a likelihood of pixels; p(latent) is beside it."
        ),
        answers={
            model_pb2.Model.METHOD_SAMPLE: "its latents follow the diffusion model beside it and no prior of its own"
        },
    )
