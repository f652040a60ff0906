"""The scheduler, driven without a device: who rides, in what order, and that nothing is ever lost."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from latentd.v1 import bundle_pb2
from latentd_server.job import CallJob, Job, Start, StepJob
from latentd_server.samplers import COLUMNS, Table
from latentd_server.scheduler import Batch, Scheduler

ROWS = 8
DECODER = bundle_pb2.Network.ROLE_DECODER


def _table(evaluations: int) -> Table:
    return Table(
        timesteps=np.arange(evaluations)[::-1].copy(),
        coefficients=np.zeros((evaluations, len(COLUMNS)), np.float32),
        completed_steps=np.arange(1, evaluations + 1, dtype=np.int32),
        step_count=evaluations,
    )


def steps(lanes: int, evaluations: int, *, guided: bool = False, model: str = "a@1") -> StepJob:
    """A diffusion job of so many lanes and evaluations."""
    return StepJob(
        model=model,
        lane_count=lanes,
        tables=(_table(evaluations),),
        start=Start(noise_scale=1.0),
        seed=0,
        sample_indices=np.arange(lanes),
        labels=np.full(lanes, -1),
        guidance_scale=2.0 if guided else 1.0,
    )


def rows(count: int, *, model: str = "a@1") -> CallJob:
    """A one-shot job of so many rows."""
    return CallJob(
        model=model,
        role=DECODER,
        lane_count=count,
        feeds={},
        outputs=("sample",),
        seed=0,
        sample_indices=np.arange(count),
        draw_indices=np.zeros(count, np.int64),
    )


def run(scheduler: Scheduler, batch: Batch | None, seconds: float = 1.0) -> list[tuple[int, int, int, bool]]:
    """Complete a batch, forgetting jobs that are over; what arrived, as (job, start, stop, done)."""
    assert batch is not None
    arrivals = scheduler.complete(batch, seconds)
    for arrival in arrivals:
        if arrival.last:
            scheduler.remove(arrival.segment.entry.job_id)
    return [(a.segment.entry.job_id, a.segment.cohort.start, a.segment.cohort.stop, a.done) for a in arrivals]


def riders(batch: Batch | None) -> dict[int, int]:
    """Lanes by job."""
    assert batch is not None
    found: Counter[int] = Counter()
    for segment in batch.segments:
        found[segment.entry.job_id] += segment.cohort.count
    return dict(found)


def test_unlike_jobs_of_one_model_ride_together() -> None:
    """Jobs with different step counts, samplers and guidance share a batch."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(2, 3), "x", 0.0)
    scheduler.add(2, steps(1, 9), "x", 0.0)
    scheduler.add(3, steps(1, 1, guided=True), "x", 0.0)
    batch = scheduler.plan(0.0)
    assert riders(batch) == {1: 2, 2: 1, 3: 1}
    assert batch is not None
    assert batch.rows == 5


def test_a_job_joins_and_leaves_at_any_step() -> None:
    """A late short job rides along in the middle of a long one and leaves before it."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(1, 4), "x", 0.0)
    run(scheduler, scheduler.plan(0.0))
    scheduler.add(2, steps(1, 1), "x", 1.0)
    assert run(scheduler, scheduler.plan(1.0)) == [(1, 0, 1, False), (2, 0, 1, True)]
    assert riders(scheduler.plan(2.0)) == {1: 1}


def test_a_batch_is_never_held_back() -> None:
    """One waiting lane is enough for a batch."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, rows(1), "x", 0.0)
    assert riders(scheduler.plan(0.0)) == {1: 1}


def test_within_a_caller_first_come_first_served() -> None:
    """A caller's older job fills the batch before the younger rides."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(ROWS, 2), "x", 0.0)
    scheduler.add(2, steps(1, 1), "x", 0.0)
    for _ in range(2):
        batch = scheduler.plan(0.0)
        assert riders(batch) == {1: ROWS}
        run(scheduler, batch)
    assert riders(scheduler.plan(0.0)) == {2: 1}


def test_callers_share_a_batch_equally() -> None:
    """A flood from one caller leaves another its share, and unused shares are not wasted."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(1000, 50), "flood", 0.0)
    scheduler.add(2, steps(100, 50), "other", 0.0)
    batch = scheduler.plan(0.0)
    assert riders(batch) == {1: ROWS // 2, 2: ROWS // 2}
    run(scheduler, batch)
    scheduler.add(3, steps(1, 50), "small", 0.0)
    assert sorted(riders(scheduler.plan(0.0)).values()) == [1, 3, 4]


def test_more_callers_than_rows_take_turns() -> None:
    """With more callers than rows everybody is served equally over time, guided or not."""
    scheduler = Scheduler(ROWS)
    served: Counter[int] = Counter()
    for job in range(21):
        scheduler.add(job, steps(5, 1000, guided=job % 3 == 0), f"caller-{job}", 0.0)
    for _ in range(300):
        batch = scheduler.plan(0.0)
        assert batch is not None
        assert batch.rows in (ROWS - 1, ROWS)
        for segment in batch.segments:
            served[segment.entry.job_id] += segment.rows
        run(scheduler, batch)
    assert max(served.values()) - min(served.values()) <= 4


def test_time_away_gains_no_credit() -> None:
    """A caller that comes back does not displace those who kept working."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(ROWS, 1000), "steady", 0.0)
    for _ in range(50):
        run(scheduler, scheduler.plan(0.0))
    scheduler.add(2, steps(ROWS, 1000), "newcomer", 0.0)
    assert riders(scheduler.plan(0.0)) == {1: ROWS // 2, 2: ROWS // 2}


def test_graphs_share_the_device_by_time() -> None:
    """A slow graph and a fast one get equal seconds, not equal turns."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(1, 10_000, model="slow@1"), "x", 0.0)
    scheduler.add(2, steps(1, 10_000, model="fast@1"), "x", 0.0)
    seconds: Counter[str] = Counter()
    for _ in range(500):
        batch = scheduler.plan(0.0)
        assert batch is not None
        cost = 0.010 if batch.key[0] == "slow@1" else 0.001
        seconds[batch.key[0]] += cost
        run(scheduler, batch, cost)
    assert seconds["slow@1"] == pytest.approx(seconds["fast@1"], rel=0.05)


def test_a_paused_job_sits_out_and_comes_back() -> None:
    """A paused job rides in no batch; resumed, it goes on where it was."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(1, 2), "x", 0.0)
    run(scheduler, scheduler.plan(0.0))
    scheduler.pause(1, True)
    assert scheduler.plan(0.0) is None
    assert not scheduler.can_ride
    scheduler.pause(1, False)
    assert run(scheduler, scheduler.plan(0.0)) == [(1, 0, 1, True)]
    assert len(scheduler) == 0


def test_expiry_names_the_jobs_that_are_late() -> None:
    """Only jobs whose deadline has passed are named."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(1, 2), "x", 0.0, deadline_s=5.0)
    scheduler.add(2, steps(1, 2), "x", 0.0, deadline_s=3.0)
    scheduler.add(3, steps(1, 2), "x", 0.0)
    assert scheduler.next_deadline_s() == 3.0
    assert scheduler.expired(2.9) == []
    assert scheduler.expired(3.0) == [2]


def test_deadlines_of_finished_jobs_are_forgotten() -> None:
    """Far deadlines of jobs long gone take no memory, and those of jobs on the books are kept."""
    scheduler = Scheduler(ROWS)
    scheduler.add(0, steps(1, 1), "x", 0.0, deadline_s=7.0)
    for job in range(1, 5000):
        scheduler.add(job, steps(1, 1), "x", 0.0, deadline_s=1e12)
        scheduler.remove(job)
    assert len(scheduler._deadlines) < 1100
    assert scheduler.next_deadline_s() == 7.0
    assert scheduler.expired(8.0) == [0]


def test_removal_counts_what_was_wasted() -> None:
    """Evaluations of unfinished lanes are wasted; those of finished lanes are not."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(2 * ROWS, 3), "x", 0.0)
    for _ in range(3):
        run(scheduler, scheduler.plan(0.0))
    run(scheduler, scheduler.plan(0.0))
    assert scheduler.remove(1) == ROWS
    assert scheduler.plan(0.0) is None


def test_two_cohorts_that_finish_together_end_the_job_once() -> None:
    """Of segments of one job in one batch, only the final one is the last."""
    scheduler = Scheduler(4)
    scheduler.add(1, steps(4, 2), "x", 0.0)
    scheduler.add(2, steps(4, 2), "y", 0.0)
    lasts: Counter[int] = Counter()
    while (batch := scheduler.plan(0.0)) is not None:
        for arrival in scheduler.complete(batch, 1.0):
            lasts[arrival.segment.entry.job_id] += arrival.last
    assert lasts == {1: 1, 2: 1}


def test_a_batch_too_small_for_guidance_is_refused() -> None:
    """Guided lanes need two rows, so a scheduler of one row is refused."""
    with pytest.raises(ValueError, match="at least 2"):
        Scheduler(1)


class Machine(RuleBasedStateMachine):
    """Random submissions, cancels, pauses and batches against a plain model of what must come out."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(ROWS)
        self.jobs: dict[int, Job] = {}
        self.evaluated: dict[int, Counter[int]] = {}
        self.finished: dict[int, Counter[int]] = {}
        self.paused: set[int] = set()
        self.batch: Batch | None = None
        self.next_id = 0

    @rule(
        lanes=st.integers(1, 20),
        evaluations=st.integers(1, 6),
        guided=st.booleans(),
        caller=st.sampled_from("abc"),
        model=st.sampled_from(["a@1", "b@1"]),
        one_shot=st.booleans(),
    )
    def submit(self, lanes: int, evaluations: int, guided: bool, caller: str, model: str, one_shot: bool) -> None:
        job = rows(lanes, model=model) if one_shot else steps(lanes, evaluations, guided=guided, model=model)
        self.scheduler.add(self.next_id, job, caller, 0.0)
        self.jobs[self.next_id] = job
        self.evaluated[self.next_id] = Counter()
        self.finished[self.next_id] = Counter()
        self.next_id += 1

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.scheduler.remove(job_id)
        self.forget(job_id)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def pause_or_resume(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.paused ^= {job_id}
        self.scheduler.pause(job_id, job_id in self.paused)

    @rule()
    def ride(self) -> None:
        batch = self.scheduler.plan(0.0)
        able = set(self.jobs) - self.paused
        assert (batch is not None) == bool(able)
        if batch is None:
            return
        assert 1 <= batch.rows <= ROWS
        assert len({segment.entry.key for segment in batch.segments}) == 1
        demand = sum(
            self.jobs[j].rows_per_lane * sum(1 for lane in range(self.jobs[j].lane_count) if not self.finished[j][lane])
            for j in able
            if (self.jobs[j].model, isinstance(self.jobs[j], CallJob)) == (batch.key[0], batch.key[1] == DECODER)
        )
        assert batch.rows >= min(ROWS - 1, demand), "a row stayed empty while a lane could have ridden"
        for segment in batch.segments:
            assert segment.entry.job_id in able
            for lane in range(segment.cohort.start, segment.cohort.stop):
                assert self.evaluated[segment.entry.job_id][lane] == segment.cohort.position
                self.evaluated[segment.entry.job_id][lane] += 1
        for arrival in self.scheduler.complete(batch, 1.0):
            job_id, cohort = arrival.segment.entry.job_id, arrival.segment.cohort
            if arrival.done:
                self.finished[job_id].update(range(cohort.start, cohort.stop))
            if arrival.last:
                job = self.jobs[job_id]
                assert self.finished[job_id] == Counter(range(job.lane_count)), "each lane exactly once"
                assert set(self.evaluated[job_id].values()) == {job.evaluations_per_lane // job.rows_per_lane}
                self.scheduler.remove(job_id)
                self.forget(job_id)

    @rule()
    def finish_everything(self) -> None:
        for job_id in list(self.paused):
            self.scheduler.pause(job_id, False)
        self.paused.clear()
        while self.jobs:
            self.ride()

    @invariant()
    def books_agree(self) -> None:
        assert len(self.scheduler) == len(self.jobs)

    def forget(self, job_id: int) -> None:
        for book in (self.jobs, self.evaluated, self.finished):
            book.pop(job_id)
        self.paused.discard(job_id)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
