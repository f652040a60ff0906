"""What a row of a graph costs: products and elements are counted exactly, and what cannot be counted is not guessed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bench.bundles import GENERATOR, TINY_VAE, write
from latentd_server import loading
from latentd_server.app import WIDEST_ROWS
from latentd_server.graph_cost import _LARGE_BYTES, _PRICES, row_cost
from onnx import TensorProto, helper, numpy_helper

Shapes = dict[str, tuple[int | str, ...]]


def node(operator: str, *inputs: str, out: str = "out", **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, [out], **attributes)


def weight(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def graph(
    nodes: Sequence[Any],
    inputs: Shapes,
    weights: dict[str, Any] | None = None,
    outputs: Shapes | None = None,
    *,
    integers: Sequence[str] = (),
) -> bytes:
    """A graph whose inputs and outputs have a batch axis before these."""
    taken = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name in integers else TensorProto.FLOAT, ("n", *shape))
        for name, shape in inputs.items()
    ]
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", *shape))
        for name, shape in (outputs or {"out": ("k",)}).items()
    ]
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    made = helper.make_graph(list(nodes), "counted", taken, given, held)
    return bytes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )


def cost(products: int, **elements: int) -> int:
    """Of products, and of what other operators do to so many elements."""
    return products + sum(_PRICES[name] * count for name, count in elements.items())


IMAGE: Shapes = {"x": (4, 8, 8)}
COUNTED = {
    "matmul": (graph([node("MatMul", "x", "w")], {"x": (3,)}, {"w": weight(3, 5)}), cost(15)),
    "matmul of rows": (graph([node("MatMul", "x", "w")], {"x": (7, 3)}, {"w": weight(3, 5)}), cost(7 * 15)),
    "gemm": (
        graph([node("Gemm", "x", "w", "bias")], {"x": (3,)}, {"w": weight(3, 5), "bias": weight(5)}),
        cost(15),
    ),
    "gemm with transB": (graph([node("Gemm", "x", "w", transB=1)], {"x": (3,)}, {"w": weight(5, 3)}), cost(15)),
    "gemm with transA": (
        graph(
            [node("Reshape", "x", "shape", out="b"), node("Gemm", "b", "w", transA=1)],
            {"x": (15,)},
            {"w": weight(3, 4), "shape": np.array([3, 5])},
        ),
        cost(5 * 4 * 3, Reshape=15),
    ),
    "gemm with transA off": (
        graph(
            [node("Reshape", "x", "shape", out="b"), node("Gemm", "b", "w", transA=0)],
            {"x": (15,)},
            {"w": weight(5, 4), "shape": np.array([3, 5])},
        ),
        cost(3 * 4 * 5, Reshape=15),
    ),
    "conv": (
        graph([node("Conv", "x", "w", "b", pads=[1] * 4)], IMAGE, {"w": weight(6, 4, 3, 3), "b": weight(6)}),
        cost(6 * 64 * 36),
    ),
    "conv with a stride": (
        graph([node("Conv", "x", "w", pads=[1] * 4, strides=[2, 2])], IMAGE, {"w": weight(6, 4, 3, 3)}),
        cost(6 * 16 * 36),
    ),
    "conv transposed": (
        graph([node("ConvTranspose", "x", "w", strides=[2, 2])], IMAGE, {"w": weight(4, 3, 2, 2)}),
        cost(4 * 64 * 12),
    ),
    "elementwise": (graph([node("Relu", "x")], {"x": (7,)}), cost(0, Relu=7)),
    "several outputs": (
        graph(
            [helper.make_node("Split", ["x", "parts"], ["out", "rest"], axis=1)],
            {"x": (7,)},
            {"parts": np.array([5, 2])},
        ),
        cost(0, Split=7),
    ),
    "inputs that are left out": (
        graph([node("Clip", "x", "", "high")], {"x": (7,)}, {"high": np.float32(1)}),
        cost(0, Clip=7),
    ),
    "labels of one element": (
        graph([node("Gather", "table", "y")], {"y": ()}, {"table": weight(10, 6)}, integers="y"),
        cost(0, Gather=6),
    ),
    "more read than written": (
        graph([node("ReduceSum", "x", "axis")], {"x": (10_000,)}, {"axis": np.array([1])}),
        cost(0, ReduceSum=10_000),
    ),
    "functions that take their time": (graph([node("Softplus", "x")], {"x": (7,)}), 600 * 7),
    "layers add up": (
        graph(
            [
                node("MatMul", "x", "w", out="a"),
                node("Relu", "a", out="b"),
                node("MatMul", "b", "v", out="c"),
                node("Tanh", "c"),
            ],
            {"x": (3,)},
            {"w": weight(3, 5), "v": weight(5, 2)},
        ),
        cost(15 + 10, Relu=5, Tanh=2),
    ),
    "a shape made from the batch's": (
        graph(
            [
                node("Shape", "x", out="n", end=1),
                node("Concat", "n", "four", out="shape", axis=0),
                node("ConstantOfShape", "shape"),
            ],
            {"x": (3,)},
            {"four": np.array([4])},
        ),
        cost(0, Shape=3, Concat=2, ConstantOfShape=4),
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_products_and_elements_are_counted_exactly(name: str) -> None:
    """Of one row: an element of a product costs as many multiply-adds as there are terms in it, and all are written."""
    data, expected = COUNTED[name]
    assert row_cost(data) == expected


def _branch(name: str) -> Any:
    return helper.make_graph(
        [helper.make_node("Identity", ["x"], [name])],
        name,
        [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
    )


UNKNOWN = {
    "einsum": graph([node("Einsum", "x", "w", equation="bi,ij->bj")], {"x": (3,)}, {"w": weight(3, 5)}),
    "lstm": graph(
        [helper.make_node("LSTM", ["x", "w", "r"], ["out"], hidden_size=2, layout=1)],
        {"x": (4, 3)},
        {"w": weight(1, 8, 3), "r": weight(1, 8, 2)},
    ),
    "if": graph(
        [node("If", "yes", then_branch=_branch("a"), else_branch=_branch("b"))],
        {"x": (3,)},
        {"yes": np.array(True)},
    ),
    "among others that are known": graph(
        [node("MatMul", "x", "w", out="a"), node("Relu", "a", out="b"), node("CumSum", "b", "axis")],
        {"x": (3,)},
        {"w": weight(3, 5), "axis": np.array(1)},
    ),
    "open axes": graph([node("Relu", "x")], {"x": (1, "height", "width")}),
    "a shape that is told in a call": graph(
        [
            node("Reshape", "y", "minus", out="list"),
            node("ConstantOfShape", "list"),
        ],
        {"y": (1,)},
        {"minus": np.array([-1])},
        integers="y",
    ),
    "a product of two inputs": graph([node("MatMul", "x", "y")], {"x": (7, 3), "y": (3, 5)}),
    "channels in groups": graph([node("Conv", "x", "w", group=2)], IMAGE, {"w": weight(6, 2, 3, 3)}),
    "transposed in groups": graph([node("ConvTranspose", "x", "w", group=2)], IMAGE, {"w": weight(4, 3, 2, 2)}),
    "a node that lacks an input": graph([node("Conv", "x")], IMAGE, outputs={"out": (6, 6, 6)}),
    "shapes that do not fit": graph([node("MatMul", "x", "w")], {"x": (3,)}, {"w": weight(4, 5)}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_counted_is_not_guessed(name: str) -> None:
    """An operator that is not known may cost anything, and so may one whose shapes are not."""
    assert row_cost(UNKNOWN[name]) is None


def test_graphs_of_more_than_four_mebibytes_are_not_looked_at() -> None:
    """However cheap they are; up to there they are counted."""
    rows = _LARGE_BYTES // 4096
    below, above = (
        graph([node("Gather", "table", "y")], {"y": ()}, {"table": weight(count, 1024)}, integers="y")
        for count in (rows - 1, rows)
    )
    assert _LARGE_BYTES == 4 * 2**20
    assert len(below) < _LARGE_BYTES < len(above)
    assert row_cost(below) == cost(0, Gather=1024)
    assert row_cost(above) is None


def test_counting_leaves_a_graph_as_it_is() -> None:
    """It is compiled from the same bytes afterwards, its batch still open."""
    data, expected = COUNTED["layers add up"]
    before = bytes(bytearray(data))
    assert row_cost(data) == row_cost(data) == expected
    assert data == before
    value = onnx.load_model_from_string(data).graph.input[0]
    assert value.type.tensor_type.shape.dim[0].dim_param == "n"


def test_the_networks_of_the_benchmark_are_told_apart(tmp_path: Path) -> None:
    """A thousand rows of the dense one are a short call; not a hundred of the convolutional one are."""
    tiny, generator = (
        row_cost((write(tmp_path, name) / "decoder.onnx").read_bytes()) for name in (TINY_VAE, GENERATOR)
    )
    assert tiny is not None
    assert generator is not None
    products = 16 * 256 + 256 * 256 + 256 * 64
    assert products < tiny < 1.2 * products
    assert generator > 6 * 64 * 64 * 64 * 9
    assert WIDEST_ROWS * tiny <= loading._SHORT_CALL
    assert 100 * generator > loading._SHORT_CALL


def test_every_network_of_the_tiny_bundles_is_counted(models_root: Path) -> None:
    """Decoders, encoders, scorers and denoisers of every family; none costs much."""
    paths = sorted(models_root.glob("*/*/*.onnx"))
    costs = {f"{path.parts[-3]}/{path.name}": row_cost(path.read_bytes()) for path in paths}
    assert len(costs) == 6
    assert all(found is not None and 0 < found < 50_000 for found in costs.values()), costs
