"""From segments to arrays and back: one runner for each graph that a model has on the device.

`run` evaluates the segments of one batch and says, for each, what its lanes have to show for it. A failed run
leaves every lane where it was, so that the engine can run the segments again one by one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from latentd.tensor import DTYPES
from latentd.v1 import bundle_pb2
from numpy.typing import NDArray

from latentd_server import noise, samplers
from latentd_server.job import CallJob, Noise, StepJob
from latentd_server.noise import Purpose
from latentd_server.runtime import Buckets, CompiledGraph, Feeds
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
    """Noise of many segments, drawn in one call: rows do not see each other, so who shares a call does not matter."""

    def __init__(self) -> None:
        self._seeds: list[Array] = []
        self._samples: list[Array] = []
        self._steps: list[Array] = []
        self._rows: list[tuple[int, int, float]] = []

    def want(self, start: int, stop: int, seed: int, samples: Array, steps: Array | int, scale: float = 1.0) -> None:
        count = stop - start
        self._seeds.append(np.full(count, seed, np.int64))
        self._samples.append(samples)
        self._steps.append(np.broadcast_to(np.asarray(steps, np.int64), count))
        self._rows.append((start, stop, scale))

    def add_to(self, target: Array, purpose: Purpose, uniform: bool = False) -> None:
        """Add the draws to their rows of `target` [n, ...] f32; other rows stay as they are, to the sign of a zero."""
        if not self._rows:
            return
        draw = noise.uniforms if uniform else noise.normals
        values = draw(
            np.concatenate(self._seeds),
            np.concatenate(self._samples),
            np.concatenate(self._steps),
            purpose,
            int(np.prod(target.shape[1:], dtype=np.int64)),
        )
        done = 0
        for start, stop, scale in self._rows:
            part = values[done : done + stop - start].reshape(stop - start, *target.shape[1:])
            target[start:stop] += part if scale == 1.0 else np.float32(scale) * part
            done += stop - start


class CallRunner:
    """One evaluation a row: decoders, encoders, scorers."""

    def __init__(self, graph: CompiledGraph, network: bundle_pb2.Network, buckets: Buckets) -> None:
        self._graph = graph
        self._buckets = buckets
        self._inputs = {value.name: (tuple(value.spec.shape), DTYPES[value.spec.data_type]) for value in network.inputs}

    def padded(self, rows: int) -> int:
        """Rows of the call, padding counted, that so many live rows need."""
        return self._buckets.fit(rows)

    def forget(self, job_id: int) -> None:
        """Nothing is kept between calls."""

    def run(self, segments: Sequence[Segment]) -> list[Outcome]:
        """Evaluate; every segment is done."""
        size = self._buckets.fit(sum(segment.rows for segment in segments))
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
        draws: dict[tuple[Purpose, bool], _Draws] = {}
        for segment, span, job in zip(segments, spans, jobs, strict=True):
            lanes = slice(segment.cohort.start, segment.cohort.stop)
            feed = job.feeds[name]
            if isinstance(feed, Noise):
                wanted = draws.setdefault((feed.purpose, feed.uniform), _Draws())
                wanted.want(
                    span.start, span.stop, job.seed, job.sample_indices[lanes], job.draw_indices[lanes], feed.scale
                )
            else:
                target[span] = feed[lanes]
        for (purpose, uniform), wanted in draws.items():
            wanted.add_to(target, purpose, uniform)


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
        self._buckets = buckets
        self._state = {name: np.zeros((1, *shape), np.float32) for name in ("x", "h")}
        self._lanes: dict[int, _LaneState] = {}
        self._riders: list[tuple[int, int, int]] = []  # job, start, stop of the lanes in the newest state

    def padded(self, rows: int) -> int:
        """Rows of the call, padding counted, that so many live rows need."""
        return self._buckets.fit(rows)

    def forget(self, job_id: int) -> None:
        """Drop the state of a job's lanes."""
        self._lanes.pop(job_id, None)

    def run(self, segments: Sequence[Segment]) -> list[Outcome]:
        """Take one step with every lane."""
        self._park_others(segments)
        spans = _spans(segments, lanes=True)
        feeds = self._feeds(segments, spans)
        x, h, x0, eps = self._graph.run(("x_next", "h_next", "x0", "eps"), feeds)
        self._state = {"x": x, "h": h}
        self._riders = []
        outcomes = []
        for segment, span in zip(segments, spans, strict=True):
            cohort, job = segment.cohort, _step_job(segment)
            self._lanes[segment.entry.job_id].row[cohort.start : cohort.stop] = np.arange(span.start, span.stop)
            self._riders.append((segment.entry.job_id, cohort.start, cohort.stop))
            outcomes.append(_outcome(job, cohort.position, span, x, h, x0, eps))
        return outcomes

    def _park_others(self, segments: Sequence[Segment]) -> None:
        """Copy out the lanes that rode last and sit out now."""
        boarding = {(s.entry.job_id, s.cohort.start, s.cohort.stop) for s in segments}
        for job_id, start, stop in self._riders:
            state = self._lanes.get(job_id)
            if state is None or (job_id, start, stop) in boarding:
                continue
            lanes = np.arange(start, stop)
            for name, values in self._state.items():
                if name not in state.parked:
                    state.parked[name] = np.zeros((len(state.row), *self._shape), np.float32)
                state.parked[name][lanes] = values[state.row[lanes]]
            state.row[lanes] = -1
        self._riders = [rider for rider in self._riders if rider in boarding]

    def _feeds(self, segments: Sequence[Segment], spans: list[slice]) -> Feeds:
        size = self._buckets.fit(sum(segment.rows for segment in segments))
        own = np.arange(size)
        feeds: Feeds = {
            **self._state,
            **{name: np.zeros((size, *self._shape), np.float32) for name in ("x_init", "h_init", "z")},
            **{name: np.zeros(size, np.int64) for name in ("slot", "timestep", "label")},
            **{name: own.copy() for name in ("lane", "row_u", "row_c")},
            "reset": np.ones(size, bool),
            "w": np.ones(size, np.float32),
            "coefficients": np.zeros((len(samplers.COLUMNS), size), np.float32),
        }
        starts, steps = _Draws(), _Draws()
        free_row = spans[-1].stop  # guided lanes' second rows come after everybody's first
        for segment, span in zip(segments, spans, strict=True):
            job, cohort = _step_job(segment), segment.cohort
            lanes = slice(cohort.start, cohort.stop)
            self._place(feeds, segment, span, starts)
            tables = job.tables if len(job.tables) == 1 else job.tables[lanes]
            position = cohort.position
            feeds["timestep"][span] = [table.timesteps[position] for table in tables]
            feeds["coefficients"][:, span] = np.stack([table.coefficients[position] for table in tables], axis=1)
            feeds["label"][span] = job.labels[lanes]
            if any(table.stochastic[position] for table in tables):
                samples = job.sample_indices[lanes]
                steps.want(span.start, span.stop, job.seed, samples, job.first_step_index + position)
            if job.rows_per_lane == 2:
                second = slice(free_row, free_row + cohort.count)
                free_row = second.stop
                feeds["lane"][second] = own[span]
                feeds["timestep"][second] = feeds["timestep"][span]
                feeds["label"][second] = -1
                feeds["row_u"][span] = own[second]
                feeds["w"][span] = job.guidance_scale
        starts.add_to(feeds["x_init"], Purpose.START)
        steps.add_to(feeds["z"], Purpose.STEP)
        if not self._has_label:
            del feeds["label"]
        return feeds

    def _place(self, feeds: Feeds, segment: Segment, span: slice, starts: _Draws) -> None:
        """Say where the lanes' x and h come from: their rows of the state, the host, or the start."""
        job, cohort, job_id = _step_job(segment), segment.cohort, segment.entry.job_id
        lanes = slice(cohort.start, cohort.stop)
        state = self._lanes.get(job_id)
        if state is None:
            state = self._lanes[job_id] = _LaneState(np.full(job.lane_count, -1, np.int64))
        if cohort.position == 0:
            start = job.start
            if start.values is not None:
                values = start.values if len(start.values) == 1 else start.values[lanes]
                feeds["x_init"][span] = values if start.scale == 1.0 else np.float32(start.scale) * values
            if start.noise_scale:
                starts.want(span.start, span.stop, job.seed, job.sample_indices[lanes], 0, start.noise_scale)
            if start.history is not None:
                feeds["h_init"][span] = start.history[lanes]
            return
        rows = state.row[lanes]
        if rows[0] >= 0:  # a cohort's lanes rode together, or are parked together
            feeds["slot"][span] = rows
            feeds["reset"][span] = False
        else:
            feeds["x_init"][span] = state.parked["x"][lanes]
            feeds["h_init"][span] = state.parked["h"][lanes]


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


def _spans(segments: Sequence[Segment], lanes: bool = False) -> list[slice]:
    """The rows (or, with `lanes`, the lanes) of each segment in the call, one behind the other."""
    spans, start = [], 0
    for segment in segments:
        stop = start + (segment.cohort.count if lanes else segment.rows)
        spans.append(slice(start, stop))
        start = stop
    return spans


def _step_job(segment: Segment) -> StepJob:
    assert isinstance(segment.entry.job, StepJob)
    return segment.entry.job


def _call_job(segment: Segment) -> CallJob:
    assert isinstance(segment.entry.job, CallJob)
    return segment.entry.job
