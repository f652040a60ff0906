"""What came of a job -> response messages. Pure."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from google.protobuf.duration_pb2 import Duration
from latentd import tensor as codec
from latentd.v1 import generation_service_pb2, tensor_pb2
from numpy.typing import NDArray

from latentd_server import noise
from latentd_server.job import Array, Cost, Finished, Preview
from latentd_server.noise import Purpose
from latentd_server.plans import (
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

RESULT_BYTES = 1 << 20
"""About how much one `result` carries."""


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


def stats(cost: Cost) -> generation_service_pb2.ExecutionStats:
    """A cost, as told to callers."""
    told = generation_service_pb2.ExecutionStats(evaluation_count=cost.evaluations, mean_batch_size=mean_batch(cost))
    _set_duration(told.queue_duration, cost.queue_s)
    _set_duration(told.compute_duration, cost.compute_s)
    return told


def mean_batch(cost: Cost) -> float:
    """Mean live rows of the batches."""
    return cost.rows / cost.batches if cost.batches else 0.0


def accepted(plan: Sampling, queue_depth: int) -> generation_service_pb2.SampleAccepted:
    """How a Sample request was understood."""
    return generation_service_pb2.SampleAccepted(
        resolved_request=plan.resolved_request, determinism_class=plan.determinism_class, queue_depth=queue_depth
    )


def preview(plan: Sampling, event: Preview) -> generation_service_pb2.SampleResponse:
    """Samples under way."""
    return generation_service_pb2.SampleResponse(
        preview=generation_service_pb2.SamplePreview(
            sample_indices=event.lanes.tolist(),
            completed_step_count=event.completed_steps,
            total_step_count=event.total_steps,
            estimates=to_tensor(event.estimates, plan.form),
        )
    )


def results(plan: Sampling, event: Finished) -> Iterator[generation_service_pb2.SampleResponse]:
    """Finished samples, in messages of about 1 MiB."""
    samples = convert(event.outputs[plan.samples], plan.form)
    latents = event.outputs[plan.latents] if plan.latents else None
    row_bytes = samples[:1].nbytes + (0 if latents is None else latents[:1].nbytes)
    group = max(1, RESULT_BYTES // max(1, row_bytes))
    for first in range(0, len(samples), group):
        rows = slice(first, first + group)
        lanes = event.lanes[rows]
        # Lanes that arrive together cost the same each; a message that holds a part of them tells that part's cost.
        share = replace(event.cost, evaluations=event.cost.evaluations * len(lanes) // len(samples))
        result = generation_service_pb2.SampleResult(
            sample_indices=lanes.tolist(), samples=codec.encode(samples[rows]), stats=stats(share)
        )
        if latents is not None:
            result.latents.CopyFrom(codec.encode(latents[rows]))
        if plan.labels is not None:
            result.class_labels.extend(plan.labels[lanes].tolist())
        yield generation_service_pb2.SampleResponse(result=result)


def encoded(plan: Encoding, gathered: Gathered) -> generation_service_pb2.EncodeResponse:
    """Latents and the posterior they come from."""
    latents = mean = gathered.outputs[plan.latents]
    response = generation_service_pb2.EncodeResponse(stats=stats(gathered.cost))
    if plan.log_variance:
        log_variance = gathered.outputs[plan.log_variance]
        response.normal.mean.CopyFrom(codec.encode(mean))
        response.normal.log_variance.CopyFrom(codec.encode(log_variance))
        if plan.seed is not None:
            latents = mean + np.exp(log_variance / 2) * _normals(plan.seed, mean, Purpose.POSTERIOR, plan.stream)
    elif plan.bernoulli:
        response.bernoulli.probability.CopyFrom(codec.encode(mean))
        if plan.seed is not None:
            latents = (_uniforms(plan.seed, mean, plan.stream) < mean).astype(np.float32)
    elif plan.categorical:
        response.categorical.probability.CopyFrom(codec.encode(mean))
        if plan.seed is not None:
            latents = _one_hot_draws(plan.seed, mean, plan.stream)
    response.latents.CopyFrom(codec.encode(latents))
    return response


def diffused(plan: Diffusing) -> generation_service_pb2.EncodeResponse:
    """A draw from q(x_t | x0) = N(alpha x0, sigma^2 I)."""
    noises = _normals(plan.seed, plan.samples, Purpose.FORWARD)
    latents = np.float32(plan.alpha) * plan.samples + np.float32(plan.sigma) * noises
    return generation_service_pb2.EncodeResponse(latents=codec.encode(latents), stats=stats(Cost()))


def decoded(plan: Decoding, gathered: Gathered) -> generation_service_pb2.DecodeResponse:
    """Samples of latents."""
    samples = to_tensor(gathered.outputs[plan.samples], plan.form)
    return generation_service_pb2.DecodeResponse(samples=samples, stats=stats(gathered.cost))


def denoised(plan: Denoising, gathered: Gathered) -> generation_service_pb2.DenoiseStepResponse:
    """One evaluation, and one step where it was asked for."""
    response = generation_service_pb2.DenoiseStepResponse(
        denoised_samples=codec.encode(gathered.outputs["denoised"]),
        noise_estimates=codec.encode(gathered.outputs["noise"]),
        stats=stats(gathered.cost),
    )
    if plan.stepped:
        response.next_samples.CopyFrom(codec.encode(gathered.outputs["sample"]))
    return response


def scored(plan: Scoring, gathered: Gathered) -> generation_service_pb2.ScoreResponse:
    """One number a row.

    K draws of a bound are combined inside each class as ln mean exp, which makes them the importance weighted
    bound IWAE-K (Burda et al., arXiv 1509.00519, eq. 8); classes as ln sum p(label) exp.
    """
    values = gathered.outputs[plan.value].astype(np.float64).reshape(plan.row_count, -1, plan.draw_count)
    if plan.type == generation_service_pb2.ScoreResponse.TYPE_REAL_PROBABILITY:
        reduced = values.mean(axis=(1, 2))
    else:
        by_class = _log_sum_exp(values) - math.log(plan.draw_count)
        reduced = _log_sum_exp(by_class + plan.log_prior)
    return generation_service_pb2.ScoreResponse(values=reduced.tolist(), type=plan.type, stats=stats(gathered.cost))


def loop_opened(loop: Loop, position: LoopPosition, queue_depth: int) -> generation_service_pb2.LoopState:
    """A loop before its first step."""
    return generation_service_pb2.LoopState(
        accepted=accepted(loop.sampling, queue_depth),
        timestep=position.current,
        remaining_timesteps=position.remaining,
    )


def loop_stepped(
    loop: Loop, position: LoopPosition, step: LoopStep, gathered: Gathered
) -> generation_service_pb2.LoopState:
    """A loop after a step that led to `position`. The state travels as float32 only where it was asked for."""
    state = generation_service_pb2.LoopState(timestep=position.current, remaining_timesteps=position.remaining)
    state.step.denoised_samples.CopyFrom(to_tensor(gathered.outputs["denoised"], loop.sampling.form))
    if step.state_requested:
        state.step.next_samples.CopyFrom(codec.encode(gathered.outputs["sample"]))
    state.step.stats.CopyFrom(stats(gathered.cost))
    return state


def to_tensor(samples: Array, form: OutputForm) -> tensor_pb2.Tensor:
    """Samples as they leave. `samples`: [n, *sample] f32 in the model's range."""
    return codec.encode(convert(samples, form))


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
    return noise.normals(*_keys(seed, like, purpose, stream), math.prod(like.shape[1:])).reshape(like.shape)


def _uniforms(seed: int, like: Array, stream: int) -> Array:
    keys = _keys(seed, like, Purpose.POSTERIOR, stream)
    return noise.uniforms(*keys, math.prod(like.shape[1:])).reshape(like.shape)


def _keys(seed: int, like: Array, purpose: Purpose, stream: int) -> tuple[NDArray[np.int64], ...]:
    """Row i is drawn by (seed, i)."""
    count, word = len(like), noise.word(purpose, stream)
    return np.full(count, seed), np.arange(count), np.zeros(count, np.int64), np.full(count, word)


def _one_hot_draws(seed: int, probabilities: Array, stream: int) -> Array:
    """One class a row by its probabilities. [n, classes] f32 -> [n, classes] f32 of zeros and a one."""
    points = noise.uniforms(*_keys(seed, probabilities, Purpose.POSTERIOR, stream), 1)
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
