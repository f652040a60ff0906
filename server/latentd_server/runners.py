"""From segments to arrays and back: one runner for each graph that a model has on the device.

`run` evaluates the segments of one batch and says, for each, what its lanes have to show for it. A failed run
leaves every lane where it was, so that the engine can run the segments again one by one.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from latentd.tensor import DTYPES
from latentd.v1 import bundle_pb2
from numpy.typing import NDArray

from latentd_server import noise, samplers
from latentd_server.certificate import Buckets
from latentd_server.job import CallJob, Noise, StepJob
from latentd_server.noise import Purpose
from latentd_server.runtime import CompiledGraph, Feeds
from latentd_server.scheduler import Segment

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one evaluation gave a segment: a look at lanes under way, or what finished lanes are."""

    preview: Array | None = None  # [k, *S] f32, the estimate of x0
    outputs: Mapping[str, Array] | None = None  # [k, ...], set on the last evaluation


class Runner(Protocol):
    """Evaluates batches of one graph; used by the engine's thread only."""

    def run(self, segments: Sequence[Segment]) -> list[Outcome]:
        """Evaluate; one outcome a segment, in order."""

    def padded(self, rows: int) -> int:
        """Rows of the call, padding counted, that so many live rows need."""

    def forget(self, job_id: int) -> None:
        """Drop what is kept for a job."""


class _Draws:
    """Noise of many rows, drawn in one call: rows do not see each other, so who shares a call does not matter."""

    def __init__(self, uniform: bool = False) -> None:
        self._draw = noise.uniforms if uniform else noise.normals
        self._seeds: list[int] = []
        self._samples: list[Array] = []
        self._steps: list[int] = []
        self._words: list[int] = []
        self._targets: list[tuple[Array, float]] = []

    def want(
        self,
        target: Array,
        word: int,
        seed: int,
        samples: Array,
        steps: Array | Sequence[int],
        scale: float = 1.0,
    ) -> None:
        """Ask for noise to be added to `target` [k, *S] f32; S is the same for everybody, `word` is `noise.word`'s."""
        self._seeds += [seed] * len(target)
        self._samples.append(samples)
        self._steps.extend(steps)
        self._words += [word] * len(target)
        self._targets.append((target, scale))

    def fill(self) -> None:
        """Draw all that was asked for. Rows nobody asked for stay as they are, to the sign of a zero."""
        if not self._targets:
            return
        shape = self._targets[0][0].shape[1:]
        values = self._draw(
            np.array(self._seeds, np.int64),
            np.concatenate(self._samples),
            np.array(self._steps, np.int64),
            np.array(self._words, np.int64),
            int(np.prod(shape, dtype=np.int64)),
        ).reshape(-1, *shape)
        done = 0
        for target, scale in self._targets:
            part = values[done : done + len(target)]
            target += part if scale == 1.0 else np.float32(scale) * part
            done += len(target)


class CallRunner:
    """One evaluation a row: decoders, encoders, scorers."""

    def __init__(self, graph: CompiledGraph, network: bundle_pb2.Network, buckets: Buckets) -> None:
        self._graph = graph
        self.buckets = buckets
        self._inputs = {value.name: (tuple(value.spec.shape), DTYPES[value.spec.data_type]) for value in network.inputs}

    def padded(self, rows: int) -> int:
        """Rows of the call, padding counted, that so many live rows need."""
        return self.buckets.fit(rows)

    def forget(self, job_id: int) -> None:
        """Nothing is kept between calls."""

    def run(self, segments: Sequence[Segment]) -> list[Outcome]:
        """Evaluate; every segment is done."""
        size = self.buckets.fit(sum(segment.rows for segment in segments))
        feeds = {name: np.zeros((size, *shape), dtype) for name, (shape, dtype) in self._inputs.items()}
        spans, jobs = _spans(segments), [_call_job(segment) for segment in segments]
        for name, target in feeds.items():
            self._feed(name, target, segments, spans, jobs)
        names = sorted({name for job in jobs for name in job.outputs if name not in feeds})
        answers = dict(zip(names, self._graph.run(names, feeds), strict=True)) | feeds
        return [
            Outcome(outputs={name: answers[name][span].copy() for name in job.outputs})
            for job, span in zip(jobs, spans, strict=True)
        ]

    def _feed(
        self, name: str, target: Array, segments: Sequence[Segment], spans: list[slice], jobs: list[CallJob]
    ) -> None:
        draws = {uniform: _Draws(uniform) for uniform in (False, True)}
        for segment, span, job in zip(segments, spans, jobs, strict=True):
            lanes = slice(segment.cohort.start, segment.cohort.stop)
            feed = job.feeds[name]
            if isinstance(feed, Noise):
                samples, numbers = job.sample_indices[lanes], job.draw_indices[lanes]
                word = noise.word(feed.purpose, feed.stream)
                draws[feed.uniform].want(target[span], word, job.seed, samples, numbers, feed.scale)
            else:
                target[span] = feed[lanes]
        for wanted in draws.values():
            wanted.fill()


@dataclass(slots=True)
class _LaneState:
    """Where the lanes of one job have their x and h: in a row of the newest state, or parked on the host."""

    row: NDArray[np.int64]  # [n]; -1: parked
    parked: dict[str, Array] = field(default_factory=dict)  # "x", "h": [n, *S] f32


class StepRunner:
    """One step of every lane in the call, whatever its sampler, through the fused step graph.

    The state of the lanes that rode last stays where the call left it; a lane that sits out is parked on the
    host and comes back as if it had just been admitted.
    """

    def __init__(self, graph: CompiledGraph, shape: tuple[int, ...], has_label: bool, buckets: Buckets) -> None:
        self._graph = graph
        self._shape = shape
        self._has_label = has_label
        self.buckets = buckets
        self._state = {name: np.zeros((1, *shape), np.float32) for name in ("x", "h")}
        self._lanes: dict[int, _LaneState] = {}
        self._riders: list[tuple[int, int, int]] = []  # job, start, stop of the lanes in the newest state

    def padded(self, rows: int) -> int:
        """Rows of the call, padding counted, that so many live rows need."""
        return self.buckets.fit(rows)

    def forget(self, job_id: int) -> None:
        """Drop the state of a job's lanes."""
        self._lanes.pop(job_id, None)

    def run(self, segments: Sequence[Segment]) -> list[Outcome]:
        """Take one step with every lane."""
        self._park_others(segments)
        feeds = self._feeds(segments)
        x, h, x0, eps = self._graph.run(("x_next", "h_next", "x0", "eps"), feeds)
        self._state = {"x": x, "h": h}
        self._riders = []
        outcomes, start = [], 0
        for segment in segments:
            cohort, job_id = segment.cohort, segment.entry.job_id
            stop = start + segment.count
            self._lanes[job_id].row[cohort.start : cohort.stop] = range(start, stop)
            self._riders.append((job_id, cohort.start, cohort.stop))
            outcomes.append(_outcome(_step_job(segment), cohort.position, slice(start, stop), x, h, x0, eps))
            start = stop
        return outcomes

    def _park_others(self, segments: Sequence[Segment]) -> None:
        """Copy out the lanes that rode last and sit out now."""
        boarding = {(s.entry.job_id, s.cohort.start, s.cohort.stop) for s in segments}
        for job_id, start, stop in self._riders:
            state = self._lanes.get(job_id)
            if state is None or (job_id, start, stop) in boarding:
                continue
            lanes = slice(start, stop)
            for name, values in self._state.items():
                if name not in state.parked:
                    state.parked[name] = np.zeros((len(state.row), *self._shape), np.float32)
                state.parked[name][lanes] = values[state.row[lanes]]
            state.row[lanes] = -1
        self._riders = [rider for rider in self._riders if rider in boarding]

    def _feeds(self, segments: Sequence[Segment]) -> Feeds:
        """The graph's inputs. Only lists are built lane by lane; arrays are filled a call at a time."""
        size = self.buckets.fit(sum(segment.rows for segment in segments))
        rows: list[Array] = []  # of the newest state, by segment; -1: not there
        labels: list[Array] = []
        coefficients: list[Array] = []  # by lane
        timesteps: list[int] = []
        guided: list[tuple[int, int, float]] = []  # first lane, lanes, scale
        draws = _Draws()
        x_init, h_init, z = (np.zeros((size, *self._shape), np.float32) for _ in range(3))
        lane = 0
        for segment in segments:
            job, cohort = _step_job(segment), segment.cohort
            lanes, position, count = slice(cohort.start, cohort.stop), cohort.position, segment.count
            state = self._lanes.get(segment.entry.job_id)
            if state is None:
                state = self._lanes[segment.entry.job_id] = _LaneState(np.full(job.lane_count, -1, np.int64))
            rows.append(state.row[lanes])
            labels.append(job.labels[lanes])
            span = slice(lane, lane + count)
            if position == 0:
                _start(job, lanes, x_init[span], h_init[span], draws)
            elif state.row[cohort.start] < 0:  # a cohort's lanes rode together, or are parked together
                x_init[span], h_init[span] = state.parked["x"][lanes], state.parked["h"][lanes]
            tables = job.tables[lanes] if len(job.tables) > 1 else job.tables * count
            coefficients += [table.coefficients[position] for table in tables]
            timesteps += [table.timesteps[position] for table in tables]
            if any(table.stochastic[position] for table in (job.tables if len(job.tables) == 1 else tables)):
                number = [job.first_step_index + position] * count
                draws.want(z[span], Purpose.STEP, job.seed, job.sample_indices[lanes], number)
            if job.rows_per_lane == 2:
                guided.append((lane, count, job.guidance_scale))
            lane += count
        draws.fill()
        row = np.concatenate(rows)
        label, timestep = np.zeros((2, size), np.int64)
        label[:lane], timestep[:lane] = np.concatenate(labels), timesteps
        table = np.zeros((len(samplers.COLUMNS), size, *[1] * len(self._shape)), np.float32)
        table.reshape(len(samplers.COLUMNS), size)[:, :lane] = np.array(coefficients).T
        feeds: Feeds = {
            **self._state,
            "x_init": x_init,
            "h_init": h_init,
            "z": z,
            "slot": np.zeros(size, np.int64),
            "reset": np.ones(size, bool),
            "timestep": timestep,
            "coefficients": table,
            **_rows_of_lanes(size, lane, guided, timestep, label),
        }
        feeds["slot"][:lane] = np.maximum(row, 0)
        feeds["reset"][:lane] = row < 0
        if self._has_label:
            feeds["label"] = label
        return feeds


def _start(job: StepJob, lanes: slice, x: Array, h: Array, draws: _Draws) -> None:
    """Write x and h before the first evaluation, but for the noise, which is asked for."""
    start = job.start
    if start.values is not None:
        values = start.values if len(start.values) == 1 else start.values[lanes]
        x[:] = values if start.scale == 1.0 else np.float32(start.scale) * values
    if start.noise_scale:
        draws.want(x, Purpose.START, job.seed, job.sample_indices[lanes], [0] * len(x), start.noise_scale)
    if start.history is not None:
        h[:] = start.history[lanes]


def _rows_of_lanes(
    size: int, lane_count: int, guided: list[tuple[int, int, float]], timestep: Array, label: Array
) -> Feeds:
    """Which lane each network row is of. Every lane has the row of its number; guided lanes' second rows, the
    unconditional ones, come after everybody's first, and `timestep` and `label` are filled in for them.
    """
    own = np.arange(size)
    lane, row_u, w = own.copy(), own.copy(), np.ones(size, np.float32)
    free = lane_count
    for first, count, scale in guided:
        lanes, second = slice(first, first + count), slice(free, free + count)
        free += count
        lane[second] = own[lanes]
        timestep[second] = timestep[lanes]
        label[second] = -1
        row_u[lanes] = own[second]
        w[lanes] = scale
    return {"lane": lane, "row_u": row_u, "row_c": own, "w": w}


def _outcome(job: StepJob, position: int, span: slice, x: Array, h: Array, x0: Array, eps: Array) -> Outcome:
    table = job.tables[0]
    if position == len(table.timesteps) - 1:
        outputs = {"sample": x[span].copy()}
        if job.estimates_wanted:
            outputs |= {"denoised": x0[span].copy(), "noise": eps[span].copy()}
        if job.history_wanted:
            outputs["history"] = h[span].copy()
        return Outcome(outputs=outputs)
    done = int(table.completed_steps[position])
    before = int(table.completed_steps[position - 1]) if position else 0
    due = job.preview_interval and done > before and done % job.preview_interval == 0
    return Outcome(preview=x0[span].copy() if due else None)


def _spans(segments: Sequence[Segment]) -> list[slice]:
    """The rows of each segment in the call, one behind the other."""
    stops = list(itertools.accumulate(segment.rows for segment in segments))
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _step_job(segment: Segment) -> StepJob:
    assert isinstance(segment.entry.job, StepJob)
    return segment.entry.job


def _call_job(segment: Segment) -> CallJob:
    assert isinstance(segment.entry.job, CallJob)
    return segment.entry.job
