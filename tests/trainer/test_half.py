"""Bundles whose networks compute in half precision."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from latentd_trainer import bundle as bundles
from latentd_trainer import parity, verify
from latentd_trainer.checkpoint import RunRecord, build_family
from latentd_trainer.data import load
from latentd_trainer.export import write_bundle
from latentd_trainer.half import to_half
from latentd_trainer.onnx_graph import GraphError
from latentd_trainer.spec import ServingSpec
from onnx import TensorProto, helper, numpy_helper, shape_inference

Write = Callable[..., Path]
Specs = dict[str, Callable[[], ServingSpec]]
FAMILIES = ("vae", "gan", "diffusion")
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@pytest.fixture(scope="module")
def half_models(tmp_path_factory: pytest.TempPathFactory, write_tiny: Write) -> Path:
    """The three tiny bundles in float16; not to be changed."""
    models = tmp_path_factory.mktemp("half")
    for family in FAMILIES:
        write_tiny(models, family, precision="fp16")
    return models


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every value and weight."""
    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        weight.name: weight.data_type for weight in graph.initializer
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_products_take_and_give_half_and_the_contract_stays_whole(
    half_models: Path, tiny_models: Path, family: str
) -> None:
    """Every product's operands are float16; inputs, outputs, sums and logarithms are what they were; files shrink."""
    for path in (half_models / f"tiny-{family}" / "1").glob("*.onnx"):
        model, whole = onnx.load(path), onnx.load(tiny_models / f"tiny-{family}" / "1" / path.name)
        types = element_types(model)
        for node in model.graph.node:
            operands = {types[name] for name in (*node.input, *node.output) if name}
            if node.op_type in HEAVY:
                assert operands == {TensorProto.FLOAT16}, node.name
            elif node.op_type in ("Exp", "Log", "ReduceSum", "Pow"):
                assert TensorProto.FLOAT16 not in operands, node.name
        assert [*model.graph.input, *model.graph.output] == [*whole.graph.input, *whole.graph.output]
        assert model.ByteSize() < 0.8 * whole.ByteSize()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_deviation_is_real_and_within_the_bar_of_half(half_models: Path, tiny_models: Path, family: str) -> None:
    """Float16 answers differ from float32's by more than the bar of float32 and less than that of float16."""
    directory = half_models / f"tiny-{family}" / "1"
    record = bundles.read_record(directory)["export"]
    assert record["precision"] == "fp16"
    assert bundles.read_record(tiny_models / f"tiny-{family}" / "1")["export"]["precision"] == "fp32"
    worst = max(value for proof in record["parity"].values() for value in proof["deviation"].values())
    assert parity.TOLERANCES["fp32"].row < worst <= parity.TOLERANCES["fp16"].row
    assert all(proof["row_invariant"] for proof in record["parity"].values())


def test_the_card_says_the_precision(half_models: Path, tiny_models: Path) -> None:
    """Who reads the card learns of float16, and nothing else of the model changes but names and digests."""
    half, whole = (bundles.read(models / "tiny-gan" / "1").model for models in (half_models, tiny_models))
    assert half.card.description == whole.card.description + " Its networks compute in float16."
    assert half.digest != whole.digest
    half.card.description, half.digest = whole.card.description, whole.digest
    assert half == whole


def test_verify_holds_a_bundle_to_the_bar_of_its_precision(tmp_path: Path) -> None:
    """A float16 bundle passes as such, and fails where its record claims float32."""
    info = load("digits").info
    spec = build_family("gan", {"width": 8}, info, seed=0).serving_spec()
    record = RunRecord("gan", {"width": 8}, "digits", info, 0, "fp32", 1, 1, {})
    time = datetime(2026, 1, 2, tzinfo=UTC)
    directory = write_bundle(spec, record, time, models=tmp_path, name="tiny", precision="fp16")
    assert [each for each in verify.check(directory) if each.failures or each.skipped] == []
    path = directory / bundles.RECORD_FILE
    claims = json.loads(path.read_text())
    claims["export"]["precision"] = "fp32"
    path.write_text(json.dumps(claims))
    assert {each.name for each in verify.check(directory) if each.failures} == {"equals torch"}


def test_what_does_not_fit_into_half_is_refused(tmp_path: Path, tiny_specs: Specs, write_tiny: Write) -> None:
    """A weight beyond float16's largest number is named; values that only become so large show as a deviation."""
    cases = (("gan", 1e6, "layers.0.weight.*float16 ends at 65504"), ("diffusion", 30, "differ.* from torch"))
    for family, factor, complaint in cases:
        spec = tiny_specs[family]()
        with torch.no_grad():
            for parameter in spec.graphs[0].module.parameters():
                parameter *= factor
        with pytest.raises(GraphError, match=complaint):
            write_tiny(tmp_path, family, spec, precision="fp16")
        assert not (tmp_path / f"tiny-{family}" / "1").exists()


def test_only_what_lies_between_products_goes_along() -> None:
    """Before the first product and after the last, in what spans magnitudes, and for a shape alone, nothing is half."""
    weight = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["before"]),
        helper.make_node("MatMul", ["before", "w"], ["first"]),
        helper.make_node("Relu", ["first"], ["between"]),
        helper.make_node("Exp", ["between"], ["wide"]),
        helper.make_node("MatMul", ["wide", "w"], ["last"]),
        helper.make_node("Tanh", ["last"], ["after"]),
        helper.make_node("Shape", ["first"], ["extent"]),
        helper.make_node("Add", ["after", "w"], ["y"]),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 3])],
            [
                helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 3]),
                helper.make_tensor_value_info("extent", TensorProto.INT64, [2]),
            ],
            [weight],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    half = to_half(model)
    onnx.checker.check_model(half, full_check=True)
    types = element_types(half)
    by_kind = {node.op_type: types[node.output[0]] for node in half.graph.node if node.op_type != "Cast"}
    assert {kind for kind, found in by_kind.items() if found == TensorProto.FLOAT16} == {"MatMul", "Relu"}
    # Into the first product, out of Relu, into the second, out of it: nothing is cast for the shape alone.
    assert sum(node.op_type == "Cast" for node in half.graph.node) == 4
    assert {weight.name for weight in half.graph.initializer} == {"w", "w/half"}
    x = np.random.default_rng(0).standard_normal((3, 3), np.float32)
    ours, theirs = (parity.run_onnx(parity.open_session(each.SerializeToString()), {"x": x}) for each in (half, model))
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-3)
