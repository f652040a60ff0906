"""An engine that does nothing by itself: tests decide what becomes of jobs, and see what was asked of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from latentd_server.admission import Work
from latentd_server.job import CallJob, Cost, Event, Failed, Finished, Job, Preview, StepJob
from latentd_server.priority import Priority

SAMPLE = (1, 4, 4)


@dataclass
class Submitted:
    """A job as it was submitted."""

    job: Job
    caller: str
    deadline: float | None
    sink: Callable[[Event], None]
    priority: Priority
    paused: bool = False


@dataclass
class ManualEngine:
    """Fulfils `latentd_server.exchange.Engine`."""

    refusal: Exception | None = None  # raised by the next submissions
    full: Exception | None = None  # raised where a request asks for room before it is read
    asked_for: list[tuple[str, str, int]] = field(default_factory=list)  # model, caller, evaluations
    crowded: bool = True
    late: Exception | None = None  # raised where a request asks for time before it is read
    asked_time_for: list[Work] = field(default_factory=list)
    pressed: bool = True
    draining: bool = False
    jobs: dict[int, Submitted] = field(default_factory=dict)
    submitted: list[Job] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    @property
    def queue_depth(self) -> int:
        return len(self.jobs)

    def check_room(self, model: str, caller: str, evaluations: int) -> None:
        self.asked_for.append((model, caller, evaluations))
        if self.full is not None:
            raise self.full

    def check_time(self, least: Work, caller: str, priority: Priority, deadline: float) -> None:
        self.asked_time_for.append(least)
        if self.late is not None:
            raise self.late

    def submit(
        self,
        job: Job,
        *,
        caller: str,
        deadline: float | None,
        sink: Callable[[Event], None],
        priority: Priority = Priority.NORMAL,
    ) -> int:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(job)
        job_id = len(self.submitted)
        self.jobs[job_id] = Submitted(job, caller, deadline, sink, priority)
        return job_id

    def cancel(self, job_id: int) -> None:
        if self.jobs.pop(job_id, None) is not None:
            self.cancelled.append(job_id)

    def pause(self, job_id: int) -> None:
        self.jobs[job_id].paused = True

    def resume(self, job_id: int) -> None:
        self.jobs[job_id].paused = False

    def preview(self, job_id: int, lanes: list[int], completed: int, value: float = 0.0) -> None:
        """Tell of lanes under way; every element of the estimate is `value`."""
        estimates = np.full((len(lanes), *SAMPLE), value, np.float32)
        total = self.jobs[job_id].job.tables[0].step_count  # type: ignore[union-attr]
        self.jobs[job_id].sink(Preview(np.array(lanes), completed, total, estimates))

    def finish(self, job_id: int, lanes: list[int] | None = None, outputs: dict[str, Any] | None = None) -> None:
        """Finish lanes, all by default; the outputs are zeros by default."""
        submitted = self.jobs[job_id]
        everything = list(range(submitted.job.lane_count))
        done = everything if lanes is None else lanes
        cost = Cost(queue_s=0.25, compute_s=0.5, evaluations=len(done), batches=2, rows=6)
        last = done[-1] == everything[-1]
        if last:
            del self.jobs[job_id]
        submitted.sink(Finished(np.array(done), outputs or _zeros(submitted.job, len(done)), cost, last))

    def fail(self, job_id: int, error: Exception) -> None:
        """End a job without a result."""
        self.jobs.pop(job_id).sink(Failed(error))


def _zeros(job: Job, count: int) -> dict[str, Any]:
    if isinstance(job, StepJob):
        names = ["sample", *(["denoised", "noise"] * job.estimates_wanted), *(["history"] * job.history_wanted)]
        return {name: np.zeros((count, *SAMPLE), np.float32) for name in names}
    assert isinstance(job, CallJob)
    shapes = {"sample": SAMPLE, "draw": SAMPLE, "bound": (), "real": ()}
    return {name: np.zeros((count, *shapes.get(name, (3,))), np.float32) for name in job.outputs}
