"""A tiny denoiser of one convolution, whose height and width are open: it takes samples of any size."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
from bundles import CLASSES, F32, I64, IN, NET, OUT, SHAPE, TIMESTEPS, add_network, begin, spec_of, write_bundle
from latentd.names import SAMPLERS
from latentd.v1 import model_pb2
from onnx import helper

NAME = "tiny-sizes"
OTHERS = ((6, 8), (8, 4))


def write_sized(
    root: Path,
    name: str = NAME,
    version: int = 1,
    *,
    sizes: tuple[tuple[int, int], ...] = OTHERS,
    open_axes: bool = True,
    leaky: bool = False,
) -> Path:
    """Tanh of a 3x3 convolution, of a table of timesteps and of one of labels; twice. Rows of a leaky one see the
    mean of their batch.
    """
    directory = begin(root, name, version)
    generator = np.random.default_rng(5)
    draw = generator.standard_normal
    weights = {
        "w1": draw((8, 1, 3, 3)).astype(np.float32) / 3,
        "w2": draw((1, 8, 3, 3)).astype(np.float32) / 6,
        "times": draw((TIMESTEPS, 8, 1, 1)).astype(np.float32) / 3,
        "labels": draw((len(CLASSES) + 1, 8, 1, 1)).astype(np.float32) / 3,
        "one": np.array(1, np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["hidden"], pads=[1, 1, 1, 1]),
        helper.make_node("Gather", ["times", "t"], ["time"]),
        helper.make_node("Add", ["y", "one"], ["row"]),
        helper.make_node("Gather", ["labels", "row"], ["label"]),
        helper.make_node("Sum", ["hidden", "time", "label"], ["total"]),
        helper.make_node("Tanh", ["total"], ["active"]),
        helper.make_node("Conv", ["active", "w2"], ["out"], pads=[1, 1, 1, 1]),
    ]
    if leaky:
        weights["batch_axis"] = np.array([0], np.int64)
        nodes += [
            helper.make_node("ReduceMean", ["out", "batch_axis"], ["batch_mean"], keepdims=1),
            helper.make_node("Sub", ["out", "batch_mean"], ["prediction"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["out"], ["prediction"]))
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
        weights,
    )
    if open_axes:
        path = directory / network.file
        graph = onnx.load(path)
        for value in (graph.graph.input[0], graph.graph.output[0]):
            for axis, word in zip(value.type.tensor_type.shape.dim[2:], ("height", "width"), strict=True):
                axis.dim_param = word
        path.write_bytes(graph.SerializeToString())
        network.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
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
        sample_sizes=[model_pb2.Size(height=height, width=width) for height, width in sizes],
        class_names=CLASSES,
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
    return write_bundle(directory, model, [network])
