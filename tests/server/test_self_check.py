"""Self-checks: answered samples are made again alone, and a broken promise is found out."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SHAPE
from latentd import tensor
from latentd.v1 import bundle_pb2
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import resolve, samplers
from latentd_server.certificate_cache import CertificateCache
from latentd_server.engine import Engine
from latentd_server.handover import QUIET_TURNS
from latentd_server.job import CallJob, Event, Finished, Job, Noise, Start, StepJob
from latentd_server.loading import LoadedModel, Terms, load
from latentd_server.metrics import Metrics
from latentd_server.noise import Purpose
from latentd_server.plans import Limits
from latentd_server.runners import Outcome, Runner, evaluate
from latentd_server.runtime import Device
from latentd_server.scheduler import GraphKey, Scheduler, Segment, graph_key
from latentd_server.self_check import SelfCheck

D, V = "tiny-diffusion@1", "tiny-vae@1"


@pytest.fixture(scope="module")
def loaded(models_root: Path) -> dict[str, LoadedModel]:
    terms = Terms(Device("cpu"), 1, 8, True, CertificateCache(None))
    return {f"{name}@1": load(models_root / name / "1", terms) for name in ("tiny-diffusion", "tiny-vae")}


class Between:
    """A runner that hands on to another, and lets a test see the calls or change what comes of them."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.before: Callable[[Sequence[Segment]], None] = lambda segments: None
        self.after: Callable[[Sequence[Segment], list[Outcome]], list[Outcome]] = lambda segments, outcomes: outcomes
        self.forgotten: list[int] = []

    def padded(self, rows: int) -> int:
        return self.inner.padded(rows)

    def forget(self, job_id: int) -> None:
        self.forgotten.append(job_id)
        self.inner.forget(job_id)

    def warm(self) -> None:
        self.inner.warm()

    def prepare(self, segments: Sequence[Segment]) -> Any:
        return segments, self.inner.prepare(segments)

    def run(self, prepared: Any) -> Any:
        self.before(prepared[0])
        return self.inner.run(prepared[1])

    def finish(self, prepared: Any, results: Any) -> list[Outcome]:
        return self.after(prepared[0], self.inner.finish(prepared[1], results))


def is_check(segments: Sequence[Segment]) -> bool:
    return segments[0].entry.caller == "self-check"


def steps(loaded: dict[str, LoadedModel], lanes: int = 3, count: int = 4, **fields: Any) -> StepJob:
    schedule = loaded[D].servable.schedule
    assert schedule is not None
    timesteps = schedule.spaced_timesteps(count)
    values: dict[str, Any] = {
        "tables": (samplers.descent(schedule, "ddpm", timesteps),),
        "start": Start(noise_scale=schedule.level(timesteps[0])[1]),
        "labels": np.arange(lanes) % 3,
        "sample_indices": np.arange(lanes),
    }
    return StepJob(model=D, lane_count=lanes, seed=5, **(values | fields))


def decode(lanes: int = 3) -> CallJob:
    return CallJob(
        model=V,
        role=bundle_pb2.Network.ROLE_DECODER,
        lane_count=lanes,
        feeds={"z": Noise(Purpose.START), "y": np.arange(lanes) % 3, "u": Noise(Purpose.OUTPUT, uniform=True)},
        outputs=("draw", "z"),
        seed=6,
        sample_indices=np.arange(lanes),
        draw_indices=np.zeros(lanes, np.int64),
    )


def variants(loaded: dict[str, LoadedModel]) -> list[Job]:
    schedule = loaded[D].servable.schedule
    assert schedule is not None
    rng = np.random.default_rng(0)
    images, history = (rng.standard_normal((3, *SHAPE), np.float32) for _ in range(2))
    table = samplers.descent(schedule, "dpmpp-2m", schedule.spaced_timesteps(3))
    other = samplers.descent(schedule, "dpmpp-2m", schedule.spaced_timesteps(4)[1:])
    return [
        decode(),
        steps(loaded),
        steps(loaded, guidance_scale=2.0, preview_interval=1),
        steps(loaded, start=Start(0.5, images, 0.5), estimates_wanted=True),
        steps(loaded, start=Start(0.5, images[:1], 0.5)),
        steps(loaded, tables=(table, other, table), start=Start(0.0, images, history=history), history_wanted=True),
        steps(loaded, guidance_scale=2.0, guidance_interval=(20, 60)),
        resolve.score(
            pb.ScoreRequest(samples=tensor.encode(images), timestep_count=4), loaded[D].servable, Limits()
        ).job,
    ]


def answered(job: Job, runner: Runner, max_rows: int = 8) -> tuple[Any, Outcome]:
    """The job's last arrival, and what came with it."""
    scheduler = Scheduler(max_rows)
    scheduler.add(1, job, "test", 0.0)
    while True:
        batch = scheduler.plan(0.0)
        assert batch is not None
        [outcome] = evaluate(runner, batch.segments)
        [arrival] = scheduler.complete(batch, 0.0)
        if arrival.last:
            runner.forget(1)
            return arrival, outcome


def counted(metrics: Metrics, name: str) -> dict[str, float]:
    """A counter's values by its last label, over all models."""
    found: dict[str, float] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name == name:
                key = sample.labels.get("result") or sample.labels["graph"]
                found[key] = found.get(key, 0) + sample.value
    return found


def lies(segments: Sequence[Segment], outcomes: list[Outcome]) -> list[Outcome]:
    """Whoever is alone is a ulp off."""
    if not is_check(segments) or outcomes[0].outputs is None:
        return outcomes
    outputs = {name: np.nextafter(values, np.float32(np.inf)) for name, values in outcomes[0].outputs.items()}
    return [replace(outcomes[0], outputs=outputs)]


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("max_rows", [2, 8])
@pytest.mark.parametrize("which", range(8))
def test_a_lane_made_again_alone_matches_unless_somebody_lies(
    which: int, max_rows: int, honest: bool, loaded: dict[str, LoadedModel], caplog: pytest.LogCaptureFixture
) -> None:
    """Walks, guidance and its interval, start points, tables by lane, history, terms of a bound and calls, in one batch
    or split over several: equal bytes, and an ulp is a mismatch.
    """
    job = variants(loaded)[which]
    metrics = Metrics()
    check = SelfCheck(metrics, 10.0)
    check.begin(job.model)
    key = graph_key(job)
    runner = Between(loaded[job.model].runners[key])
    arrival, outcome = answered(job, runner, max_rows)
    check.offer(arrival, outcome, 1.0)
    assert check.has_work
    runner.after = runner.after if honest else lies
    while check.has_work:
        check.step({key: runner}, 2.0)
    assert counted(metrics, "latentd_self_checks_total") == {"match" if honest else "mismatch": 1}
    spent = counted(metrics, "latentd_self_check_evaluations_total")
    assert list(spent.values()) == [job.evaluations_per_lane]
    assert ("other bytes alone" in caplog.text) != honest
    assert runner.forgotten[-1] < 0


def test_checks_keep_their_distance(loaded: dict[str, LoadedModel]) -> None:
    """A sample is chosen when the interval since the last check has passed, another lane each time; never with 0."""
    key: GraphKey = (V, bundle_pb2.Network.ROLE_DECODER)
    runners = loaded[V].runners
    arrival, outcome = answered(decode(), runners[key])
    check, never = SelfCheck(Metrics(), 10.0), SelfCheck(Metrics(), 0.0)
    for each in (check, never):
        each.begin(V)
    check.offer(arrival, outcome, 5.0)
    assert check.has_work
    check.step(runners, 7.0)
    check.offer(arrival, outcome, 16.9)
    assert not check.has_work
    check.offer(arrival, outcome, 17.0)
    assert check.has_work
    never.offer(arrival, outcome, 1e9)
    assert not never.has_work


def test_what_is_not_promised_is_not_checked(loaded: dict[str, LoadedModel]) -> None:
    """Models without a promise are left alone, and one that goes takes its check along."""
    key: GraphKey = (V, bundle_pb2.Network.ROLE_DECODER)
    runner = Between(loaded[V].runners[key])
    arrival, outcome = answered(decode(), runner)
    check = SelfCheck(Metrics(), 10.0)
    check.offer(arrival, outcome, 0.0)
    assert not check.has_work
    check.begin(V)
    check.offer(arrival, outcome, 0.0)
    check.end(V, {key: runner})
    assert not check.has_work
    assert runner.forgotten[-1] < 0


def test_what_is_kept_is_one_lane(loaded: dict[str, LoadedModel]) -> None:
    """A check of a large request holds on to none of its other lanes."""
    key: GraphKey = (D, bundle_pb2.Network.ROLE_DENOISER)
    images = np.zeros((8, *SHAPE), np.float32)
    arrival, outcome = answered(steps(loaded, lanes=8, start=Start(0.5, images, 0.5)), loaded[D].runners[key])
    check = SelfCheck(Metrics(), 10.0)
    check.begin(D)
    check.offer(arrival, outcome, 0.0)
    seen: list[Job] = []
    runner = Between(loaded[D].runners[key])
    runner.before = lambda segments: seen.append(segments[0].entry.job)
    while check.has_work:
        check.step({key: runner}, 0.0)
    for job in seen:
        assert isinstance(job, StepJob)
        assert job.start.values is not None
        assert (job.lane_count, len(job.labels), job.start.values.shape) == (1, 1, (1, *SHAPE))
        assert job.start.values.base is None


def test_a_check_that_raises_is_counted_and_over(loaded: dict[str, LoadedModel]) -> None:
    """An error of the second run is no mismatch, and no error of anybody's request."""
    key: GraphKey = (V, bundle_pb2.Network.ROLE_DECODER)
    runner = Between(loaded[V].runners[key])
    arrival, outcome = answered(decode(), runner)
    metrics = Metrics()
    check = SelfCheck(metrics, 10.0)
    check.begin(V)
    check.offer(arrival, outcome, 0.0)

    def fail(segments: Sequence[Segment]) -> None:
        raise RuntimeError("lost")

    runner.before = fail
    check.step({key: runner}, 0.0)
    assert not check.has_work
    assert counted(metrics, "latentd_self_checks_total") == {"failed": 1}


class Bench:
    """An engine with a runner that a test can hold, and what it counted."""

    def __init__(self, loaded: dict[str, LoadedModel], metrics: Metrics) -> None:
        self.metrics = metrics
        self.engine = Engine(metrics, max_rows=8, max_backlog=10_000, self_check_interval_s=1e-9)
        self.runners: dict[GraphKey, Any] = {}
        for model in loaded.values():
            self.runners |= {key: Between(runner) for key, runner in model.runners.items()}
        self.engine.attach(self.runners, promise=True)
        self.steps = self.runners[D, bundle_pb2.Network.ROLE_DENOISER]

    async def result(self, job: Job) -> None:
        over = asyncio.Event()

        def sink(event: Event) -> None:
            assert isinstance(event, Finished)
            if event.last:
                over.set()

        self.engine.submit(job, caller="test", deadline=None, sink=sink)
        await asyncio.wait_for(over.wait(), 30)

    async def checked(self, result: str, count: int) -> None:
        async with asyncio.timeout(30):
            while counted(self.metrics, "latentd_self_checks_total").get(result, 0) < count:  # noqa: ASYNC110  # a metric
                await asyncio.sleep(0.005)


@pytest.fixture
async def bench(loaded: dict[str, LoadedModel]) -> AsyncIterator[Bench]:
    bench = Bench(loaded, Metrics())
    yield bench
    await bench.engine.close()


async def handed_over() -> None:
    """Let the event loop turn until the device thread has been told what was asked for."""
    for _ in range(QUIET_TURNS + 2):
        await asyncio.sleep(0)


async def test_an_idle_engine_checks_what_it_answered(bench: Bench, loaded: dict[str, LoadedModel]) -> None:
    """Nothing is asked of it but the request; its evaluations are those of the request, the check's are apart."""
    await bench.result(steps(loaded))
    await bench.checked("match", 1)
    value = bench.metrics.registry.get_sample_value
    assert value("latentd_evaluations_total", {"model": D, "graph": "denoiser"}) == 12
    assert value("latentd_self_check_evaluations_total", {"model": D, "graph": "denoiser"}) == 4
    assert (bench.engine.queue_depth, bench.engine.backlog) == (0, 0)


async def test_an_engine_finds_a_liar_out(bench: Bench, loaded: dict[str, LoadedModel]) -> None:
    """Bytes that depend on company are a mismatch in the metric."""
    bench.steps.after = lies
    await bench.result(steps(loaded))
    await bench.checked("mismatch", 1)


async def test_work_waits_for_no_more_than_one_call_of_a_check(bench: Bench, loaded: dict[str, LoadedModel]) -> None:
    """A request that arrives during a check is run to its end before the check's next evaluation."""
    calls: list[bool] = []
    reached, go = threading.Event(), threading.Event()

    def hold(segments: Sequence[Segment]) -> None:
        calls.append(is_check(segments))
        if calls.count(True) == 2 and is_check(segments):
            reached.set()
            assert go.wait(30)

    bench.steps.before = hold
    await bench.result(steps(loaded))
    await asyncio.to_thread(reached.wait, 30)
    other = asyncio.ensure_future(bench.result(steps(loaded, lanes=2)))
    await handed_over()
    assert bench.engine.queue_depth == 1
    go.set()
    await other
    await bench.checked("match", 1)
    assert calls[:12] == [*[False] * 4, True, True, *[False] * 4, True, True]


async def test_a_drain_does_not_wait_for_a_check(bench: Bench, loaded: dict[str, LoadedModel]) -> None:
    """A draining engine begins no evaluation of a check, and is drained while one is half done."""
    calls: list[bool] = []
    reached, go = threading.Event(), threading.Event()

    def hold(segments: Sequence[Segment]) -> None:
        calls.append(is_check(segments))
        if is_check(segments):
            reached.set()
            assert go.wait(30)

    bench.steps.before = hold
    await bench.result(steps(loaded))
    await asyncio.to_thread(reached.wait, 30)
    bench.engine.drain()
    await asyncio.wait_for(bench.engine.drained(), 30)
    go.set()
    await bench.engine.close()
    assert calls.count(True) == 1


async def test_a_model_that_goes_takes_its_check_along(bench: Bench, loaded: dict[str, LoadedModel]) -> None:
    """Detaching during a check ends it; the engine goes on."""
    reached, go = threading.Event(), threading.Event()

    def hold(segments: Sequence[Segment]) -> None:
        if is_check(segments):
            reached.set()
            assert go.wait(30)

    bench.steps.before = hold
    await bench.result(steps(loaded))
    await asyncio.to_thread(reached.wait, 30)
    bench.engine.detach(D)
    await handed_over()
    go.set()
    await bench.result(decode())
    await bench.checked("match", 1)
    matches = {"model": D, "result": "match"}
    assert bench.metrics.registry.get_sample_value("latentd_self_checks_total", matches) is None
