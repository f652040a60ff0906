"""Tiny bundles made with the onnx helper alone: a diffusion model, a VAE and a GAN of 4x4 images in three classes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.json_format import MessageToJson
from latentd.digest import bundle_digest
from latentd.names import BUNDLE_FILE, BUNDLE_FORMAT_VERSION, SAMPLERS
from latentd.v1 import bundle_pb2, model_pb2, tensor_pb2
from onnx import TensorProto, helper, numpy_helper

SHAPE = (1, 4, 4)
LATENT = 3
CLASSES = ("zero", "one", "two")
TIMESTEPS = 100

F32 = TensorProto.FLOAT
I64 = TensorProto.INT64
IN = bundle_pb2.NetworkInput
OUT = bundle_pb2.NetworkOutput
NET = bundle_pb2.Network

Inputs = Sequence[tuple[str, int, int, tuple[int, ...]]]  # name, source, onnx type, shape
Outputs = Sequence[tuple[str, int, tuple[int, ...]]]  # name, meaning, shape


def _graph(nodes: list[Any], inputs: Inputs, outputs: Outputs, weights: dict[str, Any]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, dtype, ("batch", *shape)) for name, _, dtype, shape in inputs],
        [helper.make_tensor_value_info(name, F32, ("batch", *shape)) for name, _, shape in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def add_network(
    directory: Path, role: int, nodes: list[Any], inputs: Inputs, outputs: Outputs, weights: dict[str, Any]
):
    name = NET.Role.Name(role).removeprefix("ROLE_").lower() + ".onnx"
    data = _graph(nodes, inputs, outputs, weights)
    (directory / name).write_bytes(data)
    network = NET(role=role, file=name, sha256=hashlib.sha256(data).hexdigest())
    for input_name, source, dtype, shape in inputs:
        data_type = tensor_pb2.DATA_TYPE_INT64 if dtype == I64 else tensor_pb2.DATA_TYPE_FLOAT32
        spec = model_pb2.TensorSpec(data_type=data_type, shape=shape)
        network.inputs.add(name=input_name, source=source, spec=spec)
    for output_name, meaning, shape in outputs:
        spec = model_pb2.TensorSpec(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=shape)
        network.outputs.add(name=output_name, meaning=meaning, spec=spec)
    return network


def spec_of(shape: Sequence[int], low: float = 0.0, high: float = 0.0) -> model_pb2.TensorSpec:
    """A float32 value of this shape and range."""
    return model_pb2.TensorSpec(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=shape, min_value=low, max_value=high)


def write_bundle(directory: Path, model: model_pb2.Model, networks: Sequence[bundle_pb2.Network]) -> Path:
    """Write bundle.json beside its graphs; the directory."""
    bundle = bundle_pb2.Bundle(format_version=BUNDLE_FORMAT_VERSION, model=model, networks=networks)
    bundle.model.digest = bundle_digest(bundle)
    (directory / BUNDLE_FILE).write_text(MessageToJson(bundle))
    return directory


def _weights(seed: int, **shapes: tuple[int, ...]) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {name: (generator.standard_normal(shape) / 3).astype(np.float32) for name, shape in shapes.items()}


def begin(root: Path, name: str, version: int) -> Path:
    """Make the directory of a bundle."""
    directory = root / name / str(version)
    directory.mkdir(parents=True)
    return directory


def image_shape() -> dict[str, Any]:
    """Constants that reshape to images and to rows."""
    return {"to_image": np.array([-1, *SHAPE], np.int64), "to_flat": np.array([-1, 16], np.int64)}


def _leak(value: str, out: str, leaky: bool) -> list[Any]:
    """Takes the mean over the batch away, so that rows see each other, or nothing."""
    if not leaky:
        return [helper.make_node("Identity", [value], [out])]
    return [
        helper.make_node("ReduceMean", [value, "batch_axis"], ["batch_mean"], keepdims=1),
        helper.make_node("Sub", [value, "batch_mean"], [out]),
    ]


def write_diffusion(
    root: Path,
    name: str = "tiny-diffusion",
    version: int = 1,
    *,
    prediction: int = 2,
    guidance: bool = True,
    seed: int = 0,
    leaky: bool = False,
) -> Path:
    """A denoiser of one hidden layer: two Gemms around tanh, a timestep table and a label table (row 0 is -1).

    A leaky one takes the mean over the batch away.
    """
    directory = begin(root, name, version)
    weights = _weights(seed, w1=(16, 32), w2=(32, 16), times=(TIMESTEPS, 32), labels=(len(CLASSES) + 1, 32))
    nodes = [
        helper.make_node("Reshape", ["x", "to_flat"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w1"], ["hidden"]),
        helper.make_node("Gather", ["times", "t"], ["time"]),
        helper.make_node("Add", ["y", "one"], ["row"]),
        helper.make_node("Gather", ["labels", "row"], ["label"]),
        helper.make_node("Sum", ["hidden", "time", "label"], ["total"]),
        helper.make_node("Tanh", ["total"], ["active"]),
        helper.make_node("MatMul", ["active", "w2"], ["out"]),
        *_leak("out", "kept", leaky),
        helper.make_node("Reshape", ["kept", "to_image"], ["prediction"]),
    ]
    network = add_network(
        directory,
        NET.ROLE_DENOISER,
        nodes,
        [
            ("x", IN.SOURCE_SAMPLE, F32, SHAPE),
            ("t", IN.SOURCE_TIMESTEP, I64, ()),
            ("y", IN.SOURCE_CLASS_LABEL, I64, ()),
        ],
        [("prediction", OUT.MEANING_PREDICTION, SHAPE)],
        weights | image_shape() | {"one": np.array(1, np.int64), "batch_axis": np.array([0], np.int64)},
    )
    angle = (np.arange(TIMESTEPS) + 1) / (TIMESTEPS + 1) * np.pi / 2
    model = model_pb2.Model(
        name=f"{name}@{version}",
        family=model_pb2.Model.FAMILY_DIFFUSION,
        methods=[
            model_pb2.Model.METHOD_SAMPLE,
            model_pb2.Model.METHOD_ENCODE,
            model_pb2.Model.METHOD_DECODE,
            model_pb2.Model.METHOD_DENOISE,
            model_pb2.Model.METHOD_SCORE,
        ],
        sample_spec=spec_of(SHAPE, -1, 1),
        latent_spec=spec_of(SHAPE),
        class_names=CLASSES,
        class_probabilities=[0.5, 0.25, 0.25],
        diffusion=model_pb2.DiffusionSpec(
            alphas=np.cos(angle),
            sigmas=np.sin(angle),
            samplers=SAMPLERS,
            prediction=prediction,
            clip_denoised=True,
            default_step_count=10,
            guidance_supported=guidance,
        ),
    )
    return write_bundle(directory, model, [network])


def write_vae(root: Path, name: str = "tiny-vae", version: int = 1, seed: int = 1) -> Path:
    """Decoder with a mean and a draw, label-free encoder, one-draw bound."""
    directory = begin(root, name, version)
    decode = [
        helper.make_node("MatMul", ["z", "w"], ["hidden"]),
        helper.make_node("Gather", ["labels", "y"], ["label"]),
        helper.make_node("Add", ["hidden", "label"], ["total"]),
        helper.make_node("Tanh", ["total"], ["flat"]),
        helper.make_node("Reshape", ["flat", "to_image"], ["sample"]),
    ]
    draw = [
        helper.make_node("Less", ["u", "half"], ["low"]),
        helper.make_node("Where", ["low", "minus", "plus"], ["sign"]),
        helper.make_node("Mul", ["sample", "sign"], ["draw"]),
    ]
    weights = _weights(seed, w=(LATENT, 16), labels=(len(CLASSES), 16))
    constants = {"half": np.float32(0.5), "minus": np.float32(-1), "plus": np.float32(1)}
    decoder = add_network(
        directory,
        NET.ROLE_DECODER,
        decode + draw,
        [
            ("z", IN.SOURCE_LATENT, F32, (LATENT,)),
            ("y", IN.SOURCE_CLASS_LABEL, I64, ()),
            ("u", IN.SOURCE_UNIFORM_NOISE, F32, SHAPE),
        ],
        [("sample", OUT.MEANING_SAMPLE, SHAPE), ("draw", OUT.MEANING_SAMPLE_DRAW, SHAPE)],
        weights | constants | {"to_image": image_shape()["to_image"]},
    )
    encoder = add_network(
        directory,
        NET.ROLE_ENCODER,
        [
            helper.make_node("Reshape", ["x", "to_flat"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w_mean"], ["mean"]),
            helper.make_node("MatMul", ["flat", "w_log_variance"], ["log_variance"]),
        ],
        [("x", IN.SOURCE_SAMPLE, F32, SHAPE)],
        [
            ("mean", OUT.MEANING_LATENT_MEAN, (LATENT,)),
            ("log_variance", OUT.MEANING_LATENT_LOG_VARIANCE, (LATENT,)),
        ],
        _weights(seed + 1, w_mean=(16, LATENT), w_log_variance=(16, LATENT)) | {"to_flat": image_shape()["to_flat"]},
    )
    scorer = add_network(
        directory,
        NET.ROLE_SCORER,
        [
            *decode,
            helper.make_node("Sub", ["x", "sample"], ["difference"]),
            helper.make_node("Mul", ["difference", "difference"], ["square"]),
            helper.make_node("ReduceSum", ["square", "image_axes"], ["distance"], keepdims=0),
            helper.make_node("Neg", ["distance"], ["bound"]),
        ],
        [
            ("x", IN.SOURCE_SAMPLE, F32, SHAPE),
            ("y", IN.SOURCE_CLASS_LABEL, I64, ()),
            ("z", IN.SOURCE_NORMAL_NOISE, F32, (LATENT,)),
        ],
        [("bound", OUT.MEANING_EVIDENCE_LOWER_BOUND, ())],
        weights | {"to_image": image_shape()["to_image"], "image_axes": np.array([1, 2, 3], np.int64)},
    )
    model = model_pb2.Model(
        name=f"{name}@{version}",
        family=model_pb2.Model.FAMILY_VAE,
        methods=[
            model_pb2.Model.METHOD_SAMPLE,
            model_pb2.Model.METHOD_ENCODE,
            model_pb2.Model.METHOD_DECODE,
            model_pb2.Model.METHOD_SCORE,
        ],
        sample_spec=spec_of(SHAPE, -1, 1),
        latent_spec=spec_of((LATENT,)),
        class_names=CLASSES,
        class_probabilities=[0.5, 0.25, 0.25],
    )
    return write_bundle(directory, model, [decoder, encoder, scorer])


def write_gan(root: Path, name: str = "tiny-gan", version: int = 1, seed: int = 3, *, leaky: bool = False) -> Path:
    """Generator and discriminator of one layer each. A leaky generator takes the mean over the batch away."""
    directory = begin(root, name, version)
    generator = add_network(
        directory,
        NET.ROLE_DECODER,
        [
            helper.make_node("MatMul", ["z", "w"], ["hidden"]),
            helper.make_node("Gather", ["labels", "y"], ["label"]),
            helper.make_node("Add", ["hidden", "label"], ["total"]),
            helper.make_node("Tanh", ["total"], ["flat"]),
            *_leak("flat", "kept", leaky),
            helper.make_node("Reshape", ["kept", "to_image"], ["sample"]),
        ],
        [("z", IN.SOURCE_LATENT, F32, (LATENT,)), ("y", IN.SOURCE_CLASS_LABEL, I64, ())],
        [("sample", OUT.MEANING_SAMPLE, SHAPE)],
        _weights(seed, w=(LATENT, 16), labels=(len(CLASSES), 16))
        | {"to_image": image_shape()["to_image"], "batch_axis": np.array([0], np.int64)},
    )
    discriminator = add_network(
        directory,
        NET.ROLE_SCORER,
        [
            helper.make_node("Reshape", ["x", "to_flat"], ["flat"]),
            helper.make_node("Gather", ["labels", "y"], ["label"]),
            helper.make_node("Mul", ["flat", "label"], ["product"]),
            helper.make_node("ReduceSum", ["product", "axis"], ["logit"], keepdims=0),
            helper.make_node("Sigmoid", ["logit"], ["real"]),
        ],
        [("x", IN.SOURCE_SAMPLE, F32, SHAPE), ("y", IN.SOURCE_CLASS_LABEL, I64, ())],
        [("real", OUT.MEANING_REAL_PROBABILITY, ())],
        _weights(seed + 1, labels=(len(CLASSES), 16))
        | {"to_flat": image_shape()["to_flat"], "axis": np.array([1], np.int64)},
    )
    model = model_pb2.Model(
        name=f"{name}@{version}",
        family=model_pb2.Model.FAMILY_GAN,
        methods=[model_pb2.Model.METHOD_SAMPLE, model_pb2.Model.METHOD_DECODE, model_pb2.Model.METHOD_SCORE],
        sample_spec=spec_of(SHAPE, -1, 1),
        latent_spec=spec_of((LATENT,)),
        class_names=CLASSES,
    )
    return write_bundle(directory, model, [generator, discriminator])


def write_echo(root: Path, name: str = "tiny-echo", version: int = 1) -> Path:
    """Binary latents with a uniform prior; a decoder and an encoder that show the noise their inputs were fed."""
    directory = begin(root, name, version)
    decoder = add_network(
        directory,
        NET.ROLE_DECODER,
        [
            helper.make_node("Concat", ["z", "u", "n", "v"], ["flat"], axis=1),
            helper.make_node("Reshape", ["flat", "to_image"], ["sample"]),
        ],
        [
            ("z", IN.SOURCE_LATENT, F32, (4,)),
            ("u", IN.SOURCE_UNIFORM_NOISE, F32, (4,)),
            ("n", IN.SOURCE_NORMAL_NOISE, F32, (4,)),
            ("v", IN.SOURCE_UNIFORM_NOISE, F32, (4,)),
        ],
        [("sample", OUT.MEANING_SAMPLE, SHAPE)],
        {"to_image": image_shape()["to_image"]},
    )
    encoder = add_network(
        directory,
        NET.ROLE_ENCODER,
        [
            helper.make_node("Reshape", ["x", "to_flat"], ["flat"]),
            helper.make_node("Mul", ["flat", "zero"], ["nothing"]),
            helper.make_node("ReduceSum", ["nothing", "axis"], ["offset"], keepdims=1),
            helper.make_node("Add", ["u", "offset"], ["probability"]),
        ],
        [("x", IN.SOURCE_SAMPLE, F32, SHAPE), ("u", IN.SOURCE_UNIFORM_NOISE, F32, (4,))],
        [("probability", OUT.MEANING_LATENT_PROBABILITY, (4,))],
        {"to_flat": image_shape()["to_flat"], "zero": np.float32(0), "axis": np.array([1], np.int64)},
    )
    model = model_pb2.Model(
        name=f"{name}@{version}",
        family=model_pb2.Model.FAMILY_SIGMOID_BELIEF_NET,
        methods=[model_pb2.Model.METHOD_SAMPLE, model_pb2.Model.METHOD_ENCODE, model_pb2.Model.METHOD_DECODE],
        sample_spec=spec_of(SHAPE, -1, 1),
        latent_spec=spec_of((4,), 0, 1),
    )
    return write_bundle(directory, model, [decoder, encoder])


def write_all(root: Path) -> Path:
    """One bundle of each family under `root`, which is returned."""
    write_diffusion(root)
    write_vae(root)
    write_gan(root)
    return root
