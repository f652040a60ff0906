"""The door: what is counted, who is refused and what they are told. By plain calls; no clock, no device."""

import numpy as np
import pytest
from latentd.v1 import bundle_pb2
from latentd_server.admission import Admission, Bounds, Work
from latentd_server.failures import DeadlineUnreachableError, OverloadedError, QuotaExceededError
from latentd_server.job import CallJob, Job, Start, StepJob
from latentd_server.priority import Priority
from latentd_server.samplers import COLUMNS, Table
from latentd_server.scheduler import Scheduler
from latentd_server.step_costs import DrainRates, Margin, StepCosts

ROWS = 8


def steps(
    count: int,
    lanes: int = 1,
    *,
    model: str = "a@1",
    guided: bool = False,
    interval: tuple[int, int] | None = None,
) -> StepJob:
    """A diffusion job."""
    table = Table(
        np.arange(count), np.zeros((count, len(COLUMNS)), np.float32), np.arange(count, dtype=np.int32), count
    )
    indices = np.arange(lanes)
    scale = 2.0 if guided else 1.0
    return StepJob(
        model, lanes, (table,), Start(1.0), 0, indices, indices, guidance_scale=scale, guidance_interval=interval
    )


def decode(rows: int, *, model: str = "vae@1") -> CallJob:
    """A one-shot job."""
    indices = np.arange(rows)
    return CallJob(model, bundle_pb2.Network.ROLE_DECODER, rows, {}, ("sample",), 0, indices, indices)


class Server:
    """The real scheduler and the real door; a call takes a second for every row or what it is told."""

    def __init__(self, bounds: Bounds | None = None, weights: dict[str, float] | None = None) -> None:
        self.admission = Admission(bounds or Bounds(10**9, 10**9, 10**9), ROWS, weights)
        self.scheduler = Scheduler(ROWS, weights)
        self.now_s = 0.0
        self.jobs = 0

    def submit(
        self, job: Job, caller: str = "x", *, within_s: float | None = None, priority: Priority = Priority.NORMAL
    ) -> int:
        """Ask for a job."""
        self.jobs += 1
        deadline_s = None if within_s is None else self.now_s + within_s
        self.admission.admit(self.jobs, job, caller, priority, self.now_s, deadline_s)
        self.scheduler.add(self.jobs, job, caller, self.now_s, deadline_s, priority)
        return self.jobs

    def run(self, batches: int = 10**9, seconds: float = 1.0) -> None:
        """Run so many batches, or all."""
        while batches and (batch := self.scheduler.plan(self.now_s)) is not None:
            batches -= 1
            self.now_s += seconds
            arrivals = self.scheduler.complete(batch, seconds)
            self.admission.ran(batch, arrivals, batch.rows, seconds, self.now_s)
            for arrival in arrivals:
                if arrival.last:
                    self.drop(arrival.segment.entry.job_id, done=True)

    def drop(self, job_id: int, *, done: bool = False) -> None:
        """Give a job up, or forget it."""
        self.admission.ended(job_id, self.now_s, done=done)
        self.scheduler.remove(job_id)


def test_work_is_counted_in_evaluations() -> None:
    """Lanes by steps by rows; what was run or given up counts no more, and at rest nothing does."""
    server = Server()
    server.submit(steps(10, lanes=3))
    guided = server.submit(steps(5, lanes=2, guided=True), "y")
    server.submit(decode(7))
    assert server.admission.backlog == 30 + 20 + 7
    server.run(1)
    assert server.admission.backlog in (57 - 7, 57 - 3 - 4)
    server.drop(guided)
    server.run()
    assert server.admission.backlog == 0
    assert not server.admission._flows
    assert not server.admission._by_caller
    assert not server.admission._by_model


def test_steps_outside_a_guidance_interval_count_once() -> None:
    """The door and its estimate go by the rows that each step takes, and at rest nothing is left on any book."""
    server = Server()
    server.submit(steps(10, lanes=3, guided=True, interval=(4, 6)))
    assert server.admission.backlog == 3 * (7 + 2 * 3)
    server.run(4)
    assert server.admission.backlog == 3 * (13 - 4)
    server.run()
    assert server.admission.backlog == 0
    assert not server.admission._flows
    guided, apart, plain = steps(100, guided=True), steps(100, guided=True, interval=(0, 49)), steps(100)
    fitted = [job.evaluations_per_lane for job in (guided, apart, plain)]
    assert fitted == [200, 150, 100]
    many = [steps(100, 20, guided=True, interval=interval) for interval in (None, (0, 49), (101, 102))]
    estimates = [server.admission.estimate_s(job, "x", Priority.NORMAL, server.now_s) for job in many]
    assert estimates[0] > estimates[1] > estimates[2]


def test_a_job_given_up_while_it_rides_is_counted_once() -> None:
    """The batch that comes back for a job that is gone changes nothing."""
    server = Server()
    job = server.submit(steps(10, lanes=2))
    server.submit(steps(10))
    batch = server.scheduler.plan(0.0)
    assert batch is not None
    server.admission.ended(job, server.now_s, done=False)
    assert server.admission.backlog == 10
    server.admission.ran(batch, server.scheduler.complete(batch, 1.0), 3, 1.0, 1.0)
    assert server.admission.backlog == 9


@pytest.mark.parametrize(
    ("bounds", "error"),
    [
        (Bounds(100, 10**9, 10**9), OverloadedError),
        (Bounds(10**9, 100, 10**9), OverloadedError),
        (Bounds(10**9, 10**9, 100), QuotaExceededError),
    ],
    ids=["server", "model", "caller"],
)
def test_each_bound_refuses_the_evaluation_too_much(bounds: Bounds, error: type[Exception]) -> None:
    """The hundredth is let in, the next is not, and after one was run there is room for one."""
    server = Server(bounds)
    server.submit(steps(99))
    server.submit(steps(1))
    with pytest.raises(error, match="100"):
        server.submit(steps(1))
    server.run(1)
    server.submit(steps(2))
    with pytest.raises(error):
        server.submit(steps(1))


@pytest.mark.parametrize(
    ("bounds", "error"),
    [
        (Bounds(10, 99, 99), OverloadedError),
        (Bounds(99, 10, 99), OverloadedError),
        (Bounds(99, 99, 10), QuotaExceededError),
    ],
)
def test_what_has_no_room_is_refused_before_it_is_understood(bounds: Bounds, error: type[Exception]) -> None:
    """As the same work would be by `admit`; what there is room for passes, and nothing is booked."""
    server = Server(bounds)
    server.admission.check_room("vae@1", "x", 99, 0.0)
    server.submit(decode(8))
    server.admission.check_room("vae@1", "x", 2, 0.0)
    with pytest.raises(error):
        server.admission.check_room("vae@1", "x", 3, 0.0)
    assert server.admission.backlog == 8


def test_lanes_that_keep_state_have_room_of_their_own() -> None:
    """Those of one step keep none; what is done or given up leaves its room; the hint is when there will be some."""
    server = Server()
    key = ("a@1", bundle_pb2.Network.ROLE_DENOISER)
    server.admission.limit_state(key, 10)
    first = server.submit(steps(4, lanes=8), "x")
    server.run(1)
    server.submit(steps(1, lanes=50), "y")
    server.submit(steps(4, lanes=50, model="b@1"), "y")
    with pytest.raises(OverloadedError, match=r"holds 8 samples under way, .* of at most 10") as refused:
        server.submit(steps(4, lanes=3), "y")
    assert 0 < refused.value.retry_after_s < 30
    server.drop(server.submit(steps(4, lanes=2), "y"))
    server.drop(first)
    server.submit(steps(4, lanes=10), "y")
    server.run()
    server.submit(steps(4, lanes=99), "y")  # alone there is always room: it was made for the largest request
    server.run()
    server.admission.forget_terms("a@1")
    server.submit(steps(4, lanes=8))
    server.submit(steps(4, lanes=8))


def test_bounds_are_of_their_own_model_and_caller() -> None:
    """A model or a caller at its bound keeps no other out."""
    server = Server(Bounds(10**9, 100, 60))
    server.submit(steps(60), "x")
    with pytest.raises(QuotaExceededError) as quota:
        server.submit(steps(1, model="b@1"), "x")
    assert quota.value.subject == "caller:x"
    server.submit(steps(40), "y")
    with pytest.raises(OverloadedError, match="a@1"):
        server.submit(steps(1), "z")
    server.submit(steps(60, model="b@1"), "z")


def test_who_has_nothing_outstanding_may_bring_anything() -> None:
    """One job larger than every bound is let in where there is no other, or nobody could ever run it."""
    server = Server(Bounds(10, 10, 10))
    server.submit(steps(50))
    with pytest.raises(QuotaExceededError):
        server.submit(steps(1))
    server.run()
    server.submit(steps(50))


def test_a_hint_says_when_there_will_be_room() -> None:
    """By the measured rate, each after those who were told before; and what was promised passes with time."""
    server = Server(Bounds(160, 10**9, 10**9))
    server.submit(steps(20, lanes=8))
    server.run(5, seconds=0.5)  # 16 evaluations a second
    hints = []
    for _ in range(3):
        server.submit(steps(40)) if not hints else None
        with pytest.raises(OverloadedError) as caught:
            server.submit(steps(16))
        hints.append(caught.value.retry_after_s)
    assert hints == pytest.approx([1.0, 2.0, 3.0])
    server.now_s += 3.0
    with pytest.raises(OverloadedError) as caught:
        server.submit(steps(16))
    assert caught.value.retry_after_s == pytest.approx(1.0)


def test_a_hint_without_a_measurement_is_a_second_and_none_is_over_half_a_minute() -> None:
    """Nobody is sent away for longer than a client would wait."""
    server = Server(Bounds(10, 10**9, 10**9))
    server.submit(steps(1000))
    with pytest.raises(OverloadedError) as caught:
        server.submit(steps(1))
    assert caught.value.retry_after_s == 1.0
    server.run(2, seconds=1.0)
    with pytest.raises(OverloadedError) as caught:
        server.submit(steps(1))
    assert caught.value.retry_after_s == 30.0


def measured(**arguments: dict[str, float]) -> Server:
    """A server that has timed calls of one row and of eight at a second each."""
    server = Server(**arguments)  # type: ignore[arg-type]
    for lanes in (1, ROWS):
        server.submit(steps(3, lanes=lanes))
        server.run()
    return server


def test_a_deadline_that_is_past_is_refused() -> None:
    """Whatever is known of the model."""
    with pytest.raises(DeadlineUnreachableError, match="passed"):
        Server().submit(steps(1), within_s=0.0)


def test_what_takes_longer_even_alone_is_refused_with_an_estimate() -> None:
    """Steps follow one another, and so do the batches of more lanes than rows."""
    server = measured()
    server.submit(steps(50), within_s=50.5)
    server.run()
    with pytest.raises(DeadlineUnreachableError, match="50 evaluations one after another") as caught:
        server.submit(steps(50), within_s=49.0)
    assert caught.value.estimate_s == pytest.approx(50.0, rel=0.02)
    with pytest.raises(DeadlineUnreachableError) as caught:
        server.submit(steps(10, lanes=4 * ROWS), within_s=39.0)
    assert caught.value.estimate_s == pytest.approx(40.0, rel=0.02)


def test_a_measurement_that_is_old_or_alone_refuses_nobody() -> None:
    """After five seconds without a call, and after a first call that may have been slow for any reason."""
    server = measured()
    server.now_s += 5.0
    server.submit(steps(50), within_s=1.0)
    fresh = Server()
    fresh.submit(steps(1))
    fresh.run(seconds=100.0)
    fresh.submit(steps(2), within_s=1.0)


def test_nobody_is_refused_for_others_while_there_is_a_seat() -> None:
    """Seven long lanes leave the eighth row to a short one with hardly more time than it needs."""
    server = measured()
    server.submit(steps(1000, lanes=ROWS - 1), "heavy")
    server.submit(steps(10), "light", within_s=10.5)
    server.run(10)
    assert server.scheduler.expired(server.now_s) == []


def test_ones_own_queue_counts_and_that_of_others_only_by_its_share() -> None:
    """Behind ninety lanes of its own a job waits for all of them; behind ninety of another it shares the batch."""
    server = measured()
    server.submit(steps(10, lanes=90), "heavy")
    with pytest.raises(DeadlineUnreachableError) as caught:
        server.submit(steps(10), "heavy", within_s=50.0)
    assert caught.value.estimate_s == pytest.approx(115, rel=0.15)
    server.submit(steps(10), "light", within_s=13.0)


@pytest.mark.parametrize(("weight", "seconds"), [(1.0, 20.0), (3.0, 40.0 / 3)])
def test_an_estimate_knows_weights(weight: float, seconds: float) -> None:
    """Eight lanes beside another's eight ride by their share of the rows."""
    server = measured(weights={"mine": weight})
    server.submit(steps(1000, lanes=ROWS), "other")
    estimate_s = server.admission.estimate_s(steps(10, lanes=ROWS), "mine", Priority.NORMAL, server.now_s)
    assert estimate_s == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize(
    ("priority", "seconds"), [(Priority.HIGH, 12.5), (Priority.NORMAL, 20.0), (Priority.LOW, 50.0)]
)
@pytest.mark.parametrize("same_graph", [True, False])
def test_an_estimate_knows_classes(priority: Priority, seconds: float, same_graph: bool) -> None:
    """Beside NORMAL work on the same graph or another, a job takes as much longer as its class has less."""
    server = measured()
    server.submit(steps(3, lanes=ROWS, model="b@1"))
    server.run()
    server.submit(steps(1000, lanes=ROWS, model="a@1" if same_graph else "b@1"), "other")
    estimate_s = server.admission.estimate_s(steps(10, lanes=ROWS), "mine", priority, server.now_s)
    assert estimate_s == pytest.approx(seconds, rel=0.05)


def test_a_paused_job_keeps_nobody_waiting() -> None:
    """Its work stays outstanding, but no estimate counts it until it rides again."""
    server = measured()
    job = server.submit(steps(100, lanes=50), "slow")
    asked = steps(10, lanes=ROWS), "x", Priority.NORMAL, server.now_s
    before_s = server.admission.estimate_s(*asked)
    server.admission.pause(job, True)
    server.admission.pause(job, True)
    assert server.admission.estimate_s(*asked) == pytest.approx(10.0, rel=0.02)
    assert server.admission.backlog == 5000
    server.admission.pause(job, False)
    assert server.admission.estimate_s(*asked) == before_s
    server.admission.pause(job, True)
    server.admission.ended(job, server.now_s, done=False)
    assert server.admission.backlog == 0


def test_what_cannot_be_in_time_is_refused_before_it_is_read() -> None:
    """By the least it may take, as the job itself would be; only while deadlines are refused at all."""
    server = measured()
    server.submit(steps(1000, lanes=ROWS), "other")
    assert not server.admission.is_pressed(server.now_s)
    with pytest.raises(DeadlineUnreachableError) as late:
        server.submit(steps(10, lanes=ROWS), within_s=15.0)
    assert server.admission.is_pressed(server.now_s)
    least = Work.of(steps(10, lanes=ROWS))
    asked = "x", Priority.NORMAL, server.now_s
    with pytest.raises(DeadlineUnreachableError) as unread:
        server.admission.check_time(least, *asked, server.now_s + 15.0)
    assert str(unread.value) == str(late.value)
    server.admission.check_time(least, *asked, server.now_s + 25.0)
    server.admission.check_time(least._replace(steps=1, evaluations=ROWS), *asked, server.now_s + 15.0)
    assert not server.admission.is_pressed(server.now_s + 2.0)


def test_the_margin_is_a_quantile() -> None:
    """Of jobs that take a random multiple of what was foreseen, two in a hundred take longer than with the margin."""
    ratios = np.random.default_rng(0).lognormal(0.0, 0.15, 20_000)
    margin, late, seen = Margin(), [], []
    for now_s, ratio in enumerate(ratios):
        late.append(bool(ratio > margin.read(now_s / 50)))
        margin.saw(now_s / 50, late=late[-1])
        seen.append(margin.value)
    assert np.mean(late[2000:]) == pytest.approx(0.025, abs=0.01)
    assert np.mean(seen[2000:]) == pytest.approx(np.quantile(ratios, 0.98), rel=0.05)


def test_the_margin_is_bounded_and_forgotten() -> None:
    """Jobs that one stall made late count as one; nobody is kept out for long by what was once late."""
    margin = Margin()
    for _ in range(1000):
        margin.saw(5.0, late=True)
    assert 1.1 < margin.value < 1.2
    for second in range(1000):
        margin.saw(6.0 + second, late=True)
    assert margin.value == 2.0
    assert margin.read(1005.0 + 60.0) < 1.2
    for _ in range(1000):
        margin.saw(1006.0, late=False)
    assert margin.value == 1.05


@pytest.mark.parametrize(
    ("beyond_s", "done", "paused", "learnt"),
    [
        (1e3, True, False, 1),
        (1e3, False, False, 1),
        (-0.01, False, False, 1),  # of what was foreseen: cancelled by its caller, for whom the deadline passes sooner
        (-0.01, True, False, -1),
        (-50.0, False, False, 0),
        (1e3, True, True, 0),
    ],
)
def test_the_door_learns_from_what_came_of_its_estimates(
    beyond_s: float, done: bool, paused: bool, learnt: int
) -> None:
    """Late work widens the margin, work in time narrows it; what was given up early or sat out says nothing."""
    server = measured()
    server.submit(steps(50, lanes=ROWS), "other")
    job = server.submit(steps(10, lanes=ROWS), within_s=200.0)
    before, foreseen_s = server.admission._margin.value, server.admission._tickets[job].foreseen_s
    assert foreseen_s is not None
    if paused:
        server.admission.pause(job, True)
        server.admission.pause(job, False)
    server.now_s += foreseen_s + beyond_s
    server.drop(job, done=done)
    assert np.sign(server.admission._margin.value - before) == learnt


def test_callers_that_are_paused_stand_for_nobody() -> None:
    """Nor does their class or their graph take a share of the device: an estimate is as if they were not there."""
    asked = steps(10, lanes=ROWS), "x", Priority.NORMAL
    server = measured()
    server.submit(steps(100, lanes=50), "busy")
    server.submit(decode(64, model="b@1"), "busy")
    sleepers = [server.submit(steps(50, lanes=3), f"sleeper-{i}", priority=list(Priority)[i % 3]) for i in range(600)]
    sleepers += [server.submit(decode(9, model=f"{i}@1"), "sleeper") for i in range(9)]
    for job in sleepers:
        server.admission.pause(job, True)
    paused_s = server.admission.estimate_s(*asked, server.now_s)
    for job in sleepers:
        server.drop(job)
    assert paused_s == server.admission.estimate_s(*asked, server.now_s)


def test_a_model_that_is_unloaded_is_forgotten() -> None:
    """What its graphs cost refuses nobody when it comes back."""
    server = measured()
    server.admission.forget_costs("a@1")
    server.submit(steps(50), within_s=1.0)


DECODES = ("vae@1", bundle_pb2.Network.ROLE_DECODER)


def decoding(wide: bool, *, calls: int = 3) -> Server:
    """A server whose decoder may have four times the usual rows, or not, and that has timed full calls of it: a second
    each, whatever they hold, and half of that where they are wide and hold no more than usual.
    """
    server = Server()
    if wide:
        widen(server, DECODES)
        for _ in range(calls):
            server.submit(decode(ROWS))
            server.run(seconds=0.5)
    for _ in range(calls):
        server.submit(decode(4 * ROWS))
        server.run()
    return server


def widen(server: Server, key: tuple[str, bundle_pb2.Network.Role.ValueType]) -> None:
    """As the engine does when it takes over a graph."""
    for books in (server.admission, server.scheduler):
        books.batch_rows.update({key: 4 * ROWS})


@pytest.mark.parametrize(("wide", "calls"), [(True, 1), (False, 4)])
def test_an_estimate_counts_the_calls_of_a_graphs_own_width(wide: bool, calls: int) -> None:
    """Rows that fit into one call take one, alone and at the deadline: a little less time is refused, more is not."""
    server = decoding(wide)
    job = decode(4 * ROWS)
    assert server.admission.estimate_s(job, "x", Priority.NORMAL, server.now_s) == pytest.approx(calls, rel=0.02)
    with pytest.raises(DeadlineUnreachableError, match=f"^{calls} evaluations one after another") as caught:
        server.submit(job, within_s=0.95 * calls)
    assert caught.value.estimate_s == pytest.approx(calls, rel=0.02)
    with pytest.raises(DeadlineUnreachableError, match=f"^{2 * calls} evaluations one after another"):
        server.submit(decode(7 * ROWS + 1), within_s=1.9 * calls)
    if not wide:  # calls of its own follow one another, so others may come between them
        with pytest.raises(DeadlineUnreachableError, match="among the work of others"):
            server.submit(job, within_s=1.05 * calls)
    server.submit(job, within_s=1.05 if wide else 1.2 * calls)
    server.run()
    assert server.scheduler.expired(server.now_s) == []


@pytest.mark.parametrize("wide", [True, False])
def test_an_estimate_beside_others_counts_seats_of_a_graphs_own_width(wide: bool) -> None:
    """Of another's flood a job gets half of every batch, however wide; and its own queue goes before it."""
    server = decoding(wide)
    call = 4 * ROWS if wide else ROWS
    server.submit(decode(100 * call), "other")
    asked = "mine", Priority.NORMAL, server.now_s
    assert server.admission.estimate_s(decode(5 * call), *asked) == pytest.approx(10.0, rel=0.05)
    server.submit(decode(5 * call), "mine")
    assert server.admission.estimate_s(decode(5 * call), *asked) == pytest.approx(20.0, rel=0.05)


@pytest.mark.parametrize("wide", [True, False])
def test_an_estimate_beside_little_work_counts_calls_of_a_graphs_own_width(wide: bool) -> None:
    """Beside two calls' worth of another's, and with nobody else to come, five calls' worth is done after seven."""
    server = decoding(wide)
    call = 4 * ROWS if wide else ROWS
    server.submit(decode(2 * call), "other")
    server.now_s += 60.0
    estimate_s = server.admission.estimate_s(decode(5 * call), "mine", Priority.NORMAL, server.now_s)
    assert estimate_s == pytest.approx(7.0, rel=0.05)


def test_work_of_a_wide_graph_beside_another_takes_its_few_calls() -> None:
    """Ten calls of one graph keep a walk on another waiting for ten seconds, not for those of forty usual batches; and
    the walk's own calls are as wide as usual.
    """
    server = decoding(True)
    server.submit(steps(3, lanes=ROWS))
    server.run()
    server.submit(decode(40 * ROWS), "other")
    for lanes, seconds in ((ROWS, 60.0), (2 * ROWS, 110.0)):
        estimate_s = server.admission.estimate_s(steps(50, lanes=lanes), "x", Priority.NORMAL, server.now_s)
        assert estimate_s == pytest.approx(seconds, rel=0.05)


def test_the_width_of_a_model_that_is_unloaded_is_forgotten() -> None:
    """What is loaded under its name afterwards is foreseen with the usual rows; other models keep theirs."""
    server = decoding(True)
    widen(server, ("vae@10", bundle_pb2.Network.ROLE_DECODER))
    server.admission.forget_terms("vae@1")
    server.admission.forget_costs("vae@1")
    server.scheduler.batch_rows.forget("vae@1")
    for model, calls in (("vae@1", 4), ("vae@10", 1)):
        for _ in range(3):
            server.submit(decode(4 * ROWS, model=model))
            server.run()
        estimate_s = server.admission.estimate_s(decode(4 * ROWS, model=model), "x", Priority.NORMAL, server.now_s)
        assert estimate_s == pytest.approx(calls, rel=0.02)


def test_costs_follow_the_rows() -> None:
    """Sizes not met lie between those that were; bounds hold for fewer rows and for more."""
    costs = StepCosts()
    for seconds in (1.0, 1.0, 1.0):
        costs.timed(1, seconds, 0.0)
        costs.timed(9, 5 * seconds, 0.0)
    assert costs.typical(1) == 1.0
    assert costs.typical(5) == pytest.approx(3.0)
    assert costs.typical(18) == pytest.approx(10.0)
    assert costs.least(9, 1.0) == pytest.approx(5.0)
    assert costs.least(3, 1.0) == pytest.approx(5 / 3)
    assert costs.least(1, 1.0) == pytest.approx(1.0)
    assert costs.least(1, 5.0) == 0.0


def test_one_slow_call_moves_a_mean_little() -> None:
    """It counts as twice the mean at most; a cost that stays is learned."""
    costs = StepCosts()
    for _ in range(50):
        costs.timed(4, 1.0, 0.0)
    costs.timed(4, 1000.0, 0.0)
    assert costs.typical(4) == pytest.approx(1.1)
    for _ in range(60):
        costs.timed(4, 5.0, 0.0)
    assert costs.typical(4) == pytest.approx(5.0, rel=0.05)


def test_rates_are_of_late_and_of_the_present_mix() -> None:
    """Evaluations a second of the device, together and by model; the past fades."""
    rates = DrainRates()
    assert rates.per_s() == rates.per_s("a") == 0.0
    for _ in range(100):
        rates.ran("a", 10, 0.1)
        rates.ran("b", 5, 0.1)
    assert rates.per_s() == pytest.approx(75.0, rel=0.01)
    assert rates.per_s("a") == pytest.approx(50.0, rel=0.05)
    for _ in range(200):
        rates.ran("b", 5, 0.1)
    assert rates.per_s("a") < 0.01
    assert rates.per_s("b") == pytest.approx(50.0, rel=0.01)
