"""The scheduler, driven without a device: who rides, in what order, and that nothing is ever lost."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from latentd.v1 import bundle_pb2
from latentd_server import shares
from latentd_server.job import CallJob, Job, Start, StepJob
from latentd_server.priority import Priority
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


def steps(
    lanes: int,
    evaluations: int,
    *,
    guided: bool = False,
    interval: tuple[int, int] | None = None,
    model: str = "a@1",
) -> StepJob:
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
        guidance_interval=interval,
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


def flood(scheduler: Scheduler, batches: int, seconds: dict[str, float] | None = None) -> list[Batch]:
    """Run so many batches; they take a second, or what their model takes."""
    ran = []
    for _ in range(batches):
        batch = scheduler.plan(0.0)
        assert batch is not None
        ran.append(batch)
        run(scheduler, batch, (seconds or {}).get(batch.key[0], 1.0))
    return ran


def shared(batches: list[Batch], by: str) -> Counter[object]:
    """Rows by an attribute of their entries."""
    found: Counter[object] = Counter()
    for batch in batches:
        for segment in batch.segments:
            found[getattr(segment.entry, by)] += segment.rows
    return found


@pytest.mark.parametrize("guided", [False, True])
def test_callers_get_rows_by_their_weights(guided: bool) -> None:
    """Over time rows are as the weights, be they large, small or of a caller whose lanes take two rows."""
    scheduler = Scheduler(ROWS, {"half": 0.5, "triple": 3.0})
    for job, caller in enumerate(("half", "one", "triple")):
        scheduler.add(job, steps(ROWS, 5000, guided=guided and caller == "half"), caller, 0.0)
    found = shared(flood(scheduler, 450), "caller")
    assert sum(found.values()) == 450 * ROWS
    for caller, share in (("half", 400), ("one", 800), ("triple", 2400)):
        assert found[caller] == pytest.approx(share, abs=4)


def test_callers_that_divide_no_batch_evenly_are_even_over_time() -> None:
    """Three callers with eight rows differ by a row at most however long they go on."""
    scheduler = Scheduler(ROWS)
    for job in range(3):
        scheduler.add(job, steps(ROWS, 5000), f"caller-{job}", 0.0)
    found = shared(flood(scheduler, 500), "caller")
    assert max(found.values()) - min(found.values()) <= 1


def test_classes_share_the_rows_of_a_graph_by_weight() -> None:
    """HIGH, NORMAL and LOW get 16, 4 and 1 of 21 rows over time, however many callers each has."""
    scheduler = Scheduler(ROWS)
    for job, (priority, caller) in enumerate(
        [(Priority.HIGH, "a"), (Priority.NORMAL, "b"), (Priority.NORMAL, "c"), (Priority.LOW, "d"), (Priority.LOW, "a")]
    ):
        scheduler.add(job, steps(ROWS, 5000), caller, 0.0, priority=priority)
    found = shared(flood(scheduler, 630), "priority")
    for priority in Priority:
        assert found[priority] == pytest.approx(630 * ROWS * priority.weight / 21, abs=2)


def test_classes_share_the_device_by_time() -> None:
    """A class keeps its share of the seconds whatever graphs it uses and however slow they are; its graphs share it."""
    scheduler = Scheduler(ROWS)
    cost = {"a@1": 0.1, "b@1": 0.3, "c@1": 1.0}
    for job, (model, priority) in enumerate(
        [("a@1", Priority.HIGH), ("b@1", Priority.NORMAL), ("c@1", Priority.NORMAL)]
    ):
        scheduler.add(job, steps(1, 50_000, model=model), "x", 0.0, priority=priority)
    seconds: Counter[str] = Counter()
    for batch in flood(scheduler, 8000, cost):
        seconds[batch.key[0]] += cost[batch.key[0]]
    total = sum(seconds.values())
    assert seconds["a@1"] / total == pytest.approx(16 / 20, rel=0.02)
    assert seconds["b@1"] / total == pytest.approx(2 / 20, rel=0.05)
    assert seconds["c@1"] / total == pytest.approx(2 / 20, rel=0.05)


def test_idle_classes_give_their_share_away() -> None:
    """LOW alone has every batch, and HIGH with one lane takes one row of it."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(2 * ROWS, 5000), "x", 0.0, priority=Priority.LOW)
    assert riders(flood(scheduler, 1)[0]) == {1: ROWS}
    scheduler.add(2, steps(1, 5000), "x", 0.0, priority=Priority.HIGH)
    assert all(riders(batch) == {1: ROWS - 1, 2: 1} for batch in flood(scheduler, 100))


@pytest.mark.parametrize("same_graph", [True, False])
def test_nothing_lower_goes_before_what_just_came(same_graph: bool) -> None:
    """HIGH work leads the batch after it came, whatever LOW work had been doing, and on however many graphs."""
    scheduler = Scheduler(ROWS)
    for job in range(10):
        scheduler.add(job, steps(ROWS, 5000, model=f"m{job}@1"), f"caller-{job}", 0.0, priority=Priority.LOW)
    flood(scheduler, 137)
    scheduler.add(99, steps(ROWS, 50, model="m3@1" if same_graph else "other@1"), "new", 0.0, priority=Priority.HIGH)
    batch = scheduler.plan(0.0)
    assert riders(batch)[99] >= ROWS * 16 // 17


def test_debts_of_one_class_are_not_anothers() -> None:
    """LOW work that used much of a graph while nobody else wanted it does not hold HIGH work on that graph back."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(ROWS, 5000, model="a@1"), "x", 0.0, priority=Priority.LOW)
    scheduler.add(2, steps(ROWS, 5000, model="b@1"), "x", 0.0, priority=Priority.NORMAL)
    flood(scheduler, 50, {"a@1": 100.0, "b@1": 1.0})
    scheduler.add(3, steps(4, 50, model="a@1"), "x", 0.0, priority=Priority.HIGH)
    assert riders(scheduler.plan(0.0))[3] == 4


def test_a_pause_gains_no_credit() -> None:
    """A job that sat out for long shares with those who went on as before."""
    scheduler = Scheduler(ROWS)
    for job in (1, 2):
        scheduler.add(job, steps(ROWS, 5000), f"caller-{job}", 0.0)
    flood(scheduler, 10)
    scheduler.pause(1, True)
    flood(scheduler, 100)
    scheduler.pause(1, False)
    found = shared(flood(scheduler, 10), "job_id")
    assert found[1] == found[2]


def test_being_content_with_less_gains_no_credit() -> None:
    """A caller that wanted one row of every batch for long, and then all of them, gets its share and no more."""
    scheduler = Scheduler(ROWS)
    scheduler.add(1, steps(1, 5000), "modest", 0.0)
    scheduler.add(2, steps(ROWS, 5000), "greedy", 0.0)
    flood(scheduler, 200)
    scheduler.add(3, steps(ROWS, 5000), "modest", 0.0)
    found = shared(flood(scheduler, 10), "caller")
    assert abs(found["modest"] - found["greedy"]) <= 1


def test_a_lane_of_two_rows_is_not_passed_over_for_ever() -> None:
    """Where shares are one row each, a guided lane still gets its turn: before its caller's younger jobs, beside other
    callers, and in a class whose share of a batch is less than a row.
    """
    scheduler = Scheduler(4)
    for job in range(1, 40):
        scheduler.add(job, steps(50, 5000), f"caller-{job % 4}", 0.0)
    scheduler.add(40, steps(50, 5000, guided=True), "fifth", 0.0)
    scheduler.add(41, steps(50, 5000), "fifth", 0.0)
    scheduler.add(42, steps(50, 5000, guided=True), "sixth", 0.0, priority=Priority.LOW)
    scheduler.add(43, steps(50, 5000), "seventh", 0.0, priority=Priority.LOW)
    batches = flood(scheduler, 1700)
    assert all(batch.rows == 4 for batch in batches)
    callers = shared(batches, "caller")
    of_normal = 1700 * 4 * 4 / 5 / 5
    assert callers["fifth"] == pytest.approx(of_normal, rel=0.06)
    assert shared(batches, "job_id")[40] >= callers["fifth"] - 10, "the oldest job first"
    assert callers["sixth"] == pytest.approx(1700 * 4 / 5 / 2, rel=0.06)


def wait_bound(weights: list[float], mine: int, longest: float) -> float:
    """Seconds between two batches that a flow leads, at most: each other one may catch up with what it paid."""
    return sum(longest * (weight / weights[mine] + 1) for index, weight in enumerate(weights) if index != mine)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_nobody_waits_longer_than_the_bound(data: st.DataObject) -> None:
    """With graphs of any cost and any mix of classes, every flow leads a batch again within the bound its weight gives;
    and over time its seconds are as its weight.
    """
    priorities = data.draw(st.lists(st.sampled_from(list(Priority)), min_size=2, max_size=6))
    cost = {f"m{i}@1": data.draw(st.integers(1, 50)) / 10 for i in range(len(priorities))}
    scheduler = Scheduler(ROWS)
    for job, priority in enumerate(priorities):
        scheduler.add(job, steps(1, 5000, model=f"m{job}@1"), "x", 0.0, priority=priority)
    graphs = Counter(priorities)
    weights = [priority.weight / graphs[priority] for priority in priorities]
    now, last, used = 0.0, [0.0] * len(priorities), [0.0] * len(priorities)
    for batch in flood(scheduler, 2000, cost):
        job = batch.segments[0].entry.job_id
        assert now - last[job] <= wait_bound(weights, job, max(cost.values())) + 1e-6
        now += cost[batch.key[0]]
        last[job] = now
        used[job] += cost[batch.key[0]]
    for job, weight in enumerate(weights):
        assert used[job] / weight == pytest.approx(now / sum(weights), abs=2 * max(cost.values()) / min(weights))


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(1, 64),
    claims=st.lists(
        st.tuples(st.floats(0, 100), st.sampled_from([0.25, 1.0, 4.0, 16.0]), st.integers(1, 80)),
        min_size=1,
        max_size=8,
    ),
)
def test_a_division_gives_all_and_keeps_clocks_together(total: int, claims: list[tuple[float, float, int]]) -> None:
    """No row is lost, nobody gets more than it wants, and whoever gets a row was behind where one more row would
    put anybody who is left hungry.
    """
    asked = [shares.Claim(*claim) for claim in claims]
    given_rows = shares.divide(total, asked)
    assert sum(given_rows) == min(total, sum(claim.wanted for claim in asked))
    assert all(0 <= rows <= claim.wanted for rows, claim in zip(given_rows, asked, strict=True))
    hungry = [
        claim.served + (rows + 1) / claim.weight
        for rows, claim in zip(given_rows, asked, strict=True)
        if rows < claim.wanted
    ]
    for rows, claim in zip(given_rows, asked, strict=True):
        if rows and hungry:
            assert claim.served + (rows - 1) / claim.weight <= min(hungry) + 1e-6


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


def widened(rows_of_a_batch: int = 4 * ROWS) -> Scheduler:
    """A scheduler whose decoder of wide@1 has other batches than all other graphs."""
    scheduler = Scheduler(ROWS)
    scheduler.batch_rows.update({("wide@1", DECODER): rows_of_a_batch})
    return scheduler


def test_a_graph_may_have_other_batches_than_the_rest() -> None:
    """More rows or fewer: those of its model's other graphs, and of other models', are the usual ones."""
    for most in (4 * ROWS, ROWS // 2):
        scheduler = widened(most)
        scheduler.add(1, rows(500, model="wide@1"), "x", 0.0)
        scheduler.add(2, rows(500, model="usual@1"), "x", 0.0)
        scheduler.add(3, steps(500, 2, model="wide@1"), "x", 0.0)
        found = {(batch.key[0], batch.key[1] == DECODER, batch.rows) for batch in flood(scheduler, 9)}
        assert found == {("wide@1", True, most), ("usual@1", True, ROWS), ("wide@1", False, ROWS)}


def test_a_wide_batch_is_not_waited_for() -> None:
    """What there is rides, be it less than the usual batch or more, and all of it at once."""
    for count in (1, ROWS + 1, 4 * ROWS - 1):
        scheduler = widened()
        scheduler.add(1, rows(count, model="wide@1"), "x", 0.0)
        assert run(scheduler, scheduler.plan(0.0)) == [(1, 0, count, True)]


@pytest.mark.parametrize("priorities", [list(Priority)[:1], list(Priority)[:2], list(Priority)], ids=len)
@pytest.mark.parametrize("callers", [1, 2, 5])
def test_a_wide_batch_is_shared_as_any_other(priorities: list[Priority], callers: int) -> None:
    """Classes get its rows by their weights and callers equally, and together they fill it."""
    scheduler = widened()
    for priority in priorities:
        for caller in range(callers):
            job = len(scheduler)
            scheduler.add(job, rows(10_000, model="wide@1"), f"{priority}-{caller}", 0.0, priority=priority)
    batches = flood(scheduler, 21)
    assert {batch.rows for batch in batches} == {4 * ROWS}
    found = shared(batches, "priority")
    weights = sum(priority.weight for priority in priorities)
    for priority in priorities:
        assert found[priority] == pytest.approx(21 * 4 * ROWS * priority.weight / weights, abs=2)
    each = shared(batches, "caller")
    assert len(each) == len(priorities) * callers
    for priority in priorities:
        of_class = [each[f"{priority}-{caller}"] for caller in range(callers)]
        assert max(of_class) - min(of_class) <= 1


@pytest.mark.parametrize("by", ["priority", "caller"])
def test_who_rode_where_there_was_room_for_all_owes_nothing(by: str) -> None:
    """More rows than the usual batch has, taken from a wider one that was not full, are no debt to anybody."""
    scheduler = widened()
    many, few = (Priority.LOW, Priority.NORMAL) if by == "priority" else (Priority.NORMAL, Priority.NORMAL)
    for job in range(10):
        scheduler.add(2 * job, rows(5 * ROWS // 2, model="wide@1"), "many", 0.0, priority=many)
        scheduler.add(2 * job + 1, rows(1, model="wide@1"), "few", 0.0, priority=few)
        assert flood(scheduler, 1)[0].rows == 5 * ROWS // 2 + 1
    scheduler.add(98, rows(500, model="wide@1"), "many", 0.0, priority=many)
    scheduler.add(99, rows(500, model="wide@1"), "few", 0.0, priority=few)
    share = 4 * ROWS * many.weight / (many.weight + few.weight)
    assert riders(scheduler.plan(0.0))[98] == pytest.approx(share, abs=1)


def test_a_model_that_is_forgotten_has_the_usual_batches_again() -> None:
    """All its graphs, at whatever size of samples, and no other model's."""
    scheduler = widened()
    sized = ("wide@1", bundle_pb2.Network.ROLE_ENCODER, (4, 4))
    scheduler.batch_rows.update({("wide@10", DECODER): 3 * ROWS, sized: 2 * ROWS})
    scheduler.batch_rows.forget("wide@1")
    for job, model in enumerate(("wide@1", "wide@10")):
        scheduler.add(job, rows(500, model=model), "x", 0.0)
    assert {(batch.key[0], batch.rows) for batch in flood(scheduler, 4)} == {("wide@1", ROWS), ("wide@10", 3 * ROWS)}
    assert scheduler.batch_rows.of(sized) == ROWS
    scheduler.batch_rows.update({("wide@1", DECODER): 2 * ROWS})
    assert {(batch.key[0], batch.rows) for batch in flood(scheduler, 4)} == {
        ("wide@1", 2 * ROWS),
        ("wide@10", 3 * ROWS),
    }


def test_a_lane_takes_two_rows_inside_its_guidance_interval_only() -> None:
    """What rides, what it costs and what leaving wastes is counted step by step."""
    scheduler = Scheduler(ROWS)
    job = steps(3, 4, guided=True, interval=(1, 2))  # of the timesteps 3, 2, 1, 0
    scheduler.add(1, job, "x", 0.0)
    batches = [scheduler.plan(0.0)]
    for _ in range(3):
        run(scheduler, batches[-1])
        batches.append(scheduler.plan(0.0))
    assert [batch.rows for batch in batches if batch] == [3, 6, 6, 3]
    assert job.evaluations_per_lane == 1 + 2 + 2 + 1
    assert all(segment.cohort.cost.evaluations == 5 for segment in batches[-1].segments if batches[-1])
    scheduler.call_off(batches[-1])
    assert scheduler.remove(1) == 3 * 5


def test_guided_lanes_that_leave_their_interval_make_room() -> None:
    """As many lanes ride as fit at the rows that each takes now: a guided one beside one that is not any more."""
    scheduler = Scheduler(4)
    scheduler.add(1, steps(6, 2, guided=True, interval=(1, 1)), "x", 0.0)
    ridden = [[segment.rows_per_lane for segment in batch.segments] for batch in flood(scheduler, 6)]
    assert ridden == [[2], [1, 2], [1, 2], [1, 2], [1, 2], [1]]
    assert len(scheduler) == 0


def rows_at(job: Job, evaluation: int) -> int:
    """Rows a lane takes at this evaluation."""
    if not isinstance(job, StepJob) or job.guidance_scale == 1:
        return 1
    low, high = job.guidance_interval or (0, 10**9)
    return 2 if low <= int(job.tables[0].timesteps[evaluation]) <= high else 1


def evaluation_count(job: Job) -> int:
    """Evaluations of a lane that follow one another."""
    return len(job.tables[0].timesteps) if isinstance(job, StepJob) else 1


class Machine(RuleBasedStateMachine):
    """Random submissions, cancels, pauses and batches against a plain model of what must come out."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(ROWS, {"b": 3.0, "c": 0.25})
        self.scheduler.batch_rows.update({("b@1", DECODER): 3 * ROWS})
        self.jobs: dict[int, Job] = {}
        self.lines: dict[int, tuple[str, Priority, str, bool]] = {}  # within one of these, first come first served
        self.evaluated: dict[int, Counter[int]] = {}
        self.finished: dict[int, Counter[int]] = {}
        self.paused: set[int] = set()
        self.batch: Batch | None = None
        self.next_id = 0

    @rule(
        lanes=st.integers(1, 20),
        evaluations=st.integers(1, 6),
        guided=st.booleans(),
        interval=st.none() | st.tuples(st.integers(0, 4), st.integers(0, 5)),
        caller=st.sampled_from("abc"),
        model=st.sampled_from(["a@1", "b@1"]),
        one_shot=st.booleans(),
        priority=st.sampled_from(Priority),
    )
    def submit(
        self,
        lanes: int,
        evaluations: int,
        guided: bool,
        interval: tuple[int, int] | None,
        caller: str,
        model: str,
        one_shot: bool,
        priority: Priority,
    ) -> None:
        walk = steps(lanes, evaluations, guided=guided, interval=interval, model=model)
        job = rows(lanes, model=model) if one_shot else walk
        self.scheduler.add(self.next_id, job, caller, 0.0, priority=priority)
        self.lines[self.next_id] = (caller, priority, job.model, one_shot)
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
        most = 3 * ROWS if batch.key == ("b@1", DECODER) else ROWS
        assert 1 <= batch.rows <= most
        assert len({segment.entry.key for segment in batch.segments}) == 1
        demand = sum(
            rows_at(self.jobs[j], self.evaluated[j][lane])
            for j in able
            for lane in range(self.jobs[j].lane_count)
            if not self.finished[j][lane]
            if (self.jobs[j].model, isinstance(self.jobs[j], CallJob)) == (batch.key[0], batch.key[1] == DECODER)
        )
        assert batch.rows >= min(most - 1, demand), "a row stayed empty while a lane could have ridden"
        self.check_order(batch, able)
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
                assert set(self.evaluated[job_id].values()) == {evaluation_count(job)}
                self.scheduler.remove(job_id)
                self.forget(job_id)

    def check_order(self, batch: Batch, able: set[int]) -> None:
        """A job's lane stays behind only if no younger job of its line rides, but into the row that a lane of two rows
        leaves free.
        """
        taken = riders(batch)
        for older in able:
            lanes = sum(1 for lane in range(self.jobs[older].lane_count) if not self.finished[older][lane])
            if taken.get(older, 0) == lanes:
                continue
            younger = sum(
                segment.rows
                for segment in batch.segments
                if segment.entry.job_id > older and self.lines[segment.entry.job_id] == self.lines[older]
            )
            assert younger < self.jobs[older].rows_per_lane, "first come, first served"

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
        for book in (self.jobs, self.lines, self.evaluated, self.finished):
            book.pop(job_id)
        self.paused.discard(job_id)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_job_that_comes_back_from_a_pause_has_its_place_again() -> None:
    """First come, first served within a caller, whoever sat out meanwhile; the paused are passed over."""
    scheduler = Scheduler(2)
    for job_id in (1, 2, 3):
        scheduler.add(job_id, steps(2, 3), "a", 0.0)
    scheduler.pause(1, True)
    scheduler.pause(1, True)
    first = scheduler.plan(0.0)
    assert first is not None
    assert [segment.entry.job_id for segment in first.segments] == [2]
    scheduler.pause(1, False)
    scheduler.complete(first, 1.0)
    second = scheduler.plan(0.0)
    assert second is not None
    assert [segment.entry.job_id for segment in second.segments] == [1]
    scheduler.pause(3, True)
    scheduler.remove(3)
    assert len(scheduler) == 2
