"""What a request becomes: a job of lanes that want evaluations. Plain data; imports no clock, thread, gRPC or ORT.

`resolve.py` makes jobs, `scheduler.py` decides who rides, `engine.py` and `runtime.py` run them, and
events carry the outcome back. Two kinds exist:

* a `StepJob` walks lanes of a diffusion model down a table of coefficients (`samplers.Table`), one
  evaluation of the denoiser at a time, or scores by lanes that are one evaluation each (`BoundTerms`);
* a `CallJob` wants one evaluation of one graph for every row (VAE, GAN, encoders, scorers).

A job may say what becomes of its finished lanes (`then`): lanes of a job of the same request on another graph.

A lane is one sample of a job. An evaluation is one row of one network call; a guided lane takes two
rows, hence two evaluations, per step, but for the steps outside its guidance interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from latentd.v1 import bundle_pb2, model_pb2
from numpy.typing import NDArray

from latentd_server.bound_terms import BoundTerms
from latentd_server.known_pixels import Known
from latentd_server.noise import Purpose
from latentd_server.samplers import Table
from latentd_server.schedules import Schedule

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Servable:
    """What the door needs to know of an active model. Hashable by identity."""

    bundle: bundle_pb2.Bundle
    schedule: Schedule | None  # diffusion models only
    determinism_class: str
    promise: bool = True  # whether equal classes promise anything; if not, no two answers get the same
    decoder: Servable | None = None  # the model that `Model.latent_space` names
    size: tuple[int, int] | None = None  # of samples, where it is not the default: then this is a variant
    variants: tuple[Servable, ...] = ()  # the model at its other sizes

    @property
    def model(self) -> model_pb2.Model:
        """The model as GetModel returns it, less its state."""
        return self.bundle.model

    def network(self, role: int) -> bundle_pb2.Network | None:
        """The graph with this role, if the bundle has one."""
        return next((network for network in self.bundle.networks if network.role == role), None)


@dataclass(frozen=True, slots=True)
class Start:
    """x at the first evaluation: `scale` * `values` + `noise_scale` * z, z ~ N(0, I) by (seed, sample, purpose)."""

    noise_scale: float
    values: Array | None = None  # [1 or n, *sample] f32
    scale: float = 1.0
    history: Array | None = None  # [n, *sample] f32; the history register, zeros if None


@dataclass(frozen=True, slots=True)
class StepJob:
    """Lanes of one diffusion request. Every array's first axis is the lane, or 1 for all of them."""

    model: str  # canonical name
    lane_count: int
    tables: tuple[Table, ...]  # one for all lanes, or one each; all of the same length
    start: Start | BoundTerms
    seed: int
    sample_indices: Array  # [n] i64; what the seed is combined with
    labels: Array  # [n] i64; -1 is the unconditional network
    guidance_scale: float = 1.0  # anything but 1 takes a second, unconditional row a lane
    guidance_interval: tuple[int, int] | None = None  # timesteps, both ends included, that are guided; None is all
    first_step_index: int = 0  # added to the evaluation's number where step noise is drawn
    preview_interval: int = 0  # solver steps between previews; 0 is none
    estimates_wanted: bool = False  # report the last evaluation's x0 and eps
    history_wanted: bool = False  # report the history register
    known: Known | None = None  # part of the samples that is given
    size: tuple[int, int] | None = None  # height and width, where they are not the model's default
    then: Handover | None = None

    @property
    def evaluations_per_lane(self) -> int:
        """Network rows one lane takes from start to end."""
        rows = self.rows_by_evaluation
        return len(self.tables[0].timesteps) * self.rows_per_lane if rows is None else sum(rows)

    @property
    def rows_per_lane(self) -> int:
        """Rows one lane occupies in a call, at most."""
        if self.guidance_scale == 1.0:
            return 1
        rows = self.rows_by_evaluation
        return 2 if rows is None else max(rows)

    @property
    def rows_by_evaluation(self) -> list[int] | None:
        """Rows one lane occupies in the call of each of its evaluations; None where an interval makes no difference."""
        if self.guidance_interval is None or self.guidance_scale == 1.0:
            return None
        low, high = self.guidance_interval
        return [1 + (low <= timestep <= high) for timestep in self.tables[0].timesteps.tolist()]


@dataclass(frozen=True, slots=True)
class Noise:
    """A graph input filled with fresh noise, row i by (seed, sample_indices[i], draw_indices[i], purpose, stream)."""

    purpose: Purpose
    uniform: bool = False  # U[0, 1) instead of N(0, 1)
    scale: float = 1.0
    stream: int = 0  # the input's number among those filled for this purpose


@dataclass(frozen=True, slots=True, eq=False)
class Repeated:
    """A graph input that is each of a few rows so many times over. Rows are taken as they are due, so that a request
    takes no more memory, and no more of the event loop's time, than it brought.
    """

    values: Array  # [m, *spec]
    times: int

    def __len__(self) -> int:
        return len(self.values) * self.times

    def __getitem__(self, lanes: slice | Array) -> Array:
        """Rows of lanes, [k, *spec]."""
        numbers = np.arange(*lanes.indices(len(self))) if isinstance(lanes, slice) else lanes
        return np.asarray(self.values[numbers // self.times])


@dataclass(frozen=True, slots=True)
class CallJob:
    """Rows of one request for one graph."""

    model: str  # canonical name
    role: bundle_pb2.Network.Role.ValueType
    lane_count: int
    feeds: Mapping[str, Array | Noise | Repeated]  # by graph input; arrays are [n, *spec]
    outputs: tuple[str, ...]  # graph outputs to report; input names are reported as they were fed
    seed: int
    sample_indices: Array  # [n] i64
    draw_indices: Array  # [n] i64; the k-th Monte Carlo draw of a row, else 0
    then: Handover | None = None

    @property
    def evaluations_per_lane(self) -> int:
        """Network rows one lane takes from start to end."""
        return 1

    @property
    def rows_per_lane(self) -> int:
        """Rows one lane occupies in a call."""
        return 1


Job = StepJob | CallJob


@dataclass(frozen=True, slots=True, eq=False)
class Handover:
    """What becomes of finished lanes: lanes of another job, made of what they report."""

    job: Job  # with as many lanes as the request; but for what is handed over
    output: str  # of what the lanes report
    into: str  # the graph input it is for; of a walk's job, "" for x at the first evaluation
    scale: Array  # f32, against rows of `output`
    shift: Array  # f32; what goes on is scale * output + shift

    def take(self, lanes: Array, outputs: Mapping[str, Array]) -> Job:
        """The job of these lanes of the request, [k] i64, of which `outputs` is what they reported, [k, ...]."""
        values = self.scale * outputs[self.output] + self.shift
        job = lanes_of(self.job, lanes)
        if isinstance(job, CallJob):
            return replace(job, feeds={**job.feeds, self.into: values})
        assert isinstance(job.start, Start)
        return replace(job, start=replace(job.start, values=values))


def stages(job: Job) -> Iterator[Job]:
    """A job and what its lanes go on to, each with all of the request's lanes."""
    yield job
    while job.then is not None:
        job = job.then.job
        yield job


def lanes_of(job: Job, lanes: Array) -> Job:
    """A job of some of a job's lanes, [k] i64. Shares no memory with it that would keep the other lanes alive."""

    def rows(values: Array | Repeated) -> Array:
        return values[lanes] if len(values) > 1 else values[:].copy()

    if isinstance(job, CallJob):
        return replace(
            job,
            lane_count=len(lanes),
            feeds={name: feed if isinstance(feed, Noise) else rows(feed) for name, feed in job.feeds.items()},
            sample_indices=rows(job.sample_indices),
            draw_indices=rows(job.draw_indices),
        )
    start = job.start
    if isinstance(start, BoundTerms):
        start = start.of_lanes(lanes)
    else:
        values = None if start.values is None else rows(start.values)
        start = replace(start, values=values, history=None if start.history is None else rows(start.history))
    return replace(
        job,
        lane_count=len(lanes),
        tables=tuple(job.tables[lane] for lane in lanes) if len(job.tables) > 1 else job.tables,
        start=start,
        known=None if job.known is None else job.known.of(lanes),
        sample_indices=rows(job.sample_indices),
        labels=rows(job.labels),
    )


@dataclass(slots=True)
class Cost:
    """What lanes have cost: sums over the batches they rode in, together."""

    queue_s: float = 0.0  # from admission to the first batch
    compute_s: float = 0.0
    evaluations: int = 0  # network rows, of all the lanes together
    batches: int = 0
    rows: int = 0  # live rows of those batches, summed; rows / batches is the mean batch size


@dataclass(frozen=True, slots=True)
class Preview:
    """The current estimate of x0 of lanes under way."""

    lanes: Array  # [k] i64
    completed_steps: int
    total_steps: int
    estimates: Array  # [k, *sample] f32


@dataclass(frozen=True, slots=True)
class Finished:
    """Lanes that are done. Sent once for every lane.

    Steps report `sample` (x after the last update) and, where wanted, `denoised`, `noise` and `history`; terms of
    a bound report `nats` alone;
    calls report the graph's outputs, and its inputs where asked for, by name.
    """

    lanes: Array  # [k] i64
    outputs: Mapping[str, Array]  # [k, ...]
    cost: Cost
    last: bool  # whether the job is over


@dataclass(frozen=True, slots=True)
class Failed:
    """The job is over without a result."""

    error: Exception


Event = Preview | Finished | Failed

__all__ = [
    "CallJob",
    "Cost",
    "Event",
    "Failed",
    "Finished",
    "Handover",
    "Job",
    "Noise",
    "Preview",
    "Repeated",
    "Servable",
    "Start",
    "StepJob",
    "lanes_of",
    "stages",
]
