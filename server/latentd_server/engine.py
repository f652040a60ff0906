"""The engine: owns the device's thread, the clock and the only loop.

Handlers submit jobs on the event loop; the device thread plans and runs batches; what came of a batch goes back to the
event loop in one hop. The two sides meet in a queue of commands and in nothing else. Where calls are long, a second
thread plans the next batch and deals with the last one while a call is on the device.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from latentd.v1 import bundle_pb2

from latentd_server.admission import Admission, Bounds, Work
from latentd_server.courses import Course
from latentd_server.failures import DeadlineError, DrainingError, RuntimeFailureError, ServingError
from latentd_server.handback import HandBack
from latentd_server.handover import Command, HandOver
from latentd_server.job import Array, Cost, Event, Failed, Finished, Job, Preview, StepJob, stages
from latentd_server.lookahead import Lookahead
from latentd_server.points import Points
from latentd_server.priority import Priority
from latentd_server.runners import Outcome, Runner, evaluate
from latentd_server.scheduler import Arrival, Batch, Entry, GraphKey, Scheduler, graph_key
from latentd_server.self_check import SelfCheck, SelfCheckMetrics

Sink = Callable[[Event], None]

_DEVICE_IS_LOST = 8
"""Batches that must fail altogether in a row. Requests are checked at the door and graphs at load, so what fails them
all is the device."""

_FIRST_STAGE = 2**62
"""Ids of jobs that only the device thread knows are above those that were handed out."""

_SMALL = 4096  # evaluations; whoever asks for more is refused, if it must be, once it is understood

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 3600.0
"""The device thread wakes at least this often; a caller's deadline may lie further ahead than a wait can be long."""


class EngineMetrics(SelfCheckMetrics, Protocol):
    """What the engine reports."""

    def batch_ran(
        self, model: str, role: bundle_pb2.Network.Role.ValueType, live_rows: int, padded_rows: int, seconds: float
    ) -> None:
        """One network call."""

    def evaluations_wasted(self, count: int) -> None:
        """Evaluations whose result nobody gets."""

    def waited_for_loop(self, seconds: float) -> None:
        """No batch was begun for so long, since the event loop was behind with results."""


WORTH_HIDING = 2.0
"""A call hides the host work of its neighbours if it takes so many times as long as that, for handing work over to
another thread takes time too; and the work is begun that long before the call is over."""
SHORTEST_S = 0.0005
"""Calls no longer than this hide nothing."""
_FORGETTING = 1.01  # the fastest call is believed to be slower by this at every other call
_NEWEST = 0.1  # weight of the newest in running means


@dataclass(slots=True, eq=False)
class Flight:
    """A batch on its way: planned, made ready, run, and dealt with."""

    batch: Batch
    runner: Runner | None
    planned_s: float
    size: int = 0  # rows, padding counted
    expected_s: float = 0.0  # what the call will take at least
    prepared: Any = None  # the runner's own
    results: Any = None
    failure: Exception | None = None  # of `prepare` or `run`
    departed_s: float = 0.0
    landed_s: float = 0.0


class DeviceLostError(Exception):
    """Nothing runs on the device any more; a new process may find another, or the same one reset."""


class Engine:
    """Runs jobs on one device. Public methods belong to the event loop's thread."""

    def __init__(
        self,
        metrics: EngineMetrics,
        *,
        max_rows: int,
        max_backlog: int,
        max_model_backlog: int | None = None,
        max_caller_backlog: int | None = None,
        caller_weights: Mapping[str, float] | None = None,
        self_check_interval_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        points: Points | None = None,
    ) -> None:
        """`max_rows` is the largest batch of graphs that are attached without another; `max_backlog` the evaluations
        that may be accepted and not yet run.

        Those of one model and of one caller have bounds of their own, or the same. `caller_weights` are the shares of
        callers that do not weigh 1. Self-checks keep `self_check_interval_s` apart; 0 is none.
        """
        self._metrics = metrics
        self._clock = clock
        self._points = points or Points()
        self._loop = asyncio.get_running_loop()
        self._sinks: dict[int, Sink] = {}
        self._models: dict[int, set[str]] = {}  # that the unfinished jobs need
        self._waiters: dict[str, asyncio.Event] = {}
        self._ids = itertools.count(1)
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.broken = asyncio.Event()  # the device thread is gone; nothing will be answered any more
        bounds = Bounds(max_backlog, max_model_backlog or max_backlog, max_caller_backlog or max_backlog)
        self._admission = Admission(bounds, max_rows, caller_weights)  # both sides' own, under the lock
        self._admission_lock = threading.Lock()
        self._leavers: set[int] = set()  # cancelled, and still on the books; both sides' own
        self._commands: queue.SimpleQueue[list[Command]] = queue.SimpleQueue()
        self._hand_over = HandOver(self._loop, clock, self._commands)
        self._hand_back = HandBack(self._loop, self._deliver)
        # From here on: the device thread's own.
        self._runners: dict[GraphKey, Runner] = {}
        self._newcomers: list[tuple[dict[GraphKey, Runner], bool]] = []  # not yet among them
        self._scheduler = Scheduler(max_rows, caller_weights)
        self._self_check = SelfCheck(metrics, self_check_interval_s)
        self._courses: dict[int, Course] = {}  # by root, of requests of several jobs
        self._stage_ids = itertools.count(_FIRST_STAGE)
        self._outbox: list[tuple[int, Event]] = []
        self._host_s: dict[GraphKey, float] = {}  # a running mean of what it takes to make a call ready
        self._fastest_s: dict[tuple[GraphKey, int], float] = {}  # calls, by size
        self._busy_until_s = 0.0  # when the call before landed
        self._lookahead: Lookahead[tuple[Flight | None, bool]] = Lookahead("latentd-lookahead")
        self._vain_batches = 0  # in a row, that failed for every segment even alone
        self._thread = threading.Thread(target=self._work, name="latentd-device", daemon=True)
        self._thread.start()

    # ---- the event loop's side -------------------------------------------------------------------------------

    @property
    def backlog(self) -> int:
        """Evaluations accepted and not yet run."""
        return self._admission.backlog

    @property
    def queue_depth(self) -> int:
        """Jobs accepted and unfinished."""
        return len(self._sinks)

    @property
    def lanes_held(self) -> int:
        """Samples whose state the device keeps."""
        return sum(runner.held for runner in list(self._runners.values()))

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining

    def submit(
        self, job: Job, *, caller: str, deadline: float | None, sink: Sink, priority: Priority = Priority.NORMAL
    ) -> int:
        """Accept a job. `sink` gets its events on the event loop, in order, until the last.

        Raises:
            DrainingError: the server is shutting down.
            QuotaExceededError: the caller has too much outstanding.
            OverloadedError: the backlog has no room for it; says when to try again.
            DeadlineUnreachableError: it would not be done in time.
        """
        now = self._clock()
        if self._draining:
            raise DrainingError
        job_id = next(self._ids)
        with self._admission_lock:
            self._admission.admit(job_id, job, caller, priority, now, deadline)
        self._sinks[job_id] = sink
        self._models[job_id] = {stage.model for stage in stages(job)}
        self._idle.clear()
        admit = partial(self._admit, job_id, job, caller, priority, now, deadline)
        share = job.lane_count * job.rows_per_lane / self._admission.batch_rows.of(graph_key(job))
        self._hand_over.submit(admit, share, alone=len(self._sinks) == 1)
        return job_id

    @property
    def crowded(self) -> bool:
        """Whether a small request may have to be refused."""
        return self._draining or not self._admission.has_room(_SMALL)

    def check_room(self, model: str, caller: str, evaluations: int) -> None:
        """Refuse, before any work is put into it, a request that takes so many evaluations at least.

        Raises:
            DrainingError, QuotaExceededError, OverloadedError: as `submit`.
        """
        if self._draining:
            raise DrainingError
        with self._admission_lock:
            self._admission.check_room(model, caller, evaluations, self._clock())

    @property
    def pressed(self) -> bool:
        """Whether a deadline may have to be refused."""
        return self._admission.is_pressed(self._clock())

    def check_time(self, least: Work, caller: str, priority: Priority, deadline: float) -> None:
        """Refuse, before any work is put into it, a request that takes so much at least.

        Raises:
            DeadlineUnreachableError: as `submit`.
        """
        with self._admission_lock:
            self._admission.check_time(least, caller, priority, self._clock(), deadline)

    def cancel(self, job_id: int) -> None:
        """Give a job up: its lanes ride in no later batch and its sink hears no more."""
        if self._forget_sink(job_id):
            self._leavers.add(job_id)
            self._hand_over.tell(lambda: self._drop(job_id))

    def give_up(self, model: str, error: ServingError) -> int:
        """Fail every accepted job that needs a model; returns how many there were."""
        jobs = [job_id for job_id, needed in self._models.items() if model in needed]
        for job_id in jobs:
            sink = self._sinks[job_id]
            self.cancel(job_id)
            sink(Failed(error))
        return len(jobs)

    def pause(self, job_id: int) -> None:
        """Let a job's lanes sit out until `resume`; its deadline goes on."""
        self._pause(job_id, True)

    def resume(self, job_id: int) -> None:
        """Let a paused job's lanes ride again."""
        self._pause(job_id, False)

    def _pause(self, job_id: int, paused: bool) -> None:
        with self._admission_lock:
            self._admission.pause(job_id, paused)
        self._hand_over.tell(lambda: self._sit_out(job_id, paused))

    def drain(self) -> None:
        """Refuse new work from now on; what was accepted is finished."""
        self._draining = True

    async def drained(self) -> None:
        """Wait until no accepted job is unfinished."""
        await self._idle.wait()

    async def finished(self, model: str) -> None:
        """Wait until no accepted job that needs a model is unfinished."""
        while any(model in needed for needed in self._models.values()):
            await self._waiters.setdefault(model, asyncio.Event()).wait()

    def attach(
        self,
        runners: dict[GraphKey, Runner],
        *,
        promise: bool = False,
        state_lanes: Mapping[GraphKey, int] = MappingProxyType({}),
        wide: Mapping[GraphKey, int] = MappingProxyType({}),
    ) -> None:
        """Take over the graphs of a model that is about to be served; `promise` is whether its bytes are checked,
        `state_lanes` for how many lanes' state there is room where that is bounded, `wide` the rows of the largest
        batch where that is another than `max_rows`.
        """
        with self._admission_lock:
            self._admission.batch_rows.update(wide)
            for key, lanes in state_lanes.items():
                self._admission.limit_state(key, lanes)
        self._hand_over.tell(lambda: self._expect(runners, promise, wide))

    def detach(self, model: str) -> None:
        """Let go of a model's graphs; its last job must be over, or given up."""
        with self._admission_lock:  # now: it may be attached anew before the device thread hears of this
            self._admission.forget_terms(model)
        self._hand_over.tell(lambda: self._let_go(model))

    async def close(self) -> None:
        """Stop the device thread after the batch under way. Unfinished jobs are not told."""
        self._hand_over.tell(None)
        await asyncio.to_thread(self._thread.join)

    def _forget_sink(self, job_id: int) -> bool:
        known = self._sinks.pop(job_id, None) is not None
        for model in self._models.pop(job_id, ()):
            if (waiter := self._waiters.pop(model, None)) is not None:
                waiter.set()
        if not self._sinks:
            self._idle.set()
        return known

    def _deliver(self, events: list[tuple[int, Event]]) -> None:
        for job_id, event in events:
            sink = self._sinks.get(job_id)
            if sink is None:  # cancelled while its batch ran
                if isinstance(event, Finished):
                    self._metrics.evaluations_wasted(event.cost.evaluations)
                continue
            if isinstance(event, Failed) or (isinstance(event, Finished) and event.last):
                self._forget_sink(job_id)
            try:
                sink(event)
            except Exception:
                log.exception("a sink failed; its job is given up")
                self.cancel(job_id)

    def _break_down(self) -> None:
        """Turn everybody away: what was accepted may be asked of another server."""
        self._draining = True
        self._deliver([(job_id, Failed(DrainingError())) for job_id in self._sinks])
        self.broken.set()

    # ---- the device thread's side ----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._run()
        except Exception:  # a lost device, or a bug of ours: single failures are dealt with where they happen
            log.critical("the device thread failed", exc_info=True)
            self._post()
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._break_down)

    def _run(self) -> None:
        """Fly batches, one after another. A long call is used for the host work of its neighbours: while it is on the
        device, the one before lands and the one after is made ready. What came of a short call is told as the next one
        sets off: only one thread at a time can have the interpreter, and the event loop gets it while this one waits.
        """
        landing: Flight | None = None  # back, and not yet dealt with
        flight: Flight | None = None  # ready to depart
        try:
            while True:
                if flight is None:
                    if landing is not None:
                        self._land(landing)
                        landing = None
                        if self._hand_back.is_behind or not self._scheduler.can_ride:
                            self._post()
                    self._wait_for_room()
                    if not self._take_commands():
                        self._post()
                        return
                    self._welcome()
                    flight = self._next_flight()
                    if flight is None:
                        if self._may_check:
                            self._self_check.step(self._runners, self._clock())
                        continue
                self._scheduler.depart(flight.batch, flight.expected_s)
                self._hand_over.calls_are_short = flight.expected_s <= SHORTEST_S
                if flight.expected_s <= max(SHORTEST_S, WORTH_HIDING * self._host_s.get(flight.batch.key, 0.0)):
                    if landing is not None:
                        self._land(landing)
                        self._post()
                    self._fly(flight)
                    landing, flight = flight, None
                    continue
                flight.departed_s = self._clock()  # or nearly: the other thread goes by it at once
                self._lookahead.begin(partial(self._meanwhile, landing, flight))
                self._fly(flight)
                following, go_on = self._lookahead.end()
                landing = flight
                if following is not None and (landing.failure is not None or not go_on or self._is_stale(following)):
                    self._scheduler.call_off(following.batch)
                    following = None
                flight = following
                if not go_on:
                    self._land(landing)
                    self._post()
                    return
        finally:
            self._lookahead.close()

    def _is_stale(self, flight: Flight) -> bool:
        """Whether a job has left since its lanes were given a seat: it must ride no more."""
        due_s = self._scheduler.next_deadline_s()
        late, leavers = due_s is not None and due_s <= self._clock(), self._leavers.copy()
        if not late and not leavers:
            return False
        now_s = self._clock()
        entries = [segment.entry for segment in flight.batch.segments]
        return any(entry.root in leavers or (entry.deadline_s or math.inf) <= now_s for entry in entries)

    def _meanwhile(self, landing: Flight | None, flight: Flight) -> tuple[Flight | None, bool]:
        """The host work beside a call: deal with the one before, then make the next one ready, as late as may be, for
        what arrives until then can still ride; and whether to go on after that.
        """
        if landing is not None:
            self._land(landing)
            self._post()
        host_s = self._host_s.get(flight.batch.key, 0.0)
        due_s = flight.departed_s + flight.expected_s - WORTH_HIDING * host_s
        self._lookahead.until_over(due_s - self._clock())
        self._wait_for_room()
        if not self._take_commands(wait=False):
            return None, False
        return self._next_flight(), True

    def _wait_for_room(self) -> None:
        """Wait for an event loop that is behind, before it is asked what to do next: meanwhile it may give jobs up."""
        if not self._hand_back.has_room:
            began_s = self._clock()
            self._hand_back.wait_for_room()
            self._metrics.waited_for_loop(self._clock() - began_s)

    def _next_flight(self) -> Flight | None:
        """Plan a batch, make its call ready, and tell what there is to tell."""
        began_s = self._clock()
        for job_id in self._scheduler.expired(began_s):
            self._fail(job_id, DeadlineError("the deadline passed before the request was finished"))
        batch = None if self._newcomers else self._scheduler.plan(began_s)
        if batch is None:
            self._post()
            return None
        flight = Flight(batch, self._runners.get(batch.key), began_s)
        try:
            if flight.runner is None:
                raise LookupError(f"no graph {batch.key} on the device")
            flight.size = flight.runner.padded(batch.rows)
            flight.prepared = flight.runner.prepare(batch.segments)
        except Exception as error:
            flight.failure = error
        now_s = self._clock()
        flight.expected_s = self._fastest_s.get((batch.key, flight.size), 0.0)
        host_s = self._host_s.get(batch.key, now_s - began_s)
        self._host_s[batch.key] = host_s + _NEWEST * (now_s - began_s - host_s)
        self._post()
        return flight

    def _fly(self, flight: Flight) -> None:
        """Make the call. What goes wrong is dealt with when it lands."""
        self._points.evaluating(flight.batch)
        flight.departed_s = self._clock()
        try:
            if flight.failure is None and flight.runner is not None:
                flight.results = flight.runner.run(flight.prepared)
        except Exception as error:
            flight.failure = error
        flight.landed_s = self._clock()
        self._lookahead.over()
        if flight.failure is not None:
            return  # a failure says nothing of how long a call takes
        # The fastest, since others may have waited for the interpreter; it is forgotten slowly.
        call_s, timed = flight.landed_s - flight.departed_s, (flight.batch.key, flight.size)
        self._fastest_s[timed] = min(call_s, _FORGETTING * self._fastest_s.get(timed, call_s))

    def _land(self, flight: Flight) -> None:
        """Move the lanes of a call on, and note what came of it; `_post` tells."""
        batch, runner = flight.batch, flight.runner
        failures: dict[int, ServingError] = {}
        witnesses = [segment.entry.job_id for segment in batch.segments]  # whose rows say something of the device
        if flight.failure is not None or runner is None:
            witnesses = [job_id for job_id in witnesses if self._scheduler.find(job_id) is not None]
            text = "a batch of %s failed; its segments are run again one by one"
            log.error(text, batch.key[0], exc_info=flight.failure)
            outcomes = self._ride_alone(runner, batch, failures)
            flight.landed_s = self._clock()
        else:
            outcomes = self._finish(runner, flight, failures)
        # Host work counts where the device waited for it.
        seconds = flight.landed_s - max(flight.planned_s, self._busy_until_s)
        self._busy_until_s = flight.landed_s
        rows, size = batch.rows, flight.size or batch.rows
        self._metrics.batch_ran(batch.key[0], batch.key[1], rows, size, flight.landed_s - flight.departed_s)
        arrivals = self._scheduler.land(batch, seconds)
        with self._admission_lock:
            self._admission.ran(batch, arrivals, size, seconds, flight.landed_s)
        self._points.evaluated(arrivals)
        for arrival, outcome in zip(arrivals, outcomes, strict=True):
            if arrival.wasted:
                self._metrics.evaluations_wasted(arrival.wasted)
            elif arrival.segment.entry.job_id not in failures:
                self._report(arrival, outcome)
                if arrival.done:
                    self._self_check.offer(arrival, outcome, flight.landed_s)
        for job_id, failure in failures.items():
            self._fail(job_id, failure)
        if witnesses:
            alive = any(job_id not in failures for job_id in witnesses)
            self._vain_batches = 0 if alive else self._vain_batches + 1
        if self._vain_batches >= _DEVICE_IS_LOST:
            raise DeviceLostError(f"{self._vain_batches} batches in a row failed, each row also alone")

    @property
    def _may_check(self) -> bool:
        """Whether there is nothing to do but a self-check."""
        return self._self_check.has_work and not len(self._scheduler) and not self._draining

    def _take_commands(self, *, wait: bool = True) -> bool:
        """Carry out what has been asked for, waiting for it if there is nothing else to do; False to stop."""
        block = wait and not self._scheduler.can_ride and not self._may_check and not self._newcomers
        timeout = None
        if block and (deadline := self._scheduler.next_deadline_s()) is not None:
            timeout = min(max(0.0, deadline - self._clock()), _LONGEST_WAIT_S)
        while True:
            try:
                commands = self._commands.get(block, timeout)
            except queue.Empty:
                break
            for command in commands:
                if command is None:
                    return False
                command()
            block, timeout = False, None
        for job_id in self._leavers.copy():  # whose commands are a turn of the event loop behind
            if self._is_on_the_books(job_id):
                self._drop(job_id)
        return True

    def _admit(
        self, job_id: int, job: Job, caller: str, priority: Priority, now: float, deadline: float | None
    ) -> None:
        entry = self._scheduler.add(job_id, job, caller, now, deadline, priority)
        if job.then is not None:
            self._courses[job_id] = Course(job.lane_count)
            self._courses[job_id].begin(entry, np.arange(job.lane_count), Cost())
        self._points.queued(entry)

    def _sit_out(self, job_id: int, paused: bool) -> None:
        course = self._courses.get(job_id)
        if course is not None:
            course.paused = paused
        for each in [job_id] if course is None else course.stages:
            self._scheduler.pause(each, paused)

    def _expect(self, runners: dict[GraphKey, Runner], promise: bool, wide: Mapping[GraphKey, int]) -> None:
        self._scheduler.batch_rows.update(wide)
        self._newcomers.append((runners, promise))

    def _welcome(self) -> None:
        """Take over the graphs of new models. Warming up takes the device, so this is for its own thread to do."""
        newcomers, self._newcomers = self._newcomers, []
        if newcomers:
            self._post()  # whose results are there need not wait for that
        for runners, promise in newcomers:
            for key, runner in runners.items():
                runner.warm()
                if promise:
                    self._self_check.begin(key[0])
            self._runners.update(runners)

    def _let_go(self, model: str) -> None:
        self._self_check.end(model, self._runners)
        for runners in (self._runners, *(newcomers for newcomers, _ in self._newcomers)):
            for key in [key for key in runners if key[0] == model]:
                del runners[key]
        for timed in [timed for timed in list(self._fastest_s) if timed[0][0] == model]:
            del self._fastest_s[timed]
        for key in [key for key in list(self._host_s) if key[0] == model]:
            del self._host_s[key]
        self._scheduler.batch_rows.forget(model)
        with self._admission_lock:
            self._admission.forget_costs(model)

    def _finish(self, runner: Runner, flight: Flight, failures: dict[int, ServingError]) -> list[Outcome]:
        """What a call gave. If that cannot be told, all who rode fail: to run them again would take the step twice."""
        try:
            return runner.finish(flight.prepared, flight.results)
        except Exception:
            model, segments = flight.batch.key[0], flight.batch.segments
            log.exception("what a batch of %s gave cannot be read; its jobs fail", model)
            failures.update((segment.entry.job_id, RuntimeFailureError(model)) for segment in segments)
            return [Outcome()] * len(segments)

    def _ride_alone(self, runner: Runner | None, batch: Batch, failures: dict[int, ServingError]) -> list[Outcome]:
        """One bad row must not fail its neighbours: every segment gets a call of its own."""
        outcomes = []
        for segment in batch.segments:
            outcome = Outcome()
            if self._scheduler.find(segment.entry.job_id) is not segment.entry:
                # It left during the call, and its lanes have no slots any more. Of the call something may be kept.
                if runner is not None:
                    runner.forget(segment.entry.job_id)
            elif runner is None or segment.entry.job_id in failures:
                failures.setdefault(segment.entry.job_id, RuntimeFailureError(batch.key[0]))
            else:
                try:
                    (outcome,) = evaluate(runner, [segment.again()])
                except Exception:
                    log.exception("job %d of %s failed alone", segment.entry.job_id, batch.key[0])
                    failures[segment.entry.job_id] = RuntimeFailureError(batch.key[0])
            outcomes.append(outcome)
        return outcomes

    def _report(self, arrival: Arrival, outcome: Outcome) -> None:
        if not arrival.done and outcome.preview is None:
            return
        entry, segment = arrival.segment.entry, arrival.segment
        course = self._courses.get(entry.root)
        if course is None:
            lanes, each = np.arange(segment.start, segment.start + segment.count), segment.cohort.cost
        else:
            lanes, each = course.stages[entry.job_id].arrived(arrival)
        if arrival.done:
            assert outcome.outputs is not None
            if course is not None and entry.job.then is not None:
                self._hand_on(course, entry, entry.job.then.take(lanes, outcome.outputs), lanes, each)
                if arrival.last:
                    self._leave(entry, course)
                return
            last = arrival.last
            if course is not None:
                course.lanes_left -= segment.count
                last = not course.lanes_left
                if arrival.last:
                    self._leave(entry, course)
            cost = Cost(each.queue_s, each.compute_s, each.evaluations * segment.count, each.batches, each.rows)
            self._outbox.append((entry.root, Finished(lanes, outcome.outputs, cost, last)))
            if last:
                self._forget(entry.root, done=True)
        else:
            assert isinstance(entry.job, StepJob)
            table = entry.job.tables[0]
            steps = int(table.completed_steps[segment.position])
            assert outcome.preview is not None
            self._outbox.append((entry.root, Preview(lanes, steps, table.step_count, outcome.preview)))

    def _hand_on(self, course: Course, entry: Entry, job: Job, lanes: Array, each: Cost) -> None:
        """Lanes that are done go on as a job of their own, among those of the same caller and class."""
        stage = self._scheduler.add(
            next(self._stage_ids), job, entry.caller, entry.admitted_s, entry.deadline_s, entry.priority, entry.root
        )
        course.begin(stage, lanes, each)
        if course.paused:
            self._scheduler.pause(stage.job_id, True)
        self._points.queued(stage)

    def _fail(self, job_id: int, error: ServingError) -> None:
        """Give a request up by any of its jobs."""
        entry = self._scheduler.find(job_id)
        root = job_id if entry is None else entry.root
        self._drop(root)
        self._outbox.append((root, Failed(error)))

    def _drop(self, job_id: int) -> None:
        """Take an unfinished request off the books."""
        self._leavers.discard(job_id)
        if self._is_on_the_books(job_id):
            self._metrics.evaluations_wasted(self._forget(job_id, done=False))

    def _is_on_the_books(self, job_id: int) -> bool:
        return job_id in self._courses or self._scheduler.find(job_id) is not None

    def _forget(self, job_id: int, *, done: bool) -> int:
        """Take a request off the books; returns the evaluations spent on its unfinished lanes."""
        with self._admission_lock:
            self._admission.ended(job_id, self._clock(), done=done)
        course = self._courses.pop(job_id, None)
        if course is not None:
            spent = course.spent_before()
            return spent + sum(self._leave(stage.entry, course) for stage in list(course.stages.values()))
        entry = self._scheduler.find(job_id)
        return 0 if entry is None else self._leave(entry)

    def _leave(self, entry: Entry, course: Course | None = None) -> int:
        """Take one job off the books; returns the evaluations spent in it on its unfinished lanes."""
        runner = self._runners.get(entry.key)
        if runner is not None:
            runner.forget(entry.job_id)
        if course is not None:
            del course.stages[entry.job_id]
        return self._scheduler.remove(entry.job_id)

    def _post(self) -> None:
        """One hop to the event loop for all that a batch brought."""
        if self._outbox:
            events, self._outbox = self._outbox, []
            try:
                self._hand_back.hand(events)
            except RuntimeError:  # the loop is closed: the process is going down and nobody listens
                log.warning("the event loop is gone; %d events are dropped", len(events))
