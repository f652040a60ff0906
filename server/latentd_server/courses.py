"""Requests whose lanes go through several jobs, one after another (ADR 24): what the engine must remember of them.

The request is known by its first job, the *root*. Whenever lanes of a job that has a `Handover` are done, they go on as
a *stage*: a job of their own on the scheduler's books, which other lanes of the request do not wait for. Pure.
"""

from dataclasses import dataclass, field

from latentd_server.job import Array, Cost
from latentd_server.scheduler import Arrival, Entry


@dataclass(slots=True, eq=False)
class Stage:
    """Lanes of a request that are in one job together."""

    entry: Entry
    lanes: Array  # [k] i64, which of the request's they are
    before: Cost  # of each of them, in the jobs before
    left: int  # of them that are in this job still

    def arrived(self, arrival: Arrival) -> tuple[Array, Cost]:
        """Which of the request's lanes have landed, and what each of them has cost until now."""
        segment, before = arrival.segment, self.before
        if arrival.done:
            self.left -= segment.count
        own = segment.cohort.cost
        each = Cost(
            before.queue_s if before.batches else own.queue_s,
            before.compute_s + own.compute_s,
            before.evaluations + own.evaluations,
            before.batches + own.batches,
            before.rows + own.rows,
        )
        return self.lanes[segment.start : segment.start + segment.count], each


@dataclass(slots=True, eq=False)
class Course:
    """A request of several jobs."""

    lanes_left: int  # that are not answered
    stages: dict[int, Stage] = field(default_factory=dict)  # by the job's id
    paused: bool = False

    def begin(self, entry: Entry, lanes: Array, before: Cost) -> None:
        """Lanes are in this job from now on."""
        self.stages[entry.job_id] = Stage(entry, lanes, before, len(lanes))

    def spent_before(self) -> int:
        """Evaluations that unanswered lanes took in jobs before the ones they are in."""
        return sum(stage.left * stage.before.evaluations for stage in self.stages.values())
