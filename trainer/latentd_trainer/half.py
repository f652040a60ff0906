"""Half precision: an exported graph whose heavy part computes in float16, while inputs and outputs stay float32.

Heavy are convolutions and matrix products. They, and what lies between two of them on a path through the graph, take
and give float16; casts stand at the edges. What comes before the first (tables of timesteps and labels) and after the
last (likelihoods, guidance, the sampler's update) stays float32, and so does whatever in between adds up many numbers
or spans orders of magnitude. The server's contract is the same for both precisions.
"""

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from latentd_trainer import onnx_graph
from latentd_trainer.onnx_graph import GraphError

_HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ALONG = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Where", "Identity"),
        *("Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Erf", "Gelu", "Softmax"),
        *("InstanceNormalization", "LayerNormalization"),
        *("AveragePool", "GlobalAveragePool", "MaxPool", "Resize", "Pad", "DepthToSpace", "SpaceToDepth"),
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Slice", "Split", "Gather", "Expand"),
    }
)
"""Operators that go along with their heavy neighbours."""
_ONLY_DATA = frozenset({"Resize"})
"""Operators whose first input alone may be float16; the others are float32 by definition."""
_ASKS_SHAPE = frozenset({"Shape", "Size"})

_HALF_SUFFIX = "/half"
_LARGEST = float(np.finfo(np.float16).max)


def to_half(model: ModelProto) -> ModelProto:
    """A copy that computes in float16 where the module's docstring says.

    Raises:
        GraphError: a weight is too large for float16.
    """
    inferred = shape_inference.infer_shapes(model, strict_mode=True).graph
    typed = [*inferred.input, *inferred.value_info, *inferred.output]
    floats = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {tensor.name for tensor in inferred.initializer if tensor.data_type == TensorProto.FLOAT}
    half = _half_nodes(list(model.graph.node))
    made = {name for index in half for name in model.graph.node[index].output if name in floats}

    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    whole = _wanted_whole(list(model.graph.node), half) | {output.name for output in graph.output}
    halved: set[str] = set()  # values and weights that float16 twins have been made of
    nodes: list[NodeProto] = []
    for index, node in enumerate(model.graph.node):
        changed = NodeProto()
        changed.CopyFrom(node)
        if index in half:
            for place, name in enumerate(node.input):
                if name not in floats or (place and node.op_type in _ONLY_DATA):
                    continue
                changed.input[place] = name + _HALF_SUFFIX
                if name in made or name in halved:
                    continue
                halved.add(name)
                if name in weights:
                    graph.initializer.append(_half_weight(weights[name]))
                else:
                    nodes.append(_cast(name, name + _HALF_SUFFIX, TensorProto.FLOAT16))
            for place, name in enumerate(node.output):
                if name in made:
                    changed.output[place] = name + _HALF_SUFFIX
        elif node.op_type in _ASKS_SHAPE and node.input[0] in made:
            changed.input[0] += _HALF_SUFFIX
        nodes.append(changed)
        if index in half:
            nodes += [
                _cast(name + _HALF_SUFFIX, name, TensorProto.FLOAT)
                for name in node.output
                if name in made and name in whole
            ]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # of types as they were
    _drop_unused(graph)
    return result


def _half_nodes(nodes: list[NodeProto]) -> set[int]:
    """Numbers of the nodes that compute in float16: the heavy ones, and those that go along between two of them."""
    after: set[str] = set()  # values that depend on a heavy node
    behind = set()
    for index, node in enumerate(nodes):
        if node.op_type in _HEAVY or after.intersection(node.input):
            after.update(node.output)
            behind.add(index)
    before: set[str] = set()  # values that a heavy node depends on
    ahead = set()
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        if node.op_type in _HEAVY or before.intersection(node.output):
            before.update(node.input)
            ahead.add(index)
    return {
        index
        for index, node in enumerate(nodes)
        if node.op_type in _HEAVY or (node.op_type in _ALONG and index in behind & ahead)
    }


def _wanted_whole(nodes: list[NodeProto], half: set[int]) -> set[str]:
    """Values that some node takes as float32, or the nodes of a branch or loop inside it."""
    wanted: set[str] = set()
    for index, node in enumerate(nodes):
        if index not in half and node.op_type not in _ASKS_SHAPE:
            wanted.update(node.input)
        elif node.op_type in _ONLY_DATA:
            wanted.update(node.input[1:])
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                wanted.update(name for each in onnx_graph.nodes(inner) for name in each.input)
    return wanted


def _half_weight(tensor: TensorProto) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= _LARGEST:
        raise GraphError(
            f"weight {tensor.name!r} reaches {largest:.3g}, but float16 ends at {_LARGEST:.0f}; "
            "export with --precision fp32"
        )
    return numpy_helper.from_array(values.astype(np.float16), tensor.name + _HALF_SUFFIX)


def _cast(name: str, to: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [name], [to], name=f"{to}/cast", to=kind)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Take out weights of which only the float16 twins are still used."""
    used = {name for node in onnx_graph.nodes(graph) for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
