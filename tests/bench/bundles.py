"""Networks of known, small cost with random weights: what serving adds shows on them as it cannot on larger ones.

Neither is trained, which makes no difference to what a call costs.
"""

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.json_format import MessageToJson
from latentd.digest import bundle_digest
from latentd.names import BUNDLE_FILE, BUNDLE_FORMAT_VERSION
from latentd.v1 import bundle_pb2, model_pb2, tensor_pb2
from onnx import TensorProto, helper, numpy_helper

TINY_VAE = "tiny-vae"
"""A decoder of three layers, latent 16, 256 hidden units, image 1x8x8: about a microsecond a row."""

GENERATOR = "generator"
"""Latent 64, one dense layer and seven convolutions of 64 channels, image 1x8x8: about 130 us a row."""

_LATENTS = {TINY_VAE: 16, GENERATOR: 64}
_SHAPE = (1, 8, 8)
_HIDDEN = 256
_CHANNELS, _CONVOLUTIONS = 64, 6


def write(root: Path, name: str) -> Path:
    """Write one of them as a bundle under `root`, where there is none yet; its directory."""
    directory = root / name / "1"
    if (directory / BUNDLE_FILE).exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    latent, shape = _LATENTS[name], _SHAPE
    data = _dense(latent) if name == TINY_VAE else _convolutional(latent)
    (directory / "decoder.onnx").write_bytes(data)
    network = bundle_pb2.Network(
        role=bundle_pb2.Network.ROLE_DECODER, file="decoder.onnx", sha256=hashlib.sha256(data).hexdigest()
    )
    spec = {"data_type": tensor_pb2.DATA_TYPE_FLOAT32}
    network.inputs.add(
        name="z", source=bundle_pb2.NetworkInput.SOURCE_LATENT, spec=model_pb2.TensorSpec(shape=[latent], **spec)
    )
    network.outputs.add(
        name="image", meaning=bundle_pb2.NetworkOutput.MEANING_SAMPLE, spec=model_pb2.TensorSpec(shape=shape, **spec)
    )
    bundle = bundle_pb2.Bundle(
        format_version=BUNDLE_FORMAT_VERSION,
        model=model_pb2.Model(
            name=f"{name}@1",
            family=model_pb2.Model.FAMILY_VAE if name == TINY_VAE else model_pb2.Model.FAMILY_GAN,
            methods=[model_pb2.Model.METHOD_SAMPLE, model_pb2.Model.METHOD_DECODE],
            sample_spec=model_pb2.TensorSpec(shape=shape, min_value=-1, max_value=1, **spec),
            latent_spec=model_pb2.TensorSpec(shape=[latent], **spec),
        ),
        networks=[network],
    )
    bundle.model.digest = bundle_digest(bundle)
    (directory / BUNDLE_FILE).write_text(MessageToJson(bundle))
    return directory


def _dense(latent: int) -> bytes:
    """Three layers of MatMul, the last through tanh into an image."""
    widths = (latent, _HIDDEN, _HIDDEN, int(np.prod(_SHAPE)))
    weights = {f"w{index}": _weights(index, *shape) for index, shape in enumerate(itertools.pairwise(widths))}
    nodes = [
        helper.make_node("MatMul", ["z", "w0"], ["a0"]),
        helper.make_node("Relu", ["a0"], ["h0"]),
        helper.make_node("MatMul", ["h0", "w1"], ["a1"]),
        helper.make_node("Relu", ["a1"], ["h1"]),
        helper.make_node("MatMul", ["h1", "w2"], ["a2"]),
        helper.make_node("Tanh", ["a2"], ["flat"]),
        helper.make_node("Reshape", ["flat", "to_image"], ["image"]),
    ]
    return _graph(nodes, latent, weights | {"to_image": np.array([-1, *_SHAPE], np.int64)})


def _convolutional(latent: int) -> bytes:
    """One dense layer to 64 channels, then convolutions, the last to an image through tanh."""
    height, width = _SHAPE[1:]
    weights = {
        "w": _weights(0, latent, _CHANNELS * height * width),
        "to_channels": np.array([-1, _CHANNELS, height, width], np.int64),
    }
    nodes = [
        helper.make_node("MatMul", ["z", "w"], ["dense"]),
        helper.make_node("Reshape", ["dense", "to_channels"], ["h0"]),
    ]
    for index in range(_CONVOLUTIONS):
        weights[f"k{index}"] = _weights(index + 1, _CHANNELS, _CHANNELS, 3, 3)
        nodes.append(helper.make_node("Conv", [f"h{index}", f"k{index}"], [f"a{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"a{index}"], [f"h{index + 1}"]))
    weights["last"] = _weights(_CONVOLUTIONS + 1, _SHAPE[0], _CHANNELS, 3, 3)
    nodes.append(helper.make_node("Conv", [f"h{_CONVOLUTIONS}", "last"], ["wide"], pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node("Tanh", ["wide"], ["image"]))
    return _graph(nodes, latent, weights)


def _weights(seed: int, *shape: int) -> Any:
    fan_in = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)


def _graph(nodes: list[Any], latent: int, weights: dict[str, Any]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", latent])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *_SHAPE])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
