"""What is found out about a model when it is loaded, what is promised of it, and what is kept of that."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench.bundles import GENERATOR, TINY_VAE, write
from bundles import write_all, write_diffusion, write_gan
from google.protobuf.json_format import MessageToJson, Parse
from latentd.names import BUNDLE_FILE
from latentd.v1 import bundle_pb2, model_pb2, model_service_pb2, model_service_pb2_grpc
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import loading, resolve
from latentd_server.bundle import BundleError
from latentd_server.certificate import Buckets, Certificate, Promise, Trial
from latentd_server.certificate_cache import CertificateCache
from latentd_server.engine import Engine
from latentd_server.failures import OverloadedError
from latentd_server.graph_cost import row_cost
from latentd_server.loading import StateRoom, Terms, load, state_room
from latentd_server.metrics import Metrics
from latentd_server.models import Registry
from latentd_server.plans import Limits
from latentd_server.runtime import CudaSettings, Device
from live import Live, gathered

Determinism = model_pb2.ModelDeterminism


def terms(cache: Path | None = None, *, strict: bool = True, rows: int = 8, widest: int = 0) -> Terms:
    return Terms(Device("cpu"), 1, rows, strict, CertificateCache(cache), widest_rows=widest)


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


NET = bundle_pb2.Network
DECODER, ENCODER, SCORER = NET.ROLE_DECODER, NET.ROLE_ENCODER, NET.ROLE_SCORER
GAN, GAN_SCORER = ("tiny-gan@1", DECODER), ("tiny-gan@1", SCORER)
GAN_ROW_BYTES = 4 * 3 + 8 + 4 * 16
"""A latent, a label and an image."""


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size is taken to give equal bytes, untried."""
    monkeypatch.setattr(loading, "certify", lambda trial, sizes: Certificate(Promise.BATCHED, Buckets(tuple(sizes))))


def test_small_graphs_that_answer_in_one_call_are_certified_in_wide_calls(models_root: Path) -> None:
    """Up to the widest, and GetModel tells; a denoiser, however small, has the usual ones."""
    wide: dict[Any, int] = {}
    for directory in sorted(models_root.glob("*/*")):
        loaded = load(directory, terms(widest=1024))
        wide |= loaded.wide
        said = {graph.file: graph for graph in loaded.servable.model.determinism.graphs}
        for network in loaded.servable.bundle.networks:
            rows = 8 if network.role == NET.ROLE_DENOISER else 1024
            graph = said[network.file]
            assert graph.promise == Determinism.PROMISE_BATCHED
            assert max(graph.batch_sizes) == rows
            assert set(range(1, 9)) <= set(graph.batch_sizes)
            runner = loaded.runners[loaded.servable.model.name, network.role]
            assert [runner.padded(size) for size in (1, rows)] == [1, rows]
    assert wide == dict.fromkeys(
        [("tiny-vae@1", role) for role in (DECODER, ENCODER, SCORER)] + [GAN, GAN_SCORER], 1024
    )


@pytest.mark.parametrize(
    ("rows", "widest", "found"),
    [
        *((8, 1024, 1024), (64, 1024, 1024), (12, 1024, 768), (8, 1023, 512), (8, 16, 16), (3, 12, 12)),
        *((8, 15, None), (8, 8, None), (64, 32, None), (1024, 1024, None), (8, 0, None)),
    ],
)
@pytest.mark.usefixtures("believed")
def test_wide_calls_are_the_usual_ones_doubled(models_root: Path, rows: int, widest: int, found: int | None) -> None:
    """As often as the widest allows; where it does not at all, the graph is one of the usual."""
    loaded = load(models_root / "tiny-gan" / "1", terms(rows=rows, widest=widest))
    assert loaded.wide.get(GAN) == found
    assert loaded.runners[GAN].padded(found or rows) == (found or rows)


@pytest.mark.parametrize(("too_much", "found"), [(0, 64), (1, 32)])
@pytest.mark.usefixtures("believed")
def test_wide_calls_take_no_more_than_a_short_one_and_a_megabyte(
    models_root: Path, monkeypatch: pytest.MonkeyPatch, too_much: int, found: int
) -> None:
    """Counted in multiply-adds and in bytes of inputs and outputs by their types: one too many halves the call."""
    directory = models_root / "tiny-gan" / "1"
    cost = row_cost((directory / "decoder.onnx").read_bytes())
    assert cost is not None
    for limit, of_a_row in (("_SHORT_CALL", cost), ("_SMALL_CALL_BYTES", GAN_ROW_BYTES)):
        with monkeypatch.context() as patch:
            patch.setattr(loading, limit, 64 * of_a_row - too_much)
            assert load(directory, terms(widest=1024)).wide[GAN] == found


@pytest.mark.usefixtures("believed")
def test_graphs_that_are_not_small_have_the_usual_calls(
    models_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the limits that are served with, a dense network of 86 thousand products is small, and a convolutional one is
    not; nor is one whose cost is unknown.
    """
    dense, convolutional = (load(write(tmp_path, name), terms(rows=64, widest=1024)) for name in (TINY_VAE, GENERATOR))
    assert dense.wide == {("tiny-vae@1", DECODER): 1024}
    assert convolutional.wide == {}
    monkeypatch.setattr("latentd_server.graph_cost.row_cost", lambda data: None)
    unknown = load(models_root / "tiny-gan" / "1", terms(widest=1024))
    assert unknown.wide == {}
    assert unknown.runners[GAN].padded(8) == 8


@pytest.mark.parametrize("lost", [(1,), (5, 8), tuple(range(1, 9))], ids=str)
def test_a_graph_whose_wide_calls_differ_from_the_usual_ones_keeps_those(
    lost: tuple[int, ...], models_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row must not take a call of hundreds because large calls give other bytes."""
    tried = []

    def certify(trial: Trial, sizes: Sequence[int]) -> Certificate:
        tried.append(sizes[-1])
        steady = tuple(size for size in sizes if sizes[-1] == 8 or size not in lost)
        return Certificate(Promise.BATCHED, Buckets(steady), (steady,))

    monkeypatch.setattr(loading, "certify", certify)
    loaded = load(models_root / "tiny-gan" / "1", replace(terms(), widest_rows=1024))
    assert tried == [1024, 8] * 2
    assert loaded.wide == {}
    graphs = loaded.servable.model.determinism.graphs
    assert [tuple(graph.batch_sizes) for graph in graphs] == [tuple(range(1, 9))] * 2


@pytest.mark.parametrize(("strict", "found"), [(True, {GAN_SCORER}), (False, {GAN, GAN_SCORER})])
def test_a_graph_whose_rows_see_each_other_has_no_wide_calls(leaky: Path, strict: bool, found: set[Any]) -> None:
    """Its samples go alone, in batches as usual; where nothing is promised they share wide calls as others do."""
    loaded = load(leaky / "tiny-gan" / "1", terms(strict=strict, widest=32))
    assert loaded.wide == dict.fromkeys(found, 32)


def test_a_certificate_of_the_usual_calls_is_not_one_of_wide_calls(
    models_root: Path, trials: list[Certificate], tmp_path: Path
) -> None:
    """Whoever kept it tries wide calls once, and finds them again at a restart."""
    directory = models_root / "tiny-gan" / "1"
    for widest, tried in ((0, 2), (16, 4), (16, 4), (0, 4)):
        loaded = load(directory, terms(tmp_path, widest=widest))
        assert loaded.wide == (dict.fromkeys([GAN, GAN_SCORER], 16) if widest else {})
        assert loaded.runners[GAN].padded(widest or 8) == (widest or 8)
        assert len(trials) == tried


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
