"""The engine on real tiny bundles: bytes, isolation, deadlines, cancels, overload, drain."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SHAPE, write_all
from doors import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latentd.names import SAMPLERS
from latentd.v1 import bundle_pb2
from latentd_server import engine as engine_module
from latentd_server import samplers
from latentd_server.call_runner import CallRunner
from latentd_server.certificate_cache import CertificateCache
from latentd_server.engine import Engine
from latentd_server.failures import (
    DeadlineError,
    DeadlineUnreachableError,
    DrainingError,
    ModelLoadingError,
    OverloadedError,
    RuntimeFailureError,
)
from latentd_server.handover import Command
from latentd_server.job import CallJob, Event, Failed, Finished, Job, Noise, Preview, Start, StepJob
from latentd_server.loading import Terms, load
from latentd_server.metrics import Metrics
from latentd_server.models import Registry
from latentd_server.noise import Purpose
from latentd_server.points import Points
from latentd_server.runners import Outcome
from latentd_server.runtime import Device
from latentd_server.scheduler import Arrival, Batch
from latentd_server.step_runner import StepRunner

MAX_ROWS = 8


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("models"))


class Bench:
    """An engine with its models, and ways to wait for what it says."""

    def __init__(self, engine: Engine, registry: Registry, metrics: Metrics) -> None:
        self.engine, self.registry, self.metrics = engine, registry, metrics

    @classmethod
    async def start(cls, root: Path, max_backlog: int = 100_000) -> "Bench":
        metrics = Metrics()
        engine = Engine(metrics, max_rows=MAX_ROWS, max_backlog=max_backlog)
        registry = Registry(root, engine, Device("cpu"), threads=1, max_rows=MAX_ROWS)
        await registry.load_all()
        return cls(engine, registry, metrics)

    def steps(
        self,
        sampler: str = "ddim",
        count: int = 4,
        lanes: int = 1,
        *,
        seed: int = 0,
        first: int = 0,
        guidance: float = 1.0,
        label: int = 0,
        start: Any = None,
        previews: int = 0,
    ) -> StepJob:
        schedule = self.registry.get("tiny-diffusion").schedule
        assert schedule is not None
        timesteps = schedule.spaced_timesteps(count)
        alpha, sigma = schedule.level(timesteps[0])
        return StepJob(
            model="tiny-diffusion@1",
            lane_count=lanes,
            tables=(samplers.descent(schedule, sampler, timesteps),),
            start=Start(noise_scale=sigma) if start is None else Start(noise_scale=sigma, values=start, scale=alpha),
            seed=seed,
            sample_indices=np.arange(first, first + lanes),
            labels=np.full(lanes, label),
            guidance_scale=guidance,
            preview_interval=previews,
        )

    def decode(self, lanes: int = 1, *, seed: int = 0, first: int = 0) -> CallJob:
        return CallJob(
            model="tiny-vae@1",
            role=bundle_pb2.Network.ROLE_DECODER,
            lane_count=lanes,
            feeds={
                "z": Noise(Purpose.START),
                "y": np.arange(first, first + lanes) % 3,
                "u": Noise(Purpose.OUTPUT, uniform=True),
            },
            outputs=("draw", "z"),
            seed=seed,
            sample_indices=np.arange(first, first + lanes),
            draw_indices=np.zeros(lanes, np.int64),
        )

    async def events(self, job: Job, *, caller: str = "test", deadline: float | None = None) -> list[Event]:
        """Everything a job says, to its end."""
        seen: list[Event] = []
        over = asyncio.Event()

        def sink(event: Event) -> None:
            seen.append(event)
            if isinstance(event, Failed) or (isinstance(event, Finished) and event.last):
                over.set()

        self.engine.submit(job, caller=caller, deadline=deadline, sink=sink)
        await asyncio.wait_for(over.wait(), 30)
        return seen

    async def result(self, job: Job, *, caller: str = "test") -> bytes:
        """A job's finished lanes in order, as bytes."""
        rows: dict[int, bytes] = {}
        for event in await self.events(job, caller=caller):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                for index, lane in enumerate(event.lanes):
                    assert int(lane) not in rows, "a lane is final once"
                    rows[int(lane)] = b"".join(event.outputs[name][index].tobytes() for name in sorted(event.outputs))
        assert sorted(rows) == list(range(job.lane_count))
        return b"".join(rows[lane] for lane in sorted(rows))

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(name, labels)
        assert value is not None
        return value


@pytest.fixture(params=[1e9, 0.0], ids=["short-calls", "long-calls"])
async def bench(root: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """As if calls were always too short to do host work beside them, and always long enough: a busy machine must not
    choose.
    """
    monkeypatch.setattr(engine_module, "WORTH_HIDING", request.param)
    monkeypatch.setattr(engine_module, "SHORTEST_S", 0.0)
    bench = await Bench.start(root)
    yield bench
    assert (bench.engine.backlog, bench.engine.queue_depth) == (0, 0), "at rest nothing is outstanding"
    await bench.engine.close()


async def test_one_request_for_n_samples_is_n_requests_for_one(bench: Bench) -> None:
    """Sample i depends on (seed, i) alone, for walks and for single calls."""
    whole = await bench.result(bench.steps("ddpm", 5, lanes=11, seed=7))
    parts = [await bench.result(bench.steps("ddpm", 5, lanes=1, seed=7, first=i)) for i in range(11)]
    assert whole == b"".join(parts)
    assert await bench.result(bench.decode(9, seed=3)) == b"".join(
        [await bench.result(bench.decode(1, seed=3, first=i)) for i in range(9)]
    )


JOBS = st.one_of(
    st.builds(
        dict,
        kind=st.just("steps"),
        sampler=st.sampled_from(SAMPLERS),
        count=st.integers(1, 9),
        lanes=st.integers(1, 12),
        seed=st.integers(0, 2**63 - 1),
        first=st.integers(0, 1000),
        guidance=st.sampled_from([1.0, 1.0, 2.5]),
        label=st.integers(0, 2),
        previews=st.integers(0, 3),
        image=st.booleans(),
    ),
    st.builds(dict, kind=st.just("decode"), lanes=st.integers(1, 20), seed=st.integers(0, 2**63 - 1)),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=st.lists(JOBS, min_size=2, max_size=14), callers=st.integers(1, 5), cancelled=st.sets(st.integers(0, 13)))
def test_bytes_are_equal_alone_and_in_any_crowd(
    root: Path, mix: list[dict[str, Any]], callers: int, cancelled: set[int]
) -> None:
    """Whatever rides along, is preempted by other callers or is cancelled, a request's bytes do not change."""

    async def scenario() -> None:
        bench = await Bench.start(root)

        def job(spec: dict[str, Any]) -> Job:
            spec = dict(spec)
            if spec.pop("kind") == "decode":
                return bench.decode(**spec)
            image = np.full((1, *SHAPE), 0.25, np.float32) if spec.pop("image") else None
            return bench.steps(**spec, start=image)

        alone = [await bench.result(job(spec)) for spec in mix]
        doomed = [
            bench.engine.submit(job(mix[i]), caller=f"caller-{i % callers}", deadline=None, sink=lambda event: None)
            for i in sorted(cancelled)
            if i < len(mix)
        ]
        crowd = [bench.result(job(spec), caller=f"caller-{i % callers}") for i, spec in enumerate(mix)]
        gathered = asyncio.gather(*crowd)
        for job_id in doomed:
            await asyncio.sleep(0)
            bench.engine.cancel(job_id)
        together = await gathered
        await bench.engine.drained()
        await bench.engine.close()
        assert together == alone
        assert bench.engine.backlog == 0

    asyncio.run(scenario())


async def test_previews_come_at_the_interval_and_cost_nothing(bench: Bench) -> None:
    """Previews after every second step of seven; the bytes and the evaluations are those of a run without."""
    plain = await bench.result(bench.steps("ddim", 7, seed=5))
    events = await bench.events(bench.steps("ddim", 7, seed=5, previews=2))
    assert [e.completed_steps for e in events if isinstance(e, Preview)] == [2, 4, 6]
    (finished,) = [e for e in events if isinstance(e, Finished)]
    assert finished.outputs["sample"].tobytes() == plain
    assert finished.cost.evaluations == 7


async def test_costs_add_up(bench: Bench) -> None:
    """Evaluations count network rows: guided lanes twice; the sum over events is the job's whole price."""
    job = bench.steps("heun", 4, lanes=10, guidance=2.0)
    finished = [e for e in await bench.events(job) if isinstance(e, Finished)]
    assert sum(e.cost.evaluations for e in finished) == 10 * 7 * 2 == job.lane_count * job.evaluations_per_lane
    assert all(e.cost.rows / e.cost.batches <= MAX_ROWS for e in finished)


async def test_a_full_backlog_refuses_and_says_when_to_return(root: Path) -> None:
    """Beyond the limit a job is refused whole, with a hint; what was accepted is finished."""
    bench = await Bench.start(root, max_backlog=1000)
    accepted = asyncio.create_task(bench.result(bench.steps("ddim", 50, lanes=20)))
    await asyncio.sleep(0)
    # As large as the limit, so that it is refused however far the other has come meanwhile.
    with pytest.raises(OverloadedError) as caught:
        bench.engine.submit(bench.steps("ddim", 50, lanes=20), caller="x", deadline=None, sink=lambda event: None)
    assert 0.05 <= caught.value.retry_after_s <= 30
    await accepted
    await bench.engine.close()


async def test_a_passed_deadline_is_refused_at_the_door(bench: Bench) -> None:
    """Nothing is computed for a caller whose time is up."""
    with pytest.raises(DeadlineError):
        bench.engine.submit(bench.steps(), caller="x", deadline=0.0, sink=lambda event: None)


async def test_a_deadline_that_no_load_explains_is_refused_with_an_estimate(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk whose steps alone take longer than the time left is refused; a shorter one is accepted."""
    now = [0.0]
    run = StepRunner.run

    def slow(runner: StepRunner, prepared: Any) -> Any:
        now[0] += 0.1
        return run(runner, prepared)

    monkeypatch.setattr(StepRunner, "run", slow)
    metrics = Metrics()
    engine = Engine(metrics, max_rows=MAX_ROWS, max_backlog=100_000, clock=lambda: now[0])
    registry = Registry(root, engine, Device("cpu"), threads=1, max_rows=MAX_ROWS)
    await registry.load_all()
    bench = Bench(engine, registry, metrics)
    await bench.result(bench.steps("ddim", 3))  # every call takes a tenth of a second by this clock
    with pytest.raises(DeadlineUnreachableError, match="50 evaluations one after another") as caught:
        engine.submit(bench.steps("ddim", 50), caller="x", deadline=now[0] + 2, sink=lambda event: None)
    assert caught.value.estimate_s == pytest.approx(5.0, rel=0.2)
    assert isinstance((await bench.events(bench.steps("ddim", 50), deadline=now[0] + 1000))[-1], Finished)
    await engine.close()


async def test_one_slow_call_does_not_refuse_everybody_for_ever(root: Path) -> None:
    """Where an estimate refuses all that would be measured anew, it is forgotten, and the next caller is accepted."""
    now, per_call = [0.0], [1.0]

    def clock() -> float:
        now[0] += per_call[0]
        return now[0]

    engine = Engine(Metrics(), max_rows=MAX_ROWS, max_backlog=100_000, clock=clock)
    registry = Registry(root, engine, Device("cpu"), threads=1, max_rows=MAX_ROWS)
    await registry.load_all()
    bench = Bench(engine, registry, Metrics())
    await bench.result(bench.steps("ddim", 2))  # a second each by this clock, as on a machine that is busy otherwise
    per_call[0] = 0.0
    with pytest.raises(DeadlineUnreachableError):
        engine.submit(bench.steps("ddim", 50), caller="x", deadline=now[0] + 2, sink=lambda event: None)
    now[0] += 10.0
    assert isinstance((await bench.events(bench.steps("ddim", 50), deadline=now[0] + 2))[-1], Finished)
    await engine.close()


async def test_drain_refuses_the_new_and_finishes_the_old(bench: Bench) -> None:
    """After `drain` a submit is refused, and every accepted lane still arrives."""
    accepted = asyncio.create_task(bench.result(bench.steps("ddim", 20, lanes=12)))
    await asyncio.sleep(0)
    bench.engine.drain()
    with pytest.raises(DrainingError):
        bench.engine.submit(bench.steps(), caller="x", deadline=None, sink=lambda event: None)
    await bench.engine.drained()
    assert await accepted


async def test_cancel_frees_the_lanes_and_counts_the_waste(bench: Bench) -> None:
    """A cancelled job is heard of no more and its spent evaluations are counted."""
    heard: list[Event] = []
    first = asyncio.Event()

    def sink(event: Event) -> None:
        heard.append(event)
        bench.engine.cancel(job_id)
        first.set()

    job_id = bench.engine.submit(bench.steps("ddim", 90, previews=1), caller="x", deadline=None, sink=sink)
    await asyncio.wait_for(first.wait(), 30)
    await bench.result(bench.steps("ddim", 2))  # passes through the device thread behind the cancel
    assert len(heard) == 1
    assert bench.metric("latentd_wasted_evaluations_total") >= 1


async def test_a_deadline_ends_a_job_under_way(root: Path) -> None:
    """When the clock passes the deadline the job fails with DeadlineError and its neighbours go on."""
    now = [0.0]

    class Late(Points):
        def evaluated(self, arrivals: Sequence[Arrival]) -> None:
            if any(arrival.segment.entry.deadline_s for arrival in arrivals):
                now[0] = 11.0  # time passes in the middle of the walk

    engine = Engine(Metrics(), max_rows=MAX_ROWS, max_backlog=100_000, clock=lambda: now[0], points=Late())
    registry = Registry(root, engine, Device("cpu"), threads=1, max_rows=MAX_ROWS)
    await registry.load_all()
    bench = Bench(engine, registry, Metrics())
    neighbour = asyncio.create_task(bench.result(bench.steps("ddim", 90, lanes=4, seed=1)))
    seen: list[Event] = []
    over = asyncio.Event()

    def sink(event: Event) -> None:
        seen.append(event)
        if not isinstance(event, Preview):
            over.set()

    engine.submit(bench.steps("ddim", 100, previews=1), caller="x", deadline=10.0, sink=sink)
    await asyncio.wait_for(over.wait(), 30)
    assert isinstance(seen[-1], Failed)
    assert isinstance(seen[-1].error, DeadlineError)
    assert await neighbour == await bench.result(bench.steps("ddim", 90, lanes=4, seed=1))
    await engine.close()


async def test_a_paused_job_waits_and_then_finishes_with_the_same_bytes(bench: Bench) -> None:
    """Pause stops a job's lanes while others run; resume brings the same result."""
    want = await bench.result(bench.steps("ddpm", 30, lanes=3, seed=9))
    rows: dict[int, bytes] = {}
    over, began = asyncio.Event(), asyncio.Event()

    def sink(event: Event) -> None:
        began.set()
        if isinstance(event, Finished):
            rows.update({int(lane): event.outputs["sample"][i].tobytes() for i, lane in enumerate(event.lanes)})
            if event.last:
                over.set()

    job = bench.steps("ddpm", 30, lanes=3, seed=9, previews=1)
    job_id = bench.engine.submit(job, caller="x", deadline=None, sink=sink)
    bench.engine.pause(job_id)
    await bench.result(bench.steps("ddim", 30, lanes=8, seed=1))
    assert not over.is_set()
    bench.engine.resume(job_id)
    await asyncio.wait_for(over.wait(), 30)
    assert b"".join(rows[lane] for lane in sorted(rows)) == want


def hold_up(bench: Bench, limit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What blocks the event loop, when called there, until the device thread waits for it."""
    hand_back = bench.engine._hand_back
    monkeypatch.setattr(hand_back, "_limit_bytes", limit_bytes)

    def block() -> None:
        tick = threading.Event()
        for _ in range(30_000):
            if hand_back.waiting:
                return
            tick.wait(0.001)
        raise AssertionError("the device thread never waited")

    return block


DECODED = {"model": "tiny-vae@1", "graph": "decoder"}


async def test_results_do_not_run_ahead_of_a_loop_that_is_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the event loop is held up the device stops beginning batches, and goes on when the loop does."""
    block = hold_up(bench, 20_000, monkeypatch)
    seen: list[tuple[int, float]] = []
    lanes: list[int] = []
    over = asyncio.Event()

    def sink(event: Event) -> None:
        assert isinstance(event, Finished)
        if not seen:
            block()
            evaluations = bench.metric("latentd_evaluations_total", **DECODED)
            seen.append((bench.engine._hand_back.on_the_way_bytes, evaluations))
        lanes.extend(event.lanes.tolist())
        if event.last:
            over.set()

    bench.engine.submit(bench.decode(4_000), caller="test", deadline=None, sink=sink)
    await asyncio.wait_for(over.wait(), 60)
    ((on_the_way, evaluations),) = seen
    assert 20_000 < on_the_way < 30_000  # two batches of 8 rows beside the limit
    assert evaluations < 400
    assert sorted(lanes) == list(range(4_000))
    assert bench.metric("latentd_device_wait_duration_seconds_count") > 0


async def test_who_is_cancelled_while_the_loop_is_behind_rides_no_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the device goes on it first hears what the loop wants: no more is done than the call that was under way."""
    under_way = 0 if engine_module.WORTH_HIDING else MAX_ROWS  # calls have landed, unless there is another beside
    block = hold_up(bench, 20_000, monkeypatch)
    ridden: list[float] = []

    def sink(event: Event) -> None:
        block()
        ridden.append(bench.metric("latentd_evaluations_total", **DECODED))
        bench.engine.cancel(job)

    job = bench.engine.submit(bench.decode(4_000), caller="test", deadline=None, sink=sink)
    await until(lambda: bench.engine.backlog == 0)
    assert bench.metric("latentd_evaluations_total", **DECODED) <= ridden[0] + under_way
    assert len(ridden) == 1


@pytest.mark.parametrize("bench", [1e9], indirect=True, ids=["short-calls"])
async def test_results_are_told_while_the_interpreter_is_free(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came of a short call is told when the next one is ready to set off, and of the last call at once."""
    course: list[str] = []

    def noted(owner: Any, name: str, word: str) -> None:
        inner = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            course.append(word)
            return inner(*arguments)

        monkeypatch.setattr(owner, name, call)

    noted(bench.engine._hand_back, "hand", "tell")
    noted(CallRunner, "prepare", "ready")
    noted(CallRunner, "run", "run")
    await bench.result(bench.decode(3 * MAX_ROWS))
    assert course == ["ready", "run", "ready", "tell", "run", "ready", "tell", "run", "tell"]


async def test_a_deadline_may_lie_further_ahead_than_any_wait(bench: Bench) -> None:
    """A paused job with a deadline in thirty million years leaves the device thread at work, and ends when resumed."""
    over = asyncio.Event()

    def sink(event: Event) -> None:
        if isinstance(event, Finished):
            over.set()

    job_id = bench.engine.submit(bench.steps("ddim", 30), caller="x", deadline=1e15, sink=sink)
    bench.engine.pause(job_id)
    await bench.result(bench.steps("ddim", 2))  # with its end nothing may ride, and the thread waits for the deadline
    await bench.result(bench.steps("ddim", 2))
    bench.engine.resume(job_id)
    await asyncio.wait_for(over.wait(), 30)


async def test_nobody_waits_for_a_device_thread_that_is_gone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in planning ends the thread: jobs under way end as retryable, new ones are refused, the engine says so."""
    bench = await Bench.start(root)
    jobs = [asyncio.create_task(bench.events(bench.steps("ddim", 90, seed=seed))) for seed in range(3)]
    await asyncio.sleep(0)
    monkeypatch.setattr(bench.engine._scheduler, "plan", lambda now_s: 1 / 0)
    for events in await asyncio.gather(*jobs):
        assert isinstance(events[-1], Failed)
        assert isinstance(events[-1].error, DrainingError)
    await asyncio.wait_for(bench.engine.broken.wait(), 30)
    with pytest.raises(DrainingError):
        bench.engine.submit(bench.steps(), caller="x", deadline=None, sink=lambda event: None)
    await bench.engine.drained()
    await bench.engine.close()


class Saboteur:
    """A runner that fails whenever a marked seed is in the call, as a bad row does."""

    def __init__(self, inner: StepRunner, bad_seed: int) -> None:
        self.inner, self.bad_seed = inner, bad_seed

    def warm(self) -> None:
        self.inner.warm()

    def prepare(self, segments: Sequence[Any]) -> tuple[Any, bool]:
        return self.inner.prepare(segments), any(segment.entry.job.seed == self.bad_seed for segment in segments)

    def run(self, prepared: tuple[Any, bool]) -> Any:
        call, bad = prepared
        if bad:
            raise RuntimeError("Non-zero status code returned while running Gather node")
        return self.inner.run(call)

    def finish(self, prepared: tuple[Any, bool], results: Any) -> list[Outcome]:
        return self.inner.finish(prepared[0], results)

    def padded(self, rows: int) -> int:
        return self.inner.padded(rows)

    def forget(self, job_id: int) -> None:
        self.inner.forget(job_id)


async def test_one_bad_row_fails_alone(bench: Bench) -> None:
    """When a call fails its segments run again one by one: only the culprit fails, the others keep their bytes."""
    want = [await bench.result(bench.steps("dpmpp-2m", 6, lanes=2, seed=seed)) for seed in range(4)]
    key = ("tiny-diffusion@1", bundle_pb2.Network.ROLE_DENOISER)
    runner = bench.engine._runners[key]
    bench.engine.attach({key: Saboteur(runner, bad_seed=666)})  # type: ignore[arg-type, dict-item]
    good = [bench.result(bench.steps("dpmpp-2m", 6, lanes=2, seed=seed)) for seed in range(4)]
    bad = bench.result(bench.steps("ddim", 3, lanes=1, seed=666))
    *got, error = await asyncio.gather(*good, bad, return_exceptions=True)
    assert got == want
    assert isinstance(error, RuntimeFailureError)
    assert "Gather" not in str(error), "no internals reach the caller"


async def test_a_lost_device_ends_the_server_and_one_success_saves_it(root: Path) -> None:
    """When every row fails, batch after batch, nothing more is accepted; a success in between starts the count anew."""
    bench = await Bench.start(root)
    key = ("tiny-diffusion@1", bundle_pb2.Network.ROLE_DENOISER)
    bench.engine.attach({key: Saboteur(bench.engine._runners[key], bad_seed=666)})  # type: ignore[arg-type, dict-item]
    for _ in range(7):
        with pytest.raises(RuntimeFailureError):
            await bench.result(bench.steps("ddim", 1, seed=666))
    await bench.result(bench.steps("ddim", 1))
    for _ in range(7):
        with pytest.raises(RuntimeFailureError):
            await bench.result(bench.steps("ddim", 1, seed=666))
    assert not bench.engine.broken.is_set()
    with pytest.raises(RuntimeFailureError):
        await bench.result(bench.steps("ddim", 1, seed=666))
    await asyncio.wait_for(bench.engine.broken.wait(), 30)
    with pytest.raises(DrainingError):
        bench.engine.submit(bench.steps(), caller="x", deadline=None, sink=lambda event: None)
    await bench.engine.close()


class Deserted(Saboteur):
    """Fails too where a job with seed 777 is in the call, which leaves meanwhile, as it may beside a long call."""

    def __init__(self, inner: StepRunner, engine: Engine) -> None:
        super().__init__(inner, 666)
        self._engine = engine
        self.calls = 0

    def prepare(self, segments: Sequence[Any]) -> tuple[Any, bool]:
        self._leavers = [segment.entry.job_id for segment in segments if segment.entry.job.seed == 777]
        return super().prepare(segments)

    def run(self, prepared: tuple[Any, bool]) -> Any:
        for job_id in self._leavers:
            self._engine._drop(job_id)
            self.calls += 1
            raise RuntimeError("Non-zero status code returned while running Gather node")
        return super().run(prepared)


async def test_a_failed_call_whose_jobs_have_left_says_nothing_of_the_device(root: Path) -> None:
    """It is no success that starts the count of failures anew, and no failure either."""
    bench = await Bench.start(root)
    key = ("tiny-diffusion@1", bundle_pb2.Network.ROLE_DENOISER)
    runner = Deserted(bench.engine._runners[key], bench.engine)  # type: ignore[arg-type]  # a step runner
    bench.engine.attach({key: runner})  # type: ignore[dict-item]  # half a Runner does

    async def leave() -> None:
        calls = runner.calls
        job_id = bench.engine.submit(
            bench.steps("ddim", 1, seed=777), caller="x", deadline=None, sink=lambda event: None
        )
        await until(lambda: runner.calls > calls)
        bench.engine.cancel(job_id)

    for _ in range(9):
        await leave()
    for number in range(8):
        assert not bench.engine.broken.is_set()
        await leave()
        with pytest.raises(RuntimeFailureError):
            await bench.result(bench.steps("ddim", 1, seed=666))
        assert runner.calls == 10 + number
    await asyncio.wait_for(bench.engine.broken.wait(), 30)
    await bench.engine.close()


class Watching(Points):
    """Notes the rows of every batch."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def evaluating(self, batch: Batch) -> None:
        self.rows.append(batch.rows)


async def test_a_graph_has_wide_batches_until_it_is_let_go(root: Path) -> None:
    """At the device and at the door; what comes after it under its name has batches of its own."""
    usual, wide = (
        load(root / "tiny-vae" / "1", Terms(Device("cpu"), 1, MAX_ROWS, True, CertificateCache(None), widest_rows=rows))
        for rows in (0, 32)
    )
    key = "tiny-vae@1", bundle_pb2.Network.ROLE_DECODER
    assert (usual.wide.get(key), wide.wide[key]) == (None, 32)
    watching = Watching()
    engine = Engine(Metrics(), max_rows=MAX_ROWS, max_backlog=100_000, points=watching)
    bench = Bench(engine, Registry(root, engine, Device("cpu"), threads=1, max_rows=MAX_ROWS), Metrics())
    answers = set()
    for loaded, rows in ((wide, [32, 8]), (usual, [8] * 5), (wide, [32, 8])):
        engine.attach(loaded.runners, wide=loaded.wide)
        assert engine._admission.batch_rows.of(key) == rows[0]
        answers.add(await bench.result(bench.decode(40, seed=3)))
        assert watching.rows == rows
        watching.rows.clear()
        engine.detach("tiny-vae@1")
        await until(lambda: not engine._runners)
        await until(lambda: engine._admission.batch_rows.of(key) == MAX_ROWS)
    assert len(answers) == 1, "and the same bytes"
    await engine.close()


async def test_a_model_may_come_back_before_the_device_has_let_it_go(root: Path) -> None:
    """While the device is in a long call a model can be unloaded and loaded anew: its new terms stay."""
    loaded = load(
        root / "tiny-vae" / "1", Terms(Device("cpu"), 1, MAX_ROWS, True, CertificateCache(None), widest_rows=32)
    )
    key = "tiny-vae@1", bundle_pb2.Network.ROLE_DECODER
    engine = Engine(Metrics(), max_rows=MAX_ROWS, max_backlog=100_000)
    bench = Bench(engine, Registry(root, engine, Device("cpu"), threads=1, max_rows=MAX_ROWS), Metrics())
    engine.attach(loaded.runners, wide=loaded.wide, state_lanes={key: 5})
    await bench.result(bench.decode(40))
    long_call = threading.Event()
    engine._hand_over.tell(lambda: wait_for(long_call))
    engine.detach("tiny-vae@1")
    engine.attach(loaded.runners, wide=loaded.wide, state_lanes={key: 5})
    long_call.set()
    await bench.result(bench.decode(40))
    assert engine._admission.batch_rows.of(key) == engine._scheduler.batch_rows.of(key) == 32
    assert engine._admission._state_lanes == {key: 5}
    engine.detach("tiny-vae@1")
    await until(lambda: not engine._runners)
    assert engine._admission.batch_rows.of(key) == engine._scheduler.batch_rows.of(key) == MAX_ROWS
    assert not engine._admission._state_lanes
    assert not engine._admission._costs
    await engine.close()


def wait_for(event: threading.Event) -> None:
    """Stand for a long call."""
    assert event.wait(60)


async def test_jobs_are_gathered_until_they_fill_a_batch_of_their_own_graph(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a job fills of it is told to the hand-over, guided lanes counted twice."""
    bench = await Bench.start(root)
    bench.engine._admission.batch_rows.update({("tiny-vae@1", bundle_pb2.Network.ROLE_DECODER): 32})
    shares: list[float] = []
    submit = bench.engine._hand_over.submit

    def told(command: Command, share: float, *, alone: bool) -> None:
        shares.append(share)
        submit(command, share, alone=alone)

    monkeypatch.setattr(bench.engine._hand_over, "submit", told)
    for job in (bench.decode(8), bench.decode(40), bench.steps(lanes=4), bench.steps(lanes=6, guidance=2.0)):
        await bench.result(job)
    assert shares == [8 / 32, 40 / 32, 4 / MAX_ROWS, 12 / MAX_ROWS]
    await bench.engine.close()


async def test_a_bundle_that_was_seen_but_not_read_is_loading(root: Path) -> None:
    """Between the opening of the ports and the end of loading a model is LOADING, never unknown."""
    engine = Engine(Metrics(), max_rows=MAX_ROWS, max_backlog=1000)
    registry = Registry(root, engine, Device("cpu"), threads=1, max_rows=MAX_ROWS)
    registry.discover()
    with pytest.raises(ModelLoadingError):
        registry.get("tiny-vae")
    await registry.load_all()
    assert registry.get("tiny-vae").model.name == "tiny-vae@1"
    await engine.close()


async def test_a_sink_that_fails_loses_only_its_own_job(bench: Bench) -> None:
    """An exception in one job's sink neither stops the engine nor reaches a neighbour."""

    def bad_sink(event: Event) -> None:
        raise RuntimeError("broken pipe")

    bench.engine.submit(bench.steps("ddim", 5, previews=1), caller="x", deadline=None, sink=bad_sink)
    assert await bench.result(bench.steps("ddim", 5))
    await bench.engine.drained()


@pytest.mark.parametrize("call", ["model", "get"])
async def test_the_newest_active_version_answers_for_the_name(root: Path, tmp_path: Path, call: str) -> None:
    """NAME is its newest active version; a newer one that failed to load does not hide it."""
    from bundles import write_gan

    write_gan(tmp_path, version=1)
    write_gan(tmp_path, version=3)
    (write_gan(tmp_path, version=4) / "decoder.onnx").write_bytes(b"damaged")
    bench = await Bench.start(tmp_path)
    ask: Callable[[str], Any] = getattr(bench.registry, call)
    found = ask("tiny-gan")
    assert (found.name if call == "model" else found.model.name) == "tiny-gan@3"
    assert [m.name for m in bench.registry.models()] == ["tiny-gan@4", "tiny-gan@3", "tiny-gan@1"]
    assert "decoder.onnx" in bench.registry.model("tiny-gan@4").failure_reason
    await bench.engine.close()
