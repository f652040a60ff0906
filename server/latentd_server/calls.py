"""Requests to one-shot models -> `CallJob`s: one evaluation of one graph for every row. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from latentd.v1 import bundle_pb2, generation_service_pb2
from numpy.typing import NDArray

from latentd_server import noise
from latentd_server.fields import MAX_INT32, Fields, has_label
from latentd_server.job import Array, CallJob, Noise, Repeated
from latentd_server.noise import Purpose
from latentd_server.plans import Decoding, Encoding, Limits, OutputForm, SampleHead, Sampling, Scoring
from latentd_server.wiring import LATENTS, SCORES, Graph, Input, Meaning, Source, Wiring

Role = bundle_pb2.Network

DEFAULT_DRAW_COUNT = 16
MAX_SCORE_ROWS = 65_536
MAX_SCORE_BYTES = 256 * 2**20
MAX_TEMPERATURE = 1000.0

_UNCONDITIONAL = np.array(-1, np.int64)
_FIRST_DRAW = np.array(0, np.int64)
_NO_NOISE = np.array(0, np.float32)
for _value in (_UNCONDITIONAL, _FIRST_DRAW, _NO_NOISE):
    _value.flags.writeable = False  # `_alike` arrays are windows onto them

_WHY_NOT = "this is no diffusion model"
_MODES = (
    generation_service_pb2.OUTPUT_MODE_UNSPECIFIED,
    generation_service_pb2.OUTPUT_MODE_MEAN,
    generation_service_pb2.OUTPUT_MODE_DRAW,
)

Feeds = Mapping["bundle_pb2.NetworkInput.Source.ValueType", "Array | Noise | Repeated | None"]


def sample(fields: Fields, request: generation_service_pb2.SampleRequest, head: SampleHead, model: Wiring) -> Sampling:
    """Latents from the prior, decoded."""
    fields.absent(request, ("diffusion",), "", _WHY_NOT)
    resolved, count = head.resolved_request, len(head.indices)
    resolved.temperature = request.temperature if request.HasField("temperature") else 1.0
    fields.number(resolved.temperature, "temperature", 0, MAX_TEMPERATURE)
    if model.uniform_prior and resolved.temperature != 1:
        fields.reject("temperature", "must be unset or 1: latents of this model come from U[0, 1), which has no scale")
    graph = model.graphs[Role.ROLE_DECODER]
    labels = fields.labels(request.condition, count, model, graph)
    codes = fields.codes(request.condition, count, graph)
    check_output_mode(fields, request.output_mode, graph)
    fields.check()
    output = _output(request.output_mode, graph)
    labels = _drawn_unless_given(labels, model, graph, head.seed, head.indices)
    latent = graph.input(Source.SOURCE_LATENT)
    values: Feeds = {
        Source.SOURCE_LATENT: Noise(Purpose.START, uniform=model.uniform_prior, scale=resolved.temperature),
        Source.SOURCE_CLASS_LABEL: labels,
        Source.SOURCE_CODES: codes,
    }
    job = _job(
        model, graph, values, output.noise, head.seed, head.indices, [output.name, *([latent.name] if latent else [])]
    )
    return Sampling(
        job=job,
        resolved_request=resolved,
        determinism_class=head.determinism_class,
        form=head.form,
        samples=output.name,
        latents=latent.name if latent else None,
        labels=labels,
    )


def encode(
    fields: Fields,
    request: generation_service_pb2.EncodeRequest,
    samples: NDArray[np.float32] | None,
    model: Wiring,
) -> Encoding:
    """Samples to the parameters of q(latent | sample), or to latents where the encoder is a function."""
    fields.absent(request, ("diffusion", "forward_timestep"), "", _WHY_NOT)
    graph = model.graphs[Role.ROLE_ENCODER]
    count = None if samples is None else len(samples)
    labels = fields.labels(request.condition, count, model, graph)
    codes = fields.codes(request.condition, count, graph)
    if graph.takes_label and model.class_count and not has_label(request.condition):
        fields.reject("condition.class_label", "must be set, or class_labels: this encoder is conditioned on a class")
    outputs = graph.outputs
    log_variance = outputs.get(Meaning.MEANING_LATENT_LOG_VARIANCE)
    bernoulli = Meaning.MEANING_LATENT_PROBABILITY in outputs
    classes = outputs.get(Meaning.MEANING_CLASS_PROBABILITY)
    seed = request.seed if request.HasField("seed") else None
    latents = next(outputs[meaning] for meaning in LATENTS if meaning in outputs)
    categorical = latents == classes
    if seed is not None and not (log_variance or bernoulli or categorical or graph.takes_noise):
        fields.reject("seed", "must be unset: this encoder is a function, with no posterior to draw from")
    fields.check()
    assert samples is not None
    values: Feeds = {
        Source.SOURCE_SAMPLE: samples,
        Source.SOURCE_CLASS_LABEL: labels,
        Source.SOURCE_CODES: codes,
    }
    indices = np.arange(len(samples), dtype=np.int64)
    beside = None if categorical else classes
    names = [name for name in (latents, log_variance, beside) if name]
    job = _job(model, graph, values, Purpose.POSTERIOR, seed or 0, indices, names)
    return Encoding(
        job, latents, log_variance, bernoulli, categorical, seed, stream=len(graph.noise_inputs), classes=beside
    )


def decode(
    fields: Fields,
    request: generation_service_pb2.DecodeRequest,
    latents: NDArray[np.float32] | None,
    form: OutputForm,
    model: Wiring,
) -> Decoding:
    """Latents to the mean of p(sample | latent), or to a draw from it."""
    fields.absent(request, ("diffusion",), "", _WHY_NOT)
    graph = model.graphs[Role.ROLE_DECODER]
    count = None if latents is None else len(latents)
    labels = fields.labels(request.condition, count, model, graph)
    codes = fields.codes(request.condition, count, graph)
    check_output_mode(fields, request.output_mode, graph)
    check_seed(fields, request)
    fields.check()
    assert latents is not None
    output = _output(request.output_mode, graph)
    indices = np.arange(len(latents), dtype=np.int64)
    values: Feeds = {
        Source.SOURCE_LATENT: latents,
        Source.SOURCE_CLASS_LABEL: _drawn_unless_given(labels, model, graph, request.seed, indices),
        Source.SOURCE_CODES: codes,
    }
    return Decoding(_job(model, graph, values, output.noise, request.seed, indices, [output.name]), form, output.name)


def score(
    fields: Fields,
    request: generation_service_pb2.ScoreRequest,
    samples: NDArray[np.float32] | None,
    model: Wiring,
    limits: Limits,
) -> Scoring:
    """Samples to one number each, by way of one row for every (sample, class, draw).

    Without a label a likelihood or a bound is that of p(x) = sum over labels of p(label) p(x | label).
    """
    fields.absent(request, ("timestep_count",), "", "only the bound of a diffusion model is a sum over timesteps")
    graph = model.graphs[Role.ROLE_SCORER]
    meaning = next(meaning for meaning in SCORES if meaning in graph.outputs)
    count = None if samples is None else len(samples)
    labels = fields.labels(request.condition, count, model, graph)
    codes = fields.codes(request.condition, count, graph)
    summed = graph.takes_label and model.class_count > 0 and not has_label(request.condition)
    if summed and meaning == Meaning.MEANING_REAL_PROBABILITY:
        fields.reject("condition.class_label", "must be set, or class_labels: this critic judges samples of a class")
    classes = np.flatnonzero(np.isfinite(model.log_prior)) if summed else np.zeros(1, np.int64)
    draw_count = _draw_count(fields, request.draw_count, graph)
    _check_score_size(fields, count or 1, len(classes), draw_count, model, limits)
    fields.check()
    assert samples is not None
    repeats = len(classes) * draw_count
    if summed:
        labels = np.tile(np.repeat(classes, draw_count), len(samples))
    elif labels is not None:
        labels = np.repeat(labels, repeats)
    values: Feeds = {
        Source.SOURCE_SAMPLE: Repeated(samples, repeats),
        Source.SOURCE_CLASS_LABEL: labels,
        Source.SOURCE_CODES: None if codes is None else Repeated(codes, repeats),
    }
    indices = np.repeat(np.arange(len(samples), dtype=np.int64), repeats)
    draws = np.tile(np.arange(draw_count, dtype=np.int64), len(samples) * len(classes))
    name = graph.outputs[meaning]
    return Scoring(
        job=_job(model, graph, values, Purpose.SCORE, request.seed, indices, [name], draws),
        value=name,
        type=SCORES[meaning],
        row_count=len(samples),
        draw_count=draw_count,
        log_prior=model.log_prior[classes] if summed else np.zeros(1),
    )


def decoding_stage(
    mode: generation_service_pb2.OutputMode.ValueType,
    labels: NDArray[np.int64],
    seed: int,
    indices: NDArray[np.int64],
    model: Wiring,
) -> tuple[CallJob, str, str]:
    """What decodes latents that there are not yet: the job without them, and the names of samples and latents."""
    graph = model.graphs[Role.ROLE_DECODER]
    output = _output(mode, graph)
    latent = graph.input(Source.SOURCE_LATENT)
    assert latent is not None
    values: Feeds = {Source.SOURCE_LATENT: np.empty(0, np.float32), Source.SOURCE_CLASS_LABEL: labels}
    job = _job(model, graph, values, output.noise, seed, indices, [output.name, latent.name])
    feeds = {name: feed for name, feed in job.feeds.items() if name != latent.name}
    return replace(job, feeds=feeds), output.name, latent.name


def encoding_stage(
    samples: NDArray[np.float32], labels: NDArray[np.int64], seed: int, indices: NDArray[np.int64], model: Wiring
) -> tuple[CallJob, str]:
    """What encodes samples, [n, *sample] f32, to the mean of their posterior, and the name of that."""
    graph = model.graphs[Role.ROLE_ENCODER]
    mean = graph.outputs[Meaning.MEANING_LATENT_MEAN]
    values: Feeds = {Source.SOURCE_SAMPLE: samples, Source.SOURCE_CLASS_LABEL: labels}
    return _job(model, graph, values, Purpose.POSTERIOR, seed, indices, [mean]), mean


@dataclass(frozen=True, slots=True)
class _Output:
    """Which output holds the samples, and what the graph's noise inputs are drawn for; None feeds them zeros."""

    name: str
    noise: Purpose | None


def check_output_mode(
    fields: Fields, mode: generation_service_pb2.OutputMode.ValueType, graph: Graph, *, undecoded: bool = False
) -> None:
    """Whether a decoder answers so; `undecoded` says that LATENT is another choice."""
    drawn = Meaning.MEANING_SAMPLE_DRAW in graph.outputs
    if mode == generation_service_pb2.OUTPUT_MODE_DRAW and not drawn:
        choices = "unset, MEAN or LATENT" if undecoded else "unset or MEAN"
        fields.reject("output_mode", f"must be {choices}: this decoder is a function, with nothing to draw")
    elif mode not in _MODES:
        choices = "MEAN, DRAW or LATENT" if undecoded else "MEAN or DRAW"
        fields.reject("output_mode", f"must be unset, {choices}; got {mode}")


def check_seed(fields: Fields, request: generation_service_pb2.DecodeRequest) -> None:
    """A draw wants a seed."""
    if request.output_mode == generation_service_pb2.OUTPUT_MODE_DRAW and not request.HasField("seed"):
        fields.reject("seed", "must be set for OUTPUT_MODE_DRAW")


def _output(mode: generation_service_pb2.OutputMode.ValueType, graph: Graph) -> _Output:
    draw = graph.outputs.get(Meaning.MEANING_SAMPLE_DRAW)
    mean = graph.outputs[Meaning.MEANING_SAMPLE]
    if mode == generation_service_pb2.OUTPUT_MODE_DRAW:
        return _Output(draw or mean, Purpose.OUTPUT)
    # Beside a draw the mean does not depend on the noise; alone it may (bundle.proto, MEANING_SAMPLE_DRAW).
    return _Output(mean, None if draw else Purpose.OUTPUT)


def _drawn_unless_given(
    labels: NDArray[np.int64] | None, model: Wiring, graph: Graph, seed: int, indices: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """Labels from p(label) by (seed, sample) where none were given; None for a graph that takes none."""
    if labels is None and graph.takes_label and model.class_count:
        return noise.labels(seed, indices, model.cumulative)
    return labels


def _draw_count(fields: Fields, asked: int, graph: Graph) -> int:
    if graph.takes_noise:
        return fields.integer(asked, "draw_count", 1, MAX_INT32, default=DEFAULT_DRAW_COUNT) or 1
    if asked not in (0, 1):
        fields.reject("draw_count", f"must be 0 or 1: this score is exact, not a Monte Carlo estimate; got {asked}")
    return 1


def _check_score_size(fields: Fields, rows: int, classes: int, draws: int, model: Wiring, limits: Limits) -> None:
    row_bytes = 4 * max(1, int(np.prod(model.sample.shape)))
    most = min(MAX_SCORE_ROWS, limits.max_evaluations, MAX_SCORE_BYTES // row_bytes)
    total = rows * classes * draws
    if total > most:
        fields.reject(
            "draw_count",
            f"{rows} rows x {classes} classes x {draws} draws make {total} evaluations; "
            f"at most {most} are allowed in one request",
        )


def _job(
    model: Wiring,
    graph: Graph,
    values: Feeds,
    purpose: Purpose | None,
    seed: int,
    sample_indices: NDArray[np.int64],
    outputs: list[str],
    draw_indices: NDArray[np.int64] | None = None,
) -> CallJob:
    count = len(sample_indices)
    feeds: dict[str, Array | Noise | Repeated] = {}
    for entry in graph.inputs:
        value = values.get(entry.source)
        if value is not None:
            feeds[entry.name] = value
        elif entry.source == Source.SOURCE_CLASS_LABEL:
            feeds[entry.name] = _alike(_UNCONDITIONAL, count)
        elif purpose is None:
            feeds[entry.name] = _alike(_NO_NOISE, count, *entry.shape)
        else:
            feeds[entry.name] = _noise(graph, entry, purpose)
    return CallJob(
        model=model.name,
        role=graph.role,
        lane_count=count,
        feeds=feeds,
        outputs=tuple(outputs),
        seed=seed,
        sample_indices=sample_indices,
        draw_indices=_alike(_FIRST_DRAW, count) if draw_indices is None else draw_indices,
    )


def _alike(value: NDArray[Any], *shape: int) -> NDArray[Any]:
    """An array that is the same everywhere and takes no memory; as `np.broadcast_to`, in a third of its time."""
    return np.ndarray(shape, value.dtype, value, strides=(0,) * len(shape))


def _noise(graph: Graph, entry: Input, purpose: Purpose) -> Noise:
    uniform = entry.source == Source.SOURCE_UNIFORM_NOISE
    return Noise(purpose, uniform=uniform, stream=graph.noise_inputs.index(entry))
