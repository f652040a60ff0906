"""Who rides in the next batch. Pure: no clock, no thread, no gRPC, no ONNX Runtime.

There are no samplers and no requests here, only lanes that want one evaluation. `plan` decides which lanes
ride; with `depart` they count as moved on, so that the batch after can be planned while theirs is on the device;
`land` says what came of them. All are plain calls on plain data, so that a simulator can drive them with any clock.

The rules:

* Work-conserving. While any lane may ride, `plan` returns a batch; it never waits for a batch to fill.
* One batch evaluates one graph. Priority classes with work share the device's time by their weights, and the graphs
  of a class share the class's time equally. A flow is the work of one class on one graph. Every flow has a clock:
  seconds by weight, of the batches it led. The flow whose clock is furthest behind leads the next batch.
* All flows of that graph ride, and share the batch's rows by the same weights; within a flow callers do, by theirs
  (`shares.py`: max-min fair, in rows, which are evaluations; what one cannot use the others get).
* Being away, paused or content with less gains no credit.
* Within a caller, jobs ride in order of arrival. Within a job, the lanes that are furthest along ride first, so that
  started work finishes.
* Lanes of one job move in cohorts: ranges of lanes that stand at the same evaluation. A cohort splits when the
  batch has no room for all of it.
* A cancelled, expired or paused job rides in no later batch. What it had been given is wasted, and counted.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TypeAlias

from latentd.v1 import bundle_pb2

from latentd_server import shares
from latentd_server.job import CallJob, Cost, Job, StepJob
from latentd_server.priority import Priority

GraphKey: TypeAlias = (
    "tuple[str, bundle_pb2.Network.Role.ValueType] | tuple[str, bundle_pb2.Network.Role.ValueType, tuple[int, int]]"
)
"""What a batch is of: canonical model name and `Network.Role`; and height and width of samples where they are not the
model's default."""

_served = attrgetter("served")
_STALE_DEADLINES = 1000
"""How many deadlines of jobs that are gone may be kept, beyond as many as there are jobs."""


@dataclass(slots=True)
class Cohort:
    """Lanes start..stop of a job, all about to take evaluation `position`."""

    start: int
    stop: int
    position: int
    cost: Cost = field(default_factory=Cost)  # of each lane
    flights: int = 0  # batches it is in that have departed and not landed
    parted: "list[Cohort]" = field(default_factory=list)  # lanes that were split off since the first of them departed

    @property
    def count(self) -> int:
        """How many lanes it has."""
        return self.stop - self.start

    def split(self, count: int) -> "Cohort":
        """Take the first `count` lanes out."""
        head = Cohort(self.start, self.start + count, self.position, replace(self.cost))
        self.start += count
        if self.flights:
            self.parted.append(head)
        return head


@dataclass(slots=True, eq=False)
class Entry:
    """A job on the scheduler's books."""

    job_id: int
    job: Job
    caller: str
    priority: Priority
    admitted_s: float
    deadline_s: float | None
    cohorts: list[Cohort]  # waiting to ride, furthest along first
    riding: int = 0  # lanes in batches that have not landed
    arrival: int = 0  # number in the order of arrival
    paused: bool = False
    ready: bool = False  # has lanes that may ride; kept by the scheduler
    root: int = field(init=False)  # the job of the request, where its lanes come from another one
    key: GraphKey = field(init=False)
    rows_per_lane: int = field(init=False)  # at most
    rows_by_evaluation: list[int] | None = field(init=False)  # of one lane; None where it always takes as many
    evaluation_count: int = field(init=False)  # of one lane's walk

    def __post_init__(self) -> None:
        self.root = self.job_id
        self.key = graph_key(self.job)
        self.rows_per_lane = self.job.rows_per_lane
        self.rows_by_evaluation = self.job.rows_by_evaluation if isinstance(self.job, StepJob) else None
        self.evaluation_count = len(self.job.tables[0].timesteps) if isinstance(self.job, StepJob) else 1

    @property
    def waiting_rows(self) -> int:
        """Rows its waiting lanes would take if all of them rode now."""
        if self.rows_by_evaluation is None:
            return sum(cohort.count for cohort in self.cohorts) * self.rows_per_lane
        return sum(cohort.count * self.rows_by_evaluation[cohort.position] for cohort in self.cohorts)

    def rows_at(self, position: int) -> int:
        """Rows one of its lanes takes at this evaluation."""
        return self.rows_per_lane if self.rows_by_evaluation is None else self.rows_by_evaluation[position]

    @property
    def is_over(self) -> bool:
        """Whether no lane is left to ride or riding."""
        return not self.cohorts and not self.riding


@dataclass(slots=True, eq=False)
class Segment:
    """Lanes of one job that ride in a batch side by side, at the same evaluation."""

    entry: Entry
    cohort: Cohort
    count: int  # lanes
    rows: int  # what they take in the call
    start: int = field(init=False)  # the first lane; the cohort may be split while the batch is under way
    position: int = field(init=False)  # of the evaluation they take; the cohort moves on
    last_leg: bool = False  # when it departed, it was not to ride again

    def __post_init__(self) -> None:
        self.start = self.cohort.start
        self.position = self.cohort.position

    @property
    def rows_per_lane(self) -> int:
        """Rows each of its lanes takes in the call."""
        return self.rows // self.count

    def again(self) -> "Segment":
        """The same lanes at the same evaluation, whatever has become of the cohort since."""
        cohort = Cohort(self.start, self.start + self.count, self.position)
        return Segment(self.entry, cohort, self.count, self.rows)


@dataclass(slots=True, eq=False)
class Batch:
    """What one network call evaluates."""

    key: GraphKey
    segments: list[Segment]
    lead: "Flow"
    weight: float  # at which its leader pays for the device's time
    expected_s: float = 0.0  # what its leader has paid already

    @property
    def rows(self) -> int:
        """Live rows, padding not counted."""
        return sum(segment.rows for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A segment after its evaluation."""

    segment: Segment
    done: bool  # its lanes need no further evaluation
    last: bool  # and with them the job is over
    wasted: int = 0  # evaluations nobody gets, since the job left while it rode


@dataclass(slots=True, eq=False)
class _Caller:
    """One caller's work in one flow."""

    weight: float
    served: float  # rows by weight, on the clock of its flow's `level`
    entries: dict[int, Entry] = field(default_factory=dict)  # in order of arrival, unless `shuffled`
    paused: dict[int, Entry] = field(default_factory=dict)  # apart, so that nobody has to pass over them at every plan
    shuffled: bool = False  # one came back from a pause
    ready: int = 0  # entries with lanes that may ride

    def in_order(self) -> Iterable[Entry]:
        """Those that are not paused, in order of arrival."""
        if self.shuffled:
            self.entries = dict(sorted(self.entries.items(), key=lambda item: item[1].arrival))
            self.shuffled = False
        return self.entries.values()

    def pause(self, entry: Entry, paused: bool) -> None:
        """Put an entry apart, or back among the others."""
        here, there = (self.entries, self.paused) if paused else (self.paused, self.entries)
        if here.pop(entry.job_id, None) is not None:
            there[entry.job_id] = entry
            self.shuffled |= not paused

    def wanted(self, most: int) -> int:
        """Rows that its lanes could take now, counted up to `most`."""
        rows = 0
        for entry in self.in_order():
            if entry.ready:
                rows += entry.waiting_rows
                if rows >= most:
                    return most
        return rows


@dataclass(slots=True, eq=False)
class Flow:
    """The work of one priority class on one graph."""

    queue: "_Queue"
    priority: Priority
    led_s: float = 0.0  # seconds of the device by weight, of the batches it led
    served: float = 0.0  # rows by weight, on the clock of its queue's `level`
    weight: float = 0.0  # at the last plan: its class's, shared by the class's graphs
    level: float = 0.0  # rows by weight, of the hungriest of its callers; where newcomers start
    callers: dict[str, _Caller] = field(default_factory=dict)
    ready: dict[str, _Caller] = field(default_factory=dict)  # those with lanes that may ride

    def wanted(self, most: int) -> int:
        """Rows that its lanes could take now, counted up to `most`."""
        rows = 0
        for caller in self.ready.values():
            rows += caller.wanted(most - rows)
            if rows >= most:
                return most
        return rows


@dataclass(slots=True, eq=False)
class _Queue:
    """The work of one graph."""

    key: GraphKey
    level: float = 0.0  # rows by weight, of the hungriest of its flows; where newcomers start
    flows: dict[Priority, Flow] = field(init=False)

    def __post_init__(self) -> None:
        self.flows = {priority: Flow(self, priority) for priority in Priority}  # the highest first


def graph_key(job: Job) -> GraphKey:
    """The graph a job's evaluations are of."""
    return (
        key_of(job.model, job.role)
        if isinstance(job, CallJob)
        else key_of(job.model, bundle_pb2.Network.ROLE_DENOISER, job.size)
    )


def key_of(model: str, role: bundle_pb2.Network.Role.ValueType, size: tuple[int, int] | None = None) -> GraphKey:
    """Name a graph; one that is compiled for other sizes of samples is another graph at each of them."""
    return (model, role) if size is None else (model, role, size)


class BatchRows:
    """How many rows a batch of a graph may have."""

    def __init__(self, usual: int) -> None:
        if usual < 2:
            raise ValueError(f"max_rows must be at least 2, since a guided lane takes two rows; got {usual}")
        self._usual = usual
        self._others: dict[GraphKey, int] = {}

    def of(self, key: GraphKey) -> int:
        """Of this graph."""
        return self._others.get(key, self._usual)

    def update(self, others: Mapping[GraphKey, int]) -> None:
        """Learn of graphs whose batches are not the usual ones."""
        self._others.update(others)

    def forget(self, model: str) -> None:
        """Forget the graphs of a model."""
        for key in [key for key in self._others if key[0] == model]:
            del self._others[key]


class Scheduler:
    """The books: every accepted and unfinished job, and whose turn it is."""

    def __init__(self, max_rows: int, caller_weights: Mapping[str, float] | None = None) -> None:
        """`max_rows` is the largest batch of graphs of which `batch_rows` knows nothing else; `caller_weights` are the
        shares of callers that do not weigh 1.
        """
        self.batch_rows = BatchRows(max_rows)
        self._caller_weights = dict(caller_weights or {})
        self._queues: dict[GraphKey, _Queue] = {}
        self._ready: list[Flow] = []  # those with lanes that may ride
        self._level_s = 0.0  # the clock of the flow that led last, as it set off; where newcomers start
        self._entries: dict[int, Entry] = {}
        self._arrivals = 0
        self._deadlines: list[tuple[float, int]] = []  # a heap; jobs that are gone stay in it until they come up

    def __repr__(self) -> str:
        lines = (
            f"{entry.job_id}:{'paused ' if entry.paused else ''}"
            + ",".join(f"{c.start}-{c.stop}@{c.position}" for c in entry.cohorts)
            for entry in self._entries.values()
        )
        return f"Scheduler({'; '.join(lines)})"

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self,
        job_id: int,
        job: Job,
        caller: str,
        now_s: float,
        deadline_s: float | None = None,
        priority: Priority = Priority.NORMAL,
        root: int | None = None,
    ) -> Entry:
        """Put a job on the books; `root` is the job of the same request that came first, if this one is not it."""
        entry = Entry(job_id, job, caller, priority, now_s, deadline_s, [Cohort(0, job.lane_count, 0)])
        entry.arrival = self._arrivals = self._arrivals + 1
        entry.root = job_id if root is None else root
        queue = self._queues.get(entry.key)
        if queue is None:
            queue = self._queues[entry.key] = _Queue(entry.key)
        flow = queue.flows[priority]
        if caller not in flow.callers:
            flow.callers[caller] = _Caller(self._caller_weights.get(caller, 1.0), flow.level)
        flow.callers[caller].entries[job_id] = entry
        self._entries[job_id] = entry
        if deadline_s is not None:
            heapq.heappush(self._deadlines, (deadline_s, job_id))
            if len(self._deadlines) > 2 * len(self._entries) + _STALE_DEADLINES:
                self._deadlines = [(e.deadline_s, e.job_id) for e in self._entries.values() if e.deadline_s is not None]
                heapq.heapify(self._deadlines)
        self._refresh(entry)
        return entry

    def remove(self, job_id: int) -> int:
        """Take a job off the books, finished or not; returns the evaluations spent on its unfinished lanes."""
        entry = self._entries.pop(job_id, None)
        if entry is None:
            return 0
        wasted = sum(cohort.count * cohort.cost.evaluations for cohort in entry.cohorts)
        entry.cohorts.clear()
        self._refresh(entry)
        callers = self._queues[entry.key].flows[entry.priority].callers
        caller = callers[entry.caller]
        (caller.paused if entry.paused else caller.entries).pop(job_id)
        if not caller.entries and not caller.paused:
            del callers[entry.caller]
        return wasted

    def _refresh(self, entry: Entry) -> None:
        """Keep count of who may ride, after a change to an entry's cohorts or its pause. No credit for time away."""
        ready = bool(entry.cohorts) and not entry.paused
        if ready == entry.ready:
            return
        entry.ready = ready
        flow = self._queues[entry.key].flows[entry.priority]
        caller = flow.callers[entry.caller]
        if not ready:
            caller.ready -= 1
            if not caller.ready:
                del flow.ready[entry.caller]
                if not flow.ready:
                    self._ready.remove(flow)
            return
        caller.ready += 1
        if caller.ready == 1:
            caller.served = max(caller.served, flow.level)
            if not flow.ready:
                flow.led_s = max(flow.led_s, self._level_s)
                flow.served = max(flow.served, flow.queue.level)
                self._ready.append(flow)
            flow.ready[entry.caller] = caller

    def find(self, job_id: int) -> Entry | None:
        """A job on the books."""
        return self._entries.get(job_id)

    @property
    def can_ride(self) -> bool:
        """Whether `plan` would return a batch."""
        return bool(self._ready)

    def pause(self, job_id: int, paused: bool) -> None:
        """Let a job's lanes sit out, or ride again."""
        entry = self._entries.get(job_id)
        if entry is not None and entry.paused != paused:
            entry.paused = paused
            self._queues[entry.key].flows[entry.priority].callers[entry.caller].pause(entry, paused)
            self._refresh(entry)

    def expired(self, now_s: float) -> list[int]:
        """Jobs whose deadline has passed, each named once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            job_id = heapq.heappop(self._deadlines)[1]
            if job_id in self._entries:
                late.append(job_id)
        return late

    def next_deadline_s(self) -> float | None:
        """When the next job expires, if nothing else happens."""
        while self._deadlines and self._deadlines[0][1] not in self._entries:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def plan(self, now_s: float) -> Batch | None:
        """The next batch, or None if no lane may ride. Its lanes are in no other until it departs."""
        if not self._ready:
            return None
        lead = self._weigh()
        self._level_s = max(self._level_s, lead.led_s)
        segments: list[Segment] = []
        flows = [flow for flow in lead.queue.flows.values() if flow.ready]
        if len(flows) == 1:
            self._fill(lead, self.batch_rows.of(lead.queue.key), segments)
        else:
            self._share_out(lead.queue, flows, segments)
        for segment in segments:
            segment.entry.riding += segment.count
            if segment.cohort.position == 0:
                segment.cohort.cost.queue_s = now_s - segment.entry.admitted_s
        return Batch(lead.queue.key, segments, lead, lead.weight)

    def _weigh(self) -> Flow:
        """Weigh the flows that are ready, and find the one that leads."""
        if len(self._ready) > 1:
            graphs = Counter(flow.priority for flow in self._ready)
            for flow in self._ready:
                flow.weight = flow.priority.weight / graphs[flow.priority]
            return min(self._ready, key=lambda flow: (flow.led_s, -flow.priority))
        (flow,) = self._ready
        flow.weight = flow.priority.weight
        return flow

    # The three below seat lanes in up to `rows` rows and add them to `segments`. They return the rows that were taken
    # and those of them that were paid for. A lane of two rows may not fit into a share of one. Then the share is left
    # to others (`strictly`), and only what these cannot use goes to those behind that lane, for nothing. So its own
    # share grows until it fits, and it is not passed over for ever.

    def _share_out(self, queue: _Queue, flows: list[Flow], segments: list[Segment]) -> None:
        """Seat the flows of a graph, each in its share of a batch."""
        left = most_rows = self.batch_rows.of(queue.key)
        wanted = [flow.wanted(left + 1) for flow in flows]
        claims = [shares.Claim(flow.served, flow.weight, most) for flow, most in zip(flows, wanted, strict=True)]
        paid = [0] * len(flows)
        for given in (shares.divide(left, claims), None):
            for index, flow in enumerate(flows):
                if rows := left if given is None else given[index]:
                    taken, charge = self._fill(flow, rows, segments, strictly=given is not None)
                    paid[index] += charge
                    left -= taken
        if sum(wanted) > most_rows:
            queue.level = shares.settle(flows, wanted, paid, queue.level)

    def _fill(self, flow: Flow, rows: int, segments: list[Segment], *, strictly: bool = False) -> tuple[int, int]:
        """Seat a flow's callers, each in its share."""
        if not flow.ready:
            return 0, 0
        if len(flow.ready) == 1:
            return self._board(next(iter(flow.ready.values())), rows, segments, strictly=strictly)
        # More callers than rows cannot ride; whose clock is behind goes first.
        callers = heapq.nsmallest(rows + 1, flow.ready.values(), key=_served)
        wanted = [caller.wanted(rows + 1) for caller in callers]
        if sum(wanted) <= rows:
            taken = sum(self._board(caller, rows, segments)[0] for caller in callers)
            return taken, taken
        claims = [
            shares.Claim(caller.served, caller.weight, most) for caller, most in zip(callers, wanted, strict=True)
        ]
        paid = [0] * len(callers)
        left = rows
        for index, share in enumerate(shares.divide(rows, claims)):
            if share:
                taken, paid[index] = self._board(callers[index], share, segments, strictly=True)
                left -= taken
        first_round = rows - left
        for passing_over in () if strictly or not left else (False, True):
            for index, caller in enumerate(callers):
                if left and caller.ready:
                    taken, charge = self._board(caller, left, segments, strictly=not passing_over)
                    paid[index] += charge
                    left -= taken
        flow.level = shares.settle(callers, wanted, paid, flow.level)
        return rows - left, first_round

    def _board(self, caller: _Caller, rows: int, segments: list[Segment], *, strictly: bool = False) -> tuple[int, int]:
        """Seat a caller's lanes, oldest jobs first; where a lane does not fit, end or pass over it."""
        left = rows
        paid: int | None = None
        for entry in caller.in_order():
            if not left:
                break
            while entry.ready:
                cohort = entry.cohorts[0]
                per_lane = entry.rows_at(cohort.position)
                count = min(cohort.count, left // per_lane)
                if not count:
                    break
                riders = entry.cohorts.pop(0) if count == cohort.count else cohort.split(count)
                self._refresh(entry)
                segments.append(Segment(entry, riders, count, count * per_lane))
                left -= count * per_lane
            if left and entry.ready:
                if strictly:
                    break
                paid = rows - left if paid is None else paid
        return rows - left, rows - left if paid is None else paid

    def depart(self, batch: Batch, expected_s: float = 0.0) -> None:
        """A batch sets off: its lanes may ride in the next one, as if they had taken their evaluation already.

        One batch at most may have departed and not landed when the next is planned. Its leader pays what the call is
        expected to take, so that the next batch is another's turn; `land` makes up the difference.
        """
        batch.expected_s = expected_s
        batch.lead.led_s += expected_s / batch.weight
        for segment in batch.segments:
            entry, cohort = segment.entry, segment.cohort
            cohort.flights += 1
            cohort.position += 1
            segment.last_leg = cohort.position == entry.evaluation_count or self._entries.get(entry.job_id) is not entry
            if not segment.last_leg:
                _insert(entry.cohorts, cohort)
                self._refresh(entry)

    def land(self, batch: Batch, seconds: float) -> list[Arrival]:
        """The batch that departed first is back, `seconds` after it set off; one arrival a segment, in order."""
        batch.lead.led_s += (seconds - batch.expected_s) / batch.weight
        live_rows = batch.rows
        arrivals: list[Arrival] = []
        for segment in batch.segments:
            entry = segment.entry
            entry.riding -= segment.count
            for cohort in (segment.cohort, *segment.cohort.parted):
                cohort.cost.compute_s += seconds
                cohort.cost.evaluations += segment.rows_per_lane
                cohort.cost.batches += 1
                cohort.cost.rows += live_rows
            segment.cohort.flights -= 1
            segment.cohort.parted.clear()
            done = segment.position == entry.evaluation_count - 1
            if self._entries.get(entry.job_id) is entry:
                arrivals.append(Arrival(segment, done, done and entry.is_over))
            else:
                # `remove` has counted what was spent on lanes that waited to ride again.
                spent = segment.cohort.cost.evaluations if segment.last_leg else segment.rows_per_lane
                arrivals.append(Arrival(segment, done, False, wasted=segment.count * spent))
        return arrivals

    def complete(self, batch: Batch, seconds: float) -> list[Arrival]:
        """A batch departs and lands, with nothing planned in between."""
        self.depart(batch)
        return self.land(batch, seconds)

    def call_off(self, batch: Batch) -> None:
        """A batch that was planned will not depart: its lanes wait again. What its callers were charged, they were."""
        for segment in batch.segments:
            entry = segment.entry
            entry.riding -= segment.count
            if self._entries.get(entry.job_id) is entry:
                _insert(entry.cohorts, segment.cohort)
                self._refresh(entry)


def _insert(cohorts: list[Cohort], cohort: Cohort) -> None:
    """Keep the furthest along first, and lanes in order among equals."""
    index = 0
    while index < len(cohorts) and (-cohorts[index].position, cohorts[index].start) < (-cohort.position, cohort.start):
        index += 1
    cohorts.insert(index, cohort)
