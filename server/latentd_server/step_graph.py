"""The fused step graph: a bundle's plain denoiser wrapped in guidance, the sampler's update and the lanes' state.

With n rows in the call, P slots of state, and S the sample's shape, one call computes

    xe = Gather(x, slot)                           hr = Gather(h, slot)
    m  = net(Gather(xe, lane), timestep, label)    every network row belongs to a lane
    m  = (1 - w) m[row_u] + w m[row_c]             Ho & Salimans 2022; an unguided lane has row_u = row_c, w = 1
    x0 = Max(Min(px xe + pm m, hi), lo)
    x' = a xe + b x0 + c hr + d m + s z
    h' = e xe + f x0 + g hr
    eps = ex xe + em m
    x[slot] = x'                                   h[slot] = h'

Bound to one address as input and as output, the state is updated in place: ScatterND copies its data only where the
two differ. Everything else is computed before the first row is written, because the rows' numbers are made to depend on
all of it. So no row is read after it was written, and a call that fails leaves every lane where it was.

Selection is by Gather, never by multiplication with 0 or 1, so that a NaN in a row that somebody left behind cannot
leak. Everything but the network is elementwise, so a row sees no other row.
"""

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, compose, helper

from latentd_server.samplers import COLUMNS

STATE = {"x": "x_next", "h": "h_next"}
"""Inputs [P, *S] f32 and the outputs that take their place."""
ESTIMATES = ("x0", "eps")
"""Outputs [n, *S] f32."""

_CHOICE = ("old", "values", "chosen")
_PREFIX = "net/"
_OPSET, _IR_VERSION = 18, 8


def build(
    denoiser: bytes, sample: str, timestep: str, label: str | None, prediction: str, shape: Sequence[int]
) -> bytes:
    """Wrap a denoiser.

    Args:
        denoiser: The bundle's ONNX graph, first axis the batch.
        sample: Its input for x_t.
        timestep: Its input for t, [n] i64.
        label: Its input for the class label, [n] i64, if it has one.
        prediction: Its output.
        shape: One sample's shape S.

    Returns:
        A serialized model with inputs x, h [P, *S] f32; z [n, *S] f32; slot, lane, timestep, label, row_u, row_c
        [n] i64; w [n, 1, ...] f32, as many axes as x; coefficients [n, len(COLUMNS), 1, ...] f32, likewise, in the
        order of `samplers.COLUMNS`; and with the outputs of `STATE` and `ESTIMATES`.
    """
    net = onnx.load_model_from_string(denoiser)
    opset = next(entry.version for entry in net.opset_import if entry.domain in ("", "ai.onnx"))
    net = compose.add_prefix(net, _PREFIX)
    names = {_PREFIX + sample: "net_sample", _PREFIX + timestep: "timestep", _PREFIX + prediction: "m_rows"}
    if label is not None:
        names[_PREFIX + label] = "label"
    _rename(net, names)

    def image(name: str, rows: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, *shape])

    def vector(name: str, dtype: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, ["n"])

    ones = [1] * (len(shape) - 1)
    inputs = [image(name, "p") for name in STATE]
    inputs.append(image("z", "n"))
    inputs += [vector(name, TensorProto.INT64) for name in ("slot", "lane", "timestep", "row_u", "row_c")]
    if label is not None:
        inputs.append(vector("label", TensorProto.INT64))
    inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, ["n", 1, *ones]))
    inputs.append(helper.make_tensor_value_info("coefficients", TensorProto.FLOAT, ["n", len(COLUMNS), *ones]))
    graph = helper.make_graph(
        [*_before(), *net.graph.node, *_after()],
        "latentd_step",
        inputs,
        [image(name, "p") for name in STATE.values()] + [image(name, "n") for name in ESTIMATES],
        [*net.graph.initializer, *_constants()],
    )
    return _model(graph, opset, net.ir_version)


def build_writer(shape: Sequence[int]) -> bytes:
    """A model that writes rows into state: inputs x, h [P, *S] f32, slot [n] i64, x_rows, h_rows [n, *S] f32, and
    the outputs of `STATE`, to be bound over x and h.
    """
    nodes = [helper.make_node("Unsqueeze", ["slot", "column_axis"], ["index"])]
    inputs = [helper.make_tensor_value_info("slot", TensorProto.INT64, ["n"])]
    outputs = []
    for name, updated in STATE.items():
        nodes.append(helper.make_node("ScatterND", [name, "index", f"{name}_rows"], [updated]))
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["p", *shape]))
        inputs.append(helper.make_tensor_value_info(f"{name}_rows", TensorProto.FLOAT, ["n", *shape]))
        outputs.append(helper.make_tensor_value_info(updated, TensorProto.FLOAT, ["p", *shape]))
    return _model(helper.make_graph(nodes, "latentd_write", inputs, outputs, _constants()), _OPSET, _IR_VERSION)


def build_blender(shape: Sequence[int]) -> bytes:
    """A model that puts parts of rows into state: inputs x [P, *S] f32, slot [n] i64, chosen [n, *S] i64 and values
    [n, *S] f32, which take the place of what is there where `chosen` is 1 and not 0; output x_next, to be bound over x.

    Selection is by index, for ONNX Runtime's Where takes the sign of a zero away.
    """
    nodes = [
        helper.make_node("Gather", ["x", "slot"], ["old"]),
        *(helper.make_node("Unsqueeze", [name, "column_axis"], [f"{name}_of_two"]) for name in _CHOICE),
        helper.make_node("Concat", ["old_of_two", "values_of_two"], ["both"], axis=1),
        helper.make_node("GatherElements", ["both", "chosen_of_two"], ["new_of_one"], axis=1),
        helper.make_node("Squeeze", ["new_of_one", "column_axis"], ["new"]),
        helper.make_node("Unsqueeze", ["slot", "column_axis"], ["index"]),
        helper.make_node("ScatterND", ["x", "index", "new"], [STATE["x"]]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["p", *shape]),
        helper.make_tensor_value_info("slot", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("chosen", TensorProto.INT64, ["n", *shape]),
        helper.make_tensor_value_info("values", TensorProto.FLOAT, ["n", *shape]),
    ]
    outputs = [helper.make_tensor_value_info(STATE["x"], TensorProto.FLOAT, ["p", *shape])]
    return _model(helper.make_graph(nodes, "latentd_blend", inputs, outputs, _constants()), _OPSET, _IR_VERSION)


def build_reader(shape: Sequence[int]) -> bytes:
    """A model that reads rows: inputs values [m, *S] f32 and rows [k] i64, output taken [k, *S] f32."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["values", "rows"], ["taken"])],
        "latentd_read",
        [
            helper.make_tensor_value_info("values", TensorProto.FLOAT, ["m", *shape]),
            helper.make_tensor_value_info("rows", TensorProto.INT64, ["k"]),
        ],
        [helper.make_tensor_value_info("taken", TensorProto.FLOAT, ["k", *shape])],
    )
    return _model(graph, _OPSET, _IR_VERSION)


def _model(graph: onnx.GraphProto, opset: int, ir_version: int) -> bytes:
    model: ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version, producer_name="latentd"
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _rename(model: ModelProto, names: dict[str, str]) -> None:
    for node in model.graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                if value in names:
                    values[index] = names[value]


def _constants() -> list[TensorProto]:
    return [
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("column_axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("column", TensorProto.INT64, [1], [1]),
    ]


def _before() -> list[NodeProto]:
    """Every lane's state, then every network row's lane."""
    return [
        helper.make_node("Gather", ["x", "slot"], ["xe"]),
        helper.make_node("Gather", ["h", "slot"], ["hr"]),
        helper.make_node("Gather", ["xe", "lane"], ["net_sample"]),
    ]


def _after() -> list[NodeProto]:
    """Guidance, the estimates, the update."""
    nodes: list[NodeProto] = []

    def op(kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    columns = [f"k_{name}" for name in COLUMNS]  # [n, 1, ...] each
    nodes.append(helper.make_node("Split", ["coefficients"], columns, axis=1, num_outputs=len(columns)))

    def combine(out: str, *terms: tuple[str, str]) -> str:
        products = [op("Mul", f"k_{column}", value, out=f"{out}_{column}") for column, value in terms]
        total = products[0]
        for index, product in enumerate(products[1:]):
            last = index == len(products) - 2
            total = op("Add", total, product, out=out if last else f"{out}_sum_{index}")
        return total

    op("Sub", "one", "w", out="w_u")
    op("Gather", "m_rows", "row_u", out="m_u")
    op("Gather", "m_rows", "row_c", out="m_c")
    op("Mul", "w_u", "m_u", out="m_u_part")
    op("Mul", "w", "m_c", out="m_c_part")
    op("Add", "m_u_part", "m_c_part", out="m")
    op("Min", combine("x0_free", ("px", "xe"), ("pm", "m")), "k_hi", out="x0_below")
    op("Max", "x0_below", "k_lo", out="x0")
    combine("x_rows", ("a", "xe"), ("b", "x0"), ("c", "hr"), ("d", "m"), ("s", "z"))
    combine("h_rows", ("e", "xe"), ("f", "x0"), ("g", "hr"))
    combine("eps", ("ex", "xe"), ("em", "m"))
    # The rows' numbers, [n, 1], where n is read off everything that must have been computed before.
    counts = [op("Shape", value, out=f"{value}_count", start=0, end=1) for value in ("x_rows", "h_rows", "eps")]
    op("Max", *counts, out="count")
    op("Concat", "count", "column", out="index_shape", axis=0)
    op("Reshape", "slot", "index_shape", out="index")
    for name, updated in STATE.items():
        op("ScatterND", name, "index", f"{name}_rows", out=updated)
    return nodes
