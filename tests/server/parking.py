"""Holds the engine where a job is at a named point, so that a test decides what happens meanwhile."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from latentd_server.points import Points
from latentd_server.scheduler import Arrival, Batch, Entry

QUEUED, REPLYING = "queued", "replying"
Place = str | int
"""QUEUED: before its first batch. A number: that evaluation is under way, from 0. REPLYING: its last is over."""

_PATIENCE_S = 60.0


@dataclass
class Stop:
    """Where the engine is to be held, and whether it is there."""

    seed: int
    place: Place
    arrived: threading.Event = field(default_factory=threading.Event)
    leave: threading.Event = field(default_factory=threading.Event)
    jobs: int = 0  # in the batch it was held with
    deadline_s: float = 0.0  # of the job, by the engine's clock; 0 if it has none


class Parking(Points):
    """The points of an engine whose tests tell jobs apart by their seeds."""

    def __init__(self) -> None:
        self._stops: list[Stop] = []

    def hold(self, seed: int, place: Place) -> Stop:
        """Hold the engine when a job with that seed is there for the first time from now on, until told to leave."""
        stop = Stop(seed, place)
        self._stops.append(stop)
        return stop

    def clear(self) -> None:
        """Let everything go on."""
        stops, self._stops = self._stops, []
        for stop in stops:
            stop.leave.set()

    def queued(self, entry: Entry) -> None:
        self._pass(entry, QUEUED, 1)

    def evaluating(self, batch: Batch) -> None:
        for segment in batch.segments:
            self._pass(segment.entry, segment.position, len(batch.segments))

    def evaluated(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            if arrival.last:
                self._pass(arrival.segment.entry, REPLYING, len(arrivals))

    def _pass(self, entry: Entry, place: Place, jobs: int) -> None:
        for stop in list(self._stops):
            if (stop.seed, stop.place) == (entry.job.seed, place) and not stop.arrived.is_set():
                stop.jobs = jobs
                stop.deadline_s = entry.deadline_s or 0.0
                stop.arrived.set()
                if not stop.leave.wait(_PATIENCE_S):
                    raise TimeoutError(f"a test held the engine at {place} for {_PATIENCE_S:g} s")
