"""Torch modules to ONNX graphs fit to be served, and the rules such a graph keeps."""

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from latentd import __version__
from latentd.tensor import DTYPES
from latentd.v1 import bundle_pb2, model_pb2
from numpy.typing import NDArray

from latentd_trainer.spec import Graph

OPSET = 20
"""The newest opset whose GroupNormalization is written in operators that every provider has kernels for: from 21
on it is one operator without a CUDA kernel, and from 23 on attention is one operator whose kernel depends on the
batch size, which row invariance cannot bear."""

BATCH = "batch"
"""Name of the symbolic first axis of every input and output."""

HEIGHT, WIDTH = "height", "width"
"""Names of the axes that a denoiser leaves open where samples may have several sizes."""

EXAMPLE_BATCH = 2  # at 1 the exporter may take the batch for a constant

_RANDOM_OPERATORS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


class GraphError(Exception):
    """A network that cannot be exported or served; says what is wrong and what was expected."""


def describe(feeds: Mapping[str, NDArray[Any]]) -> str:
    """Names, types and shapes of inputs, for messages."""
    return ", ".join(f"{name} {rows.dtype}{list(rows.shape)}" for name, rows in feeds.items())


def to_onnx(
    graph: Graph,
    example: Mapping[str, NDArray[Any]],
    opset: int = OPSET,
    sized: Collection[str] = (),
) -> onnx.ModelProto:
    """Export one network with a symbolic batch axis, free of paths and of everything that varies between exports.

    Args:
        graph: The network; its module is on the CPU and in evaluation mode.
        example: One array for each input by name, [EXAMPLE_BATCH, *shape].
        opset: Version of the default operator set.
        sized: Inputs whose last two axes are symbolic too.

    Raises:
        GraphError: the module is in training mode, or the exporter cannot express it.
    """
    training = [name or "the module itself" for name, module in graph.module.named_modules() if module.training]
    if training:
        raise GraphError(f"must be in evaluation mode, but {', '.join(training[:3])} is in training mode")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.module,
                tuple(torch.from_numpy(array) for array in example.values()),
                dynamo=True,
                input_names=[entry.name for entry in graph.inputs],
                output_names=[result.name for result in graph.outputs],
                dynamic_shapes=tuple(
                    {0: BATCH, 2: HEIGHT, 3: WIDTH} if entry.name in sized else {0: BATCH} for entry in graph.inputs
                ),
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever went wrong inside the module
        raise GraphError(f"cannot be exported with inputs {describe(example)}: {error}") from error
    assert program is not None  # it is None only for exports straight to a file
    model = program.model_proto
    strip(model)
    return model


def opset(model: onnx.ModelProto) -> int:
    """Version of the default operator set that a graph is written in; 0 if it names none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def serialize(model: onnx.ModelProto) -> bytes:
    """The bytes of the `.onnx` file; equal graphs give equal bytes.

    Raises:
        GraphError: the graph is over protobuf's 2 GiB.
    """
    try:
        return bytes(model.SerializeToString(deterministic=True))
    except ValueError as error:
        raise GraphError(f"the graph is over 2 GiB, more than one ONNX file can hold: {error}") from error


def graph_violations(model: onnx.ModelProto, network: bundle_pb2.Network, sized: Collection[str] = ()) -> list[str]:
    """Everything in an ONNX graph that contradicts what the bundle says of it, or that could not be served.

    `sized` are the inputs and outputs that must leave their height and width open.
    """
    found = []
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        found.append(f"onnx.checker: {error}")
    inputs = [(entry.name, entry.spec) for entry in network.inputs]
    outputs = [(result.name, result.spec) for result in network.outputs]
    found += _interface_violations("input", model.graph.input, inputs, sized)
    found += _interface_violations("output", model.graph.output, outputs, sized)
    return found + content_violations(model)


def content_violations(model: onnx.ModelProto) -> list[str]:
    """Everything inside an ONNX graph, whatever its inputs and outputs are, that could not be served."""
    found = []
    everything = list(nodes(model.graph)) + [node for function in model.functions for node in function.node]
    random = sorted({node.op_type for node in everything} & _RANDOM_OPERATORS)
    if random:
        found.append(f"draws noise with {', '.join(random)}; noise must come in by inputs")
    domains = sorted({node.domain for node in everything} - {"", "ai.onnx"})
    if domains:
        found.append(f"uses operators of {', '.join(domains)}; only the default domain is allowed")
    if model.functions:
        found.append("defines functions of its own; onnx.inliner.inline_local_functions puts them in their places")
    external = [tensor.name for tensor in _tensors(model.graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if external:
        found.append(
            f"keeps {', '.join(external[:3])} in other files; the weights must be inside: onnx.load reads them, and "
            "onnx.save with save_as_external_data=False writes one file"
        )
    if any(_texts(model)):
        found.append("carries metadata or doc strings, where exporters leave paths of the machine they ran on")
    return found


def _interface_violations(
    kind: str,
    values: Sequence[onnx.ValueInfoProto],
    declared: Sequence[tuple[str, model_pb2.TensorSpec]],
    sized: Collection[str],
) -> list[str]:
    names = [value.name for value in values]
    expected = [name for name, _ in declared]
    if names != expected:
        return [f"{kind}s: must be {expected}, got {names}"]
    found = []
    for value, (name, spec) in zip(values, declared, strict=True):
        tensor = value.type.tensor_type
        element = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[spec.data_type])
        if tensor.elem_type != element:
            found.append(
                f"{kind} {name!r}: must hold {onnx.TensorProto.DataType.Name(element)}, "
                f"holds {onnx.TensorProto.DataType.Name(tensor.elem_type)}"
            )
        axes = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
        wanted = [BATCH, *spec.shape]
        if name in sized:
            wanted[-2:] = HEIGHT, WIDTH
        if axes != wanted:
            found.append(f"{kind} {name!r}: must be of shape {wanted}, is {axes}")
    return found


def set_shape(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    """Write, in place, into an input or output that it is of shape [BATCH, *shape]."""
    axes = value.type.tensor_type.shape.dim
    del axes[:]
    axes.add().dim_param = BATCH
    for extent in shape:
        axes.add().dim_value = extent


def open_sizes(model: onnx.ModelProto, sized: Collection[str]) -> None:
    """Write, in place, into inputs and outputs of these names that their last two axes are open."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name in sized:
            for axis, name in zip(value.type.tensor_type.shape.dim[-2:], (HEIGHT, WIDTH), strict=True):
                axis.dim_param = name


def strip(model: onnx.ModelProto) -> None:
    """Remove, in place, what says where and how the graph was made; exporters note source paths and code on nodes."""
    model.producer_name = "latentd-train"
    model.producer_version = __version__
    for message in _carriers(model):
        message.ClearField("doc_string")
        message.ClearField("metadata_props")


def _texts(model: onnx.ModelProto) -> Iterator[bool]:
    return (bool(message.doc_string) or bool(message.metadata_props) for message in _carriers(model))


def _carriers(model: onnx.ModelProto) -> Iterator[Any]:
    """Every part of a model that can hold a doc string and metadata."""
    yield model
    yield from model.functions
    for graph in _graphs(model.graph):
        yield graph
        yield from graph.node
        yield from graph.initializer
        yield from (*graph.input, *graph.output, *graph.value_info)
    yield from (node for function in model.functions for node in function.node)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the graphs in the attributes of its nodes (branches, loop bodies)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs inside it."""
    return (node for inner in _graphs(graph) for node in inner.node)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    return (tensor for inner in _graphs(graph) for tensor in inner.initializer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which warns of optional packages and of its own internals; errors are raised anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
