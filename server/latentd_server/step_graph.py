"""The fused step graph: a bundle's plain denoiser wrapped in admission, compaction, guidance and the update.

With n rows in the call, p rows of state left by the call before, and S the sample's shape, one call computes

    xe = Where(reset, x_init, Gather(x, slot))     hr = Where(reset, h_init, Gather(h, slot))
    m  = net(Gather(xe, lane), timestep, label)    every network row belongs to a lane
    m  = (1 - w) m[row_u] + w m[row_c]             Ho & Salimans 2022; an unguided lane has row_u = row_c, w = 1
    x0 = Max(Min(px xe + pm m, hi), lo)
    x' = a xe + b x0 + c hr + d m + s z
    h' = e xe + f x0 + g hr
    eps = ex xe + em m

Selection is by Where and Gather, never by multiplication with 0 or 1, so that a NaN in a row that somebody
left behind cannot leak. Everything but the network is elementwise, so a row sees no other row.
"""

from collections.abc import Sequence

import onnx
from onnx import ModelProto, NodeProto, TensorProto, compose, helper

from latentd_server.samplers import COLUMNS

STATE = ("x", "h")
"""Inputs [p, *S] f32: the outputs of the call before."""
OUTPUTS = ("x_next", "h_next", "x0", "eps")
"""Outputs [n, *S] f32."""

_PREFIX = "net/"


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
        A serialized model with inputs x, h [p, *S] f32; x_init, h_init, z [n, *S] f32; slot, lane, timestep,
        label, row_u, row_c [n] i64; reset [n] bool; w [n] f32; coefficients [len(COLUMNS), n, 1, ...] f32, rows
        in the order of `samplers.COLUMNS`, with as many trailing 1s as S has axes; and the outputs of `OUTPUTS`.
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

    inputs = [image(name, "p") for name in STATE]
    inputs += [image(name, "n") for name in ("x_init", "h_init", "z")]
    inputs += [vector(name, TensorProto.INT64) for name in ("slot", "lane", "timestep", "row_u", "row_c")]
    if label is not None:
        inputs.append(vector("label", TensorProto.INT64))
    inputs += [vector("reset", TensorProto.BOOL), vector("w", TensorProto.FLOAT)]
    inputs.append(
        helper.make_tensor_value_info("coefficients", TensorProto.FLOAT, [len(COLUMNS), "n", *[1] * len(shape)])
    )
    graph = helper.make_graph(
        [*_before(), *net.graph.node, *_after()],
        "latentd_step",
        inputs,
        [image(name, "n") for name in OUTPUTS],
        [*net.graph.initializer, *_constants(len(shape))],
    )
    model: ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=net.ir_version, producer_name="latentd"
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _rename(model: ModelProto, names: dict[str, str]) -> None:
    for node in model.graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                if value in names:
                    values[index] = names[value]


def _constants(rank: int) -> list[TensorProto]:
    """Axes that make a vector [n] broadcast over [n, *S], and the one that the table's columns leave behind."""
    axes = helper.make_tensor("sample_axes", TensorProto.INT64, [rank], list(range(1, rank + 1)))
    return [
        axes,
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("column_axis", TensorProto.INT64, [1], [0]),
    ]


def _before() -> list[NodeProto]:
    """State by slot, or fresh; then every network row's lane."""
    return [
        helper.make_node("Unsqueeze", ["reset", "sample_axes"], ["reset_all"]),
        helper.make_node("Gather", ["x", "slot"], ["x_kept"]),
        helper.make_node("Gather", ["h", "slot"], ["h_kept"]),
        helper.make_node("Where", ["reset_all", "x_init", "x_kept"], ["xe"]),
        helper.make_node("Where", ["reset_all", "h_init", "h_kept"], ["hr"]),
        helper.make_node("Gather", ["xe", "lane"], ["net_sample"]),
    ]


def _after() -> list[NodeProto]:
    """Guidance, the estimates, the update."""
    nodes: list[NodeProto] = []

    def op(kind: str, *inputs: str, out: str) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [out]))
        return out

    # Columns are [1, n, 1, ...], so what they are combined to is [1, n, *S] until its first axis is squeezed out.
    columns = [f"k_{name}" for name in COLUMNS]
    nodes.append(helper.make_node("Split", ["coefficients"], columns, axis=0, num_outputs=len(columns)))

    def combine(out: str, *terms: tuple[str, str]) -> str:
        products = [op("Mul", f"k_{column}", value, out=f"{out}_{column}") for column, value in terms]
        total = products[0]
        for index, product in enumerate(products[1:]):
            last = index == len(products) - 2
            total = op("Add", total, product, out=out if last else f"{out}_sum_{index}")
        return total

    op("Unsqueeze", "w", "sample_axes", out="w_c")
    op("Sub", "one", "w_c", out="w_u")
    op("Gather", "m_rows", "row_u", out="m_u")
    op("Gather", "m_rows", "row_c", out="m_c")
    op("Mul", "w_u", "m_u", out="m_u_part")
    op("Mul", "w_c", "m_c", out="m_c_part")
    op("Add", "m_u_part", "m_c_part", out="m")
    op("Min", combine("x0_free", ("px", "xe"), ("pm", "m")), "k_hi", out="x0_below")
    op("Max", "x0_below", "k_lo", out="x0_wide")
    combine("x_wide", ("a", "xe"), ("b", "x0_wide"), ("c", "hr"), ("d", "m"), ("s", "z"))
    combine("h_wide", ("e", "xe"), ("f", "x0_wide"), ("g", "hr"))
    combine("eps_wide", ("ex", "xe"), ("em", "m"))
    for wide, out in (("x_wide", "x_next"), ("h_wide", "h_next"), ("x0_wide", "x0"), ("eps_wide", "eps")):
        op("Squeeze", wide, "column_axis", out=out)
    return nodes
