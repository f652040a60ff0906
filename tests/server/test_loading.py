"""What is found out about a model when it is loaded, what is promised of it, and what is kept of that."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import write_all, write_diffusion, write_gan
from google.protobuf.json_format import MessageToJson, Parse
from latentd.names import BUNDLE_FILE
from latentd.v1 import bundle_pb2, model_pb2, model_service_pb2, model_service_pb2_grpc
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import loading, resolve
from latentd_server.bundle import BundleError
from latentd_server.certificate import Certificate, Trial
from latentd_server.certificate_cache import CertificateCache
from latentd_server.engine import Engine
from latentd_server.failures import OverloadedError
from latentd_server.loading import StateRoom, Terms, load, state_room
from latentd_server.metrics import Metrics
from latentd_server.models import Registry
from latentd_server.plans import Limits
from latentd_server.runtime import CudaSettings, Device
from live import Live, gathered

Determinism = model_pb2.ModelDeterminism


def terms(cache: Path | None = None, *, strict: bool = True) -> Terms:
    return Terms(Device("cpu"), 1, 8, strict, CertificateCache(cache))


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Certificate]:
    """Every certificate that was found by trial."""
    found: list[Certificate] = []
    real = loading.certify

    def certify(trial: Trial, sizes: Any) -> Certificate:
        found.append(real(trial, sizes))
        return found[-1]

    monkeypatch.setattr(loading, "certify", certify)
    return found


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("leaky")
    write_diffusion(root, leaky=True)
    write_gan(root, leaky=True)
    return root


def test_the_bundles_of_all_families_are_certified_in_every_size(models_root: Path, trials: list[Certificate]) -> None:
    """Diffusion with guided lanes, VAE and GAN: no bucket is left out, and GetModel tells so."""
    for directory in sorted(models_root.glob("*/*")):
        loaded = load(directory, terms())
        said = loaded.servable.model.determinism
        assert said.determinism_class == loaded.servable.determinism_class
        assert said.determinism_class.startswith("certified-cpu-")
        assert {graph.file for graph in said.graphs} == {network.file for network in loaded.servable.bundle.networks}
        assert all(graph.promise == Determinism.PROMISE_BATCHED for graph in said.graphs)
        assert all(list(graph.batch_sizes) == list(range(1, 9)) for graph in said.graphs)
    assert len(trials) == 6


def test_a_restart_tries_nothing_again(models_root: Path, trials: list[Certificate], tmp_path: Path) -> None:
    """With a cache, loading again finds the same certificates and the same class without a trial."""
    directory = models_root / "tiny-diffusion" / "1"
    first = load(directory, terms(tmp_path))
    again = load(directory, terms(tmp_path))
    assert len(trials) == 1
    assert again.servable.model.determinism == first.servable.model.determinism


def test_a_kept_certificate_is_believed_only_if_the_bytes_are_those_of_then(
    models_root: Path, trials: list[Certificate], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One call shows whether the machine still computes as it did; if not, everything is tried anew and kept."""
    directory = models_root / "tiny-diffusion" / "1"
    load(directory, terms(tmp_path))
    [path] = tmp_path.iterdir()
    path.write_text(path.read_text().replace(trials[0].witness, "0" * 64))
    load(directory, terms(tmp_path))
    assert len(trials) == 2
    assert "not believed" in caplog.text
    assert trials[1].witness in path.read_text()


def test_other_weights_or_terms_are_tried_for_themselves(trials: list[Certificate], tmp_path: Path) -> None:
    """The cache knows a graph by its bytes, and what it was run with."""
    cache = tmp_path / "cache"
    cache.mkdir()
    known = write_diffusion(tmp_path / "models")
    load(known, terms(cache))
    load(write_diffusion(tmp_path / "models", version=2, seed=5), terms(cache))
    load(known, Terms(Device("cpu"), 2, 8, True, CertificateCache(cache)))
    load(known, Terms(Device("cpu"), 1, 16, True, CertificateCache(cache)))
    assert len(trials) == 4
    assert len(list(cache.iterdir())) == 4


def test_rows_that_see_each_other_are_told_of(leaky: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log and GetModel name the graph, say that samples go alone, and that bytes are equal all the same."""
    loaded = load(leaky / "tiny-gan" / "1", terms())
    said = {graph.file: graph for graph in loaded.servable.model.determinism.graphs}
    assert said["decoder.onnx"].promise == Determinism.PROMISE_ALONE
    assert list(said["decoder.onnx"].batch_sizes) == [1]
    assert said["scorer.onnx"].promise == Determinism.PROMISE_BATCHED
    text = "rows of decoder.onnx see each other, so every sample has a call to itself: equal bytes, but slower"
    assert text in loaded.servable.model.determinism.explanation
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"tiny-gan@1: {text}"
    ]


def walk(seed: int, **fields: Any) -> pb.SampleRequest:
    options = pb.DiffusionOptions(sampler="ddpm", step_count=6, **fields)
    return pb.SampleRequest(model="tiny-diffusion", seed=seed, sample_count=3, diffusion=options)


CROWD = [
    *[walk(seed) for seed in range(3)],
    *[walk(seed, guidance_scale=2.0) for seed in range(3)],
    *[pb.SampleRequest(model="tiny-gan", seed=seed, sample_count=4) for seed in range(3)],
]


@pytest.fixture(scope="module")
def live(leaky: Path) -> Iterator[Live]:
    running = Live(leaky, max_batch_rows=8)
    yield running
    running.stop()


def test_a_model_whose_rows_see_each_other_keeps_the_promise_alone(live: Live) -> None:
    """Requests in a crowd give the bytes they give alone, walks and single calls, with guidance and without."""
    alone = [live.sample(request) for request in CROWD]
    calls = [live.stub.Sample(request, timeout=60) for request in CROWD]
    streamed = live.stream(*[pb.StreamRequest(id=index, sample=request) for index, request in enumerate(CROWD)])
    assert [gathered(call) for call in calls] == alone
    assert [gathered(each.sample for each in streamed[index]) for index in range(len(CROWD))] == alone
    assert len(set(alone)) == len(alone)


def test_without_determinism_nothing_is_tried_and_nothing_promised(trials: list[Certificate], tmp_path: Path) -> None:
    """`none` uses every size, answers with a class of its own each time, and GetModel says why."""
    running = Live(write_all(tmp_path), max_batch_rows=8, determinism="none")
    try:
        models = model_service_pb2_grpc.ModelServiceStub(running.channel)
        model = models.GetModel(model_service_pb2.GetModelRequest(name="tiny-gan")).model
        assert model.determinism.explanation == "this server runs with determinism=none"
        assert model.determinism.determinism_class.startswith("none-cpu-")
        assert all(graph.promise == Determinism.PROMISE_NOTHING for graph in model.determinism.graphs)
        assert all(list(graph.batch_sizes) == list(range(1, 9)) for graph in model.determinism.graphs)
        request = pb.SampleRequest(model="tiny-gan", seed=1)
        classes = {next(iter(running.stub.Sample(request))).accepted.determinism_class for _ in range(3)}
        assert len(classes) == 3
        assert all(name.startswith(model.determinism.determinism_class) for name in classes)
    finally:
        running.stop()
    assert not trials


def test_rows_that_see_each_other_share_calls_where_nothing_is_promised(leaky: Path) -> None:
    """`none` is for speed: nobody goes alone."""
    loaded = load(leaky / "tiny-gan" / "1", terms(strict=False))
    assert [type(runner).__name__ for runner in loaded.runners.values()] == ["CallRunner", "CallRunner"]


def test_a_promise_in_a_bundle_is_not_the_servers(tmp_path: Path) -> None:
    """What bundle.json says of determinism is replaced, and does not make another model of it."""
    directory = write_gan(tmp_path)
    bundle = Parse((directory / BUNDLE_FILE).read_text(), bundle_pb2.Bundle())
    bundle.model.determinism.explanation = "trust me"
    (directory / BUNDLE_FILE).write_text(MessageToJson(bundle))
    said = load(directory, terms()).servable.model.determinism
    assert said.explanation != "trust me"
    assert {graph.promise for graph in said.graphs} == {Determinism.PROMISE_BATCHED}


def on_gpu(memory_mib: int, **fields: Any) -> Terms:
    device = Device("cuda", cuda=CudaSettings(memory_mib=memory_mib))
    return Terms(device, 1, 8, True, CertificateCache(None), **fields)


def test_limited_memory_is_shared_with_the_state_of_samples_under_way() -> None:
    """The pool has room for the largest request and the calls under way from the start; the arena has what is left."""
    room = state_room(on_gpu(100, max_samples=991), (3, 32, 32))
    assert (room.lanes, room.slots) == (991, 991 + 32)
    assert room.device.cuda.memory_mib == 100 - 24  # 1,024 slots of 24 KiB
    for unlimited in (on_gpu(0), Terms(Device("cpu"), 1, 8, True, CertificateCache(None))):
        assert state_room(unlimited, (3, 512, 512)) == StateRoom(unlimited.device)


def test_a_model_whose_state_does_not_fit_says_what_it_needs() -> None:
    """At load, with the settings that would do; and those do."""
    with pytest.raises(BundleError) as refused:
        state_room(on_gpu(1000), (3, 512, 512))
    (problem,) = refused.value.problems
    assert "takes 6342 MiB of GPU memory" in problem
    assert "give 12684 or more, or lower --max-samples 1024 or --max-batch-rows 8" in problem
    assert state_room(on_gpu(12684), (3, 512, 512)).device.cuda.memory_mib == 6342


async def test_room_for_state_is_kept_by_the_registry(models_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model was loaded with is what the engine's door goes by."""
    room = StateRoom(Device("cpu"), 5, 40)
    monkeypatch.setattr(loading, "state_room", lambda terms, shape: room)
    engine = Engine(Metrics(), max_rows=8, max_backlog=10_000)
    registry = Registry(models_root, engine, Device("cpu"), threads=1, max_rows=8)
    await registry.load("tiny-diffusion")
    job = resolve.sample(
        pb.SampleRequest(model="tiny-diffusion", sample_count=4), registry.get("tiny-diffusion"), 1, Limits()
    ).job
    engine.submit(job, caller="x", deadline=None, sink=lambda event: None)
    with pytest.raises(OverloadedError, match="samples under way"):
        engine.submit(job, caller="y", deadline=None, sink=lambda event: None)
    await engine.drained()
    await engine.close()
