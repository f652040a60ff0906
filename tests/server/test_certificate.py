"""The certificate: sizes of equal bytes, found by trial."""

from typing import Any

import numpy as np
from latentd_server.certificate import Buckets, bucket_sizes, certify
from latentd_server.runtime import CompiledGraph, Device, Feeds
from onnx import TensorProto, helper

CPU = Device("cpu")


def _graph(*nodes: Any) -> CompiledGraph:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("batch_axis", TensorProto.INT64, [1], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return CompiledGraph(model.SerializeToString(), CPU, 1)


def _rows(count: int, rng: np.random.Generator) -> Feeds:
    return {"x": rng.standard_normal((count, 7), np.float32)}


def test_buckets_are_fine_at_the_top() -> None:
    """1, 2, 4, then multiples of 4, and always the limit itself."""
    assert bucket_sizes(16) == (1, 2, 4, 8, 12, 16)
    assert bucket_sizes(10) == (1, 2, 4, 8, 10)
    assert bucket_sizes(2) == (1, 2)
    assert Buckets((1, 2, 4, 8), certified=True).fit(5) == 8


def test_a_graph_of_independent_rows_is_certified() -> None:
    """An elementwise graph gives equal bytes in every bucket, so all of them may be used."""
    graph = _graph(helper.make_node("Tanh", ["x"], ["y"]))
    assert certify(graph, _rows, 8) == Buckets((1, 2, 4, 8), certified=True)


def test_a_graph_whose_rows_see_each_other_is_not_certified() -> None:
    """A mean over the batch is found out."""
    graph = _graph(
        helper.make_node("ReduceMean", ["x", "batch_axis"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    )
    assert not certify(graph, _rows, 8).certified


def test_a_size_with_other_bytes_is_left_out() -> None:
    """A bucket whose bytes differ from the largest one's is not used; the others stay."""

    class Odd:
        outputs = ("y",)

        def run(self, outputs: Any, feeds: Feeds) -> list[Any]:
            x = feeds["x"]
            return [x / 2 if len(x) > 1 else x / 2 + np.float32(1e-3)]

    assert certify(Odd(), _rows, 8) == Buckets((2, 4, 8), certified=True)  # type: ignore[arg-type]
