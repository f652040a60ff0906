"""Samples of other sizes from the trainer's own U-Net: exported, checked, served, and asked for by the client."""

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf.json_format import MessageToDict
from latentd_client import Client
from latentd_client.commands import app
from latentd_client.errors import FieldsInvalid
from latentd_trainer import bundle, verify
from latentd_trainer.checkpoint import RunRecord, build_family
from latentd_trainer.data import load
from latentd_trainer.export import write_bundle
from latentd_trainer.onnx_graph import GraphError
from latentd_trainer.spec import ServingSpec
from processes import Running, start_server
from typer.testing import CliRunner

NAME = "digits-sizes"
SIZES = ((12, 12), (16, 8))
SETTINGS = {"width": 8}
WHEN = datetime(2026, 1, 2, tzinfo=UTC)
RECORD = RunRecord("diffusion", SETTINGS, "digits", load("digits").info, 0, "fp32", 1, 1, {})


@pytest.fixture(scope="module")
def spec() -> ServingSpec:
    """A small diffusion model of 8x8 images with random weights; its U-Net halves once and attends."""
    spec = build_family("diffusion", SETTINGS, RECORD.info, seed=0).serving_spec()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (each for graph in spec.graphs for each in graph.module.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return spec


@pytest.fixture(scope="module")
def models(spec: ServingSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_bundle(spec, RECORD, WHEN, models=root, name=NAME, sizes=SIZES)
    return root


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    running = start_server(Path(sys.executable), models, log, "--max-batch-rows", "8", "--cache", "off")
    yield running
    assert running.stop() == 0, log.read_text()


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def test_a_bundle_of_several_sizes_is_proved_at_each(models: Path) -> None:
    """Export measures every size against torch, `verify` measures it again, and a row is the same in every batch."""
    directory = models / NAME / "1"
    proof = bundle.read_record(directory)["export"]["parity"]["denoiser"]["sizes"]
    assert list(proof) == ["12x12", "16x8"]
    assert all(each["row_invariant"] and each["deviation"]["prediction"] <= 1e-5 for each in proof.values())
    checks = list(verify.check(directory))
    assert [each for each in checks if each.failures] == []
    assert {"runs with samples of 12x12", "equals torch at 16x8"} <= {each.name for each in checks}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_samples_of_every_size_are_served(client: Client, size: tuple[int, int]) -> None:
    """They have that size, repeat byte for byte in another company, and a loop of steps ends in them."""
    samples = client.sample(NAME, 3, seed=7, steps=4, label=1, sampler="ddpm", size=size)
    assert samples.array.shape == (3, 1, *size)
    np.testing.assert_array_equal(samples.reproduce(client).array, samples.array)
    one = client.sample(NAME, seed=7, steps=4, label=1, sampler="ddpm", size=size, first_index=2)
    np.testing.assert_array_equal(one.array[0], samples.array[2])
    with client.denoise_loop(NAME, 3, seed=7, steps=4, label=1, sampler="ddpm", size=size) as loop:
        *_, last = loop
    np.testing.assert_array_equal(last.state, samples.array)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_served_network_is_the_trained_one(client: Client, spec: ServingSpec, size: tuple[int, int]) -> None:
    """At a size that it was not trained on DenoiseStep gives what torch gives: the estimate of x0 from v."""
    x = np.random.default_rng(3).standard_normal((2, 1, *size)).astype(np.float32)
    step = client.denoise_step(NAME, x, 600, label=4)
    assert spec.diffusion is not None
    alpha, sigma = spec.diffusion.alphas[600], spec.diffusion.sigmas[600]
    with torch.no_grad():
        v = spec.graphs[0].module(torch.from_numpy(x), torch.tensor([600, 600]), torch.tensor([4, 4])).numpy()
    np.testing.assert_allclose(step.array, np.clip(alpha * x - sigma * v, -1, 1), atol=1e-4)


def test_scores_are_by_the_dimensions_of_what_is_scored(client: Client) -> None:
    """Bits per dimension of a 12x12 image are divided by 144."""
    scores = client.score(NAME, np.zeros((1, 1, 12, 12), np.float32), timestep_count=3)
    assert scores.bits_per_dimension is not None
    np.testing.assert_allclose(scores.bits_per_dimension, -scores.values / np.log(2) / 144)


def test_the_client_tells_the_sizes(client: Client) -> None:
    """In the model, and in the refusal of another one."""
    model = client.model(NAME)
    assert model.sample_sizes == SIZES
    assert len(MessageToDict(model.proto)["determinism"]["graphs"]) == 1 + len(SIZES)
    with pytest.raises(FieldsInvalid, match="must be unset or one of 8x8, 12x12, 16x8; got 10x10"):
        client.sample(NAME, size=(10, 10))


def test_latentctl_samples_at_a_size(server: Running, tmp_path: Path) -> None:
    """`--size` is a height and a width; what is none is refused, and `describe` tells those that there are."""
    out = tmp_path / "samples.npz"

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["--server", server.target, *arguments])
        return result.stdout if result.exit_code == 0 else f"{result.exit_code} {result.stderr}"

    told = json.loads(run("--json", "sample", NAME, "-n", "2", "--steps", "3", "--size", "16x8", "--out", str(out)))
    assert told["model"] == f"{NAME}@1"
    assert np.load(out)["samples"].shape == (2, 1, 16, 8)
    assert "must be HEIGHTxWIDTH, as 16x24; got 'big'" in run("sample", NAME, "--size", "big", "--out", str(out))
    assert "12x12 16x8" in run("describe", NAME)


def test_a_size_that_does_not_halve_is_refused(spec: ServingSpec, tmp_path: Path) -> None:
    """Nothing is written, and the refusal names the size."""
    with pytest.raises(GraphError, match=r"takes no samples of 9x12: .*must halve as often"):
        write_bundle(spec, RECORD, WHEN, models=tmp_path, name=NAME, sizes=((12, 12), (9, 12)))
    assert list(tmp_path.iterdir()) == []
