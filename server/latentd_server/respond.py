"""What came of a job -> response messages, filled in where they stand: copies of messages add up. Pure."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.duration_pb2 import Duration
from latentd import tensor as codec
from latentd.v1 import generation_service_pb2, tensor_pb2
from numpy.typing import NDArray

from latentd_server import noise
from latentd_server.job import Array, Cost, Finished, Preview
from latentd_server.noise import Purpose
from latentd_server.plans import (
    Bounding,
    Decoding,
    Denoising,
    Diffusing,
    Encoding,
    Loop,
    LoopPosition,
    LoopStep,
    OutputForm,
    Sampling,
    Scoring,
)
from latentd_server.wire import Written, inside, opening

Result = generation_service_pb2.SampleResult
_RESULT = generation_service_pb2.SampleResponse.RESULT_FIELD_NUMBER

RESULT_BYTES = 1 << 20
"""About how much one `result` carries."""
_MANY = 1024  # indices that are written once for all


class Gathered:
    """The outputs of a job's lanes, put in order as they finish."""

    def __init__(self, lane_count: int) -> None:
        self.lane_count = lane_count
        self.outputs: dict[str, Array] = {}
        self.cost = Cost(queue_s=math.inf)

    def add(self, event: Finished) -> None:
        """Take in lanes that are done."""
        add_cost(self.cost, event.cost)
        if len(event.lanes) == self.lane_count:
            self.outputs = dict(event.outputs)
            return
        for name, values in event.outputs.items():
            if name not in self.outputs:
                self.outputs[name] = np.empty((self.lane_count, *values.shape[1:]), values.dtype)
            self.outputs[name][event.lanes] = values


def add_cost(total: Cost, cost: Cost) -> None:
    """Add up what groups of lanes have cost; the queue time is that of the first to ride."""
    total.queue_s = min(total.queue_s, cost.queue_s)
    total.compute_s += cost.compute_s
    total.evaluations += cost.evaluations
    total.batches += cost.batches
    total.rows += cost.rows


def tell(cost: Cost, into: generation_service_pb2.ExecutionStats) -> None:
    """A cost, as told to callers."""
    into.evaluation_count = cost.evaluations
    into.mean_batch_size = mean_batch(cost)
    _set_duration(into.queue_duration, cost.queue_s)
    _set_duration(into.compute_duration, cost.compute_s)


def mean_batch(cost: Cost) -> float:
    """Mean live rows of the batches."""
    return cost.rows / cost.batches if cost.batches else 0.0


def accepted(
    plan: Sampling, queue_depth: int, into: generation_service_pb2.SampleResponse
) -> generation_service_pb2.SampleResponse:
    """How a Sample request was understood."""
    _accept(plan, queue_depth, into.accepted)
    return into


def _accept(plan: Sampling, queue_depth: int, into: generation_service_pb2.SampleAccepted) -> None:
    into.resolved_request.CopyFrom(plan.resolved_request)
    into.determinism_class = plan.determinism_class
    into.queue_depth = queue_depth


def preview(
    plan: Sampling, event: Preview, into: generation_service_pb2.SampleResponse
) -> generation_service_pb2.SampleResponse:
    """Samples under way."""
    look = into.preview
    look.sample_indices.extend(event.lanes.tolist())
    look.completed_step_count = event.completed_steps
    look.total_step_count = event.total_steps
    codec.pack(convert(event.estimates, plan.preview_form or plan.form), look.estimates)
    return into


def results(plan: Sampling, event: Finished) -> Iterator[tuple[int, Written]]:
    """Finished samples, as `SampleResponse`s of about 1 MiB, and how many each holds."""
    samples = convert(event.outputs[plan.samples], plan.form)
    latents = event.outputs[plan.latents] if plan.latents else None
    row_bytes = samples[:1].nbytes + (0 if latents is None else latents[:1].nbytes)
    group = max(1, RESULT_BYTES // max(1, row_bytes))
    for first in range(0, len(samples), group):
        rows = slice(first, first + group)
        lanes = event.lanes[rows]
        share = event.cost
        if len(lanes) < len(samples):
            # Lanes that arrive together cost the same each; a message that holds a part of them tells that part's cost.
            share = replace(share, evaluations=share.evaluations * len(lanes) // len(samples))
        pieces = [_indices(lanes), *_tensor(Result.SAMPLES_FIELD_NUMBER, samples[rows])]
        if latents is not None:
            pieces += _tensor(Result.LATENTS_FIELD_NUMBER, latents[rows])
        rest = Result()
        if plan.labels is not None:
            rest.class_labels.extend(plan.labels[lanes].tolist())
        tell(share, rest.stats)
        result = Written([*pieces, rest.SerializeToString()])
        yield len(lanes), Written(inside(_RESULT, result))


def _indices(lanes: Array) -> bytes:
    """A `SampleResult` of these indices alone. Of many they are nearly always all, in order."""
    count = len(lanes)
    if 1 < count <= _MANY and lanes[0] == 0 and np.array_equal(lanes, np.arange(count)):
        return _first_indices(count)
    return Result(sample_indices=lanes.tolist()).SerializeToString()


@lru_cache(maxsize=64)
def _first_indices(count: int) -> bytes:
    return Result(sample_indices=range(count)).SerializeToString()


def _tensor(field: int, array: Array) -> list[bytes]:
    """The pieces of a field that is a `Tensor`."""
    before, dtype = _before_data(field, array.dtype, array.shape)
    return [before, array.astype(dtype, copy=False).tobytes()]


@lru_cache(maxsize=256)
def _before_data(field: int, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> "tuple[bytes, np.dtype[Any]]":
    """What stands before the elements of an array in such a field, and the type they have there."""
    head = tensor_pb2.Tensor()
    dtype = codec.describe(dtype, shape, head)
    length = math.prod(shape) * dtype.itemsize
    said = head.SerializeToString()
    if length:
        said += opening(tensor_pb2.Tensor.DATA_FIELD_NUMBER, length)
    return opening(field, len(said) + length) + said, dtype


def encoded(
    plan: Encoding, gathered: Gathered, into: generation_service_pb2.EncodeResponse
) -> generation_service_pb2.EncodeResponse:
    """Latents and the posterior they come from."""
    latents = mean = gathered.outputs[plan.latents]
    tell(gathered.cost, into.stats)
    if plan.log_variance:
        log_variance = gathered.outputs[plan.log_variance]
        codec.pack(mean, into.normal.mean)
        codec.pack(log_variance, into.normal.log_variance)
        if plan.seed is not None:
            latents = mean + np.exp(log_variance / 2) * _normals(plan.seed, mean, Purpose.POSTERIOR, plan.stream)
    elif plan.bernoulli:
        codec.pack(mean, into.bernoulli.probability)
        if plan.seed is not None:
            latents = (_uniforms(plan.seed, mean, plan.stream) < mean).astype(np.float32)
    elif plan.categorical:
        codec.pack(mean, into.categorical.probability)
        if plan.seed is not None:
            latents = _one_hot_draws(plan.seed, mean, plan.stream)
    if plan.classes:
        codec.pack(gathered.outputs[plan.classes], into.class_posterior.probability)
    codec.pack(latents, into.latents)
    return into


def diffused(plan: Diffusing, into: generation_service_pb2.EncodeResponse) -> generation_service_pb2.EncodeResponse:
    """A draw from q(x_t | x0) = N(alpha x0, sigma^2 I)."""
    noises = _normals(plan.seed, plan.samples, Purpose.FORWARD)
    latents = np.float32(plan.alpha) * plan.samples + np.float32(plan.sigma) * noises
    codec.pack(latents, into.latents)
    tell(Cost(), into.stats)
    return into


def decoded(
    plan: Decoding, gathered: Gathered, into: generation_service_pb2.DecodeResponse
) -> generation_service_pb2.DecodeResponse:
    """Samples of latents."""
    codec.pack(convert(gathered.outputs[plan.samples], plan.form), into.samples)
    tell(gathered.cost, into.stats)
    return into


def denoised(
    plan: Denoising, gathered: Gathered, into: generation_service_pb2.DenoiseStepResponse
) -> generation_service_pb2.DenoiseStepResponse:
    """One evaluation, and one step where it was asked for."""
    codec.pack(gathered.outputs["denoised"], into.denoised_samples)
    codec.pack(gathered.outputs["noise"], into.noise_estimates)
    if plan.stepped:
        codec.pack(gathered.outputs["sample"], into.next_samples)
    tell(gathered.cost, into.stats)
    return into


def scored(
    plan: Scoring | Bounding, gathered: Gathered, into: generation_service_pb2.ScoreResponse
) -> generation_service_pb2.ScoreResponse:
    """One number a row."""
    if isinstance(plan, Bounding):
        _bound(plan, gathered, into)
    else:
        into.values.extend(_score(plan, gathered).tolist())
        into.type = plan.type
    tell(gathered.cost, into.stats)
    return into


def _bound(plan: Bounding, gathered: Gathered, into: generation_service_pb2.ScoreResponse) -> None:
    """The bound of each row. Its terms are added up row by row, so that its bytes are its own."""
    nats = gathered.outputs["nats"].reshape(plan.row_count, plan.draw_count, -1)
    reconstruction = np.array([row[:, 0].sum() for row in nats])
    diffusion = np.array([row[:, 1:].sum() for row in nats])
    into.values.extend((-(plan.prior + diffusion + reconstruction)).tolist())
    into.type = generation_service_pb2.ScoreResponse.TYPE_EVIDENCE_LOWER_BOUND
    into.terms.prior.extend(plan.prior.tolist())
    into.terms.diffusion.extend(diffusion.tolist())
    into.terms.reconstruction.extend(reconstruction.tolist())


def _score(plan: Scoring, gathered: Gathered) -> NDArray[np.float64]:
    """What a scorer's answers come to, [n] f64.

    K draws of a bound are combined inside each class as ln mean exp, which makes them the importance weighted
    bound IWAE-K (Burda et al., arXiv 1509.00519, eq. 8); classes as ln sum p(label) exp.
    """
    values = gathered.outputs[plan.value].astype(np.float64).reshape(plan.row_count, -1, plan.draw_count)
    if plan.type == generation_service_pb2.ScoreResponse.TYPE_REAL_PROBABILITY:
        return np.asarray(values.mean(axis=(1, 2)))
    by_class = _log_sum_exp(values) - math.log(plan.draw_count)
    return _log_sum_exp(by_class + plan.log_prior)


def loop_opened(
    loop: Loop, position: LoopPosition, queue_depth: int, into: generation_service_pb2.LoopState
) -> generation_service_pb2.LoopState:
    """A loop before its first step."""
    _accept(loop.sampling, queue_depth, into.accepted)
    _stand(position, into)
    return into


def loop_stepped(
    loop: Loop, position: LoopPosition, step: LoopStep, gathered: Gathered, into: generation_service_pb2.LoopState
) -> generation_service_pb2.LoopState:
    """A loop after a step that led to `position`. The state travels as float32 only where it was asked for."""
    _stand(position, into)
    codec.pack(convert(gathered.outputs["denoised"], loop.sampling.form), into.step.denoised_samples)
    if step.state_requested:
        codec.pack(gathered.outputs["sample"], into.step.next_samples)
    tell(gathered.cost, into.step.stats)
    return into


def _stand(position: LoopPosition, into: generation_service_pb2.LoopState) -> None:
    into.timestep = position.current
    into.remaining_timesteps.extend(position.remaining)


def convert(samples: Array, form: OutputForm) -> Array:
    """Samples in the element type that was asked for; UINT8 maps the model's range to 0..255, half to even."""
    if form.data_type == tensor_pb2.DATA_TYPE_UINT8:
        scaled = (samples - np.float32(form.low)) * np.float32(255 / (form.high - form.low))
        return np.asarray(np.clip(np.rint(np.nan_to_num(scaled)), 0, 255), np.uint8)
    if form.data_type == tensor_pb2.DATA_TYPE_FLOAT16:
        with np.errstate(over="ignore"):  # beyond float16 is infinite
            return samples.astype(np.float16)
    return samples


def _normals(seed: int, like: Array, purpose: Purpose, stream: int = 0) -> Array:
    return noise.normals(_rows(seed, like, purpose, stream), math.prod(like.shape[1:])).reshape(like.shape)


def _uniforms(seed: int, like: Array, stream: int) -> Array:
    rows = _rows(seed, like, Purpose.POSTERIOR, stream)
    return noise.uniforms(rows, math.prod(like.shape[1:])).reshape(like.shape)


def _rows(seed: int, like: Array, purpose: Purpose, stream: int) -> list[noise.Run]:
    """Row i is drawn by (seed, i)."""
    return noise.runs(noise.word(purpose, stream), seed, range(len(like)))


def _one_hot_draws(seed: int, probabilities: Array, stream: int) -> Array:
    """One class a row by its probabilities. [n, classes] f32 -> [n, classes] f32 of zeros and a one."""
    points = noise.uniforms(_rows(seed, probabilities, Purpose.POSTERIOR, stream), 1)
    cumulative = np.cumsum(probabilities.astype(np.float64), axis=1)
    chosen = (cumulative <= points * cumulative[:, -1:]).sum(axis=1)
    drawn = np.zeros_like(probabilities)
    drawn[np.arange(len(drawn)), np.minimum(chosen, drawn.shape[1] - 1)] = 1
    return drawn


def _log_sum_exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ln of the sum of exp over the last axis."""
    highest = values.max(axis=-1, keepdims=True)
    shift = np.where(np.isfinite(highest), highest, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(values - shift).sum(axis=-1)) + shift[..., 0])


def _set_duration(duration: Duration, seconds: float) -> None:
    nanoseconds = round(seconds * 1e9) if math.isfinite(seconds) else 0
    duration.seconds, duration.nanos = divmod(nanoseconds, 10**9)
