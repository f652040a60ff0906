"""Whether the promise holds: a sample that has been answered is made again, alone, and its bytes are compared.

At most one at a time, and only while the engine has nothing else to do: one evaluation at a time, so that work that
arrives waits for no more than a call of one lane. What is kept is the job of that lane and the digest of its bytes.
Used by one thread at a time, `step` by the device's; told the time, reads no clock.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from latentd.v1 import bundle_pb2

from latentd_server.job import Job, StepJob, lanes_of
from latentd_server.runners import Outcome, Runner, evaluate
from latentd_server.runtime import Array
from latentd_server.scheduler import Arrival, Cohort, Entry, GraphKey, Scheduler, Segment

log = logging.getLogger(__name__)

_JOB_ID = -3
"""The engine's are positive."""


class SelfCheckMetrics(Protocol):
    """What self-checks report."""

    def self_checked(self, model: str, result: str) -> None:
        """One check: `match`, `mismatch`, or `failed` where the second run raised an error."""

    def self_check_evaluated(self, model: str, role: bundle_pb2.Network.Role.ValueType, rows: int) -> None:
        """Network evaluations spent on a check."""


@dataclass(slots=True)
class _Check:
    """A lane that is being made again."""

    entry: Entry
    digest: bytes
    position: int = 0


class SelfCheck:
    """One check after another."""

    def __init__(self, metrics: SelfCheckMetrics, interval_s: float) -> None:
        """`interval_s` lies between the end of a check and the moment the next sample is chosen; 0 is never."""
        self._metrics = metrics
        self._interval_s = interval_s
        self._due_s = -np.inf if interval_s else np.inf  # when a sample is chosen
        self._chosen = 0
        self._promised: set[str] = set()
        self._check: _Check | None = None

    def begin(self, model: str) -> None:
        """A model's bytes are promised from now on. Others' are not checked."""
        self._promised.add(model)

    def end(self, model: str, runners: Mapping[GraphKey, Runner]) -> None:
        """A model goes, and a check of it with it."""
        self._promised.discard(model)
        if self._check is not None and self._check.entry.key[0] == model:
            self._over(runners.get(self._check.entry.key), -np.inf)

    @property
    def has_work(self) -> bool:
        """Whether there is a lane to be made again."""
        return self._check is not None

    def offer(self, arrival: Arrival, outcome: Outcome, now_s: float) -> None:
        """Lanes are finished; one of them is chosen if a check is due."""
        if now_s < self._due_s or outcome.outputs is None or arrival.segment.entry.key[0] not in self._promised:
            return
        segment = arrival.segment
        row = self._chosen % segment.count
        self._chosen += 1
        self._due_s = np.inf
        self._check = _Check(_alone(_lane_of(segment.entry.job, segment.start + row)), _digest(outcome.outputs, row))

    def step(self, runners: Mapping[GraphKey, Runner], now_s: float) -> None:
        """Take one evaluation of the check under way, alone, and compare if it was the last."""
        check = self._check
        if check is None:
            return
        entry = check.entry
        model, role = entry.key[:2]
        runner = runners[entry.key]
        segment = Segment(entry, Cohort(0, 1, check.position), 1, entry.rows_at(check.position))
        try:
            [outcome] = evaluate(runner, [segment])
        except Exception:
            log.exception("a self-check of %s failed", model)
            self._metrics.self_checked(model, "failed")
            self._over(runner, now_s)
            return
        self._metrics.self_check_evaluated(model, role, segment.rows)
        check.position += 1
        if outcome.outputs is None:
            return
        match = _digest(outcome.outputs, 0) == check.digest
        if not match:
            job = entry.job
            log.error(
                "self-check: sample %d of seed %d of %s has other bytes alone than it had in company; the promise of "
                "equal bytes does not hold on this machine",
                job.sample_indices[0], job.seed, model,
            )  # fmt: skip
        self._metrics.self_checked(model, "match" if match else "mismatch")
        self._over(runner, now_s)

    def _over(self, runner: Runner | None, now_s: float) -> None:
        if runner is not None:
            runner.forget(_JOB_ID)
        self._check = None
        self._due_s = now_s + self._interval_s


def _alone(job: Job) -> Entry:
    """A job on books of its own."""
    return Scheduler(2).add(_JOB_ID, job, "self-check", 0.0)


def _digest(outputs: Mapping[str, Array], row: int) -> bytes:
    hashed = hashlib.sha256()
    for name in sorted(outputs):
        hashed.update(np.ascontiguousarray(outputs[name][row]).tobytes())
    return hashed.digest()


def _lane_of(job: Job, lane: int) -> Job:
    """A job of one lane of another, of which nothing is handed on or looked at on the way."""
    one = replace(lanes_of(job, np.array([lane])), then=None)
    return replace(one, preview_interval=0) if isinstance(one, StepJob) else one
