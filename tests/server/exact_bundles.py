"""Bundles whose networks compute exactly: their sums come out the same in any order, so on any machine.

Inputs are rounded to eighths, weights are small integers, and what is divided is divided by powers of two, so that
every product and every sum is a number that float32 holds. Around the network the server uses exactly rounded
operations, one at a time.
"""

from pathlib import Path
from typing import Any

import numpy as np
from bundles import (
    CLASSES,
    F32,
    I64,
    IN,
    LATENT,
    NET,
    OUT,
    SHAPE,
    TIMESTEPS,
    add_network,
    begin,
    image_shape,
    spec_of,
    write_bundle,
)
from latentd.names import SAMPLERS
from latentd.v1 import model_pb2
from onnx import helper

HIDDEN = 32


def _integers(rows: int, columns: int, salt: int, most: int) -> Any:
    """[rows, columns] f32 of integers from -most to most, mixed by arithmetic alone."""
    i, j = np.indices((rows, columns))
    return ((7 * i * i + 11 * j + 3 * i * j + salt * (i + 2 * j)) % (2 * most + 1) - most).astype(np.float32)


def _rounded(value: str, out: str) -> list[Any]:
    """Integers from -32 to 32: eighths of `value`, rounded half to even."""
    return [
        helper.make_node("Mul", [value, "eight"], [f"{out}_scaled"]),
        helper.make_node("Round", [f"{out}_scaled"], [f"{out}_whole"]),
        helper.make_node("Clip", [f"{out}_whole", "least", "most"], [out]),
    ]


_ROUNDING = {"eight": np.float32(8), "least": np.float32(-32), "most": np.float32(32)}


def write_exact_diffusion(root: Path, order: Any = None, name: str = "exact-diffusion") -> Path:
    """A denoiser with one hidden layer; `order` is a permutation of its units, which must not matter."""
    directory = begin(root, name, 1)
    units = np.arange(HIDDEN) if order is None else order
    weights = {
        "w1": _integers(16, HIDDEN, 1, 4)[:, units],
        "times": _integers(TIMESTEPS, HIDDEN, 2, 60)[:, units],
        "labels": _integers(len(CLASSES) + 1, HIDDEN, 3, 60)[:, units],
        "w2": _integers(HIDDEN, 16, 4, 3)[units],
        "sixteenth": np.float32(1 / 16),
        "small": np.float32(1 / 1024),
        "one": np.array(1, np.int64),
    }
    nodes = [
        helper.make_node("Reshape", ["x", "to_flat"], ["flat"]),
        *_rounded("flat", "seen"),
        helper.make_node("MatMul", ["seen", "w1"], ["hidden"]),
        helper.make_node("Gather", ["times", "t"], ["time"]),
        helper.make_node("Add", ["y", "one"], ["row"]),
        helper.make_node("Gather", ["labels", "row"], ["label"]),
        helper.make_node("Sum", ["hidden", "time", "label"], ["total"]),
        helper.make_node("Mul", ["total", "sixteenth"], ["scaled"]),
        *_rounded("scaled", "active"),
        helper.make_node("MatMul", ["active", "w2"], ["out"]),
        helper.make_node("Mul", ["out", "small"], ["sized"]),
        helper.make_node("Reshape", ["sized", "to_image"], ["prediction"]),
    ]
    denoiser = add_network(
        directory,
        NET.ROLE_DENOISER,
        nodes,
        [
            ("x", IN.SOURCE_SAMPLE, F32, SHAPE),
            ("t", IN.SOURCE_TIMESTEP, I64, ()),
            ("y", IN.SOURCE_CLASS_LABEL, I64, ()),
        ],
        [("prediction", OUT.MEANING_PREDICTION, SHAPE)],
        weights | image_shape() | _ROUNDING,
    )
    slope = (np.arange(TIMESTEPS) + 1) / (TIMESTEPS + 1)  # of a point on the circle: rational, so no library's cosine
    model = model_pb2.Model(
        name=f"{name}@1",
        family=model_pb2.Model.FAMILY_DIFFUSION,
        methods=[model_pb2.Model.METHOD_SAMPLE],
        sample_spec=spec_of(SHAPE, -1, 1),
        latent_spec=spec_of(SHAPE),
        class_names=CLASSES,
        diffusion=model_pb2.DiffusionSpec(
            alphas=(1 - slope**2) / (1 + slope**2),
            sigmas=2 * slope / (1 + slope**2),
            samplers=SAMPLERS,
            prediction=model_pb2.DiffusionSpec.PREDICTION_V,
            clip_denoised=True,
            default_step_count=10,
            guidance_supported=True,
        ),
    )
    return write_bundle(directory, model, [denoiser])


def write_exact_vae(root: Path, name: str = "exact-vae") -> Path:
    """A decoder with a mean and a draw, and an encoder."""
    directory = begin(root, name, 1)
    decoder = add_network(
        directory,
        NET.ROLE_DECODER,
        [
            *_rounded("z", "seen"),
            helper.make_node("MatMul", ["seen", "w"], ["hidden"]),
            helper.make_node("Gather", ["labels", "y"], ["label"]),
            helper.make_node("Add", ["hidden", "label"], ["total"]),
            helper.make_node("Mul", ["total", "small"], ["sized"]),
            helper.make_node("Clip", ["sized", "minus", "plus"], ["flat"]),
            helper.make_node("Reshape", ["flat", "to_image"], ["sample"]),
            helper.make_node("Less", ["u", "half"], ["low"]),
            helper.make_node("Where", ["low", "minus", "plus"], ["sign"]),
            helper.make_node("Mul", ["sample", "sign"], ["draw"]),
        ],
        [
            ("z", IN.SOURCE_LATENT, F32, (LATENT,)),
            ("y", IN.SOURCE_CLASS_LABEL, I64, ()),
            ("u", IN.SOURCE_UNIFORM_NOISE, F32, SHAPE),
        ],
        [("sample", OUT.MEANING_SAMPLE, SHAPE), ("draw", OUT.MEANING_SAMPLE_DRAW, SHAPE)],
        {
            "w": _integers(LATENT, 16, 5, 4),
            "labels": _integers(len(CLASSES), 16, 6, 40),
            "small": np.float32(1 / 128),
            "half": np.float32(0.5),
            "minus": np.float32(-1),
            "plus": np.float32(1),
            "to_image": image_shape()["to_image"],
        }
        | _ROUNDING,
    )
    encoder = add_network(
        directory,
        NET.ROLE_ENCODER,
        [
            helper.make_node("Reshape", ["x", "to_flat"], ["flat"]),
            *_rounded("flat", "seen"),
            helper.make_node("MatMul", ["seen", "w_mean"], ["whole_mean"]),
            helper.make_node("Mul", ["whole_mean", "small"], ["mean"]),
            helper.make_node("MatMul", ["seen", "w_variance"], ["whole_variance"]),
            helper.make_node("Mul", ["whole_variance", "small"], ["log_variance"]),
        ],
        [("x", IN.SOURCE_SAMPLE, F32, SHAPE)],
        [
            ("mean", OUT.MEANING_LATENT_MEAN, (LATENT,)),
            ("log_variance", OUT.MEANING_LATENT_LOG_VARIANCE, (LATENT,)),
        ],
        {
            "w_mean": _integers(16, LATENT, 7, 4),
            "w_variance": _integers(16, LATENT, 8, 4),
            "small": np.float32(1 / 128),
            "to_flat": image_shape()["to_flat"],
        }
        | _ROUNDING,
    )
    model = model_pb2.Model(
        name=f"{name}@1",
        family=model_pb2.Model.FAMILY_VAE,
        methods=[model_pb2.Model.METHOD_SAMPLE, model_pb2.Model.METHOD_ENCODE, model_pb2.Model.METHOD_DECODE],
        sample_spec=spec_of(SHAPE, -1, 1),
        latent_spec=spec_of((LATENT,)),
        class_names=CLASSES,
        class_probabilities=[0.5, 0.25, 0.25],
    )
    return write_bundle(directory, model, [decoder, encoder])
