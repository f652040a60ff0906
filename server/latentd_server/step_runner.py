"""One step of every lane in a call, whatever its sampler: from segments to the fused step graph and back.

The lanes' state stays on the device, in slots of a `StatePool`. A call takes up the slots' numbers, coefficients and
the noise that is not zero; previews and finished rows come down.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latentd_server import step_graph
from latentd_server.bound_terms import BoundTerms
from latentd_server.certificate import Buckets
from latentd_server.draws import Draws, StepNoise, draw_steps
from latentd_server.job import StepJob
from latentd_server.noise import Purpose, word
from latentd_server.runners import Outcome
from latentd_server.runtime import NO_CAPTURE, Array, BoundGraph, CompiledGraph, Memory, recording
from latentd_server.samplers import COLUMNS
from latentd_server.scheduler import Segment
from latentd_server.state_pool import Slots, StatePool

log = logging.getLogger(__name__)

_F32, _I64 = np.dtype(np.float32), np.dtype(np.int64)
_START, _SCORE = word(Purpose.START), word(Purpose.SCORE)
_KNOWN = word(Purpose.KNOWN)
_UNDER_WAY = Outcome()
_OUTPUTS = {"x": "sample", "h": "history", "x0": "denoised", "eps": "noise"}
"""What finished lanes' rows are called."""


@dataclass(slots=True, eq=False)
class _Walk:
    """A job whose lanes have slots, with what is looked up at every step as plain lists."""

    job: StepJob
    slots: list[int]  # by lane; -1: none yet, or no more
    labels: list[int]
    samples: list[int]
    noise: dict[int, StepNoise] = field(default_factory=dict)  # by lane, of those that ever wanted any

    def noise_of(self, lane: int) -> StepNoise:
        """The step noise of a lane."""
        found = self.noise.get(lane)
        if found is None:
            job = self.job
            found = StepNoise(job.seed, self.samples[lane], job.first_step_index, len(job.tables[0].timesteps))
            self.noise[lane] = found
        return found


class _Frame:
    """Memory of one call, bound to the graph. Calls that are under way at one time, from `prepare` to `finish`, have a
    frame each; on a device with memory of its own, these are twins.
    """

    def __init__(self, graph: CompiledGraph, rows: int, shape: tuple[int, ...], twin: "_Frame | None" = None) -> None:
        """Room for up to so many rows."""
        self._graph, device = graph, graph.device
        flat = [1] * (len(shape) - 1)
        vector, image = ((rows,), _I64), ((rows, *shape), _F32)
        per_row = {name: vector for name in ("slot", "timestep", "label") if name in graph.inputs}
        table = {"coefficients": ((rows, len(COLUMNS), *flat), _F32)}
        pairs = dict.fromkeys(("lane", "row_u", "row_c"), vector) | {"w": ((rows, 1, *flat), _F32)}
        self.rows: Memory = Memory(device, per_row | table, twin.rows if twin else None)
        self.pairs: Memory = Memory(device, pairs, twin.pairs if twin else None)
        self.noise: Memory = Memory(device, {"z": image}, twin.noise if twin else None)
        self.estimates: Memory = Memory(
            device, dict.fromkeys(step_graph.ESTIMATES, image), twin.estimates if twin else None
        )
        self.noisy: list[int] = []  # rows of z that are not zero
        self.guided = True  # whether the pairs are others than those of unguided lanes
        self.capacity = rows
        self._own = np.arange(rows)
        self._bound: dict[int, tuple[BoundGraph, Memory]] = {}  # by size, with the state
        self.pair_up([], 0)

    def bound(self, size: int, state: Memory) -> BoundGraph:
        """The graph with this frame's first `size` rows and the lanes' state."""
        bound, bound_state = self._bound.get(size, (None, None))
        if bound is None:
            bound = self._graph.bind()
            for memory in (self.rows, self.pairs, self.noise):
                bound.read(memory, first=size)
            bound.write(self.estimates, first=size)
        if bound_state is not state:
            bound.read(state)
            bound.write(state, step_graph.STATE)
            self._bound[size] = bound, state
        return bound

    def pair_up(self, guided: Sequence[tuple[int, int, float]], lane_count: int) -> None:
        """Say which lane each network row is of. Every lane has the row of its number; the second rows of guided lanes,
        the unconditional ones, come after everybody's first.

        Args:
            guided: First lane, lanes and scale of each guided segment.
            lane_count: Lanes in the call.
        """
        if not guided and not self.guided:
            return
        pairs, rows = self.pairs.arrays, self.rows.arrays
        for name in ("lane", "row_u", "row_c"):
            pairs[name][:] = self._own
        pairs["w"][:] = 1
        free = lane_count
        for first, count, scale in guided:
            lanes, second = slice(first, first + count), slice(free, free + count)
            free += count
            pairs["lane"][second] = self._own[lanes]
            pairs["row_u"][lanes] = self._own[second]
            pairs["w"][lanes] = scale
            rows["timestep"][second] = rows["timestep"][lanes]
            rows["label"][second] = -1
        self.guided = bool(guided)

    def scatter_noise(self, noisy: list[int], values: Sequence[NDArray[np.float32]]) -> None:
        """Write the step noise of these rows, [size] f32 each. All others are +0, for the sign of a zero shows in a
        sum of zeros.
        """
        z = self.noise.arrays["z"].reshape(self.capacity, -1)
        if self.noisy:
            z[self.noisy] = 0
        for row, value in zip(noisy, values, strict=True):
            z[row] = value
        self.noisy = noisy


@dataclass(slots=True)
class _OnDevice:
    """What a device with memory of its own holds for calls of one size."""

    capture: int = NO_CAPTURE  # number of the CUDA graph that was recorded
    state: Memory | None = None  # for which that was done
    guided: bool = True  # whether the pairs are, or may be, others than those of unguided lanes
    noisy: bool = True  # whether some noise is, or may be, other than zero


@dataclass(slots=True)
class _Ending:
    """What a segment has to show for the call: a preview, or finished lanes. Spans are of what is read by name."""

    segment: int
    job_id: int
    walk: _Walk
    lanes: slice
    finished: bool
    spans: dict[str, slice]


@dataclass(slots=True)
class PreparedSteps:
    """A call that is ready to be run, once."""

    size: int
    frame: _Frame
    slots: int  # that the pool must have
    segments: int
    endings: list[_Ending]
    reads: dict[str, list[int]]  # what is read when the call is over: rows of the estimates, slots of the state
    start_slots: list[int] = field(default_factory=list)  # of the lanes that start with this call
    start_x: Array | None = None  # [k, *S] f32
    start_h: Array | None = None
    blend: tuple[NDArray[np.int64], Array, Array] | None = None  # slots of lanes, masks, and what is known of their x


@dataclass(slots=True)
class StepResults:
    """Where the results of a call are."""

    state: Memory
    rows: dict[str, Array] | None = None  # where the device's thread had to read them
    failure: Exception | None = None  # why they could not be read, though every lane has taken its step


class StepRunner:
    """Evaluates batches of a denoiser. See `runners.Runner` for the phases."""

    def __init__(
        self, graph: CompiledGraph, shape: tuple[int, ...], buckets: Buckets, *, lanes: int | None = None
    ) -> None:
        """Make room for the state of `lanes` lanes, by default of two of the largest calls; it grows."""
        self._graph = graph
        self._shape = shape
        self._elements = int(np.prod(shape))
        self._has_label = "label" in graph.inputs
        self._slots = Slots()
        self._walks: dict[int, _Walk] = {}
        self._pool = StatePool(graph.device, shape, lanes or 2 * buckets.sizes[-1])
        self._records = False
        self._captures = itertools.count(1)
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
        self._on_device = {size: _OnDevice() for size in buckets.sizes}

    @property
    def held(self) -> int:
        """Slots that lanes have."""
        return self._slots.taken

    def padded(self, rows: int) -> int:
        """Rows of the call, padding counted, that so many live rows need."""
        return self._buckets.fit(rows)

    def forget(self, job_id: int) -> None:
        """Free the slots of a job's lanes."""
        walk = self._walks.pop(job_id, None)
        if walk is not None:
            self._free(walk, slice(None))

    # ---- before the call: host work only -----------------------------------------------------------------------

    def prepare(self, segments: Sequence[Segment]) -> PreparedSteps:
        """Fill a frame. Python works lane by lane on lists alone; arrays are filled a call at a time."""
        slots: list[int] = []
        labels: list[int] = []
        timesteps: list[int] = []
        coefficients: list[Array] = []
        guided: list[tuple[int, int, float]] = []
        noisy: list[int] = []  # lanes of the call
        noises: list[tuple[StepNoise, int]] = []  # theirs, and at which evaluation
        starts: list[tuple[_Walk, slice]] = []
        blends: list[tuple[_Walk, slice, int]] = []
        endings: list[_Ending] = []
        reads: dict[str, list[int]] = {}
        draws = Draws()
        rows = lane = 0
        for number, segment in enumerate(segments):
            job_id, count = segment.entry.job_id, segment.count
            walk = self._walks.get(job_id) or self._board(job_id, segment.entry.job)
            job, position = walk.job, segment.position
            first, stop = segment.start, segment.start + count
            rows += segment.rows
            if position == 0:
                self._seat(walk, first, stop)
                starts.append((walk, slice(first, stop)))
            if job.known is not None and job.known.levels[position] is not None:
                blends.append((walk, slice(first, stop), position))
            slots += walk.slots[first:stop]
            labels += walk.labels[first:stop]
            for index, table in enumerate(job.tables[first:stop] if len(job.tables) > 1 else job.tables * count):
                coefficients.append(table.coefficients[position])
                timesteps.append(table.timesteps[position])
                if table.stochastic[position]:
                    noisy.append(lane + index)
                    noises.append((walk.noise_of(first + index), position))
            if segment.rows != count:
                guided.append((lane, count, job.guidance_scale))
            if wanted := _wanted(job, position):
                own = range(lane, lane + count)
                spans = {}
                for name in wanted:
                    asked = reads.setdefault(name, [])
                    spans[name] = slice(len(asked), len(asked) + count)
                    asked += walk.slots[first:stop] if name in step_graph.STATE else own
                finished = position == len(job.tables[0].timesteps) - 1
                endings.append(_Ending(number, job_id, walk, slice(first, stop), finished, spans))
            lane += count
        size = self._buckets.fit(rows)
        frame = self._frame(size)
        arrays = frame.rows.arrays
        _fill(arrays["slot"], slots, size)
        _fill(arrays["timestep"], timesteps, size)
        if self._has_label:
            _fill(arrays["label"], labels, size)
        table_rows = arrays["coefficients"].reshape(-1, len(COLUMNS))
        np.concatenate(coefficients, out=table_rows[:lane].reshape(-1))
        table_rows[lane:size] = 0
        frame.pair_up(guided, lane)
        scales = _ask_for_starts(starts, draws)
        begun = draw_steps(noises, draws, self._elements)
        frame.scatter_noise(noisy, [noise.at(position) for noise, position in noises])
        prepared = PreparedSteps(size, frame, self._slots.count, len(segments), endings, reads)
        if starts:
            prepared.start_slots = [slot for walk, lanes in starts for slot in walk.slots[lanes]]
            prepared.start_x, prepared.start_h = self._starts(starts, scales, begun)
        if blends:
            prepared.blend = self._blends(blends)
        return prepared

    def _board(self, job_id: int, job: object) -> _Walk:
        assert isinstance(job, StepJob)
        walk = _Walk(job, [-1] * job.lane_count, job.labels.tolist(), job.sample_indices.tolist())
        self._walks[job_id] = walk
        return walk

    def _seat(self, walk: _Walk, first: int, stop: int) -> None:
        """Give lanes that start a slot each, unless they tried before and the call failed."""
        for lane in range(first, stop):
            if walk.slots[lane] < 0:
                walk.slots[lane] = self._slots.take()

    def _frame(self, size: int) -> _Frame:
        """A frame that nobody uses. One fits all sizes where nothing is copied up; else each size has its own."""
        rows = size if self._graph.device.has_memory else self._buckets.sizes[-1]
        spare = self._spare.setdefault(rows, [])
        return spare.pop() if spare else self._new_frame(rows)

    def _new_frame(self, rows: int) -> _Frame:
        frame = _Frame(self._graph, rows, self._shape, self._frames.get(rows))
        self._frames.setdefault(rows, frame)
        return frame

    def _starts(
        self, starts: list[tuple[_Walk, slice]], scales: list[float], values: NDArray[np.float32]
    ) -> tuple[Array, Array]:
        """State of lanes, x and h [k, *S] f32, before their first evaluation."""
        x = np.zeros((len(scales), *self._shape), np.float32)
        h = np.zeros_like(x)
        done = 0
        for walk, lanes in starts:
            start = walk.job.start
            span = slice(done, done + lanes.stop - lanes.start)
            done = span.stop
            if isinstance(start, BoundTerms):
                x[span] = start.means(lanes)
                continue
            if start.values is not None:
                given = start.values if len(start.values) == 1 else start.values[lanes]
                x[span] = given if start.scale == 1.0 else np.float32(start.scale) * given
            if start.history is not None:
                h[span] = start.history[lanes]
        noisy = [index for index, scale in enumerate(scales) if scale]
        if noisy:
            x.reshape(len(x), -1)[noisy] += np.array(scales, np.float32)[noisy, None] * values
        return x, h

    def _blends(self, blends: list[tuple[_Walk, slice, int]]) -> tuple[NDArray[np.int64], Array, Array]:
        """What is known of lanes whose steps begin: their slots [k] i64, masks [k, *S] bool and x there [k, *S] f32."""
        draws, slots, masks, values = Draws(), [], [], []
        for walk, lanes, position in blends:
            slots += walk.slots[lanes]
            samples = walk.samples[lanes]
            draws.want(_KNOWN, walk.job.seed, samples, [walk.job.first_step_index + position] * len(samples))
        noise = draws.draw(self._elements).reshape(-1, *self._shape)
        done = 0
        for walk, lanes, position in blends:
            assert walk.job.known is not None
            part = noise[done : done + lanes.stop - lanes.start]
            values.append(walk.job.known.noised(lanes, position, part))
            masks.append(np.broadcast_to(walk.job.known.masks(lanes), part.shape))
            done += len(part)
        return np.array(slots, np.int64), np.concatenate(masks), np.concatenate(values)

    # ---- the call: the device's thread -------------------------------------------------------------------------

    def warm(self) -> None:
        """Record a CUDA graph of every size, where the device has such, and from now on whenever the state moves."""
        self._records = self._graph.captures
        for size, held in self._on_device.items():
            self._record(size, held)

    def run(self, prepared: PreparedSteps) -> StepResults:
        """Write what is new, evaluate, read what is wanted."""
        pool, frame, held = self._pool, prepared.frame, self._on_device[prepared.size]
        pool.grow(prepared.slots)
        if prepared.start_x is not None and prepared.start_h is not None:
            pool.write(np.array(prepared.start_slots), prepared.start_x, prepared.start_h)
        if prepared.blend is not None:  # once more, if this call fails and its lanes are prepared anew
            pool.blend(*prepared.blend)
        if self._graph.device.has_memory:
            self._record(prepared.size, held)
            _upload(frame, held)
        frame.bound(prepared.size, pool.memory).run(held.capture)
        if not self._graph.device.has_memory:
            return StepResults(pool.memory)
        try:
            return StepResults(pool.memory, {name: self._read(prepared, name, pool.memory) for name in prepared.reads})
        except Exception as error:  # a call that fails must leave every lane where it was, and they have moved on
            return StepResults(pool.memory, failure=error)

    def _record(self, size: int, held: _OnDevice) -> None:
        """Record the calls of a size as a CUDA graph, anew when the state has moved.

        The recorded call has no lanes: all its rows are the padding's, since recording runs it several times over.
        """
        if not self._records or held.state is self._pool.memory:
            return
        if held.capture != NO_CAPTURE:
            self._graph.forget(held.capture)
            held.capture = (
                NO_CAPTURE  # its addresses are those of the old state, whether or not it is recorded anew now
            )
        with recording() as alone:
            if not alone:
                return
            held.state = self._pool.memory
            number = next(self._captures)
            try:
                frame = self._new_frame(size)
                _upload(frame, held)
                frame.bound(size, self._pool.memory).record(number)
            except Exception as error:
                log.warning("no CUDA graph for calls of %d rows, kernels are launched one by one: %s", size, error)
            else:
                held.capture = number

    # ---- after the call: host work only ------------------------------------------------------------------------

    def finish(self, prepared: PreparedSteps, results: StepResults) -> list[Outcome]:
        """Hand out previews and finished lanes, whose slots are free from now on and whose noise is gone."""
        if results.failure is not None:
            raise results.failure
        outcomes = [_UNDER_WAY] * prepared.segments
        rows = results.rows or {name: self._read(prepared, name, results.state) for name in prepared.reads}
        for ending in prepared.endings:
            taken = {name: rows[name][span] for name, span in ending.spans.items()}
            if (known := ending.walk.job.known) is not None:
                taken = {name: known.put_into(array, ending.lanes) for name, array in taken.items()}
            if not ending.finished:
                outcomes[ending.segment] = Outcome(preview=taken["x0"])
                continue
            terms = ending.walk.job.start
            if isinstance(terms, BoundTerms):
                outputs = {"nats": terms.nats(ending.lanes, taken["x0"])}
            else:
                outputs = {_OUTPUTS[name]: array for name, array in taken.items()}
            outcomes[ending.segment] = Outcome(outputs=outputs)
            if self._walks.get(ending.job_id) is ending.walk:
                self._free(ending.walk, ending.lanes)
        self._spare.setdefault(prepared.frame.capacity, []).append(prepared.frame)
        return outcomes

    def _read(self, prepared: PreparedSteps, name: str, state: Memory) -> Array:
        memory = state if name in step_graph.STATE else prepared.frame.estimates
        return self._pool.read(memory, name, prepared.reads[name])

    def _free(self, walk: _Walk, lanes: slice) -> None:
        for lane in range(*lanes.indices(len(walk.slots))):
            if walk.slots[lane] >= 0:
                self._slots.free(walk.slots[lane])
                walk.slots[lane] = -1
                walk.noise.pop(lane, None)


def _upload(frame: _Frame, held: _OnDevice) -> None:
    """Bring up what the device has not: pairs and noise stay as they are while nobody needs any."""
    frame.rows.up()
    if frame.guided or held.guided:
        frame.pairs.up()
    if frame.noisy or held.noisy:
        frame.noise.up()
    held.guided, held.noisy = frame.guided, bool(frame.noisy)


def _fill(target: Array, values: Sequence[int], size: int) -> None:
    """Set the first `size` rows: the values, then zeros, which is also the padding's slot."""
    target[: len(values)] = values
    target[len(values) : size] = 0


def _ask_for_starts(starts: list[tuple[_Walk, slice]], draws: Draws) -> list[float]:
    """Ask for the noise that lanes start with, and give its scale for each lane; 0 where there is none."""
    scales: list[float] = []
    for walk, lanes in starts:
        start, samples = walk.job.start, walk.samples[lanes]
        if isinstance(start, BoundTerms):
            scales += start.sigmas[lanes].tolist()
            draws.want(_SCORE, walk.job.seed, samples, start.draws[lanes].tolist())
            continue
        scale = start.noise_scale
        scales += [scale] * len(samples)
        if scale:
            draws.want(_START, walk.job.seed, samples, [0] * len(samples))
    return scales


def _wanted(job: StepJob, position: int) -> tuple[str, ...]:
    """What is read after a lane's evaluation: of the state and estimates, by name."""
    table = job.tables[0]
    if isinstance(job.start, BoundTerms):
        return ("x0",)
    if position == len(table.timesteps) - 1:
        estimates = step_graph.ESTIMATES if job.estimates_wanted else ()
        return ("x", *estimates, *(("h",) if job.history_wanted else ()))
    if not job.preview_interval:
        return ()
    done = int(table.completed_steps[position])
    before = int(table.completed_steps[position - 1]) if position else 0
    return ("x0",) if done > before and done % job.preview_interval == 0 else ()
