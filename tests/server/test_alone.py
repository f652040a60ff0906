"""Lanes that have calls to themselves."""

from collections.abc import Sequence

import numpy as np
import pytest
from latentd.v1 import bundle_pb2
from latentd_server.alone import Alone
from latentd_server.job import CallJob
from latentd_server.runners import Array, Outcome, evaluate
from latentd_server.scheduler import Scheduler, Segment


class Counting:
    """A runner whose lanes say how often they took a step, and that fails when it is told to."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int], int] = {}
        self.failing: set[tuple[int, int]] = set()
        self.forgotten: list[int] = []

    def padded(self, rows: int) -> int:
        return rows + 100

    def forget(self, job_id: int) -> None:
        self.forgotten.append(job_id)

    def warm(self) -> None:
        self.is_warm = True

    def prepare(self, segments: Sequence[Segment]) -> tuple[int, int]:
        [segment] = segments
        assert (segment.count, segment.cohort.count) == (1, 1), "one lane a call"
        return segment.entry.job_id, segment.start

    def run(self, prepared: tuple[int, int]) -> Array:
        if prepared in self.failing:
            raise RuntimeError("bad lane")
        self.steps[prepared] = self.steps.get(prepared, 0) + 1
        return np.array([prepared])

    def finish(self, prepared: tuple[int, int], results: Array) -> list[Outcome]:
        return [Outcome(preview=results, outputs={"y": results})]


def segments(*lane_counts: int) -> list[Segment]:
    scheduler = Scheduler(32)
    for job_id, count in enumerate(lane_counts):
        lanes = np.arange(count)
        job = CallJob("m@1", bundle_pb2.Network.ROLE_DECODER, count, {}, ("y",), 0, lanes, lanes)
        scheduler.add(job_id, job, "test", 0.0)
    batch = scheduler.plan(0.0)
    assert batch is not None
    return batch.segments


def test_every_lane_has_a_call_and_its_segment_one_outcome() -> None:
    """Three lanes and two are five calls, and two outcomes with their lanes in order."""
    outcomes = evaluate(Alone(Counting()), segments(3, 2))
    assert [outcome.outputs["y"].tolist() for outcome in outcomes if outcome.outputs] == [
        [[0, 0], [0, 1], [0, 2]],
        [[1, 0], [1, 1]],
    ]
    assert all(outcome.preview is not None for outcome in outcomes)


def test_a_lane_that_fails_makes_nobody_step_twice() -> None:
    """What was done before the failure is kept for the second try, when segments go one by one."""
    inner = Counting()
    alone, batch = Alone(inner), segments(2, 3, 1)
    inner.failing.add((1, 1))
    with pytest.raises(RuntimeError, match="bad lane"):
        evaluate(alone, batch)
    assert evaluate(alone, batch[:1])
    with pytest.raises(RuntimeError, match="bad lane"):
        evaluate(alone, batch[1:2])
    assert evaluate(alone, batch[2:])
    assert set(inner.steps.values()) == {1}
    inner.failing.clear()
    evaluate(alone, batch[:1])
    assert inner.steps[0, 0] == 2, "the next step is a step"


def test_forgetting_a_job_forgets_what_it_had_done() -> None:
    """Nothing of a job stays, here or further down."""
    inner = Counting()
    alone, batch = Alone(inner), segments(2)
    inner.failing.add((0, 1))
    with pytest.raises(RuntimeError):
        evaluate(alone, batch)
    alone.forget(0)
    inner.failing.clear()
    evaluate(alone, batch)
    assert inner.forgotten == [0]
    assert inner.steps[0, 0] == 2


def test_a_job_may_be_forgotten_during_its_call() -> None:
    """The call gives what it gives, and nothing of it stays."""
    inner = Counting()
    alone, batch = Alone(inner), segments(2, 1)
    run = inner.run

    def forgetting(prepared: tuple[int, int]) -> Array:
        if prepared == (0, 1):
            alone.forget(0)
        return run(prepared)

    inner.run = forgetting  # type: ignore[method-assign]
    outcomes = evaluate(alone, batch)
    assert [outcome.outputs["y"].tolist() for outcome in outcomes if outcome.outputs][1] == [[1, 0]]
    assert not alone._done


def test_nothing_is_padded() -> None:
    """Rows of the batch are the rows of its calls."""
    assert Alone(Counting()).padded(5) == 5
