import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from latentd.digest import bundle_digest
from latentd.v1 import model_pb2
from latentd_trainer import bundle as bundles
from latentd_trainer import checkpoint, export, parity
from latentd_trainer.bundle import BundleError
from latentd_trainer.checkpoint import RunRecord
from latentd_trainer.data import DataInfo
from latentd_trainer.export import write_bundle
from latentd_trainer.onnx_graph import GraphError
from latentd_trainer.spec import Graph, GraphOutput, Meaning, Role, ServingSpec, Source
from torch import Tensor, nn

Write = Callable[..., Path]
Specs = dict[str, Callable[[], ServingSpec]]
FAMILIES = ("vae", "gan", "diffusion")


def with_module(spec: ServingSpec, module: nn.Module, **changes: object) -> ServingSpec:
    """The spec with its first network's module, or more of that graph, replaced."""
    first = dataclasses.replace(spec.graphs[0], module=module.eval(), **changes)
    return dataclasses.replace(spec, graphs=[first, *spec.graphs[1:]])


class Wrapped(nn.Module):
    """A generator whose samples go through `change`."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.change(self.inner(z, y))


def wrapped(spec: ServingSpec, change: Callable[[Tensor], Tensor]) -> ServingSpec:
    return with_module(spec, Wrapped(spec.graphs[0].module, change))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bundle_says_what_its_graphs_are(tiny_models: Path, family: str) -> None:
    """Every family's bundle has a right digest, a digest for each graph, and a batch axis by name on all of them."""
    directory = tiny_models / f"tiny-{family}" / "1"
    bundle = bundles.read(directory)
    assert bundle.model.name == f"tiny-{family}@1"
    assert bundle.model.digest == bundle_digest(bundle)
    assert list(bundle.model.class_probabilities) == [0.5, 0.25, 0.25]
    for network in bundle.networks:
        data = (directory / network.file).read_bytes()
        assert bundles.sha256(data) == network.sha256
        graph = onnx.load_model_from_string(data).graph
        assert [value.name for value in graph.input] == [entry.name for entry in network.inputs]
        for value in (*graph.input, *graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_inputs_say_in_which_range_their_values_are(tiny_models: Path) -> None:
    """Labels reach down to -1 only where the network knows an unconditional label; timesteps end at the last one."""
    denoiser = bundles.read(tiny_models / "tiny-diffusion" / "1").networks[0]
    decoder = bundles.read(tiny_models / "tiny-gan" / "1").networks[0]
    assert [(entry.spec.min_value, entry.spec.max_value) for entry in denoiser.inputs] == [(0, 0), (0, 19), (-1, 2)]
    assert [(entry.spec.min_value, entry.spec.max_value) for entry in decoder.inputs] == [(0, 0), (0, 2)]


def test_two_exports_are_the_same_bytes(tmp_path: Path, tiny_models: Path, write_tiny: Write) -> None:
    """Exporting equal weights again gives equal files, all of them."""
    again = write_tiny(tmp_path, "vae")
    first = tiny_models / "tiny-vae" / "1"
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in first.iterdir()
    }


def test_no_file_tells_where_it_was_made(tiny_models: Path) -> None:
    """No source path, data path or stack trace of the exporting machine is in any file of a bundle."""
    for path in tiny_models.glob("*/1/*"):
        content = path.read_bytes()
        for trace in (str(Path(__file__).parent).encode(), b"stack_trace", b"/home/of/the/data", b"site-packages"):
            assert trace not in content, path


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_and_row_invariance_are_recorded(tiny_models: Path, family: str) -> None:
    """The record tells how far each output is from torch, below the tolerance, and that rows keep their bytes."""
    record = bundles.read_record(tiny_models / f"tiny-{family}" / "1")
    for proof in record["export"]["parity"].values():
        assert 0 <= max(proof["deviation"].values()) <= 1e-5
        assert proof["row_invariant"] is True
    if family == "diffusion":
        assert 0 < record["export"]["parity"]["denoiser"]["chain_deviation"] <= 1e-4


def test_versions_count_up_from_the_newest(tmp_path: Path, tiny_specs: Specs, write_tiny: Write) -> None:
    """A version that is not given is one above the newest there is, and the model's name carries it."""
    write_tiny(tmp_path, "gan", version=4)
    assert bundles.read(write_tiny(tmp_path, "gan")).model.name == "tiny-gan@5"


EXPORT_AFTER_A_WORD = """
import sys
from pathlib import Path

from latentd_trainer import bundle as bundles
from latentd_trainer import export

require_free = bundles.require_free


def wait(directory, replace):
    require_free(directory, replace)
    print("chosen", directory.name, flush=True)
    sys.stdin.readline()


bundles.require_free = wait
print(export.run(Path(sys.argv[1]), models=Path(sys.argv[2]), name="raced", replace=True))
"""


def test_exports_that_choose_one_version_take_two(tmp_path: Path, tiny_record: Callable[[str], RunRecord]) -> None:
    """When two processes find the same version free, one gets it and the other the next, whole and rightly named."""
    settings = {"width": 8, "hidden": 16, "latent": 5, "steps": 20}
    info = DataInfo("tiny", (1, 8, 8), 17, ("a", "b"), (0.5, 0.5), "0" * 64)
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.write_record(run, dataclasses.replace(tiny_record("gan"), settings=settings, info=info))
    checkpoint.save(run, checkpoint.build_family("gan", settings, info, 0), 20)
    command = [sys.executable, "-c", EXPORT_AFTER_A_WORD, run, tmp_path / "models"]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "chosen 1\n"
    for process in both:
        process.communicate("\n", timeout=120)
        assert process.returncode == 0
    versions = tmp_path / "models" / "raced"
    assert sorted(entry.name for entry in versions.iterdir()) == ["1", "2"]
    for version in ("1", "2"):
        bundle = bundles.read(versions / version)
        assert bundle.model.name == f"raced@{version}"
        assert bundle.model.digest == bundle_digest(bundle)


def test_a_run_that_was_stopped_says_how_far_it_came(
    tmp_path: Path, tiny_record: Callable[[str], RunRecord], caplog: pytest.LogCaptureFixture
) -> None:
    """The record tells the steps that were done beside those asked for, and a warning that there are fewer."""
    settings = {"width": 8, "hidden": 16, "latent": 5, "steps": 50}
    info = DataInfo("tiny", (1, 8, 8), 17, ("a", "b"), (0.5, 0.5), "0" * 64)
    record = dataclasses.replace(tiny_record("gan"), settings=settings, info=info)
    checkpoint.write_record(tmp_path, record)
    checkpoint.save(tmp_path, checkpoint.build_family("gan", settings, info, 0), 20)
    directory = export.run(tmp_path, models=tmp_path / "models", name="stopped")
    found = bundles.read_record(directory)
    assert (found["trained_steps"], found["settings"]["steps"]) == (20, 50)
    assert "trained for 20 of 50 steps so far" in caplog.text


def test_noise_inside_a_graph_is_refused(tmp_path: Path, tiny_specs: Specs, write_tiny: Write) -> None:
    """A network that draws its own noise is refused, and nothing is written."""
    noisy = wrapped(tiny_specs["gan"](), lambda x: x + torch.randn_like(x))
    with pytest.raises(GraphError, match=r"^decoder: .*RandomNormalLike; noise must come in by inputs"):
        write_tiny(tmp_path, "gan", noisy)
    assert list(tmp_path.iterdir()) == []


def test_training_mode_is_refused(tmp_path: Path, tiny_specs: Specs, write_tiny: Write) -> None:
    """A network left in training mode is refused by name."""
    spec = tiny_specs["gan"]()
    spec.graphs[0].module.layers[1].train()
    with pytest.raises(GraphError, match=r"^decoder: must be in evaluation mode, but layers\.1 is in training mode"):
        write_tiny(tmp_path, "gan", spec)


def test_a_network_for_one_batch_size_is_refused(tmp_path: Path, tiny_specs: Specs, write_tiny: Write) -> None:
    """A network that bakes the batch size in is refused, and the message shows the example's shapes."""
    fixed = wrapped(tiny_specs["gan"](), lambda x: x.reshape(2, 1, 4, 4))
    with pytest.raises(GraphError, match=r"^decoder: cannot be exported with inputs z float32\[2, 4\], y int64\[2\]"):
        write_tiny(tmp_path, "gan", fixed)


def test_a_wrong_shape_names_the_output_and_what_was_expected(
    tmp_path: Path, tiny_specs: Specs, write_tiny: Write
) -> None:
    """An output of another shape than declared is refused with both shapes."""
    flat = wrapped(tiny_specs["gan"](), lambda x: x.flatten(2))
    expected = r"^decoder: .*output 'sample': must be of shape \['batch', 1, 4, 4\], is \['batch', 1, 16\]"
    with pytest.raises(GraphError, match=expected):
        write_tiny(tmp_path, "gan", flat)


def test_a_graph_that_differs_from_torch_is_refused(tmp_path: Path, tiny_specs: Specs, write_tiny: Write) -> None:
    """A graph that answers otherwise than its module is refused with the difference and the tolerance."""
    other = wrapped(tiny_specs["gan"](), lambda x: x + (1e-3 if torch.compiler.is_exporting() else 0.0))
    with pytest.raises(GraphError, match=r"^decoder: output 'sample' differs from torch by 0\.001 .*at most 1e-05"):
        write_tiny(tmp_path, "gan", other)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_see_their_neighbours_are_reported(
    tmp_path: Path, tiny_specs: Specs, write_tiny: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """A network whose rows depend on the batch is exported with a warning that names it, and recorded as such."""
    centred = wrapped(tiny_specs["gan"](), lambda x: x - x.mean(0, keepdim=True))
    with caplog.at_level(logging.WARNING):
        directory = write_tiny(tmp_path, "gan", centred)
    assert caplog.messages == [
        "decoder: a row's bytes depend on the batch it rides in; equal seeds will not give equal bytes"
    ]
    proofs = bundles.read_record(directory)["export"]["parity"]
    assert (proofs["decoder"]["row_invariant"], proofs["scorer"]["row_invariant"]) == (False, True)


def test_every_contradiction_of_a_spec_is_listed(tmp_path: Path, tiny_specs: Specs, write_tiny: Write) -> None:
    """A spec that cannot be served is refused before any export, with all that is wrong."""
    spec = tiny_specs["diffusion"]()
    assert spec.diffusion is not None
    broken = model_pb2.DiffusionSpec()
    broken.CopyFrom(spec.diffusion)
    broken.samplers.append("guesswork")
    broken.default_step_count = 21
    del broken.sigmas[-1]
    graph = spec.graphs[0]
    inputs = [dataclasses.replace(graph.inputs[0], shape=(1, 5, 5)), *graph.inputs[1:]]
    outputs = [*graph.outputs, GraphOutput("score", Meaning.MEANING_REAL_PROBABILITY, ())]
    spec = dataclasses.replace(
        spec,
        diffusion=broken,
        graphs=[Graph(Role.ROLE_DENOISER, graph.module, inputs, outputs)],
        sample_levels=1,
    )
    with pytest.raises(BundleError) as refused:
        write_tiny(tmp_path, "diffusion", spec)
    assert str(refused.value).splitlines()[1:] == [
        "- model.sample_spec: level_count must be 0, for no levels, or at least 2, got 1",
        "- denoiser: input 'x': sample must be float32 of shape [1, 4, 4], got float32 of shape [1, 5, 5]",
        "- denoiser: output 'score': real probability has no place here",
        "- denoiser: outputs: must be exactly one, got 2",
        "- model.diffusion.alphas: 20 values and 19 sigmas; must be as many, and at least one",
        "- model.diffusion.samplers: must be some of ddim, ddpm, dpmpp-2m, dpmpp-2m-sde, euler, euler-ancestral, heun, "
        "got ddim, ddpm, guesswork",
        "- model.diffusion.default_step_count: must be 1 to 20, got 21",
    ]


@pytest.mark.parametrize("name", ["Digits", "digits_vae", "digits@1", "-x", ""])
def test_a_bad_name_is_refused(tmp_path: Path, tiny_specs: Specs, tiny_record: Callable, name: str) -> None:
    """A name that no client could address is refused."""
    with pytest.raises(BundleError, match="is no model name; it must match"):
        write_bundle(tiny_specs["gan"](), tiny_record("gan"), datetime.now(UTC), models=tmp_path, name=name)


def test_log_likelihoods_are_compared_relative_to_their_size() -> None:
    """1e-3 nats off a thousand is 1e-6; off a tenth of a nat it is 1e-3."""
    meaning = Meaning.MEANING_EVIDENCE_LOWER_BOUND
    assert parity.deviation(meaning, np.array([-1000.001]), np.array([-1000.0])) == pytest.approx(1e-6)
    assert parity.deviation(meaning, np.array([0.101]), np.array([0.1])) == pytest.approx(1e-3)
    assert parity.deviation(Meaning.MEANING_SAMPLE, np.array([-1000.001]), np.array([-1000.0])) == pytest.approx(1e-3)


def test_one_pixel_in_a_thousand_of_a_draw_may_round_to_another_level() -> None:
    """A draw that falls to the next level in one of 2000 pixels is equal; in three of them it is not."""
    expected = np.zeros(2000)
    one, three = expected.copy(), expected.copy()
    one[0], three[:3] = 0.125, 0.125
    assert parity.deviation(Meaning.MEANING_SAMPLE_DRAW, one, expected) == 0
    assert parity.deviation(Meaning.MEANING_SAMPLE_DRAW, three, expected) == 0.125
    assert parity.deviation(Meaning.MEANING_SAMPLE, one, expected) == 0.125


def test_nan_never_counts_as_parity() -> None:
    """Where either side is not finite, or both, the deviation is infinite and beyond every tolerance."""
    nan, zero = np.array([np.nan]), np.array([0.0])
    for actual, expected in ((nan, zero), (zero, nan), (nan, nan)):
        assert parity.deviation(Meaning.MEANING_SAMPLE, actual, expected) == float("inf")
    assert len(parity.excesses({"sample": float("nan")}, float("inf"))) == 2


def test_random_rows_stay_in_the_range_of_their_source(tiny_models: Path) -> None:
    """Uniform noise is in [0, 1), labels are classes, latents are normal."""
    decoder = bundles.read(tiny_models / "tiny-vae" / "1").networks[0]
    rows = parity.random_rows(decoder, 500)
    source = {entry.source: rows[entry.name] for entry in decoder.inputs}
    noise = source[Source.SOURCE_UNIFORM_NOISE]
    assert noise.min() >= 0
    assert noise.max() < 1
    assert set(source[Source.SOURCE_CLASS_LABEL].tolist()) == {0, 1, 2}
    assert abs(source[Source.SOURCE_LATENT].std() - 1) < 0.1
