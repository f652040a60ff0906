import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import safetensors.torch
from google.protobuf.json_format import MessageToJson
from latentd.digest import bundle_digest
from latentd.v1 import bundle_pb2, model_pb2
from latentd_trainer import bundle as bundles
from latentd_trainer import verify
from latentd_trainer.spec import Meaning, Role, ServingSpec, Source
from onnx import numpy_helper
from rich.console import Console


@pytest.fixture
def bundle_of(
    tmp_path: Path,
    tiny_models: Path,
    tiny_specs: dict[str, Callable[[], ServingSpec]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Path]:
    """A copy of a family's tiny bundle, to be tampered with, whose family is known to `verify`."""

    def build(name: str, settings: object, info: object, seed: int) -> SimpleNamespace:
        return SimpleNamespace(serving_spec=tiny_specs[name])

    monkeypatch.setattr(verify, "build_family", build)

    def copy(family: str) -> Path:
        directory = tmp_path / f"tiny-{family}" / "1"
        shutil.copytree(tiny_models / f"tiny-{family}" / "1", directory)
        return directory

    return copy


def failures(directory: Path) -> list[str]:
    return [f"{each.subject}: {failure}" for each in verify.check(directory) for failure in each.failures]


def edit(directory: Path, change: Callable[[bundle_pb2.Bundle], object], *, sign: bool = True) -> None:
    """Change bundle.json; with `sign` its digest is made to fit, so that only the change itself is wrong."""
    bundle = bundles.read(directory)
    change(bundle)
    if sign:
        bundle.model.digest = bundle_digest(bundle)
    (directory / "bundle.json").write_text(MessageToJson(bundle))


def edit_graph(directory: Path, index: int, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change a graph, and make every digest fit."""
    network = bundles.read(directory).networks[index]
    model = onnx.load(directory / network.file)
    change(model)
    data = model.SerializeToString()
    (directory / network.file).write_bytes(data)
    edit(directory, lambda bundle: setattr(bundle.networks[index], "sha256", bundles.sha256(data)))


@pytest.mark.parametrize("family", ["vae", "gan", "diffusion"])
def test_a_fresh_bundle_passes_every_check(bundle_of: Callable[[str], Path], family: str) -> None:
    """What export writes passes, with nothing skipped."""
    checks = list(verify.check(bundle_of(family)))
    assert [each for each in checks if each.failures or each.skipped] == []
    assert any(each.name == "equals torch" for each in checks)


def test_without_a_checkpoint_parity_is_skipped_and_says_so(bundle_of: Callable[[str], Path]) -> None:
    """A bundle whose checkpoint was left out passes, and the table says what was not checked."""
    directory = bundle_of("gan")
    (directory / "checkpoint.safetensors").unlink()
    checks = list(verify.check(directory))
    assert not any(each.failures for each in checks)
    assert [each.note for each in checks if each.skipped] == ["there is no checkpoint beside it"] * 2


def test_a_failed_check_exits_1_and_lists_every_failure(bundle_of: Callable[[str], Path]) -> None:
    """The command prints a table and each failure, and its status is 1; a good bundle's is 0."""
    directory = bundle_of("vae")
    assert verify.run(directory, Console(file=io.StringIO())) == 0
    (directory / "stray.onnx").write_bytes(b"")
    edit(directory, lambda bundle: bundle.model.class_names.append("three"), sign=False)
    console = Console(file=io.StringIO(), width=200)
    assert verify.run(directory, console) == 1
    text = console.file.getvalue()
    assert "FAILED" in text
    assert "stray.onnx is named by no graph" in text
    assert "model.class_probabilities: 3 values for 4 class names" in text
    assert "model.digest is" in text


def drop(field: str) -> Callable[[bundle_pb2.Bundle], None]:
    return lambda bundle: bundle.model.ClearField(field)


def set_source(index: int, entry: int, source: int) -> Callable[[bundle_pb2.Bundle], None]:
    return lambda bundle: setattr(bundle.networks[index].inputs[entry], "source", source)


def set_meaning(index: int, result: int, meaning: int) -> Callable[[bundle_pb2.Bundle], None]:
    return lambda bundle: setattr(bundle.networks[index].outputs[result], "meaning", meaning)


@pytest.mark.parametrize(
    ("family", "change", "failure"),
    [
        ("vae", lambda b: setattr(b, "format_version", 2), "format_version: must be 1, got 2"),
        ("vae", lambda b: setattr(b.model, "name", "tiny-vae@2"), "its folder says 'tiny-vae@1'"),
        ("vae", lambda b: setattr(b.model, "name", "tiny-vae"), "must carry its version"),
        ("vae", lambda b: setattr(b.model, "name", "Tiny@1"), "'Tiny@1' must be NAME or NAME@VERSION"),
        ("vae", drop("family"), "model.family: must be given"),
        ("vae", drop("methods"), "model.methods: must name at least one method"),
        ("vae", lambda b: b.model.methods.remove(5), "scorer: no declared method uses this graph"),
        ("vae", drop("sample_spec"), "model.sample_spec: must be float32 of shape [C, H, W]"),
        ("vae", drop("latent_spec"), "latent must be absent: the model has no latent_spec"),
        ("vae", drop("class_names"), "class label must be absent: the model names no classes"),
        ("vae", lambda b: b.model.class_probabilities.__setitem__(0, 0.75), "at least 0 and sum to 1"),
        ("vae", lambda b: b.networks[0].inputs[0].spec.shape.append(2), "'z': latent must be float32 of shape [4]"),
        ("vae", lambda b: setattr(b.networks[1].inputs[1].spec, "data_type", 1), "must be int64 of shape []"),
        ("vae", lambda b: b.networks[2].outputs[0].spec.shape.append(1), "must be float32 of shape []"),
        ("vae", set_source(0, 0, Source.SOURCE_UNSPECIFIED), "input 'z': unspecified has no place here"),
        ("vae", set_source(0, 0, Source.SOURCE_TIMESTEP), "input 'z': timestep has no place here"),
        ("vae", set_source(1, 0, 99), "input 'x': number 99 has no place here"),
        ("vae", set_meaning(0, 0, Meaning.MEANING_UNSPECIFIED), "output 'sample': unspecified has no place here"),
        ("vae", set_meaning(0, 0, Meaning.MEANING_SAMPLE_DRAW), "outputs: must have one that means sample"),
        ("vae", set_meaning(1, 0, Meaning.MEANING_LATENT_LOG_VARIANCE), "exactly one of latent mean"),
        ("vae", lambda b: setattr(b.networks[0], "role", 9), "role: unknown to this version"),
        ("vae", lambda b: setattr(b.networks[1], "role", Role.ROLE_DECODER), "2 graphs are decoders; at most one"),
        ("vae", lambda b: setattr(b.networks[0], "file", "../decoder.onnx"), "must be a name in the bundle"),
        ("vae", lambda b: setattr(b.networks[0], "file", "encoder.onnx"), "2 graphs are in 'encoder.onnx'"),
        ("vae", lambda b: b.networks[0].inputs.pop(2), "sample draw needs a noise input"),
        ("gan", lambda b: b.networks[0].inputs.pop(0), "must take latents, codes or noise"),
        ("gan", lambda b: b.model.diffusion.SetInParent(), "given, but no graph is a denoiser"),
        ("diffusion", drop("diffusion"), "model.diffusion: must be given, as there is a denoiser"),
        ("diffusion", lambda b: b.networks[0].inputs.pop(1), "timestep: must be an input"),
        ("diffusion", lambda b: b.networks[0].inputs.pop(2), "guidance_supported: needs a denoiser that takes a class"),
        ("diffusion", lambda b: b.model.diffusion.sigmas.pop(), "20 values and 19 sigmas"),
        ("diffusion", lambda b: b.model.diffusion.alphas.__setitem__(3, 0.5), "alpha^2 + sigma^2 must be 1"),
        ("diffusion", lambda b: b.model.diffusion.alphas.__setitem__(3, 0.0), "alphas: must be at least 1e-06"),
        ("diffusion", lambda b: b.model.diffusion.sigmas.__setitem__(3, -1.0), "sigmas: must be at least 1e-06"),
        ("diffusion", lambda b: setattr(b.model.diffusion, "prediction", 0), "prediction: must be given"),
        ("diffusion", lambda b: b.model.diffusion.samplers.append("x"), "samplers: must be some of ddim"),
        ("diffusion", lambda b: setattr(b.model.diffusion, "default_step_count", 0), "must be 1 to 20, got 0"),
        ("diffusion", lambda b: b.model.latent_spec.shape.__setitem__(0, 2), "must have the shape of sample_spec"),
    ],
)
def test_each_contradiction_in_the_message_is_named(
    bundle_of: Callable[[str], Path], family: str, change: Callable[[bundle_pb2.Bundle], object], failure: str
) -> None:
    """Whatever bundle.json says wrong, with a digest that fits, is named."""
    directory = bundle_of(family)
    edit(directory, change)
    assert any(failure in each for each in failures(directory)), failures(directory)


def test_levels_that_rise_are_named(bundle_of: Callable[[str], Path]) -> None:
    """A schedule must grow noisier with every timestep."""
    directory = bundle_of("diffusion")

    def swap(bundle: bundle_pb2.Bundle) -> None:
        spec = bundle.model.diffusion
        spec.alphas[4], spec.alphas[5] = spec.alphas[5], spec.alphas[4]
        spec.sigmas[4], spec.sigmas[5] = spec.sigmas[5], spec.sigmas[4]

    edit(directory, swap)
    assert any("alpha / sigma must fall strictly" in each for each in failures(directory))


def test_a_change_without_a_digest_is_named(bundle_of: Callable[[str], Path]) -> None:
    """Any edit outside the card shows in the digest; one of the card does not."""
    directory = bundle_of("vae")
    edit(directory, lambda bundle: setattr(bundle.model.card, "license", "MIT"), sign=False)
    assert failures(directory) == []
    edit(directory, lambda bundle: bundle.model.class_names.__setitem__(0, "none"), sign=False)
    assert [each.startswith("bundle.json: model.digest is 'sha256:") for each in failures(directory)] == [True]


def test_damaged_json_is_named(bundle_of: Callable[[str], Path]) -> None:
    """A truncated bundle.json is the only failure: nothing else can be checked."""
    directory = bundle_of("vae")
    text = (directory / "bundle.json").read_text()
    (directory / "bundle.json").write_text(text[: len(text) // 2])
    assert ["is not a bundle as proto JSON" in each for each in failures(directory)] == [True]


def test_a_flipped_bit_in_a_graph_is_named(bundle_of: Callable[[str], Path]) -> None:
    """A graph whose bytes changed is named with both digests."""
    directory = bundle_of("gan")
    data = bytearray((directory / "scorer.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "scorer.onnx").write_bytes(bytes(data))
    assert failures(directory)[0].startswith("scorer.onnx: sha256 is ")


def test_a_missing_graph_is_named(bundle_of: Callable[[str], Path]) -> None:
    """A graph that is not there is named."""
    directory = bundle_of("gan")
    (directory / "scorer.onnx").unlink()
    assert failures(directory) == ["scorer.onnx: cannot be read: No such file or directory"]


def test_a_graph_that_is_no_onnx_is_named(bundle_of: Callable[[str], Path]) -> None:
    """A file of other bytes, with a digest that fits, is named."""
    directory = bundle_of("gan")
    (directory / "scorer.onnx").write_bytes(b"\xff\xff\xff")
    edit(directory, lambda bundle: setattr(bundle.networks[1], "sha256", bundles.sha256(b"\xff\xff\xff")))
    assert failures(directory)[0].startswith("scorer.onnx: is no ONNX file")


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "w"
    for node in model.graph.node:
        node.input[:] = ["w" if name == "x" else name for name in node.input]


def fix_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def other_type(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT32


def add_noise(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("RandomNormal", [], ["unused"], shape=[1]))


def add_foreign(model: onnx.ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    model.graph.node.append(onnx.helper.make_node("Gelu", ["x"], ["unused"], domain="com.microsoft"))


def add_path(model: onnx.ModelProto) -> None:
    model.graph.node[0].metadata_props.add(key="source", value="/home/someone/net.py")


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (rename_input, "inputs: must be ['x', 'y'], got ['w', 'y']"),
        (fix_batch, "input 'x': must be of shape ['batch', 1, 4, 4], is [4, 1, 4, 4]"),
        (other_type, "input 'y': must hold INT64, holds INT32"),
        (add_noise, "draws noise with RandomNormal; noise must come in by inputs"),
        (add_foreign, "uses operators of com.microsoft; only the default domain is allowed"),
        (add_path, "carries metadata or doc strings"),
    ],
)
def test_each_contradiction_in_a_graph_is_named(
    bundle_of: Callable[[str], Path], change: Callable[[onnx.ModelProto], None], failure: str
) -> None:
    """Whatever a graph does against the contract, with digests that fit, is named with its file."""
    directory = bundle_of("gan")
    edit_graph(directory, 1, change)
    found = failures(directory)
    assert any(each.startswith("scorer.onnx: ") and failure in each for each in found), found


def poison(value: float) -> Callable[[onnx.ModelProto], None]:
    """Put `value` into the label table."""

    def change(model: onnx.ModelProto) -> None:
        table = next(tensor for tensor in model.graph.initializer if tensor.dims == [3, 16])
        table.CopyFrom(numpy_helper.from_array(np.full((3, 16), value, np.float32), table.name))

    return change


def test_weights_that_give_nan_are_named(bundle_of: Callable[[str], Path]) -> None:
    """A graph that answers NaN is named at each size it was run at."""
    directory = bundle_of("gan")
    edit_graph(directory, 1, poison(float("nan")))
    assert failures(directory)[:2] == [
        "scorer.onnx: output 'real' is not finite at batch size 1",
        "scorer.onnx: output 'real' is not finite at batch size 3",
    ]


def test_other_weights_than_the_checkpoint_are_named(bundle_of: Callable[[str], Path]) -> None:
    """A graph whose weights are not the checkpoint's is named with the difference."""
    directory = bundle_of("gan")
    edit_graph(directory, 1, poison(0.5))
    (failure,) = failures(directory)
    assert failure.startswith("scorer.onnx: output 'real' differs from torch by 0.")


def test_a_checkpoint_of_another_network_is_named(bundle_of: Callable[[str], Path]) -> None:
    """Missing weights are a failure of the checkpoint."""
    directory = bundle_of("gan")
    path = directory / "checkpoint.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    del tensors["scorer.labels.weight"]
    path.write_bytes(safetensors.torch.save(tensors))
    (failure,) = failures(directory)
    assert failure.startswith("checkpoint.safetensors: GraphError: scorer: the checkpoint does not fit the network")


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"family": "gan"}), json.dumps({"family": "gan", "info": []})])
def test_a_damaged_record_is_named(bundle_of: Callable[[str], Path], text: str) -> None:
    """A record that the networks cannot be rebuilt from is a failure, not a crash."""
    directory = bundle_of("gan")
    (directory / "record.json").write_text(text)
    (failure,) = failures(directory)
    assert failure.startswith("checkpoint.safetensors: ")


def test_an_unknown_method_is_named(bundle_of: Callable[[str], Path]) -> None:
    """A method without a graph that answers it is named."""
    directory = bundle_of("gan")
    edit(directory, lambda bundle: bundle.model.methods.append(model_pb2.Model.METHOD_ENCODE))
    assert failures(directory) == ["bundle.json: model.methods: METHOD_ENCODE needs a graph: denoiser or encoder"]


def split_in_two(model: onnx.ModelProto) -> None:
    """Let the graph run at even batch sizes only."""
    model.graph.node.append(onnx.helper.make_node("Split", ["y"], ["first", "second"], num_outputs=2))
    model.graph.node.append(onnx.helper.make_node("Add", ["first", "second"], ["sums"]))


def test_a_graph_that_cannot_run_is_named(bundle_of: Callable[[str], Path]) -> None:
    """A graph that looks right but fails on some batch is named with the inputs it failed on."""
    directory = bundle_of("gan")
    edit_graph(directory, 1, split_in_two)
    (failure,) = failures(directory)
    assert failure.startswith("scorer.onnx: does not run with inputs x float32[1, 1, 4, 4], y int64[1]: ")


def only_one_or_three(model: onnx.ModelProto) -> None:
    """Let the graph run at the sizes of the smoke test only."""
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.int64), "three"))
    model.graph.node.append(onnx.helper.make_node("Add", ["y", "three"], ["sums"]))


def test_a_graph_for_a_few_batch_sizes_is_named(bundle_of: Callable[[str], Path]) -> None:
    """A graph that runs at the first sizes tried and fails at a later one is named with the inputs it failed on."""
    directory = bundle_of("gan")
    edit_graph(directory, 1, only_one_or_three)
    (failure,) = failures(directory)
    assert failure.startswith("scorer.onnx: does not run with inputs x float32[64, 1, 4, 4], y int64[64]: ")


def test_a_failure_while_comparing_with_torch_is_named(
    bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows already differ by batch, sizes are tried last against torch; failing there is told too."""
    monkeypatch.setattr(verify.parity, "row_invariant", lambda *_: False)
    directory = bundle_of("gan")
    edit_graph(directory, 1, only_one_or_three)
    (failure,) = failures(directory)
    assert failure.startswith("scorer.onnx: does not run with inputs x float32[2, 1, 4, 4], y int64[2]: ")
