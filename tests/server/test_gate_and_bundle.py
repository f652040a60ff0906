"""What a bundle on disk must be, and what is said of one that is not."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundles import write_all, write_diffusion, write_gan
from google.protobuf.json_format import MessageToJson, Parse
from latentd.digest import bundle_digest
from latentd.names import BUNDLE_FILE, ModelReference
from latentd.v1 import bundle_pb2, model_pb2, tensor_pb2
from latentd_server import bundle as bundles_on_disk
from latentd_server import gate
from latentd_server.bundle import BundleError
from onnx import TensorProto, helper


def _edit(directory: Path, change: Callable[[bundle_pb2.Bundle], Any], *, resign: bool = True) -> Path:
    path = directory / BUNDLE_FILE
    message = Parse(path.read_text(), bundle_pb2.Bundle())
    change(message)
    if resign:
        message.model.digest = bundle_digest(message)
    path.write_text(MessageToJson(message))
    return directory


def test_find_names_every_version_and_nothing_else(tmp_path: Path) -> None:
    """Only NAME/VERSION/bundle.json counts; hidden, misnamed and unfinished directories do not."""
    write_all(tmp_path)
    write_gan(tmp_path, version=12)
    for stray in (".tiny-vae.tmp/1", "Upper/1", "tiny-vae/01", "tiny-vae/0", "tiny-vae/x", "tiny-vae/.2.tmp"):
        (tmp_path / stray).mkdir(parents=True)
        (tmp_path / stray / BUNDLE_FILE).write_text("{}")
    (tmp_path / "tiny-vae" / "7").mkdir()
    assert {reference for reference, _ in bundles_on_disk.find(tmp_path)} == {
        ModelReference("tiny-diffusion", 1),
        ModelReference("tiny-gan", 1),
        ModelReference("tiny-gan", 12),
        ModelReference("tiny-vae", 1),
    }


def test_a_sound_bundle_is_read_whole(tmp_path: Path) -> None:
    """Every graph is there by role, and a diffusion model has its schedule."""
    stored = bundles_on_disk.read(write_diffusion(tmp_path))
    assert set(stored.graphs) == {bundle_pb2.Network.ROLE_DENOISER}
    assert stored.schedule is not None
    assert stored.schedule.timestep_count == 100


def test_the_card_may_change_without_a_new_digest(tmp_path: Path) -> None:
    """Evaluation results written into the card keep the bundle readable."""
    directory = _edit(write_gan(tmp_path), lambda b: b.model.card.metrics.update(fid=1.5), resign=False)
    assert bundles_on_disk.read(directory).message.model.card.metrics["fid"] == 1.5


def _swap_bytes(directory: Path) -> None:
    path = directory / "decoder.onnx"
    path.write_bytes(path.read_bytes().replace(b"tiny", b"tinY", 1))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing bundle.json": (lambda d: (d / BUNDLE_FILE).unlink(), "cannot be read"),
    "truncated bundle.json": (lambda d: (d / BUNDLE_FILE).write_text((d / BUNDLE_FILE).read_text()[:200]), BUNDLE_FILE),
    "binary bundle.json": (lambda d: (d / BUNDLE_FILE).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "unknown field": (
        lambda d: (d / BUNDLE_FILE).write_text(json.dumps(json.loads((d / BUNDLE_FILE).read_text()) | {"extra": 1})),
        "extra",
    ),
    "newer format": (lambda d: _edit(d, lambda b: setattr(b, "format_version", 9)), "format_version is 9"),
    "missing graph": (lambda d: (d / "decoder.onnx").unlink(), "decoder.onnx: cannot be read"),
    "changed graph": (_swap_bytes, "decoder.onnx: differs from its digest"),
    "changed contract": (
        lambda d: _edit(d, lambda b: b.model.class_names.append("x"), resign=False),
        "model.digest does not match",
    ),
    "other name": (lambda d: _edit(d, lambda b: setattr(b.model, "name", "other@1")), "its directory says"),
    "path for a file": (
        lambda d: _edit(d, lambda b: setattr(b.networks[0], "file", "../decoder.onnx")),
        "is not the name of a file",
    ),
    "two decoders": (lambda d: _edit(d, lambda b: b.networks.append(b.networks[0])), "second graph with ROLE_DECODER"),
    "method without graph": (
        lambda d: _edit(d, lambda b: b.model.methods.append(model_pb2.Model.METHOD_ENCODE)),
        "no graph for METHOD_ENCODE",
    ),
    "no methods": (lambda d: _edit(d, lambda b: b.model.ClearField("methods")), "methods is empty"),
    "probabilities": (lambda d: _edit(d, lambda b: b.model.class_probabilities.extend([0.5])), "class_probabilities"),
    "range": (lambda d: _edit(d, lambda b: setattr(b.model.sample_spec, "max_value", -2)), "min_value < max_value"),
    "shape": (lambda d: _edit(d, lambda b: b.model.sample_spec.ClearField("shape")), "positive extents"),
    "inputs renamed": (
        lambda d: _edit(d, lambda b: setattr(b.networks[0].inputs[0], "name", "latent")),
        "bundle.json says ['latent', 'y']",
    ),
    "shape of an input": (
        lambda d: _edit(d, lambda b: b.networks[0].inputs[0].spec.shape.append(2)),
        "input 'z' has shape [3] behind the batch axis, bundle.json says [3, 2]",
    ),
    "schedule on a GAN": (
        lambda d: _edit(d, lambda b: b.model.diffusion.alphas.append(0.5)),
        "must come together",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    """Each kind of damage is found and named."""
    directory = write_gan(tmp_path)
    harm, says = DAMAGE[damage]
    harm(directory)
    with pytest.raises(BundleError) as caught:
        bundles_on_disk.read(directory)
    assert says in str(caught.value)
    assert str(tmp_path) not in str(caught.value), "no path of the server's disk may reach a client"


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    """Two faults are two entries."""
    directory = write_gan(tmp_path)
    (directory / "decoder.onnx").unlink()
    _edit(directory, lambda b: setattr(b.model, "name", "other@1"))
    with pytest.raises(BundleError) as caught:
        bundles_on_disk.read(directory)
    assert len(caught.value.problems) == 2


def test_a_bad_schedule_is_refused(tmp_path: Path) -> None:
    """A schedule that does not fall is named as the diffusion field's fault."""
    directory = _edit(write_diffusion(tmp_path), lambda b: b.model.diffusion.alphas.append(0.5))
    with pytest.raises(BundleError, match="diffusion: "):
        bundles_on_disk.read(directory)


# ---- the gate on a single graph ----------------------------------------------------------------------------------


def _network() -> bundle_pb2.Network:
    network = bundle_pb2.Network(file="graph.onnx")
    network.inputs.add(name="x", spec=model_pb2.TensorSpec(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2]))
    network.outputs.add(name="y", spec=model_pb2.TensorSpec(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2]))
    return network


def _model(**changes: Any) -> onnx.ModelProto:
    dtype, batch = changes.get("dtype", TensorProto.FLOAT), changes.get("batch", "batch")
    graph = helper.make_graph(
        changes.get("nodes", [helper.make_node("Add", ["x", "w"], ["y"])]),
        "g",
        [helper.make_tensor_value_info("x", dtype, [batch, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2])],
        [helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def _external(model: onnx.ModelProto, tensor: TensorProto) -> onnx.ModelProto:
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    return model


def _external_initializer() -> onnx.ModelProto:
    model = _model()
    return _external(model, model.graph.initializer[0])


def _external_constant() -> onnx.ModelProto:
    value = helper.make_tensor("c", TensorProto.FLOAT, [2], [1.0, 2.0])
    model = _model(
        nodes=[helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Add", ["x", "c"], ["y"])]
    )
    return _external(model, model.graph.node[0].attribute[0].t)


def _external_in_subgraph() -> onnx.ModelProto:
    branches = {}
    for side in ("then_branch", "else_branch"):
        weight = helper.make_tensor("k", TensorProto.FLOAT, [2], [1.0, 2.0])
        output = [helper.make_tensor_value_info("o", TensorProto.FLOAT, [2])]
        branches[side] = helper.make_graph([helper.make_node("Identity", ["k"], ["o"])], side, [], output, [weight])
    model = _model(nodes=[helper.make_node("If", ["c"], ["y"], **branches)])
    return _external(model, model.graph.node[0].attribute[0].g.initializer[0])


def _external_sparse() -> onnx.ModelProto:
    model = _model()
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]))
    return _external(model, sparse.values)


GRAPHS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "external initializer": (_external_initializer, "another file"),
    "external constant": (_external_constant, "another file"),
    "external data in a branch": (_external_in_subgraph, "another file"),
    "external sparse initializer": (_external_sparse, "another file"),
    "custom operator": (
        lambda: _model(nodes=[helper.make_node("Evil", ["x"], ["y"], domain="com.example")]),
        "uses operator Evil",
    ),
    "noise of its own": (
        lambda: _model(nodes=[helper.make_node("RandomNormalLike", ["x"], ["y"])]),
        "draws noise itself",
    ),
    "static batch": (lambda: _model(batch=1), "no dynamic first axis"),
    "double input": (lambda: _model(dtype=TensorProto.DOUBLE), "holds DOUBLE"),
}


@pytest.mark.parametrize("fault", GRAPHS)
def test_the_gate_names_what_is_wrong_with_a_graph(fault: str) -> None:
    """Each way a graph can be unfit is found before ONNX Runtime sees it."""
    make, says = GRAPHS[fault]
    problems = gate.problems(make().SerializeToString(), _network())
    assert any(says in problem for problem in problems), problems


def test_the_gate_passes_a_sound_graph() -> None:
    """A self-contained graph with a dynamic batch has no problems."""
    assert gate.problems(_model().SerializeToString(), _network()) == []


def test_the_gate_survives_garbage() -> None:
    """Bytes that are no protobuf are a problem, not an exception."""
    garbage = hashlib.sha256(b"x").digest() * 10
    assert "is no ONNX model" in gate.problems(garbage, _network())[0]
