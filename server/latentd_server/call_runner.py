"""One evaluation a row: decoders, encoders, scorers. From segments to one call of a plain graph and back."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from latentd.tensor import DTYPES
from latentd.v1 import bundle_pb2

from latentd_server import noise
from latentd_server.certificate import Buckets
from latentd_server.draws import Draws
from latentd_server.job import CallJob, Noise, Repeated
from latentd_server.runners import Array, Outcome
from latentd_server.runtime import NO_CAPTURE, BoundGraph, CompiledGraph, Layout, Memory, recording
from latentd_server.scheduler import Segment

log = logging.getLogger(__name__)


class _Frame:
    """Memory of one call, bound to the graph. Calls that are under way at one time, from `prepare` to `finish`, have a
    frame each; on a device with memory of its own, these are twins.
    """

    def __init__(self, graph: CompiledGraph, inputs: Layout, outputs: Layout, rows: int, twin: "_Frame | None") -> None:
        """Room for up to so many rows; the layouts are those of one row."""
        self._graph = graph
        self.capacity = rows
        self.feeds: Memory = Memory(graph.device, _stacked(inputs, rows), twin.feeds if twin else None)
        self.answers: Memory = Memory(graph.device, _stacked(outputs, rows), twin.answers if twin else None)
        self._bound: dict[int, BoundGraph] = {}

    def bound(self, size: int) -> BoundGraph:
        """The graph with this frame's first `size` rows."""
        bound = self._bound.get(size)
        if bound is None:
            bound = self._bound[size] = self._graph.bind()
            bound.read(self.feeds, first=size)
            bound.write(self.answers, first=size)
        return bound


def _stacked(layout: Layout, rows: int) -> Layout:
    return {name: ((rows, *shape), dtype) for name, (shape, dtype) in layout.items()}


@dataclass(slots=True)
class PreparedCall:
    """A call that is ready to be run, once."""

    size: int
    rows: int  # that are live
    frame: _Frame
    jobs: list[CallJob]
    spans: list[slice]  # of the rows, by segment


class CallRunner:
    """Evaluates batches of a graph that answers in one call. See `runners.Runner` for the phases."""

    def __init__(self, graph: CompiledGraph, network: bundle_pb2.Network, buckets: Buckets) -> None:
        self._graph = graph
        self._inputs = {value.name: (tuple(value.spec.shape), DTYPES[value.spec.data_type]) for value in network.inputs}
        self._outputs = {
            value.name: (tuple(value.spec.shape), DTYPES[value.spec.data_type]) for value in network.outputs
        }
        self._records = False
        self.buckets = buckets

    @property
    def buckets(self) -> Buckets:
        """The sizes of calls. To be changed only while no call is under way."""
        return self._buckets

    @buckets.setter
    def buckets(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._spare: dict[int, list[_Frame]] = {}  # by rows
        self._frames: dict[int, _Frame] = {}  # the first that was made of each, whose twins the others are
        self._captures: dict[int, int] = {}  # CUDA graphs by size, of those that were tried

    @property
    def held(self) -> int:
        """Nothing is kept between calls."""
        return 0

    def padded(self, rows: int) -> int:
        """Rows of the call, padding counted, that so many live rows need."""
        return self._buckets.fit(rows)

    def forget(self, job_id: int) -> None:
        """Nothing is kept between calls."""

    def warm(self) -> None:
        """Record a CUDA graph of every size, where the device has such; what cannot be now is at its first call."""
        self._records = self._graph.captures
        for size in self._buckets.sizes:
            self._record(size)

    def _record(self, size: int) -> None:
        if not self._records or size in self._captures:
            return
        with recording() as alone:
            if not alone:
                return
            self._captures[size] = NO_CAPTURE
            try:
                frame = _Frame(self._graph, self._inputs, self._outputs, size, self._frames.get(size))
                self._frames.setdefault(size, frame)
                frame.feeds.up()
                frame.bound(size).record(size)
            except Exception as error:
                log.warning("no CUDA graph for calls of %d rows, kernels are launched one by one: %s", size, error)
            else:
                self._captures[size] = size

    def prepare(self, segments: Sequence[Segment]) -> PreparedCall:
        """Fill a frame: the rows of each segment behind one another, zeros in the rest."""
        jobs, spans, rows = [], [], 0
        for segment in segments:
            assert isinstance(segment.entry.job, CallJob)
            jobs.append(segment.entry.job)
            spans.append(slice(rows, rows + segment.rows))
            rows += segment.rows
        lanes = [slice(segment.start, segment.start + segment.count) for segment in segments]
        size = self._buckets.fit(rows)
        frame = self._frame(size)
        for name, target in frame.feeds.arrays.items():
            _feed(target, [job.feeds[name] for job in jobs], jobs, lanes, spans)
            target[rows:size] = 0  # a label that some earlier call left there may be out of range
        return PreparedCall(size, rows, frame, jobs, spans)

    def run(self, prepared: PreparedCall) -> None:
        """Make the call; the answers are in the frame."""
        frame = prepared.frame
        self._record(prepared.size)
        frame.feeds.up()
        frame.bound(prepared.size).run(self._captures.get(prepared.size, NO_CAPTURE))
        frame.answers.down()

    def finish(self, prepared: PreparedCall, results: None = None) -> list[Outcome]:
        """Every segment is done."""
        frame = prepared.frame
        wanted = {name for job in prepared.jobs for name in job.outputs}
        arrays = frame.feeds.arrays | frame.answers.arrays
        taken = {name: arrays[name][: prepared.rows].copy() for name in wanted}
        self._spare[frame.capacity].append(frame)
        return [
            Outcome(outputs={name: taken[name][span] for name in job.outputs})
            for job, span in zip(prepared.jobs, prepared.spans, strict=True)
        ]

    def _frame(self, size: int) -> _Frame:
        """A frame that nobody uses. One fits all sizes where nothing is copied up; else each size has its own."""
        rows = size if self._graph.device.has_memory else self._buckets.sizes[-1]
        spare = self._spare.setdefault(rows, [])
        if spare:
            return spare.pop()
        frame = _Frame(self._graph, self._inputs, self._outputs, rows, self._frames.get(rows))
        self._frames.setdefault(rows, frame)
        return frame


def _feed(
    target: Array, feeds: list[Array | Noise | Repeated], jobs: list[CallJob], lanes: list[slice], spans: list[slice]
) -> None:
    """Fill one input: rows that were given are copied, noise is drawn for all rows that want it together."""
    given, places, noises = [], [], []
    for index, feed in enumerate(feeds):
        if isinstance(feed, Noise):
            noises.append(index)
        else:
            given.append(feed[lanes[index]])
            places.append(index)
    if not noises:
        np.concatenate(given, out=target[: spans[-1].stop], casting="same_kind")
        return
    for index, rows in zip(places, given, strict=True):
        target[spans[index]] = rows
    for uniform in (False, True):
        draws, wanted = Draws(), []
        for index in noises:
            feed, job, own = feeds[index], jobs[index], lanes[index]
            assert isinstance(feed, Noise)
            if feed.uniform == uniform:
                samples, numbers = job.sample_indices[own].tolist(), job.draw_indices[own].tolist()
                draws.want(noise.word(feed.purpose, feed.stream), job.seed, samples, numbers)
                wanted.append((spans[index], feed.scale))
        if not wanted:
            continue
        values = draws.draw(target[0].size, uniform=uniform).reshape(-1, *target.shape[1:])
        done = 0
        for span, scale in wanted:
            part = values[done : done + span.stop - span.start]
            target[span] = part if scale == 1.0 else np.float32(scale) * part
            done += len(part)
