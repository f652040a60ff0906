"""Diffusion over the latents of the tiny VAE, and the same walk without a decoder, to hold it against."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bundles import CLASSES, F32, I64, IN, LATENT, NET, OUT, SHAPE, TIMESTEPS, add_network, begin, spec_of, write_bundle
from google.protobuf.json_format import Parse
from latentd.names import BUNDLE_FILE, SAMPLERS
from latentd.v1 import bundle_pb2, model_pb2
from onnx import helper

SCALES, SHIFTS = (0.5, 1.5, 0.75), (0.25, -0.5, 0.0)
CLIP = 4.0


def write_latent_diffusion(
    root: Path,
    name: str = "tiny-latents",
    decoder: str = "tiny-vae@1",
    *,
    joined: bool = True,
    digest: str | None = None,
    scales: Sequence[float] = SCALES,
    shifts: Sequence[float] = SHIFTS,
    latent: int = LATENT,
    classes: Sequence[str] = CLASSES,
    methods: Sequence[int] = (),
) -> Path:
    """A denoiser of vectors. `joined` says that they are latents of `decoder`, whose bundle lies under `root`."""
    directory = begin(root, name, 1)
    generator = np.random.default_rng(7)
    weights: dict[str, Any] = {
        each: (generator.standard_normal(shape) / 2).astype(np.float32)
        for each, shape in {
            "w1": (latent, 16),
            "w2": (16, latent),
            "times": (TIMESTEPS, 16),
            "labels": (len(classes) + 1, 16),
        }.items()
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["hidden"]),
        helper.make_node("Gather", ["times", "t"], ["time"]),
        helper.make_node("Add", ["y", "one"], ["row"]),
        helper.make_node("Gather", ["labels", "row"], ["label"]),
        helper.make_node("Sum", ["hidden", "time", "label"], ["total"]),
        helper.make_node("Tanh", ["total"], ["active"]),
        helper.make_node("MatMul", ["active", "w2"], ["prediction"]),
    ]
    network = add_network(
        directory,
        NET.ROLE_DENOISER,
        nodes,
        [
            ("x", IN.SOURCE_SAMPLE, F32, (latent,)),
            ("t", IN.SOURCE_TIMESTEP, I64, ()),
            ("y", IN.SOURCE_CLASS_LABEL, I64, ()),
        ],
        [("prediction", OUT.MEANING_PREDICTION, (latent,))],
        weights | {"one": np.array(1, np.int64)},
    )
    angle = (np.arange(TIMESTEPS) + 1) / (TIMESTEPS + 1) * np.pi / 2
    model = model_pb2.Model(
        name=f"{name}@1",
        family=model_pb2.Model.FAMILY_DIFFUSION,
        methods=methods
        or [
            model_pb2.Model.METHOD_SAMPLE,
            model_pb2.Model.METHOD_ENCODE,
            model_pb2.Model.METHOD_DECODE,
            model_pb2.Model.METHOD_DENOISE,
        ],
        sample_spec=spec_of(SHAPE, -1, 1) if joined else spec_of((latent,), -CLIP, CLIP),
        latent_spec=spec_of((latent,), -CLIP, CLIP) if joined else spec_of((latent,)),
        class_names=classes,
        diffusion=model_pb2.DiffusionSpec(
            alphas=np.cos(angle),
            sigmas=np.sin(angle),
            samplers=SAMPLERS,
            prediction=model_pb2.DiffusionSpec.PREDICTION_V,
            clip_denoised=True,
            default_step_count=10,
            guidance_supported=True,
        ),
    )
    if joined:
        model.latent_space.CopyFrom(model_pb2.LatentSpace(decoder=decoder, scales=scales, shifts=shifts))
        model.latent_space.decoder_digest = _digest(root, decoder) if digest is None else digest
    return write_bundle(directory, model, [network])


def _digest(root: Path, reference: str) -> str:
    text = (root / reference.replace("@", "/") / BUNDLE_FILE).read_text()
    return Parse(text, bundle_pb2.Bundle()).model.digest
