"""ONNX files of other people's, imported: what becomes of good ones, and what is said of each kind of bad one."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import yaml
from google.protobuf.json_format import MessageToDict
from latentd.v1 import model_pb2
from latentd_server import bundle as server_bundle
from latentd_trainer import bundle as bundles
from latentd_trainer import cli, parity, verify
from latentd_trainer.bundle import BundleError
from latentd_trainer.card import UNSAID
from latentd_trainer.importers import ImportingError, onnx_files
from latentd_trainer.importers.described import import_onnx
from latentd_trainer.onnx_graph import GraphError
from onnx import numpy_helper
from typer.testing import CliRunner

DECODER = """
<ir_version: 9, opset_import: ["": 18]>
decoder (float[N, 4] z, int64[N] y) => (float[N, c, h, w] image)
<float[3, 4] table = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2}, int64[4] shape = {-1, 1, 2, 2}>
{
  e = Gather(table, y)
  s = Add(z, e)
  t = Tanh(s)
  image = Reshape(t, shape)
}"""
ENCODER = """
<ir_version: 9, opset_import: ["": 18]>
encoder (float[N, 1, 2, 2] x) => (float[N, k] mean, float[N, k] logvar)
{
  mean = Flatten(x)
  logvar = Neg(mean)
}"""
DENOISER = """
<ir_version: 9, opset_import: ["": 18]>
denoiser (float[N, 1, 2, 2] x, int64[N] t) => (float[N, 1, 2, 2] eps)
<float[10] table = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0}, int64[1] axes = {1}, int64[2] more = {2, 3}>
{
  e = Gather(table, t)
  one = Unsqueeze(e, axes)
  all = Unsqueeze(one, more)
  eps = Mul(x, all)
}"""
GAN: dict[str, Any] = {
    "name": "my-gan",
    "family": "gan",
    "classes": ["a", "b", "c"],
    "graphs": {
        "decoder": {
            "file": "decoder.onnx",
            "inputs": {"z": "latent", "y": "class_label"},
            "outputs": {"image": "sample"},
        }
    },
}
VAE: dict[str, Any] = {
    "name": "my-vae",
    "family": "vae",
    "classes": ["a", "b", "c"],
    "class_probabilities": [0.5, 0.25, 0.25],
    "license": "MIT",
    "dataset": "squares",
    "description": "Four pixels.",
    "reference": "https://arxiv.org/abs/1312.6114",
    "graphs": GAN["graphs"]
    | {
        "encoder": {
            "file": "encoder.onnx",
            "inputs": {"x": "sample"},
            "outputs": {"mean": "latent_mean", "logvar": "latent_log_variance"},
        }
    },
}
DIFFUSION: dict[str, Any] = {
    "name": "my-ddpm",
    "family": "diffusion",
    "graphs": {
        "denoiser": {
            "file": "denoiser.onnx",
            "inputs": {"x": "sample", "t": "timestep"},
            "outputs": {"eps": "prediction"},
        }
    },
    "diffusion": {
        "prediction": "eps",
        "schedule": {"kind": "linear", "timesteps": 10, "beta_start": 0.001, "beta_end": 0.5},
        "samplers": ["ddpm", "ddim"],
        "clip": True,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a good graph of each role."""
    for name, text in {"decoder": DECODER, "encoder": ENCODER, "denoiser": DENOISER}.items():
        save(tmp_path, name, text)
    return tmp_path


def save(folder: Path, name: str, text: str, change: Callable[[onnx.ModelProto], object] = lambda model: None) -> None:
    """Write a graph, after `change` has been at it."""
    model = onnx.parser.parse_model(text)
    change(model)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())


def run(folder: Path, content: dict[str, Any], **options: Any) -> Path:
    """Import what the model file `content` says."""
    (folder / "model.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return import_onnx(folder / "model.yaml", models=folder / "models", **options)


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The content with one thing in it replaced, or removed where the value is None."""
    content = copy.deepcopy(content)
    *parents, last = path.split(".")
    part = content
    for parent in parents:
        part = part[parent]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return content


def refusal(folder: Path, content: dict[str, Any]) -> str:
    """What is said of it; nothing is written."""
    with pytest.raises((ImportingError, BundleError)) as caught:
        run(folder, content)
    assert not (folder / "models").exists()
    return str(caught.value)


@pytest.mark.parametrize("content", [GAN, VAE, DIFFUSION], ids=lambda content: content["name"])
def test_a_bundle_that_the_server_reads(folder: Path, content: dict[str, Any]) -> None:
    """Graphs become a bundle that `verify` passes, that the server's own checks pass, and that answers as they did."""
    written = run(folder, content)
    assert written == folder / "models" / content["name"] / "1"
    assert [each for each in verify.check(written) if each.failures] == []
    stored = server_bundle.read(written)
    for network in stored.message.networks:
        feeds = {
            entry.name: np.ones((3, *entry.spec.shape), "i8" if entry.spec.data_type == 4 else "f4")
            for entry in network.inputs
        }
        before, after = (
            ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)
            for data in ((folder / network.file).read_bytes(), stored.graphs[network.role])
        )
        assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_the_file_says_is_what_the_bundle_says(folder: Path) -> None:
    """Names, classes, card, ranges and methods come from the file; shapes and the rest from the graphs."""
    model = bundles.read(run(folder, VAE | {"sample": {"range": [0, 2]}}, version=7)).model
    assert model.name == "my-vae@7"
    card = MessageToDict(model.card)
    assert [each.pop("description") != "" for each in card["capabilities"]] == [True] * 5
    del card["capabilities"]
    assert card == {
        "description": "Four pixels.",
        "license": "MIT",
        "dataset": "squares",
        "datasetLicense": "NOASSERTION",
        "likelihood": {"kind": "KIND_NONE", "explanation": UNSAID},
        "referenceUri": "https://arxiv.org/abs/1312.6114",
    }
    assert list(model.class_probabilities) == [0.5, 0.25, 0.25]
    assert (list(model.sample_spec.shape), model.sample_spec.min_value, model.sample_spec.max_value) == (
        [1, 2, 2],
        0,
        2,
    )
    assert list(model.latent_spec.shape) == [4]
    assert set(model.methods) == {
        model_pb2.Model.METHOD_SAMPLE,
        model_pb2.Model.METHOD_DECODE,
        model_pb2.Model.METHOD_ENCODE,
    }


def test_a_uniform_prior_is_passed_on(folder: Path) -> None:
    """`latent: {prior: uniform}` gives latents the range [0, 1]."""
    spec = bundles.read(run(folder, GAN | {"latent": {"prior": "uniform"}})).model.latent_spec
    assert (spec.min_value, spec.max_value) == (0, 1)


def test_a_schedule_by_name(folder: Path) -> None:
    """The betas of the name make the alphas and sigmas, and the first sampler named is the default."""
    spec = bundles.read(run(folder, DIFFUSION)).model.diffusion
    abars = np.cumprod(1 - np.linspace(0.001, 0.5, 10))
    assert spec.alphas == pytest.approx(np.sqrt(abars))
    assert spec.sigmas == pytest.approx(np.sqrt(1 - abars))
    assert list(spec.samplers) == ["ddpm", "ddim"]
    assert (spec.default_step_count, spec.clip_denoised) == (10, True)


@pytest.mark.parametrize(
    "schedule",
    [
        {"betas": list(np.linspace(0.001, 0.5, 10).tolist())},
        {"alphas_cumprod": np.cumprod(1 - np.linspace(0.001, 0.5, 10)).tolist()},
    ],
    ids=["betas", "alphas_cumprod"],
)
def test_a_schedule_by_its_numbers(folder: Path, schedule: dict[str, Any]) -> None:
    """Betas and their products give the same bundle as their name."""
    alphas = bundles.read(run(folder, changed(DIFFUSION, "diffusion.schedule", schedule))).model.diffusion.alphas
    assert alphas == pytest.approx(np.sqrt(np.cumprod(1 - np.linspace(0.001, 0.5, 10))))


def test_outputs_that_are_not_served_are_dropped(folder: Path) -> None:
    """An output that is said to be unused is not in the bundle's graph, and nothing is missing."""
    written = run(folder, changed(VAE, "graphs.encoder.outputs.logvar", "unused"))
    graph = onnx.load(written / "encoder.onnx").graph
    assert [value.name for value in graph.output] == ["mean"]
    assert [axis.dim_param or axis.dim_value for axis in graph.output[0].type.tensor_type.shape.dim] == ["batch", 4]


def test_axes_left_open_are_fixed_by_the_file(folder: Path) -> None:
    """A graph for any height and width is fixed at the shape that the file gives its input."""
    save(folder, "encoder", ENCODER.replace("N, 1, 2, 2", "N, 1, h, w"))
    assert "input 'x': has the shape ['N', 1, 'h', 'w']; say `shape`" in refusal(folder, VAE)
    entry = {"source": "sample", "shape": [1, 2, 2]}
    written = run(folder, changed(VAE, "graphs.encoder.inputs.x", entry))
    assert list(bundles.read(written).networks[1].inputs[0].spec.shape) == [1, 2, 2]


def test_notes_of_where_a_graph_was_made_are_removed(folder: Path) -> None:
    """Doc strings, metadata and names of operator sets that no node uses are not in the bundle."""

    def annotate(model: onnx.ModelProto) -> None:
        model.doc_string = "/home/of/somebody"
        model.graph.node[0].metadata_props.add(key="stack_trace", value="/home/of/somebody/net.py")
        model.opset_import.add(domain="pkg.torch", version=1)

    save(folder, "decoder", DECODER, annotate)
    data = (run(folder, GAN) / "decoder.onnx").read_bytes()
    assert b"somebody" not in data
    assert b"pkg.torch" not in data


STATIC = "input 'z': its first axis is fixed at 2; it is the batch and must be dynamic: export it again"
BAD_DECODERS: dict[str, tuple[str, str]] = {
    "a static batch": (DECODER.replace("float[N, 4] z", "float[2, 4] z"), STATIC),
    "a baked batch": (
        DECODER.replace("{-1, 1, 2, 2}", "{2, 1, 2, 2}").replace("float[N, c, h, w]", "float[c, h, w, v]"),
        "does not run with 1 rows",
    ),
    "no batch axis": (
        DECODER.replace("int64[N] y", "int64 y"),
        "input 'y': is a single number; the first axis of every input is the batch",
    ),
    "float64": (
        DECODER.replace("float[", "double[").replace("float[", "double["),
        "input 'z': holds DOUBLE; must hold FLOAT: cast inside the graph and export it again",
    ),
    "labels that are no integers": (
        DECODER.replace("int64[N] y", "float[N] y").replace(
            "e = Gather(table, y)", "i = Cast<to = 7>(y) e = Gather(table, i)"
        ),
        "input 'y': holds FLOAT; must hold INT64 (timesteps and labels are whole numbers)",
    ),
    "a later opset": (DECODER.replace('"": 18', '"": 27'), "is written in opset 27; a decoder must be in 7 to 26"),
    "an early opset": (DECODER.replace('"": 18', '"": 6'), "is written in opset 6; a decoder must be in 7 to 26"),
    "operators of others": (
        DECODER.replace('["": 18]', '["": 18, "com.microsoft": 1]').replace("t = Tanh(s)", "t = com.microsoft.Gelu(s)"),
        "uses operators of com.microsoft; only the default domain is allowed",
    ),
    "noise of its own": (
        DECODER.replace("t = Tanh(s)", "r = RandomNormalLike(s) t = Add(s, r)"),
        "draws noise with RandomNormalLike; noise must come in by inputs",
    ),
    "another output": (DECODER.replace("image", "picture"), "outputs: has no 'image'; it has 'picture'"),
    "another input": (
        DECODER.replace("z, int64[N] y", "z, int64[N] y, float[N] w"),
        "inputs: has 'w' too; say where it comes from",
    ),
    "channels last": (
        DECODER.replace("{-1, 1, 2, 2}", "{-1, 2, 2, 1}"),
        "samples of shape [2, 2, 1] look like [H, W, C] (NHWC); they must be [C, H, W] (NCHW)",
    ),
    "samples that are no images": (
        DECODER.replace("int64[4] shape = {-1, 1, 2, 2}", "int64[2] shape = {-1, 4}").replace("[N, c, h, w]", "[N, c]"),
        "samples must be of shape [C, H, W]; these are of shape [4]",
    ),
    "statistics of the batch": (
        DECODER.replace("t = Tanh(s)", "m = ReduceMean<keepdims = 1>(s, zero) t = Sub(s, m)").replace(
            "int64[4] shape", "int64[1] zero = {0}, int64[4] shape"
        ),
        "of a row differs by",
    ),
    "a half output": (
        DECODER.replace("image = Reshape(t, shape)", "f = Cast<to = 10>(t) image = Reshape(f, shape)").replace(
            "(float[N, c", "(float16[N, c"
        ),
        "output 'image': holds FLOAT16; must hold FLOAT",
    ),
    "infinite samples": (
        DECODER.replace("t = Tanh(s)", "n = Sub(s, s) t = Div(s, n)"),
        "output 'image' is not finite for random inputs in their ranges",
    ),
    "one row for all": (
        DECODER.replace("t = Tanh(s)", "t = ReduceSum<keepdims = 1>(s, zero)").replace(
            "int64[4] shape", "int64[1] zero = {0}, int64[4] shape"
        ),
        "output 'image' is of shape [1, 1, 2, 2] for 2 rows; its first axis must be the batch",
    ),
}


@pytest.mark.parametrize("kind", BAD_DECODERS)
def test_a_graph_that_cannot_be_served_is_refused_in_words(folder: Path, kind: str) -> None:
    """Each kind of bad graph is refused by the graph's role, the file or the input, with what was expected."""
    text, expected = BAD_DECODERS[kind]
    save(folder, "decoder", text)
    said = refusal(folder, GAN)
    assert expected in said
    assert "samples" in said or "decoder: " in said


def test_external_data_are_refused(folder: Path) -> None:
    """Weights in another file are refused with the call that brings them in, even where that file is there."""
    model = onnx.parser.parse_model(DECODER)
    table = numpy_helper.from_array(np.zeros((3, 4), np.float32), "table")
    model.graph.initializer[0].CopyFrom(table)
    onnx.save_model(model, folder / "decoder.onnx", save_as_external_data=True, size_threshold=0, location="weights")
    assert "keeps table" in (said := refusal(folder, GAN))
    assert "onnx.save with save_as_external_data=False writes one file" in said


def test_functions_are_refused(folder: Path) -> None:
    """A graph that calls functions of its own is refused with the call that puts them in their places."""
    text = DECODER.replace('["": 18]', '["": 18, "my": 1]').replace("t = Tanh(s)", "t = my.squash(s)")
    text += '<domain: "my", opset_import: ["": 18]> squash (a) => (b) { b = Tanh(a) }'
    save(folder, "decoder", text)
    assert "defines functions of its own; onnx.inliner.inline_local_functions" in refusal(folder, GAN)


def test_weights_among_the_inputs_are_refused(folder: Path) -> None:
    """A graph of before IR version 4, whose weights are inputs too, is refused with why."""

    def list_weights(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        model.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))

    save(folder, "decoder", DECODER, list_weights)
    assert "lists its weights table among its inputs, as before IR version 4" in refusal(folder, GAN)


def test_a_denoiser_must_be_new_enough_for_the_step(folder: Path) -> None:
    """The sampler's update is written in opset 18, so an older denoiser is refused though others may be older."""
    save(folder, "denoiser", DENOISER.replace('"": 18', '"": 17'))
    assert "is written in opset 17; a denoiser must be in 18 to 26" in refusal(folder, DIFFUSION)


def test_the_newest_opset_is_the_runtime_s(folder: Path) -> None:
    """The installed ONNX Runtime takes the newest opset that is allowed, and not the one after it."""
    newest = onnx_files.NEWEST_OPSET
    save(folder, "decoder", DECODER.replace('"": 18', f'"": {newest}'))
    assert run(folder, GAN).is_dir()
    save(folder, "decoder", DECODER.replace('"": 18', f'"": {newest + 1}'))
    with pytest.raises(GraphError, match="ONNX Runtime refuses the graph"):
        parity.open_session((folder / "decoder.onnx").read_bytes())


def test_a_file_that_is_no_graph_is_refused(folder: Path) -> None:
    """A missing file and one that is something else are told apart."""
    (folder / "decoder.onnx").write_bytes(b"no graph")
    (folder / "encoder.onnx").unlink()
    said = refusal(folder, VAE)
    assert "decoder: decoder.onnx: is no ONNX file" in said
    assert "encoder: encoder.onnx: cannot be read: No such file or directory" in said


def test_everything_wrong_with_every_graph_is_said_at_once(folder: Path) -> None:
    """Problems of two graphs, two of them in one, are in one message."""
    text = DECODER.replace("float[N, 4] z", "float[2, 4] z").replace("int64[N] y", "int64 y")
    save(folder, "decoder", text)
    save(folder, "encoder", ENCODER.replace('"": 18', '"": 27'))
    said = refusal(folder, VAE)
    assert said.count("\n") == 2
    for part in ("input 'z': its first axis is fixed at 2", "input 'y': is a single number", "written in opset 27"):
        assert part in said


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "a source": (
        changed(GAN, "graphs.decoder.inputs.z", "noise"),
        "graphs.decoder.inputs.z.source: must be one of sample, latent, timestep, class_label, codes, normal_noise, "
        "uniform_noise; got 'noise'",
    ),
    "a meaning": (
        changed(GAN, "graphs.decoder.outputs.image", "picture"),
        "graphs.decoder.outputs.image: must be one of sample, prediction, latent_mean",
    ),
    "a role": (
        changed(GAN, "graphs", {"generator": GAN["graphs"]["decoder"]}),
        "graphs.generator: must be one of decoder, encoder, denoiser, scorer; got 'generator'",
    ),
    "a family": (GAN | {"family": "flow"}, "family: must be one of naive_bayes,"),
    "a name": (GAN | {"name": "My GAN"}, "name 'My GAN' must match"),
    "a key": (GAN | {"lisence": "MIT"}, "lisence: Extra inputs are not permitted"),
    "a missing key": (changed(GAN, "graphs.decoder.file", None), "graphs.decoder.file: Field required"),
    "a class that YAML changed": (GAN | {"classes": [True, "b", "c"]}, "classes.0: must be a text; YAML reads words"),
    "a range": (GAN | {"sample": {"range": [1, -1]}}, "sample: range must rise, got [1.0, -1.0]"),
    "a sampler": (
        changed(DIFFUSION, "diffusion.samplers", ["plms"]),
        "diffusion.samplers.0: must be one of ddim, ddpm",
    ),
    "a schedule's name": (
        changed(DIFFUSION, "diffusion.schedule.kind", "cosine"),
        "diffusion.schedule: kind must be one of linear, scaled_linear, squaredcos_cap_v2; got 'cosine'",
    ),
    "two schedules": (
        changed(DIFFUSION, "diffusion.schedule.betas", [0.1]),
        "diffusion.schedule: must have exactly one of kind, betas, alphas_cumprod; got kind, betas",
    ),
    "a schedule nobody can walk": (
        changed(DIFFUSION, "diffusion.schedule", {"alphas_cumprod": [0.5, 0.9]}),
        "diffusion: the schedule cannot be walked along: alphas: alpha / sigma must fall strictly",
    ),
    "no schedule": (changed(DIFFUSION, "diffusion", None), "a denoiser and `diffusion` must come together"),
    "a place that a source has not": (
        changed(GAN, "graphs.decoder.inputs.z", "sample"),
        "graphs.decoder.inputs.z: a decoder takes latent, class_label, codes, normal_noise, uniform_noise",
    ),
    "a method that no graph answers": (
        GAN | {"methods": ["encode"]},
        "METHOD_ENCODE needs a graph: denoiser or encoder",
    ),
    "labels without classes": (
        changed(GAN, "classes", None),
        "graphs.decoder.inputs.y: takes labels, so `classes` must name them",
    ),
    "a meaning without a place": (
        changed(GAN, "graphs.decoder.outputs.image", "prediction"),
        "graphs.decoder.outputs.image: a decoder gives sample, sample_draw, unused",
    ),
    "a denoiser that is told no timestep": (
        changed(DIFFUSION, "graphs.denoiser.inputs", {"x": "sample"}),
        "graphs.denoiser.inputs: one must come from timestep",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_says_what_cannot_be_is_refused_by_path(folder: Path, kind: str) -> None:
    """Each kind of slip is named by its path in the file, with what is allowed there."""
    content, expected = BAD_FILES[kind]
    assert expected in refusal(folder, content)


def test_every_slip_in_a_file_is_named_at_once(folder: Path) -> None:
    """Three slips in three places are in one message."""
    content = changed(changed(GAN, "graphs.decoder.inputs.z", "noise"), "graphs.decoder.outputs.image", "picture")
    said = refusal(folder, content | {"family": "flow"})
    assert all(
        path in said for path in ("family: ", "graphs.decoder.inputs.z.source: ", "graphs.decoder.outputs.image: ")
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "name stands twice"),
        ("- a\n", "must be a mapping with name, family and graphs"),
        ("name: [\n", "is not YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_a_file_that_is_not_a_plain_mapping_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    """Keys that stand twice, lists, broken YAML and YAML that makes objects are refused."""
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ImportingError, match=expected):
        import_onnx(tmp_path / "model.yaml", models=tmp_path / "models")


def test_the_command_prints_the_bundle_or_the_problems(folder: Path) -> None:
    """`import onnx` prints the directory and exits with 0, and with 2 for a model that cannot be imported."""
    (folder / "model.yaml").write_text(yaml.safe_dump(GAN, sort_keys=False))
    arguments = ["import", "onnx", str(folder / "model.yaml"), "--models", str(folder / "models")]
    done = CliRunner().invoke(cli.app, arguments)
    assert (done.exit_code, done.output.strip()) == (0, str(folder / "models" / "my-gan" / "1"))
    shutil.copy(folder / "encoder.onnx", folder / "decoder.onnx")
    failed = CliRunner().invoke(cli.app, arguments)
    assert failed.exit_code == 2
    assert "decoder: decoder.onnx: inputs: has no 'z', 'y'; it has 'x'" in failed.output
