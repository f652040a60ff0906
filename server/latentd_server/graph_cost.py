"""What a row of a graph costs, counted from the graph itself: the same on every machine, unlike a measurement. Pure."""

import math
from collections.abc import Mapping, Sequence

import onnx
from onnx import NodeProto

_LARGE_BYTES = 4 * 2**20
"""Graphs of more than that are not looked at: with a million weights they are not cheap."""
_ELEMENT_COST = 8
"""Multiply-adds in whose time an element is written and read, about: of products a core does several a cycle."""

# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "BatchNormalization", "Cast", "Ceil", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor",
    "Gather", "GatherND", "Gelu", "Greater", "GreaterOrEqual", "GroupNormalization", "HardSigmoid", "HardSwish",
    "Identity", "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "LogSoftmax", "Max", "Min", "Mish", "Mul", "Neg", "Not", "Or", "PRelu", "Pad", "Pow",
    "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape",
    "Round", "Selu", "Shape", "Sigmoid", "Sign", "Sin", "Cos", "Slice", "Softmax", "Softplus",
    "Softsign", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Unsqueeze",
    "Where",
})
# fmt: on
"""Operators that cost a few operations an element of what they give."""

_Shape = Sequence[int]


def row_cost(data: bytes) -> int | None:
    """Multiply-adds that one row takes, about; what is done to weights alone is counted with every row.

    Args:
        data: A serialized graph whose inputs have the batch as their first, open axis.

    Returns:
        None where that cannot be told: of large graphs, of those with operators that are not known here, and where a
        shape does not follow from the inputs'.
    """
    if len(data) > _LARGE_BYTES:
        return None
    model = onnx.load_model_from_string(data)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # names the axis that is 1 now
    try:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception:  # of several kinds; whatever is wrong with a graph is ONNX Runtime's to say
        return None
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        shape = value.type.tensor_type.shape
        if all(extent.HasField("dim_value") for extent in shape.dim):
            shapes.setdefault(value.name, tuple(extent.dim_value for extent in shape.dim))
    total = 0
    for node in model.graph.node:
        cost = _node_cost(node, shapes)
        if cost is None:
            return None
        total += cost
    return total


def _node_cost(node: NodeProto, shapes: Mapping[str, _Shape]) -> int | None:
    given = [shapes.get(name) for name in node.output if name]
    taken = [shapes.get(name) for name in node.input if name]
    if any(shape is None for shape in (*given, *taken)):
        return None
    elements = sum(math.prod(shape) for shape in given if shape is not None)
    operands = [shape for shape in taken if shape is not None]
    products = 0
    if node.op_type == "MatMul":
        products = elements * operands[0][-1]
    elif node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        products = elements * operands[0][0 if transposed else 1]
    elif node.op_type == "Conv":
        products = elements * math.prod(operands[1][1:])
    elif node.op_type == "ConvTranspose":
        products = math.prod(operands[0]) * math.prod(operands[1][1:])
    elif node.op_type not in _ELEMENTWISE:
        return None
    return products + _ELEMENT_COST * elements
