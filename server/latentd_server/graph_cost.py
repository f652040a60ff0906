"""What a row of a graph costs, counted from the graph itself: the same on every machine, unlike a measurement. Pure."""

import math
from collections.abc import Mapping, Sequence

import onnx
from onnx import ModelProto, NodeProto

_LARGE_BYTES = 4 * 2**20
"""Graphs of more than that are not looked at: with a million weights they are not small."""
_PRICES = {
    **dict.fromkeys(["Constant", "Shape", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze"], 1),
    **dict.fromkeys(["Add", "Sub", "Mul", "Div", "Sum", "Neg", "Abs", "Min", "Max", "Clip"], 15),
    **dict.fromkeys(["Relu", "LeakyRelu", "HardSigmoid", "BatchNormalization"], 15),
    **dict.fromkeys(["And", "Or", "Not", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Where"], 15),
    **dict.fromkeys(["Cast", "ConstantOfShape", "Concat", "Split", "Tile"], 15),
    **dict.fromkeys(["Exp", "Sqrt", "Sigmoid", "Tanh", "HardSwish", "Round", "Floor", "Ceil"], 25),
    **dict.fromkeys(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "Slice"], 30),
    **dict.fromkeys(["Erf", "Gelu", "Pad", "InstanceNormalization", "GroupNormalization", "LayerNormalization"], 70),
    **dict.fromkeys(["Log", "Elu", "Selu", "Sin", "Cos"], 120),
    **dict.fromkeys(["Softmax", "PRelu", "Expand", "Transpose"], 300),
    **dict.fromkeys(["Gather", "GatherND"], 400),
    **dict.fromkeys(["Softplus", "Mish", "Pow"], 600),
}
"""Multiply-adds in whose time an operator does an element: the most that ONNX Runtime took on one core, about, over
some shapes; what moves small pieces takes many times as long as what moves large ones."""

_Shape = Sequence[int]


def row_cost(data: bytes) -> int | None:
    """Multiply-adds that one row takes, about; what is done to weights alone is counted with every row.

    Args:
        data: A serialized graph whose inputs have the batch as their first, open axis.

    Returns:
        None where that cannot be told: of large graphs, of those with operators that are not known, and
        where a shape does not follow from the inputs'.
    """
    if len(data) > _LARGE_BYTES:
        return None
    try:
        return _counted(onnx.load_model_from_string(data))
    except Exception:  # of many kinds; whatever is wrong with a graph is ONNX Runtime's to say
        return None


def _counted(model: ModelProto) -> int | None:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # names the axis that is 1 now
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    shapes: dict[str, _Shape] = dict(weights)
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        shape = value.type.tensor_type.shape
        if all(extent.HasField("dim_value") for extent in shape.dim):
            shapes.setdefault(value.name, tuple(extent.dim_value for extent in shape.dim))
    total = 0
    for node in model.graph.node:
        cost = _node_cost(node, shapes, weights)
        if cost is None:
            return None
        total += cost
    return total


def _node_cost(node: NodeProto, shapes: Mapping[str, _Shape], weights: Mapping[str, _Shape]) -> int | None:
    given = [shapes.get(name) for name in node.output if name]
    taken = [shapes.get(name) for name in node.input if name]
    if any(shape is None for shape in (*given, *taken)):
        return None
    elements = sum(math.prod(shape) for shape in given if shape is not None)
    if node.op_type in _PRICES:
        read = sum(math.prod(shapes[name]) for name in node.input if name and name not in weights)
        return _PRICES[node.op_type] * max(elements, read)
    if node.op_type not in _PRODUCTS or node.input[1] not in weights or _attribute(node, "group", 1) != 1:
        return None  # products of two values come as many small ones, and groups of channels too
    first, weight = shapes[node.input[0]], weights[node.input[1]]
    if node.op_type == "Conv":
        products = elements * math.prod(weight[1:])
    elif node.op_type == "ConvTranspose":
        products = math.prod(first) * math.prod(weight[1:])
    else:
        transposed = node.op_type == "Gemm" and _attribute(node, "transA", 0)
        products = elements * first[0 if transposed else -1]
    return products


_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
