"""Who rides in the next batch. Pure: no clock, no thread, no gRPC, no ONNX Runtime.

There are no samplers and no requests here, only lanes that want one evaluation. `plan` decides which lanes
ride, the engine runs them, `complete` moves them on; all three are plain calls on plain data, so that a
simulator can drive them with any clock.

The rules:

* Work-conserving. While any lane may ride, `plan` returns a batch; it never waits for a batch to fill.
* One batch evaluates one graph. Graphs with work share the device's time equally.
* Within a graph, callers share every batch equally (max-min fair, in rows, which are evaluations; the least
  served goes first where rows are too few, and being away gains no credit). Within a caller, jobs ride in
  order of arrival. Within a job, the lanes that are furthest along ride first, so that started work finishes.
* Lanes of one job move in cohorts: ranges of lanes that stand at the same evaluation. A cohort splits when the
  batch has no room for all of it.
* A cancelled, expired or paused job rides in no later batch. What it had been given is wasted, and counted.
"""

import heapq
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from latentd.v1 import bundle_pb2

from latentd_server.job import CallJob, Cost, Job, StepJob

GraphKey: TypeAlias = "tuple[str, bundle_pb2.Network.Role.ValueType]"
"""Canonical model name and `Network.Role`: what a batch is of."""

_STALE_DEADLINES = 1000
"""How many deadlines of jobs that are gone may be kept, beyond as many as there are jobs."""


@dataclass(slots=True)
class Cohort:
    """Lanes start..stop of a job, all about to take evaluation `position`."""

    start: int
    stop: int
    position: int
    cost: Cost = field(default_factory=Cost)  # of each lane

    @property
    def count(self) -> int:
        """How many lanes it has."""
        return self.stop - self.start

    def split(self, count: int) -> "Cohort":
        """Take the first `count` lanes out."""
        head = Cohort(self.start, self.start + count, self.position, replace(self.cost))
        self.start += count
        return head


@dataclass(slots=True, eq=False)
class Entry:
    """A job on the scheduler's books."""

    job_id: int
    job: Job
    caller: str
    admitted_s: float
    deadline_s: float | None
    cohorts: list[Cohort]  # waiting to ride, furthest along first
    riding: int = 0  # lanes in the batch under way
    paused: bool = False
    ready: bool = False  # has lanes that may ride; kept by the scheduler
    key: GraphKey = field(init=False)
    rows_per_lane: int = field(init=False)
    evaluation_count: int = field(init=False)  # of one lane's walk

    def __post_init__(self) -> None:
        self.key = graph_key(self.job)
        self.rows_per_lane = self.job.rows_per_lane
        self.evaluation_count = len(self.job.tables[0].timesteps) if isinstance(self.job, StepJob) else 1

    @property
    def waiting_rows(self) -> int:
        """Rows its waiting lanes would take if all of them rode now."""
        return sum(cohort.count for cohort in self.cohorts) * self.rows_per_lane

    @property
    def outstanding(self) -> int:
        """Evaluations still to be run for its waiting lanes."""
        steps = sum(cohort.count * (self.evaluation_count - cohort.position) for cohort in self.cohorts)
        return steps * self.rows_per_lane

    @property
    def is_over(self) -> bool:
        """Whether no lane is left to ride or riding."""
        return not self.cohorts and not self.riding


@dataclass(frozen=True, slots=True)
class Segment:
    """Lanes of one job that ride in a batch side by side, at the same evaluation."""

    entry: Entry
    cohort: Cohort
    count: int  # lanes
    rows: int  # what they take in the call


@dataclass(frozen=True, slots=True)
class Batch:
    """What one network call evaluates."""

    key: GraphKey
    segments: list[Segment]

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


@dataclass(slots=True)
class _Caller:
    """One caller's work on one graph."""

    served: float  # rows, on the clock of its queue's `level`
    entries: dict[int, Entry] = field(default_factory=dict)  # in order of arrival
    ready: int = 0  # entries with lanes that may ride

    def wanted(self, most: int) -> int:
        """Rows that its lanes could take now, counted up to `most`."""
        rows = 0
        for entry in self.entries.values():
            if entry.ready:
                rows += entry.waiting_rows
                if rows >= most:
                    return most
        return rows


@dataclass(slots=True)
class _Queue:
    """The work of one graph."""

    served: float  # seconds of the device
    level: float = 0.0  # rows served to the least served of the callers at work; where newcomers start
    callers: dict[str, _Caller] = field(default_factory=dict)
    ready: dict[str, _Caller] = field(default_factory=dict)  # those with lanes that may ride


def graph_key(job: Job) -> GraphKey:
    """The graph a job's evaluations are of."""
    return (job.model, job.role if isinstance(job, CallJob) else bundle_pb2.Network.ROLE_DENOISER)


class Scheduler:
    """The books: every accepted and unfinished job, and whose turn it is."""

    def __init__(self, max_rows: int) -> None:
        if max_rows < 2:
            raise ValueError(f"max_rows must be at least 2, since a guided lane takes two rows; got {max_rows}")
        self._max_rows = max_rows
        self._queues: dict[GraphKey, _Queue] = {}
        self._level = 0.0  # seconds served to the least served of the graphs with work; where newcomers start
        self._entries: dict[int, Entry] = {}
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

    def add(self, job_id: int, job: Job, caller: str, now_s: float, deadline_s: float | None = None) -> Entry:
        """Put a job on the books."""
        entry = Entry(job_id, job, caller, now_s, deadline_s, [Cohort(0, job.lane_count, 0)])
        queue = self._queues.setdefault(entry.key, _Queue(self._level))
        if not queue.callers:  # no credit for time away
            queue.served = max(queue.served, self._level)
        queue.callers.setdefault(caller, _Caller(queue.level)).entries[job_id] = entry
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
        queue = self._queues[entry.key]
        caller = queue.callers[entry.caller]
        del caller.entries[job_id]
        if not caller.entries:
            del queue.callers[entry.caller]
        return wasted

    def _refresh(self, entry: Entry) -> None:
        """Keep count of who may ride, after a change to an entry's cohorts or its pause."""
        ready = bool(entry.cohorts) and not entry.paused
        if ready == entry.ready:
            return
        entry.ready = ready
        queue = self._queues[entry.key]
        caller = queue.callers[entry.caller]
        caller.ready += 1 if ready else -1
        if caller.ready:
            queue.ready[entry.caller] = caller
        else:
            queue.ready.pop(entry.caller, None)

    def find(self, job_id: int) -> Entry | None:
        """A job on the books."""
        return self._entries.get(job_id)

    @property
    def can_ride(self) -> bool:
        """Whether `plan` would return a batch."""
        return any(queue.ready for queue in self._queues.values())

    def pause(self, job_id: int, paused: bool) -> None:
        """Let a job's lanes sit out, or ride again."""
        entry = self._entries.get(job_id)
        if entry is not None:
            entry.paused = paused
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
        """The next batch, or None if no lane may ride. The lanes in it ride until `complete`."""
        queue = min((q for q in self._queues.values() if q.ready), key=lambda q: q.served, default=None)
        if queue is None:
            return None
        self._level = max(self._level, queue.served)
        # More callers than rows cannot ride; those who wait longest are among the least served.
        callers = heapq.nsmallest(self._max_rows, queue.ready.values(), key=lambda caller: caller.served)
        queue.level = max(queue.level, callers[0].served)
        segments: list[Segment] = []
        left = self._max_rows
        # The second round gives away what nobody's lanes fitted exactly.
        for rows in (self._shares(callers), None):
            for index, caller in enumerate(callers):
                if not left:
                    break
                riders = self._board(caller, left if rows is None else rows[index])
                taken = sum(segment.rows for segment in riders)
                caller.served += taken
                left -= taken
                segments += riders
        for segment in segments:
            segment.entry.riding += segment.count
            if segment.cohort.position == 0:
                segment.cohort.cost.queue_s = now_s - segment.entry.admitted_s
        return Batch(segments[0].entry.key, segments)

    def _shares(self, callers: list[_Caller]) -> list[int]:
        """Rows for each caller, least served first: one lane's worth each, then equal shares of the rest."""
        left = self._max_rows
        if len(callers) == 1:
            return [left]
        shares = []
        for caller in callers:
            first = next(entry for entry in caller.entries.values() if entry.ready)
            shares.append(first.rows_per_lane if first.rows_per_lane <= left else 0)
            left -= shares[-1]
        wanted = [
            caller.wanted(self._max_rows) - share if share else 0 for caller, share in zip(callers, shares, strict=True)
        ]
        order = sorted((index for index in range(len(callers)) if wanted[index]), key=wanted.__getitem__)
        for done, index in enumerate(order):
            extra = min(wanted[index], left // (len(order) - done))
            shares[index] += extra
            left -= extra
        return shares

    def _board(self, caller: _Caller, rows: int) -> list[Segment]:
        """Seat a caller's lanes in up to `rows` rows: its oldest jobs first, skipping lanes that do not fit."""
        segments: list[Segment] = []
        for entry in caller.entries.values():
            if not rows:
                break
            per_lane = entry.rows_per_lane
            while entry.ready and rows >= per_lane:
                cohort = entry.cohorts[0]
                count = min(cohort.count, rows // per_lane)
                riders = entry.cohorts.pop(0) if count == cohort.count else cohort.split(count)
                self._refresh(entry)
                segments.append(Segment(entry, riders, count, count * per_lane))
                rows -= count * per_lane
        return segments

    def complete(self, batch: Batch, seconds: float) -> list[Arrival]:
        """Move the riders on by one evaluation, `seconds` after they set off; one arrival a segment, in order."""
        self._queues[batch.key].served += seconds
        live_rows = batch.rows
        arrivals: list[Arrival] = []
        for segment in batch.segments:
            entry, cohort = segment.entry, segment.cohort
            entry.riding -= segment.count
            cohort.position += 1
            cohort.cost.compute_s += seconds
            cohort.cost.evaluations += entry.rows_per_lane
            cohort.cost.batches += 1
            cohort.cost.rows += live_rows
            done = cohort.position == entry.evaluation_count
            if not done:
                _insert(entry.cohorts, cohort)
                self._refresh(entry)
            arrivals.append(Arrival(segment, done, done and entry.is_over))
        return arrivals


def _insert(cohorts: list[Cohort], cohort: Cohort) -> None:
    """Keep the furthest along first, and lanes in order among equals."""
    index = 0
    while index < len(cohorts) and (-cohorts[index].position, cohorts[index].start) < (-cohort.position, cohort.start):
        index += 1
    cohorts.insert(index, cohort)
