"""ONNX files as graphs to serve: everything that keeps a file from being served is said at once.

What is changed is what changes no number: notes are removed, the batch axis gets its name, axes that a model file
fixes are fixed, operator sets that no node uses are dropped, and so are outputs that are not served.
"""

from collections.abc import Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from latentd.tensor import DTYPES
from latentd.v1 import tensor_pb2

from latentd_trainer import onnx_graph
from latentd_trainer.contract import role_name
from latentd_trainer.importers import ImportingError
from latentd_trainer.importers.model_file import Input, OnnxEntry
from latentd_trainer.importers.words import UNUSED, Role
from latentd_trainer.onnx_graph import GraphError
from latentd_trainer.onnx_module import OnnxModule
from latentd_trainer.spec import Graph, GraphInput, GraphOutput
from latentd_trainer.spec import Role as Roles

OLDEST_OPSET, NEWEST_OPSET = 7, 26
"""What the server's ONNX Runtime has kernels for."""
OLDEST_DENOISER_OPSET = 18
"""A denoiser is joined with the operators of the sampler's update, which came with opset 18."""

_EXAMPLE = "torch.onnx.export(..., dynamo=True, dynamic_shapes={...: {0: 'batch'}})"


def graph(path: Path, role: Role, entry: OnnxEntry) -> Graph:
    """The graph in a file, its outputs' shapes left open (`()`).

    Raises:
        ImportingError: it cannot be served; the message lists every problem.
    """
    model = _read(path)
    onnx_graph.strip(model)
    del model.graph.value_info[:]  # they speak of axes by names that are about to change
    if problems := _problems(model, role, entry):
        raise ImportingError(_listed(path, problems))
    _normalise(model, entry)
    try:
        module = OnnxModule(model)
    except GraphError as error:
        raise ImportingError(_listed(path, [str(error)])) from error
    inputs = [
        GraphInput(value.name, said.source, _shape(value, said), said.data_type)
        for value in model.graph.input
        for said in [entry.inputs[value.name]]
    ]
    outputs = [GraphOutput(value.name, entry.outputs[value.name], ()) for value in model.graph.output]
    return Graph(role, module, inputs, outputs)


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise ImportingError(_listed(path, [f"cannot be read: {error.strerror}"])) from error
    except DecodeError as error:
        raise ImportingError(_listed(path, [f"is no ONNX file: {error}"])) from error
    if not model.graph.output:
        raise ImportingError(_listed(path, ["is no ONNX file with outputs"]))
    return model


def _problems(model: onnx.ModelProto, role: Role, entry: OnnxEntry) -> list[str]:
    """Everything that can be seen of a graph without running it."""
    found = _opset_problems(model, role) + onnx_graph.content_violations(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    if among := [value.name for value in model.graph.input if value.name in weights]:
        shown = ", ".join(among[:3])
        return [*found, f"lists its weights {shown} among its inputs, as before IR version 4; export it again"]
    found += _name_problems("input", model.graph.input, list(entry.inputs))
    found += _name_problems("output", model.graph.output, list(entry.outputs))
    for value in model.graph.input:
        if value.name in entry.inputs:
            found += [f"input {value.name!r}: {text}" for text in _input_problems(value, entry.inputs[value.name])]
    for value in model.graph.output:
        if entry.outputs.get(value.name, UNUSED) != UNUSED:
            texts = _type_problems(value, tensor_pb2.DATA_TYPE_FLOAT32)
            found += [f"output {value.name!r}: {text}" for text in texts]
    return found


def _opset_problems(model: onnx.ModelProto, role: Role) -> list[str]:
    oldest = OLDEST_DENOISER_OPSET if role == Roles.ROLE_DENOISER else OLDEST_OPSET
    found = onnx_graph.opset(model)
    if oldest <= found <= NEWEST_OPSET:
        return []
    return [
        f"is written in opset {found}; a {role_name(role)} must be in {oldest} to {NEWEST_OPSET}: export it with "
        f"opset_version={onnx_graph.OPSET}, or change it with onnx.version_converter"
    ]


def _name_problems(kind: str, values: Sequence[onnx.ValueInfoProto], said: Sequence[str]) -> list[str]:
    has = [value.name for value in values]
    unknown, unsaid = [name for name in said if name not in has], [name for name in has if name not in said]
    found = []
    if unknown:
        found.append(f"{kind}s: has no {', '.join(map(repr, unknown))}; it has {', '.join(map(repr, has))}")
    if unsaid:
        way = "say where it comes from" if kind == "input" else "say what it means, or `unused`"
        found.append(f"{kind}s: has {', '.join(map(repr, unsaid))} too; {way}")
    return found


def _input_problems(value: onnx.ValueInfoProto, said: Input) -> list[str]:
    found = _type_problems(value, said.data_type)
    extents = _extents(value)
    if not value.type.tensor_type.HasField("shape"):
        open_ended = said.shape is None and not said.is_integer
        return [*found, "has no shape; say `shape`, the extents after the batch axis"] if open_ended else found
    if not extents:
        return [*found, "is a single number; the first axis of every input is the batch"]
    if isinstance(extents[0], int):
        found.append(
            f"its first axis is fixed at {extents[0]}; it is the batch and must be dynamic: export it again, "
            f"e.g. with {_EXAMPLE}"
        )
    inner = said.shape if said.shape is not None else () if said.is_integer else None
    if inner is None:
        if any(isinstance(extent, str) for extent in extents[1:]):
            found.append(f"has the shape {extents}; say `shape`, the extents after the batch axis")
    elif len(extents) != 1 + len(inner) or any(
        isinstance(extent, int) and extent != asked for extent, asked in zip(extents[1:], inner, strict=True)
    ):
        found.append(f"must be of shape {['batch', *inner]}, is {extents}")
    return found


def _type_problems(value: onnx.ValueInfoProto, data_type: tensor_pb2.DataType.ValueType) -> list[str]:
    expected = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[data_type])
    actual = value.type.tensor_type.elem_type
    if actual == expected:
        return []
    name = onnx.TensorProto.DataType.Name
    way = " (timesteps and labels are whole numbers)" if expected == onnx.TensorProto.INT64 else ""
    return [f"holds {name(actual)}; must hold {name(expected)}{way}: cast inside the graph and export it again"]


def _extents(value: onnx.ValueInfoProto) -> list[int | str]:
    """Numbers for fixed axes, names for the others."""
    axes = value.type.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in axes]


def _normalise(model: onnx.ModelProto, entry: OnnxEntry) -> None:
    for value in model.graph.input:
        said = entry.inputs[value.name]
        onnx_graph.set_shape(value, _shape(value, said))
    served = [value for value in model.graph.output if entry.outputs[value.name] != UNUSED]
    for value in served:
        value.type.tensor_type.ClearField("shape")
    del model.graph.output[:]
    model.graph.output.extend(served)
    used = {node.domain for node in onnx_graph.nodes(model.graph)} | {"", "ai.onnx"}
    kept = [each for each in model.opset_import if each.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _shape(value: onnx.ValueInfoProto, said: Input) -> tuple[int, ...]:
    """The extents after the batch axis of an input without problems."""
    if said.shape is not None or said.is_integer:
        return said.shape or ()
    return tuple(int(extent) for extent in _extents(value)[1:])


def _listed(path: Path, problems: Sequence[str]) -> str:
    return "\n".join(f"{path.name}: {problem}" for problem in problems)
