"""The door: may this job in, and when would it be done? Pure: time is an argument; the engine holds a lock around it.

Work is counted in evaluations that were accepted and are not yet run: a 50-step sample is fifty times a decode. The
server, every model and every caller have a bound. A deadline is refused at once if the job cannot be done in time:

* alone, by the fastest calls that were measured: its steps follow one another, and so do its batches;
* among others, by typical calls, as `scheduler.py` shares: behind the caller's own work, beside everybody else's;
  with a margin that what came of earlier estimates sets.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from latentd_server import shares
from latentd_server.failures import DeadlineUnreachableError, OverloadedError, QuotaExceededError
from latentd_server.job import Job, StepJob, stages
from latentd_server.priority import Priority
from latentd_server.scheduler import Arrival, Batch, BatchRows, GraphKey, graph_key
from latentd_server.step_costs import WINDOW_S, Decaying, DrainRates, Margin, StepCosts

_PLENTY = 4
"""So many times as long as everything outstanding takes is time enough for anybody; no more is asked then."""
_SHORTEST_RETRY_S, _LONGEST_RETRY_S, _UNKNOWN_RETRY_S = 0.05, 30.0, 1.0
_PRESSED_S = 1.0
"""How long after a refusal others are judged before they are read."""
_CANCELLED_AHEAD_S = 0.02
_LOOKED_AT = 256
"""Callers of a flow that an estimate looks at; the rest are taken to be like them."""


class Bounds(NamedTuple):
    """Evaluations that may be accepted and not yet run. Who has none outstanding may always bring one job."""

    server: int
    model: int
    caller: int


class Work(NamedTuple):
    """What a job asks of one graph."""

    key: GraphKey
    steps: int  # evaluations of a lane that follow one another
    rows: int  # that its lanes take together in a call; the mean, where that differs from step to step
    evaluations: int

    @staticmethod
    def of(job: Job) -> "Work":
        """A job, without those that follow it."""
        steps = _steps(job)
        evaluations = job.lane_count * job.evaluations_per_lane
        return Work(graph_key(job), steps, -(-evaluations // steps), evaluations)


@dataclass(slots=True, eq=False)
class _Line:
    """What one caller has in one flow that is not paused. A lane's rows count as often as it takes steps, and so on."""

    weight: float
    flow: "_Flow"
    jobs: int = 0
    rows: int = 0  # of lanes that are not done
    evaluations: int = 0  # not yet run
    steps: int = 0  # rows by the steps of their whole walks
    squares: int = 0  # rows by the squares of these

    @property
    def mean_left(self) -> float:
        """Steps that a lane under way has left on average: long walks are met more often, half done."""
        return self.squares / (2 * self.steps) if self.steps else 0.0

    def add(self, rows: int, steps: int, evaluations: int) -> None:
        """Count lanes of so many rows in, or out."""
        self.rows += rows
        self.steps += rows * steps
        self.squares += rows * steps**2
        self.evaluations += evaluations
        self.flow.rows += rows
        self.flow.evaluations += evaluations


@dataclass(slots=True, eq=False)
class _Flow:
    """What all callers of one priority class have on one graph that is not paused: that keeps nobody waiting."""

    rows: int = 0
    evaluations: int = 0
    lines: dict[str, _Line] = field(default_factory=dict)  # by caller; none without jobs


@dataclass(slots=True, eq=False)
class _Part:
    """What is left of an accepted job on one graph."""

    key: GraphKey
    steps: int
    rows: int
    evaluations: int
    lanes: int = 0  # that keep their state between evaluations
    line: _Line | None = None  # that it is counted in, while it is not paused


@dataclass(slots=True, eq=False)
class _Ticket:
    """What is left of an accepted job, on every graph that its lanes go through."""

    caller: str
    priority: Priority
    admitted_s: float
    foreseen_s: float | None = None  # it takes at most, the margin counted, if that was asked and still holds
    parts: dict[GraphKey, _Part] = field(default_factory=dict)
    paused: bool = False


@dataclass(slots=True, eq=False)
class _Promises:
    """What refused callers were told to come back with."""

    evaluations: float = 0.0
    told_s: float = 0.0

    def wait_s(self, excess: int, evaluations: int, per_s: float, now_s: float) -> float:
        """When `excess` will have drained, and what was promised before; makes one more promise."""
        if not per_s:
            return _UNKNOWN_RETRY_S
        self.evaluations = max(0.0, self.evaluations - per_s * (now_s - self.told_s))
        self.told_s = now_s
        wait_s = (excess + self.evaluations) / per_s
        if wait_s < _LONGEST_RETRY_S:
            self.evaluations += evaluations
        return min(_LONGEST_RETRY_S, max(_SHORTEST_RETRY_S, wait_s))


class Admission:
    """The door's books: what is outstanding, and what calls cost."""

    def __init__(self, bounds: Bounds, max_rows: int, caller_weights: Mapping[str, float] | None = None) -> None:
        """`max_rows`, `caller_weights` and then `batch_rows` are the scheduler's."""
        self._bounds = bounds
        self._tightest = min(bounds)
        self.batch_rows = BatchRows(max_rows)
        self._caller_weights = dict(caller_weights or {})
        self._tickets: dict[int, _Ticket] = {}
        self._flows: dict[GraphKey, dict[Priority, _Flow]] = {}  # those with jobs
        self._by_model: dict[str, int] = {}
        self._by_caller: dict[str, int] = {}
        self._costs: dict[GraphKey, StepCosts] = {}
        self._rates = DrainRates()
        self._refused_s = -math.inf  # when a deadline was, last
        self._margin = Margin()  # of estimates among others, for half of what is at the edge would miss it
        self._inflow = Decaying()  # evaluations accepted of late
        self._promises: dict[str, _Promises] = {}  # by model; "" is the server
        self._state_lanes: dict[GraphKey, int] = {}  # room for lanes' state, where that is bounded
        self._lanes: Counter[GraphKey] = Counter()  # that may take it
        self.backlog = 0  # evaluations accepted and not yet run

    def admit(
        self, job_id: int, job: Job, caller: str, priority: Priority, now_s: float, deadline_s: float | None
    ) -> None:
        """Let a job in.

        Raises:
            QuotaExceededError: the caller has too much outstanding.
            OverloadedError: the server or the model has; says when there will be room.
            DeadlineUnreachableError: it would not be done in time; says when it would be.
        """
        if deadline_s is not None and deadline_s <= now_s:
            raise DeadlineUnreachableError("the deadline has passed before the request was admitted", 0.0)
        self._check_bounds(job, caller, now_s)
        if self._state_lanes:
            self._check_state(job, now_s)
        foreseen_s = None
        if deadline_s is not None:
            every = [Work.of(stage) for stage in stages(job)]
            foreseen_s = self._check_reachable(every, caller, priority, now_s, deadline_s - now_s)
        ticket = self._tickets[job_id] = _Ticket(caller, priority, now_s, foreseen_s)
        for stage in stages(job):
            evaluations = stage.lane_count * stage.evaluations_per_lane
            part = _Part(graph_key(stage), _steps(stage), stage.lane_count * stage.rows_per_lane, evaluations)
            if part.steps > 1 and part.key in self._state_lanes:
                part.lanes = stage.lane_count
                self._lanes[part.key] += part.lanes
            ticket.parts[part.key] = part
            self._inflow.add(evaluations, now_s)
            self._enter(ticket, part)
            self._count(part, caller, evaluations)

    def limit_state(self, key: GraphKey, lanes: int) -> None:
        """A graph's device has room for the state of so many lanes between their evaluations, of all callers."""
        self._state_lanes[key] = lanes

    def has_room(self, evaluations: int) -> bool:
        """Whether there is room for so many of any model and caller, for there is little altogether."""
        return self.backlog + evaluations <= self._tightest

    def check_room(self, model: str, caller: str, evaluations: int, now_s: float) -> None:
        """Refuse what is not worth understanding: a request that takes so many evaluations at least, and has no room.

        Raises:
            QuotaExceededError, OverloadedError: as `admit`.
        """
        self._check_held({model: evaluations}, caller, now_s)

    def is_pressed(self, now_s: float) -> bool:
        """Whether deadlines were refused of late."""
        return now_s - self._refused_s < _PRESSED_S

    def check_time(self, least: Work, caller: str, priority: Priority, now_s: float, deadline_s: float) -> None:
        """Refuse what is not worth understanding: a request that takes so much at least, and would not be in time.

        Raises:
            DeadlineUnreachableError: as `admit`.
        """
        self._check_reachable([least], caller, priority, now_s, deadline_s - now_s)

    def ran(self, batch: Batch, arrivals: list[Arrival], size: int, seconds: float, now_s: float) -> None:
        """Learn of a batch: what is done of whose work, and what a call of `size` rows took."""
        for arrival in arrivals:
            ticket = self._tickets.get(arrival.segment.entry.root)
            if ticket is None:
                continue  # given up while it rode
            part = ticket.parts[batch.key]
            segment = arrival.segment
            rows, done = segment.rows, segment.count * segment.entry.rows_per_lane if arrival.done else 0
            part.rows -= done
            part.evaluations -= rows
            if part.lanes and arrival.done:
                part.lanes -= segment.count
                self._lanes[part.key] -= segment.count
            if part.line is not None:
                part.line.add(-done, part.steps, -rows)
            self._count(part, ticket.caller, -rows)
        self._costs.setdefault(batch.key, StepCosts()).timed(size, seconds, now_s)
        self._rates.ran(batch.key[0], batch.rows, seconds)

    def pause(self, job_id: int, paused: bool) -> None:
        """Learn that a job sits out, or rides again. Its work stays outstanding."""
        ticket = self._tickets.get(job_id)
        if ticket is not None and ticket.paused != paused:
            ticket.paused = paused
            ticket.foreseen_s = None
            for part in ticket.parts.values():
                if paused:
                    self._exit(ticket, part)
                else:
                    self._enter(ticket, part)

    def ended(self, job_id: int, now_s: float, *, done: bool) -> None:
        """Forget a job, done or given up, and learn whether it was done when it was foreseen."""
        ticket = self._tickets.pop(job_id, None)
        if ticket is None:
            return
        if ticket.foreseen_s is not None:
            # Who gives a job up for its deadline does so a little before it passes.
            late = now_s - ticket.admitted_s > ticket.foreseen_s - (0.0 if done else _CANCELLED_AHEAD_S)
            if late or done:
                self._margin.saw(now_s, late=late)
        for part in ticket.parts.values():
            if not ticket.paused:
                self._exit(ticket, part)
            self._count(part, ticket.caller, -part.evaluations)
            if part.lanes:
                self._lanes[part.key] -= part.lanes

    def _enter(self, ticket: _Ticket, part: _Part) -> None:
        flows = self._flows.setdefault(part.key, {})
        flow = flows.get(ticket.priority)
        if flow is None:
            flow = flows[ticket.priority] = _Flow()
        line = flow.lines.get(ticket.caller)
        if line is None:
            line = flow.lines[ticket.caller] = _Line(self._weight(ticket.caller), flow)
        part.line = line
        line.jobs += 1
        line.add(part.rows, part.steps, part.evaluations)

    def _exit(self, ticket: _Ticket, part: _Part) -> None:
        line, part.line, flows = part.line, None, self._flows[part.key]
        assert line is not None
        line.add(-part.rows, part.steps, -part.evaluations)
        line.jobs -= 1
        if not line.jobs:
            del line.flow.lines[ticket.caller]
            if not line.flow.lines:
                del flows[ticket.priority]
            if not flows:
                del self._flows[part.key]

    def forget_terms(self, model: str) -> None:
        """Forget on what terms the graphs of a model were attached. Jobs that were given up may end later."""
        for key in [key for key in self._state_lanes if key[0] == model]:
            del self._state_lanes[key]
        for key in [key for key, lanes in self._lanes.items() if key[0] == model and not lanes]:
            del self._lanes[key]
        self.batch_rows.forget(model)
        self._promises.pop(model, None)

    def forget_costs(self, model: str) -> None:
        """Forget what the graphs of a model cost; the last of their calls must be over."""
        for key in [key for key in self._costs if key[0] == model]:
            del self._costs[key]
        self._rates.rows.pop(model, None)

    def _weight(self, caller: str) -> float:
        return self._caller_weights.get(caller, 1.0)

    def _count(self, part: _Part, caller: str, change: int) -> None:
        self.backlog += change
        for book, name in ((self._by_model, part.key[0]), (self._by_caller, caller)):
            left = book.get(name, 0) + change
            if left:
                book[name] = left
            else:
                book.pop(name, None)

    def _check_bounds(self, job: Job, caller: str, now_s: float) -> None:
        if job.then is None:
            self._check_held({job.model: job.lane_count * job.evaluations_per_lane}, caller, now_s)
            return
        asked: dict[str, int] = {}
        for stage in stages(job):
            asked[stage.model] = asked.get(stage.model, 0) + stage.lane_count * stage.evaluations_per_lane
        self._check_held(asked, caller, now_s)

    def _check_held(self, asked: dict[str, int], caller: str, now_s: float) -> None:
        evaluations = sum(asked.values())
        if self.has_room(evaluations):
            return
        held, bound = self._by_caller.get(caller, 0), self._bounds.caller
        if held and held + evaluations > bound:
            text = f"a caller may have {bound} evaluations outstanding; this one has {held} and asks for {evaluations}"
            raise QuotaExceededError(f"caller:{caller}", text)
        for model, wanted in (("", evaluations), *asked.items()):
            held = self._by_model.get(model, 0) if model else self.backlog
            bound = self._bounds.model if model else self._bounds.server
            if held and held + wanted > bound:
                excess = min(held, held + wanted - bound)
                promises = self._promises.setdefault(model, _Promises(told_s=now_s))
                retry_s = promises.wait_s(excess, wanted, self._rates.per_s(model), now_s)
                raise OverloadedError(held, bound, retry_s, model)

    def _check_state(self, job: Job, now_s: float) -> None:
        for stage in stages(job):
            key = graph_key(stage)
            most, held = self._state_lanes.get(key), self._lanes[key]
            if most is None or not held or held + stage.lane_count <= most or _steps(stage) == 1:
                continue
            left_of_each = self._by_model.get(stage.model, 0) / held
            excess = math.ceil((held + stage.lane_count - most) * left_of_each)
            promises = self._promises.setdefault(stage.model, _Promises(told_s=now_s))
            wanted = stage.lane_count * stage.evaluations_per_lane
            retry_s = promises.wait_s(excess, wanted, self._rates.per_s(stage.model), now_s)
            unit = "samples under way, whose state is on the device,"
            raise OverloadedError(held, most, retry_s, stage.model, unit=unit)

    def _check_reachable(
        self, every: list[Work], caller: str, priority: Priority, now_s: float, left_s: float
    ) -> float | None:
        """What it is foreseen to take, where that is worth asking.

        The longest of a job's stages is judged among others; the rest are taken to be alone, for by then, or until
        then, those who wait for these graphs now are others.
        """
        work = max(every, key=lambda each: each.steps)
        beside_s = sum(self._alone_s(each, now_s) for each in every if each is not work)
        costs = self._costs.get(work.key)
        if costs is None or not costs.is_fresh(now_s):
            return None
        rate = self._rates.per_s()
        typical_s = costs.typical(self.batch_rows.of(work.key))
        last_s = (self.backlog + work.evaluations) / rate + work.steps * typical_s if rate else math.inf
        if _PLENTY * (last_s + beside_s) <= left_s:
            return None
        alone_s = beside_s + self._alone_s(work, now_s)
        if alone_s > left_s:
            self._refused_s = now_s
            batches = sum(self._batches(each) for each in every)
            text = f"{batches} evaluations one after another take {alone_s:.3g} s or more; {left_s:.3g} s are left"
            raise DeadlineUnreachableError(text, alone_s)
        margin = 1.0 if self._fits_a_batch(work) else self._margin.read(now_s)
        foreseen_s = margin * (beside_s + self._estimate_s(work, caller, priority, now_s))
        if foreseen_s > left_s:
            self._refused_s = now_s
            text = f"among the work of others it would take up to {foreseen_s:.3g} s; {left_s:.3g} s are left"
            raise DeadlineUnreachableError(text, foreseen_s)
        return foreseen_s if margin > 1 else None

    def _demand(self, work: Work) -> int:
        """Rows that a graph's jobs would take together, this one among them."""
        return work.rows + sum(flow.rows for flow in self._flows.get(work.key, {}).values())

    def _fits_a_batch(self, work: Work) -> bool:
        """Whether a job would ride in every batch, with all there is on its graph."""
        return self._demand(work) <= self.batch_rows.of(work.key)

    def _batches(self, work: Work) -> int:
        """Calls that a job alone needs, one after another."""
        return max(work.steps, -(-work.evaluations // self.batch_rows.of(work.key)))

    def _alone_s(self, work: Work, now_s: float) -> float:
        """Seconds a job needs at least; 0 where that is not known."""
        costs = self._costs.get(work.key)
        if costs is None or not costs.is_fresh(now_s):
            return 0.0
        return self._batches(work) * costs.least(min(work.rows, self.batch_rows.of(work.key)), now_s)

    def estimate_s(self, job: Job, caller: str, priority: Priority, now_s: float) -> float:
        """Seconds until a job would be done if it were let in now and nobody came after it.

        Where everything fits into one batch it is a lower bound. Else it is a fluid model of the scheduler: lanes
        take seats by weight, and nobody is given more than is outstanding.
        """
        return self._estimate_s(Work.of(job), caller, priority, now_s)

    def _estimate_s(self, work: Work, caller: str, priority: Priority, now_s: float) -> float:
        key = work.key
        costs = self._costs.get(key, StepCosts())
        if self._fits_a_batch(work):
            own_s = work.steps * costs.least(self._demand(work), now_s)
            return own_s + self._elsewhere_s(key, priority, own_s)
        seats, ahead = self._seats(key, caller, priority, work.rows)
        # Others who are done are followed by others still, as many as came of late.
        rate = self._rates.per_s()
        pace = 1 - min(1.0, self._inflow.read(now_s) / WINDOW_S / rate) if rate else 0.0

        def batches(evaluations: float) -> float:
            beside = self._beside(key, caller, priority, evaluations)
            return min(evaluations / seats, beside / pace) if pace else evaluations / seats

        start, walk = batches(ahead), max(float(work.steps), batches(work.evaluations))
        own_s = (start + walk) * costs.typical(self.batch_rows.of(key))
        return own_s + self._elsewhere_s(key, priority, own_s)

    def _class_weights(self, key: GraphKey, priority: Priority) -> dict[tuple[GraphKey, Priority], float]:
        """What each flow weighs against the others, the one that is asked for among them."""
        active = {(graph, one) for graph, flows in self._flows.items() for one in flows} | {(key, priority)}
        graphs = Counter(one for _, one in active)
        return {(graph, one): one.weight / graphs[one] for graph, one in active}

    def _seats(self, key: GraphKey, caller: str, priority: Priority, rows: int) -> tuple[float, float]:
        """Rows of a batch that a caller would get with `rows` more, and evaluations it has to run before those ride."""
        flows, weights = self._flows.get(key, {}), self._class_weights(key, priority)
        claims = {one: shares.Claim(0.0, weights[key, one], flow.rows) for one, flow in flows.items()}
        mine = flows.get(priority) or _Flow()
        claims[priority] = shares.Claim(0.0, weights[key, priority], mine.rows + rows)
        share = _share(self.batch_rows.of(key), claims[priority], [c for one, c in claims.items() if one != priority])
        line = mine.lines.get(caller) or _Line(self._weight(caller), mine)
        others, scale = _others(mine, caller)
        own = shares.Claim(0.0, line.weight, line.rows + rows)
        seats = _share(share, own, [shares.Claim(0.0, scale * o.weight, scale * o.rows) for o in others])
        if seats >= own.wanted:
            return seats, 0.0
        beside = max(0.0, min(seats, line.rows) - rows)  # the caller's own, when the last of these rows sets off
        return seats, max(0.0, line.evaluations - beside * line.mean_left)

    def _beside(self, key: GraphKey, caller: str, priority: Priority, evaluations: float) -> float:
        """Batches in which a caller gets so many evaluations while the others on its graph get theirs."""
        flows, weights = self._flows.get(key, {}), self._class_weights(key, priority)
        total = evaluations
        if priority in flows:
            others, scale = _others(flows[priority], caller)
            pace = evaluations / self._weight(caller)
            total += scale * sum(min(other.evaluations, pace * other.weight) for other in others)
        pace = total / weights[key, priority]
        total += sum(min(flow.evaluations, pace * weights[key, one]) for one, flow in flows.items() if one != priority)
        return total / self.batch_rows.of(key)

    def _elsewhere_s(self, key: GraphKey, priority: Priority, own_s: float) -> float:
        """Seconds that other graphs get of the device while this one gets `own_s`."""
        if not self._flows.keys() - {key}:
            return 0.0
        weights = self._class_weights(key, priority)
        pace = own_s / sum(weight for (graph, _), weight in weights.items() if graph == key)
        total = 0.0
        for graph, flows in self._flows.items():
            rows = min(self.batch_rows.of(graph), sum(flow.rows for flow in flows.values()))
            if graph != key and graph in self._costs and rows:
                evaluation_s = self._costs[graph].typical(rows) / rows
                for one, flow in flows.items():
                    total += min(flow.evaluations * evaluation_s, pace * weights[graph, one])
        return total


def _steps(job: Job) -> int:
    """Evaluations of a lane that follow one another."""
    return len(job.tables[0].timesteps) if isinstance(job, StepJob) else 1


def _others(flow: _Flow, caller: str) -> tuple[list[_Line], float]:
    """Other callers of a flow, as many as are looked at, and how many each of them stands for."""
    count = len(flow.lines) - (caller in flow.lines)
    others = list(islice((line for name, line in flow.lines.items() if name != caller), _LOOKED_AT))
    return others, count / len(others) if others else 1.0


def _share(rows: float, mine: shares.Claim, others: list[shares.Claim]) -> float:
    """What one of several gets of so many rows."""
    return min(mine.wanted, mine.weight * shares.level(rows, [mine, *others]))
