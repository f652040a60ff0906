"""The real scheduler and the real door under a virtual clock, and what they are compared with. Pure and repeatable.

A network call of n rows takes `curve(n)` seconds and nothing else takes any time. Requests want one sample each, of
10, 25 or 50 steps. The rivals batch whole requests: equal ones only, or any, and then all wait for the longest.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from latentd_server.admission import Admission, Bounds
from latentd_server.failures import ServingError
from latentd_server.job import Start, StepJob
from latentd_server.priority import Priority
from latentd_server.samplers import COLUMNS, Table
from latentd_server.scheduler import Scheduler

STEPS = (10, 25, 50)
ROWS = 32
SIZES = (1, 2, *range(4, ROWS + 1, 4))
MODEL = "simulated@1"
Curve = Callable[[int], float]
UNBOUNDED = Bounds(10**12, 10**12, 10**12)


@dataclass(frozen=True)
class Ask:
    """One request."""

    at_s: float
    steps: int
    timeout_s: float | None = None
    caller: str = "x"
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True)
class Outcome:
    """What became of one."""

    ask: Ask
    over_s: float
    refusal: Exception | None = None
    estimate_s: float | None = None  # what the door foretold
    late: bool = False

    @property
    def latency_s(self) -> float:
        """From asking to the answer."""
        return self.over_s - self.ask.at_s

    @property
    def served(self) -> bool:
        """Whether it was done, and in time."""
        return self.refusal is None and not self.late


class Load:
    """Requests as they come: known beforehand, or one anew for each that is over."""

    def __init__(self, asks: Iterable[Ask], follow: Callable[[Outcome], Ask | None] = lambda outcome: None) -> None:
        self._numbers = itertools.count()
        self._waiting = [(ask.at_s, next(self._numbers), ask) for ask in asks]
        heapq.heapify(self._waiting)
        self._follow = follow
        self.outcomes: list[Outcome] = []

    def arrived(self, now_s: float) -> Iterator[Ask]:
        """Those who have come by now, in order."""
        while self._waiting and self._waiting[0][0] <= now_s:
            yield heapq.heappop(self._waiting)[2]

    @property
    def next_s(self) -> float | None:
        """When the next one comes."""
        return self._waiting[0][0] if self._waiting else None

    def over(self, outcome: Outcome) -> None:
        """One is over."""
        self.outcomes.append(outcome)
        if (after := self._follow(outcome)) is not None:
            heapq.heappush(self._waiting, (after.at_s, next(self._numbers), after))


def poisson(
    per_s: float, count: int, seed: int = 0, timeout: Callable[[int], float] | None = None, **fields: object
) -> Load:
    """So many arrivals of an open loop, step counts equally likely; `timeout` says seconds by steps."""
    rng = random.Random(seed)
    asks, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(per_s)
        steps = rng.choice(STEPS)
        asks.append(Ask(now, steps, timeout(steps) if timeout else None, **fields))  # type: ignore[arg-type]
    return Load(asks)


def closed(in_flight: int, count: int, seed: int = 0) -> Load:
    """A closed loop: whoever is answered asks again."""
    rng = random.Random(seed)
    left = itertools.count(in_flight)
    return Load(
        [Ask(0.0, rng.choice(STEPS)) for _ in range(in_flight)],
        lambda outcome: Ask(outcome.over_s, rng.choice(STEPS)) if next(left) < count else None,
    )


def padded(rows: int) -> int:
    """The bucket of a batch."""
    return next(size for size in SIZES if size >= rows)


def interpolated(points: dict[int, float]) -> Curve:
    """A curve through measured points, in seconds; batches are padded to buckets."""
    sizes = sorted(points)
    costs = [float(np.interp(padded(rows), sizes, [points[size] for size in sizes])) for rows in range(1, ROWS + 1)]
    return lambda rows: costs[rows - 1]


MEASURED = interpolated({1: 1.0e-3, 4: 1.6e-3, 8: 2.8e-3, 16: 5.0e-3, 32: 9.4e-3})
"""An 8x8 U-Net on two cores, by ONNX Runtime: nearly proportional to the rows."""
LAUNCH_BOUND = interpolated({rows: max(1.0, 0.5 + rows / 16) * 1e-3 for rows in range(1, ROWS + 1)})
"""A device that a few rows do not fill."""


def job(steps: int, lanes: int = 1) -> StepJob:
    """So many samples of so many steps."""
    table = Table(
        timesteps=np.arange(steps)[::-1],
        coefficients=np.zeros((steps, len(COLUMNS)), np.float32),
        completed_steps=np.arange(1, steps + 1, dtype=np.int32),
        step_count=steps,
    )
    indices = np.arange(lanes)
    return StepJob(MODEL, lanes, (table,), Start(noise_scale=1.0), 0, indices, np.full(lanes, -1))


_JOBS = {steps: job(steps) for steps in STEPS}


@dataclass
class StepLevel:
    """The server: every step is planned anew."""

    curve: Curve
    bounds: Bounds = UNBOUNDED
    weights: dict[str, float] = field(default_factory=dict)

    def run(self, load: Load) -> list[Outcome]:
        """Serve a load to its end."""
        scheduler = Scheduler(ROWS, self.weights)
        admission = Admission(self.bounds, ROWS, self.weights)
        numbers, asked = itertools.count(), dict[int, tuple[Ask, float | None]]()
        now_s = 0.0
        while True:
            for ask in load.arrived(now_s):
                number, deadline_s = next(numbers), None if ask.timeout_s is None else ask.at_s + ask.timeout_s
                wanted = _JOBS[ask.steps]
                estimate_s = admission.estimate_s(wanted, ask.caller, ask.priority, now_s)
                try:
                    admission.admit(number, wanted, ask.caller, ask.priority, now_s, deadline_s)
                except ServingError as refusal:
                    load.over(Outcome(ask, now_s, refusal, estimate_s))
                    continue
                scheduler.add(number, wanted, ask.caller, now_s, deadline_s, ask.priority)
                asked[number] = (ask, estimate_s)
            for number in scheduler.expired(now_s):
                scheduler.remove(number)
                admission.ended(number, now_s, done=False)
                load.over(Outcome(asked[number][0], now_s, None, asked.pop(number)[1], late=True))
            batch = scheduler.plan(now_s)
            if batch is None:
                if load.next_s is None:
                    return load.outcomes
                now_s = load.next_s
                continue
            seconds = self.curve(batch.rows)
            now_s += seconds
            arrivals = scheduler.complete(batch, seconds)
            admission.ran(batch, arrivals, padded(batch.rows), seconds, now_s)
            for arrival in arrivals:
                if arrival.last:
                    number = arrival.segment.entry.job_id
                    scheduler.remove(number)
                    admission.ended(number, now_s, done=True)
                    ask, estimate_s = asked.pop(number)
                    late = ask.timeout_s is not None and now_s > ask.at_s + ask.timeout_s
                    load.over(Outcome(ask, now_s, None, estimate_s, late))


@dataclass
class RequestLevel:
    """A server that batches whole requests: the oldest, and others that wait; all are answered together."""

    curve: Curve
    equal_steps: bool = True  # only with its like
    max_rows: int = ROWS

    def run(self, load: Load) -> list[Outcome]:
        """Serve a load to its end."""
        waiting: deque[Ask] = deque()
        now_s = 0.0
        while True:
            waiting.extend(load.arrived(now_s))
            if not waiting:
                if load.next_s is None:
                    return load.outcomes
                now_s = load.next_s
                continue
            riders = [ask for ask in waiting if not self.equal_steps or ask.steps == waiting[0].steps][: self.max_rows]
            riding = set(map(id, riders))
            waiting = deque(ask for ask in waiting if id(ask) not in riding)
            now_s += max(ask.steps for ask in riders) * self.curve(len(riders))
            for ask in riders:
                load.over(Outcome(ask, now_s))


def capacity_per_s(curve: Curve) -> float:
    """Requests a second that full batches can serve."""
    return ROWS / curve(ROWS) / (sum(STEPS) / len(STEPS))


def throughput_per_s(outcomes: list[Outcome]) -> float:
    """Requests served in time, a second."""
    return sum(outcome.served for outcome in outcomes) / max(outcome.over_s for outcome in outcomes)


def latencies_s(outcomes: list[Outcome], steps: int | None = None) -> np.ndarray:
    """Latencies of those served; of one step count, or all."""
    return np.array([o.latency_s for o in outcomes if o.served and steps in (None, o.ask.steps)])
