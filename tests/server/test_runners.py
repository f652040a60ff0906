"""Runners: the phases of a call, the lanes' state, and who may be in which phase when."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SHAPE, TIMESTEPS
from latentd.v1 import bundle_pb2
from latentd_server import samplers, step_graph, step_runner
from latentd_server.bundle import read
from latentd_server.call_runner import CallRunner
from latentd_server.certificate import Buckets
from latentd_server.certificate_cache import CertificateCache
from latentd_server.job import CallJob, Noise, Start, StepJob
from latentd_server.loading import Terms, load
from latentd_server.noise import Purpose
from latentd_server.runners import Outcome, evaluate
from latentd_server.runtime import NO_CAPTURE, BoundGraph, CompiledGraph, Device, Memory
from latentd_server.scheduler import Cohort, Scheduler, Segment
from latentd_server.state_pool import Slots, StatePool
from latentd_server.step_runner import StepRunner

CPU = Device("cpu")
MAX_ROWS = 8
TERMS = Terms(CPU, 1, MAX_ROWS, True, CertificateCache(None))


@pytest.fixture
def steps(models_root: Path) -> StepRunner:
    """The runner of the tiny diffusion model, with room for two lanes to begin with."""
    loaded = load(models_root / "tiny-diffusion" / "1", TERMS)
    (runner,) = loaded.runners.values()
    assert isinstance(runner, StepRunner)
    return StepRunner(runner._graph, SHAPE, runner.buckets, lanes=2)


@pytest.fixture
def job(models_root: Path) -> Callable[..., StepJob]:
    """Makes jobs for it."""
    schedule = read(models_root / "tiny-diffusion" / "1").schedule
    assert schedule is not None

    def make(sampler: str = "dpmpp-2m-sde", count: int = 5, lanes: int = 1, **fields: Any) -> StepJob:
        timesteps = schedule.spaced_timesteps(count)
        settings: dict[str, Any] = {
            "start": Start(noise_scale=schedule.level(timesteps[0])[1]),
            "seed": 0,
            "sample_indices": np.arange(lanes),
            "labels": np.arange(lanes) % 3,
            "tables": (samplers.descent(schedule, sampler, timesteps),),
        }
        return StepJob(model="tiny-diffusion@1", lane_count=lanes, **(settings | fields))

    return make


def segment(job_id: int, job: StepJob | CallJob, position: int = 0) -> Segment:
    """All lanes of a job at an evaluation."""
    entry = Scheduler(MAX_ROWS).add(job_id, job, "test", 0.0)
    cohort = Cohort(0, job.lane_count, position)
    return Segment(entry, cohort, cohort.count, cohort.count * job.rows_per_lane)


def length(job: StepJob) -> int:
    """Evaluations of one lane."""
    return len(job.tables[0].timesteps)


def walked(runner: StepRunner, job: StepJob, job_id: int = 1) -> list[Outcome]:
    """What a job alone in its calls has to show for every evaluation."""
    outcomes = [evaluate(runner, [segment(job_id, job, position)])[0] for position in range(length(job))]
    runner.forget(job_id)
    return outcomes


def as_bytes(outcome: Outcome) -> list[bytes]:
    """Everything in an outcome."""
    arrays = [] if outcome.preview is None else [outcome.preview]
    return [array.tobytes() for array in [*arrays, *(dict(sorted((outcome.outputs or {}).items())).values())]]


def test_calls_may_overlap(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """Preparing a call before the one before is run, and finishing one after the next was run, changes no byte."""
    fields: dict[str, Any] = {"preview_interval": 1, "estimates_wanted": True, "history_wanted": True}
    jobs = {1: job(lanes=2, seed=1, **fields), 2: job("ddim", 5, seed=2, guidance_scale=2.0, **fields)}
    alone = {job_id: [as_bytes(outcome) for outcome in walked(steps, each)] for job_id, each in jobs.items()}

    def prepared(position: int) -> Any:
        return steps.prepare([segment(job_id, each, position) for job_id, each in jobs.items()])

    following, last, outcomes = prepared(0), None, []
    for position in range(length(jobs[1])):
        call = following
        if position + 1 < length(jobs[1]):
            following = prepared(position + 1)
        results = steps.run(call)
        if last is not None:
            outcomes.append(steps.finish(*last))
        last = call, results
    assert last is not None
    outcomes.append(steps.finish(*last))
    for index, job_id in enumerate(jobs):
        assert [as_bytes(outcome[index]) for outcome in outcomes] == alone[job_id]


def test_state_stays_while_lanes_sit_out(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """A lane that pauses for calls in which others start, finish and free their slots goes on where it was."""
    held = job(lanes=2, seed=3)
    alone = as_bytes(walked(steps, held)[-1])
    for position in range(length(held)):
        (outcome,) = evaluate(steps, [segment(7, held, position)])
        for other in range(4):
            walked(steps, job("ddpm", 2, lanes=3, seed=other), job_id=100 + other)
    assert as_bytes(outcome) == alone


def test_a_finished_lane_frees_its_slot_and_a_forgotten_one_too(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """However many jobs come and go, no more slots are in use than lanes were under way at one time."""
    for number in range(20):
        walked(steps, job("ddim", 2, lanes=2, seed=number), job_id=number)
        evaluate(steps, [segment(1000 + number, job("ddim", 2, lanes=2))])
        steps.forget(1000 + number)
        steps.forget(1000 + number)
    assert steps._slots.count == 1 + 2
    assert steps._pool.capacity == 1 + 2, "two lanes and the padding never needed more room"


def test_a_finished_lane_keeps_no_noise(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """Or a job of many lanes would keep a row or more of each until the last of them is done."""
    walk = job("ddpm", 4, lanes=2)
    everybody = segment(1, walk)
    for position in range(length(walk)):
        first = Segment(everybody.entry, Cohort(0, 1, position), 1, 1)
        assert not position or steps._walks[1].noise[0]._rows
        evaluate(steps, [first])
    assert 0 not in steps._walks[1].noise
    steps.forget(1)
    assert steps.held == 0


def test_the_pool_grows_under_lanes_on_their_way(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """When the state moves to a larger pool, lanes keep theirs, and what is still read from the old one is intact."""
    first = job(lanes=2, seed=5)
    alone = as_bytes(walked(steps, first)[-1])
    before = steps._pool.capacity
    for position in range(length(first)):
        call = steps.prepare([segment(1, first, position)])
        results = steps.run(call)
        evaluate(steps, [segment(10 + position, job(lanes=4, seed=position))])
        (outcome,) = steps.finish(call, results)
    assert steps._pool.capacity > 2 * before
    assert as_bytes(outcome) == alone


def test_a_failed_call_leaves_every_lane_where_it_was(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """An out-of-range label fails the call; the others, run again one by one, end with the bytes they have alone."""
    good = [job(lanes=2, seed=1), job("ddpm", 5, seed=2, guidance_scale=2.0)]
    alone = [as_bytes(walked(steps, each)[-1]) for each in good]
    bad = job(labels=np.array([10_000]))
    for position in range(length(good[0])):
        together = [segment(index, each, position) for index, each in enumerate(good)]
        with pytest.raises(Exception, match="Gather"):
            evaluate(steps, [together[0], segment(99, bad), together[1]])
        outcomes = [evaluate(steps, [each])[0] for each in together]
    assert [as_bytes(outcome) for outcome in outcomes] == alone


def test_every_lane_of_a_call_takes_its_own_step(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """Lanes with tables of their own, some with noise and some without, get the bytes they get alone."""
    tables = (*job("ddpm", 5).tables, *job("ddim", 5).tables, *job("euler-ancestral", 5).tables)
    mixed = job(lanes=3, seed=4, tables=tables)
    together = walked(steps, mixed)[-1].outputs
    assert together is not None
    for lane, table in enumerate(tables):
        single = job(seed=4, tables=(table,), sample_indices=np.array([lane]), labels=np.array([lane]))
        outputs = walked(steps, single)[-1].outputs
        assert outputs is not None
        assert outputs["sample"].tobytes() == together["sample"][lane : lane + 1].tobytes()


def test_noise_of_an_earlier_call_is_gone(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """A row without noise finds +0 there, whoever had the row before."""
    walked(steps, job("ddpm", 3, lanes=8))
    frame = steps.prepare([segment(1, job("ddim", 3, lanes=4))]).frame
    z = frame.noise.arrays["z"]
    assert not np.any(z)
    assert not np.any(np.signbit(z))


def test_nobody_guided_means_no_second_rows(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """After a guided call the pairs are those of unguided lanes again, and stay untouched while nobody is guided."""
    own = np.arange(MAX_ROWS)
    evaluate(steps, [segment(1, job(lanes=2, guidance_scale=3.0))])
    frame = steps.prepare([segment(2, job(lanes=2))]).frame
    assert all(np.array_equal(frame.pairs.arrays[name], own) for name in ("lane", "row_u", "row_c"))
    assert np.all(frame.pairs.arrays["w"] == 1)


class Apart(Device):
    """The CPU, treated as a device whose memory is another than the host's, as a GPU's is."""

    @property
    def has_memory(self) -> bool:
        return True


@pytest.fixture
def apart(models_root: Path, steps: StepRunner) -> StepRunner:
    """The runner of the tiny diffusion model on such a device, recording its calls."""
    network = read(models_root / "tiny-diffusion" / "1")
    (data,) = network.graphs.values()
    fused = step_graph.build(data, "x", "t", "y", "prediction", SHAPE)
    graph = CompiledGraph(fused, Apart("cpu"), 1)
    graph.captures = True
    runner = StepRunner(graph, SHAPE, steps.buckets, lanes=2)
    runner.warm()
    return runner


def test_a_device_with_its_own_memory_gives_the_same(
    steps: StepRunner, apart: StepRunner, job: Callable[..., StepJob]
) -> None:
    """What goes up and comes down, guided and not, noisy and not, growing and overlapping, changes no byte."""
    fields: dict[str, Any] = {"preview_interval": 2, "estimates_wanted": True, "history_wanted": True}
    jobs = [
        job("ddpm", 5, seed=1, guidance_scale=2.0, **fields),
        job("ddim", 5, lanes=3, seed=2, **fields),
        job("dpmpp-2m-sde", 5, lanes=2, seed=3, **fields),
    ]
    crowds = [jobs[:1], jobs[1:2], jobs[:1], jobs[1:], jobs]
    for crowd in crowds:
        want = [[as_bytes(outcome) for outcome in walked(steps, each)] for each in crowd]
        got: list[list[list[bytes]]] = [[] for _ in crowd]
        last = None
        for position in range(length(crowd[0])):
            call = apart.prepare([segment(number, each, position) for number, each in enumerate(crowd)])
            results = apart.run(call)
            if last is not None:
                for number, outcome in enumerate(apart.finish(*last)):
                    got[number].append(as_bytes(outcome))
            last = call, results
        assert last is not None
        for number, outcome in enumerate(apart.finish(*last)):
            got[number].append(as_bytes(outcome))
            apart.forget(number)
        assert got == want


def test_only_what_changed_goes_up(
    apart: StepRunner, job: Callable[..., StepJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise and pairs are uploaded when there are any and once more when there are none; then not again."""
    sent: list[str] = []
    upload = Memory.up
    monkeypatch.setattr(Memory, "up", lambda memory: (sent.append("+".join(memory.layout)), upload(memory))[1])
    rows, pairs = "slot+timestep+label+coefficients", "lane+row_u+row_c+w"
    plain, noisy, guided = (job("ddim", 5), job("ddpm", 5), job("ddim", 5, guidance_scale=2.0))

    def uploads(number: int, each: StepJob) -> set[str]:
        evaluate(apart, [segment(number, each, 0)])
        sent.clear()
        evaluate(apart, [segment(number, each, 1)])
        return {name for name in sent if name in (rows, pairs, "z")}

    assert uploads(1, plain) == {rows}
    assert uploads(2, noisy) == {rows, "z"}
    assert uploads(3, guided) == {rows, pairs}
    assert uploads(4, plain) == {rows}


def test_a_recording_touches_no_lane(apart: StepRunner, job: Callable[..., StepJob]) -> None:
    """ONNX Runtime makes a call several times over to record it; when the pool moves in the middle of a walk, calls are
    recorded anew, and only the padding's slot is ever in a call that records.
    """
    slots: list[list[int]] = []
    record = BoundGraph.run

    def run(bound: BoundGraph, capture: int = -1) -> None:
        memory = bound._kept.get("slot")
        if capture >= 0 and capture not in recorded and memory is not None:
            recorded.add(capture)
            slots.append(memory.arrays["slot"].tolist())
            record(bound, capture)
            record(bound, capture)
        record(bound, capture)

    recorded = set(range(1, 1 + len(apart.buckets.sizes)))  # by `warm`
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundGraph, "run", run)
        first = job(lanes=2, seed=5)
        for position in range(length(first)):
            (outcome,) = evaluate(apart, [segment(1, first, position)])
            evaluate(apart, [segment(10 + position, job(lanes=4, seed=position))])
    apart.forget(1)
    assert slots, "the pool moved"
    assert all(set(each) == {0} for each in slots)
    assert as_bytes(outcome) == as_bytes(walked(apart, first)[-1])


def test_a_call_goes_without_a_recording_that_fails(
    apart: StepRunner, job: Callable[..., StepJob], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a graph cannot be captured the log says so, and calls are made without."""
    want = [as_bytes(outcome) for outcome in walked(apart, job(seed=8))]
    plain = BoundGraph.run

    def run(bound: BoundGraph, capture: int = -1) -> None:
        if capture >= 0 and "coefficients" in bound._kept:
            raise RuntimeError("operation not permitted when stream is capturing")
        plain(bound, capture)

    monkeypatch.setattr(BoundGraph, "run", run)
    apart._pool.grow(100)
    assert [as_bytes(outcome) for outcome in walked(apart, job(seed=8))] == want
    assert "kernels are launched one by one" in caplog.text


def test_no_call_replays_what_was_recorded_for_another_pool(
    apart: StepRunner, job: Callable[..., StepJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a network is compiled nothing can be recorded: calls go without, and are recorded once it is done."""
    busy = [True]
    monkeypatch.setattr(step_runner, "recording", lambda: contextlib.nullcontext(not busy[0]))
    size = apart.padded(1)
    apart._pool.grow(100)
    evaluate(apart, [segment(1, job())])
    assert apart._on_device[size].capture == NO_CAPTURE
    busy[0] = False
    evaluate(apart, [segment(1, job(), 1)])
    assert apart._on_device[size].capture != NO_CAPTURE


def test_rows_that_cannot_be_read_make_no_lane_step_twice(
    apart: StepRunner, job: Callable[..., StepJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the step was taken and only reading fails, it is `finish` that fails, not the call: nobody tries again."""

    def fail(*arguments: Any) -> None:
        raise RuntimeError("copy failed")

    monkeypatch.setattr(StatePool, "read", fail)
    call = apart.prepare([segment(1, job(preview_interval=1))])
    results = apart.run(call)
    with pytest.raises(RuntimeError, match="copy failed"):
        apart.finish(call, results)


def test_single_calls_on_a_device_with_its_own_memory(calls: CallRunner, models_root: Path) -> None:
    """Rows go up, answers come down, and calls that overlap do not mix."""
    stored = read(models_root / "tiny-vae" / "1")
    (network,) = (each for each in stored.message.networks if each.role == bundle_pb2.Network.ROLE_DECODER)
    graph = CompiledGraph(stored.graphs[network.role], Apart("cpu"), 1)
    graph.captures = True
    runner = CallRunner(graph, network, calls.buckets)
    runner.warm()
    jobs = [decode(2, seed=1), decode(2, seed=2), decode(3, seed=3)]
    prepared = [runner.prepare([segment(1, each)]) for each in jobs]
    for call in prepared:
        runner.run(call)
    got = [as_bytes(runner.finish(call)[0]) for call in prepared]
    assert got == [as_bytes(evaluate(calls, [segment(1, each)])[0]) for each in jobs]


@pytest.mark.parametrize("through_graphs", [False, True])
def test_a_pool_keeps_what_is_written(through_graphs: bool) -> None:
    """Rows are read as they were written, before and after growing, by the host and by graphs on the device alike."""
    rng = np.random.default_rng(0)
    pool = StatePool(CPU, SHAPE, 3, through_graphs=through_graphs)
    x, h = rng.standard_normal((2, 3, *SHAPE), np.float32)
    pool.write(np.array([3, 1, 2]), x, h)
    small = pool.memory
    pool.grow(9)
    pool.write(np.array([8]), x[:1], h[:1])
    assert pool.read(pool.memory, "x", [3, 1, 2, 8]).tobytes() == np.concatenate([x, x[:1]]).tobytes()
    assert pool.read(pool.memory, "h", [2, 8]).tobytes() == np.stack([h[2], h[0]]).tobytes()
    assert pool.read(small, "h", [3, 1, 2]).tobytes() == h.tobytes(), "the old memory stays as it was"
    assert not np.any(pool.read(pool.memory, "x", [0, 4, 5, 6, 7]))


def test_slots_are_numbered_without_holes() -> None:
    """Freed numbers are given out before new ones, and the padding's never."""
    slots = Slots()
    taken = [slots.take() for _ in range(3)]
    slots.free(taken[1])
    assert [slots.take(), slots.take()] == [taken[1], 4]
    assert 0 not in taken
    assert slots.count == 5


def decode(lanes: int, seed: int = 0, z: Any = None) -> CallJob:
    """A job for the tiny VAE's decoder."""
    return CallJob(
        model="tiny-vae@1",
        role=bundle_pb2.Network.ROLE_DECODER,
        lane_count=lanes,
        feeds={
            "z": Noise(Purpose.START) if z is None else z,
            "y": np.arange(lanes) % 3,
            "u": Noise(Purpose.OUTPUT, uniform=True, stream=1),
        },
        outputs=("draw", "z"),
        seed=seed,
        sample_indices=np.arange(lanes),
        draw_indices=np.zeros(lanes, np.int64),
    )


@pytest.fixture
def calls(models_root: Path) -> CallRunner:
    """The runner of the tiny VAE's decoder."""
    loaded = load(models_root / "tiny-vae" / "1", TERMS)
    runner = loaded.runners["tiny-vae@1", bundle_pb2.Network.ROLE_DECODER]
    assert isinstance(runner, CallRunner)
    return runner


def test_single_calls_may_overlap(calls: CallRunner) -> None:
    """Three calls prepared, run and looked at in turns give what each gives alone, given rows and drawn ones alike."""
    rows = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    jobs = [decode(2, seed=1), decode(3, z=rows[:, : calls._inputs["z"][0][0]]), decode(2, seed=2)]
    alone = [as_bytes(evaluate(calls, [segment(1, each)])[0]) for each in jobs]
    first = calls.prepare([segment(1, jobs[0])])
    second = calls.prepare([segment(2, jobs[1])])
    calls.run(first)
    third = calls.prepare([segment(3, jobs[2])])
    calls.run(second)
    outcomes = calls.finish(first)
    outcomes += calls.finish(second)
    calls.run(third)
    outcomes += calls.finish(third)
    assert [as_bytes(outcome) for outcome in outcomes] == alone


def test_a_bad_row_of_an_earlier_call_is_not_in_the_padding(calls: CallRunner) -> None:
    """After a call failed by an out-of-range label, a call with rows to spare succeeds."""
    calls.buckets = Buckets((MAX_ROWS,))
    bad = decode(3)
    bad.feeds["y"][:] = 10_000  # type: ignore[index]  # a dict, so that the test can spoil it
    with pytest.raises(Exception, match="Gather"):
        evaluate(calls, [segment(1, bad)])
    assert evaluate(calls, [segment(2, decode(1))])[0].outputs is not None


def test_memory_that_is_bound_stays(steps: StepRunner, job: Callable[..., StepJob]) -> None:
    """The same frames serve call after call: nothing is allocated anew for every step."""
    evaluate(steps, [segment(1, job(lanes=2))])
    frames = [id(frame) for spare in steps._spare.values() for frame in spare]
    for position in range(1, 4):
        evaluate(steps, [segment(1, job(lanes=2), position)])
    assert [id(frame) for spare in steps._spare.values() for frame in spare] == frames
    assert TIMESTEPS > 4
