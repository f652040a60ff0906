"""What graphs are tried with: random lanes, sent through the very runner that serves them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from latentd.tensor import DTYPES
from latentd.v1 import bundle_pb2, model_pb2
from numpy.typing import NDArray

from latentd_server import samplers
from latentd_server.call_runner import CallRunner
from latentd_server.certificate import Buckets, Seat
from latentd_server.job import CallJob, Job, Start, StepJob
from latentd_server.priority import Priority
from latentd_server.runners import Outcome, evaluate
from latentd_server.samplers import Table
from latentd_server.scheduler import Cohort, Entry, Segment
from latentd_server.step_runner import StepRunner
from latentd_server.wiring import state_spec

Array = NDArray[Any]
_Source = bundle_pb2.NetworkInput
_GUIDANCE = 2.5
_TRIAL_JOBS = (-1, -2)
"""Job ids; the engine's are positive."""


class CallTrial:
    """Tries a graph that answers in one call. Fulfils `certificate.Trial`."""

    def __init__(self, runner: CallRunner, network: bundle_pb2.Network, model: model_pb2.Model, max_rows: int) -> None:
        rng = np.random.default_rng(0)
        self.rows = (1,) * max_rows
        self._runner = runner
        self._name, self._role = model.name, network.role
        self._lanes = {value.name: _random(value, model, max_rows, rng) for value in network.inputs}
        self._outputs = tuple(value.name for value in network.outputs)

    def run(self, size: int, seats: Sequence[Seat]) -> list[bytes]:
        """Make one call of exactly `size` rows; see `certificate.Trial`."""
        lanes, hostile, values = _places(seats)
        feeds = {name: _spoiled(array[lanes], hostile, values) for name, array in self._lanes.items()}
        count = len(seats)
        job = CallJob(
            model=self._name,
            role=self._role,
            lane_count=count,
            feeds=feeds,
            outputs=self._outputs,
            seed=0,
            sample_indices=lanes,
            draw_indices=np.zeros(count, np.int64),
        )
        [outcome] = _run(self._runner, size, [job])
        return _bytes(outcome, count)


class StepTrial:
    """Tries the step graph: every lane takes one step from a random start, by random coefficients, with noise.

    Where the model takes guidance, every third lane is guided.
    """

    def __init__(self, runner: StepRunner, model: model_pb2.Model, has_label: bool, max_rows: int) -> None:
        rng = np.random.default_rng(0)
        pattern = (1, 2, 1) if has_label and model.diffusion.guidance_supported else (1, 1, 1)
        rows = [pattern[lane % 3] for lane in range(max_rows)]
        self.rows = tuple(rows[: int(np.searchsorted(np.cumsum(rows), max_rows, side="right"))])
        count, shape = len(self.rows), tuple(state_spec(model).shape)
        self._runner = runner
        self._name = model.name
        self._labels = rng.integers(0, len(model.class_names), count) if has_label else np.full(count, -1)
        self._x, self._h = (rng.standard_normal((count, *shape), np.float32) for _ in range(2))
        self._tables = [_random_table(rng, len(model.diffusion.alphas)) for _ in range(count)]

    def run(self, size: int, seats: Sequence[Seat]) -> list[bytes]:
        """Make one call of exactly `size` rows; see `certificate.Trial`."""
        plain = [place for place, seat in enumerate(seats) if self.rows[seat.lane] == 1]
        guided = [place for place, seat in enumerate(seats) if self.rows[seat.lane] == 2]
        groups = [(places, scale) for places, scale in ((plain, 1.0), (guided, _GUIDANCE)) if places]
        outcomes = _run(
            self._runner, size, [self._job([seats[place] for place in places], scale) for places, scale in groups]
        )
        answers: dict[int, bytes] = {}
        for (places, _), outcome in zip(groups, outcomes, strict=True):
            answers |= dict(zip(places, _bytes(outcome, len(places)), strict=True))
        return [answers[place] for place in range(len(seats))]

    def _job(self, seats: Sequence[Seat], guidance_scale: float) -> StepJob:
        lanes, hostile, values = _places(seats)
        return StepJob(
            model=self._name,
            lane_count=len(seats),
            tables=tuple(self._tables[lane] for lane in lanes),
            start=Start(
                noise_scale=0.0,
                values=_spoiled(self._x[lanes], hostile, values),
                history=_spoiled(self._h[lanes], hostile, values),
            ),
            seed=0,
            sample_indices=lanes,
            labels=self._labels[lanes],
            guidance_scale=guidance_scale,
            estimates_wanted=True,
            history_wanted=True,
        )


def _run(runner: CallRunner | StepRunner, size: int, jobs: Sequence[Job]) -> list[Outcome]:
    """Let the jobs ride in one call of this size."""
    served_with, runner.buckets = runner.buckets, Buckets((size,))
    segments = []
    for job_id, job in zip(_TRIAL_JOBS, jobs, strict=False):
        cohort = Cohort(0, job.lane_count, 0)
        entry = Entry(job_id, job, "trial", Priority.NORMAL, 0.0, None, [cohort])
        segments.append(Segment(entry, cohort, job.lane_count, job.lane_count * job.rows_per_lane))
    try:
        return evaluate(runner, segments)
    finally:
        runner.buckets = served_with
        for segment in segments:
            runner.forget(segment.entry.job_id)


def _places(seats: Sequence[Seat]) -> tuple[Array, Array, Array]:
    """The lanes [k], which places are hostile [h], and what with [h]."""
    hostile = [place for place, seat in enumerate(seats) if seat.hostile is not None]
    values = [seats[place].hostile for place in hostile]
    return np.array([seat.lane for seat in seats]), np.array(hostile, np.int64), np.array(values, np.float32)


def _spoiled(lanes: Array, hostile: Array, values: Array) -> Array:
    """A copy of [k, ...] with hostile floats in these places; integers are left alone, since they must be in range."""
    if lanes.dtype == np.float32:
        lanes[hostile] = values.reshape(-1, *[1] * (lanes.ndim - 1))
    return lanes


def _random(value: bundle_pb2.NetworkInput, model: model_pb2.Model, count: int, rng: np.random.Generator) -> Array:
    """Values of one input, as requests might bring them."""
    shape = (count, *value.spec.shape)
    if value.source == _Source.SOURCE_TIMESTEP:
        return rng.integers(0, len(model.diffusion.alphas), shape)
    if value.source == _Source.SOURCE_CLASS_LABEL:
        return rng.integers(0, max(1, len(model.class_names)), shape)
    if value.source == _Source.SOURCE_UNIFORM_NOISE:
        return rng.random(shape, np.float32)
    return rng.standard_normal(shape, np.float32).astype(DTYPES[value.spec.data_type])


def _random_table(rng: np.random.Generator, timestep_count: int) -> Table:
    """One evaluation by random numbers; what is clipped is clipped to -2 and 2."""
    row = rng.standard_normal((1, len(samplers.COLUMNS)), np.float32)
    row[0, samplers.COLUMNS.index("lo")], row[0, samplers.COLUMNS.index("hi")] = -2, 2
    return Table(rng.integers(0, timestep_count, 1), row, np.ones(1, np.int32), 1)


def _bytes(outcome: Outcome, count: int) -> list[bytes]:
    """Each lane's outputs."""
    assert outcome.outputs is not None
    outputs = [outcome.outputs[name] for name in sorted(outcome.outputs)]
    return [b"".join(output[lane].tobytes() for output in outputs) for lane in range(count)]
