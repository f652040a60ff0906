"""What an ONNX graph must be before ONNX Runtime sees it: self-contained, of standard operators, without noise of
its own, batched on the first axis, and as `bundle.json` describes it.

ONNX Runtime resolves external data against the working directory even for models given as bytes, so a hostile
bundle could read files; the gate refuses external data in every place a tensor can hide.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import onnx
from latentd.v1 import bundle_pb2, model_pb2, tensor_pb2

from latentd_server.sizes import shapes_follow

_DOMAINS = ("", "ai.onnx")
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_ELEMENT_TYPES = {
    tensor_pb2.DATA_TYPE_FLOAT32: onnx.TensorProto.FLOAT,
    tensor_pb2.DATA_TYPE_INT64: onnx.TensorProto.INT64,
}


def problems(data: bytes, network: bundle_pb2.Network, *, sized: bool = False) -> list[str]:
    """Everything that keeps a graph from being served; empty if nothing does.

    `sized` is whether the model makes samples of several sizes, whose height and width the graph must leave open.
    """
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:
        return [f"{network.file}: is no ONNX model ({type(error).__name__})"]
    found = [f"imports operators of domain {o.domain!r}" for o in model.opset_import if o.domain not in _DOMAINS]
    if model.functions:
        found.append("defines functions of its own")
    for graph in _graphs(model.graph):
        found += _graph_problems(graph)
    found += _signature_problems("input", model.graph.input, network.inputs, sized)
    found += _signature_problems("output", model.graph.output, network.outputs, sized)
    return [f"{network.file}: {text}" for text in dict.fromkeys(found)]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _graph_problems(graph: onnx.GraphProto) -> list[str]:
    found = [
        f"keeps tensor {tensor.name!r} in another file; a graph must hold its weights itself"
        for tensor in _tensors(graph)
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    for node in graph.node:
        if node.domain not in _DOMAINS:
            found.append(f"uses operator {node.op_type} of domain {node.domain!r}")
        if node.op_type in _RANDOM:
            found.append(f"draws noise itself ({node.op_type}); noise must come in by an input")
    return found


def _signature_problems(
    kind: str, actual: Sequence[onnx.ValueInfoProto], declared: Sequence[Any], sized: bool
) -> list[str]:
    have, want = [value.name for value in actual], [value.name for value in declared]
    if have != want:
        return [f"has {kind}s {have}, bundle.json says {want}"]
    found = []
    for value, said in zip(actual, declared, strict=True):
        texts = _value_problems(value.type.tensor_type, said.spec, 2 if sized and shapes_follow(said) else 0)
        found += [f"{kind} {value.name!r} {text}" for text in texts]
    return found


def _value_problems(actual: onnx.TypeProto.Tensor, spec: model_pb2.TensorSpec, open_axes: int) -> list[str]:
    element = _ELEMENT_TYPES.get(spec.data_type)
    if element is None:
        return ["must be FLOAT32 or INT64 in bundle.json"]
    found = []
    if actual.elem_type != element:
        found.append(f"holds {onnx.TensorProto.DataType.Name(actual.elem_type)}, not what bundle.json says")
    extents = list(actual.shape.dim)
    if not extents or not extents[0].dim_param:
        found.append("has no dynamic first axis for the batch")
    inner, said = [extent.dim_value for extent in extents[1:]], list(spec.shape)
    if open_axes and any(inner[-open_axes:]):
        found.append(f"is of shape {inner} alone, and model.sample_sizes lists other sizes; export it with open axes")
    elif inner != said[: len(said) - open_axes] + [0] * open_axes:
        shown = [extent.dim_value or extent.dim_param for extent in extents[1:]]
        found.append(f"has shape {shown} behind the batch axis, bundle.json says {said}")
    return found
