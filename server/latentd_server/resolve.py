"""Requests -> plans, or every field violation at once. Pure: one function for each method.

One-shot models are resolved in `calls`, diffusion models in `walks`, client-driven loops in `loops`. Fields that
mean nothing to the model at hand are violations too: what a caller asked for is done or refused, never ignored.

Every function raises FieldsInvalidError, which lists every violation, and MethodUnsupportedError.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
from latentd.v1 import bundle_pb2, generation_service_pb2, model_pb2, tensor_pb2

from latentd_server import bounds, calls, loops, sizes, walks
from latentd_server.admission import Work
from latentd_server.fields import MAX_INT32, Fields, has_label
from latentd_server.job import Servable
from latentd_server.plans import (
    Bounding,
    Decoding,
    Denoising,
    Diffusing,
    Encoding,
    Limits,
    Loop,
    LoopPosition,
    SampleHead,
    Sampling,
    Scoring,
)
from latentd_server.scheduler import key_of
from latentd_server.wiring import Wiring, supporting, wiring

Model = model_pb2.Model

_MOST_KEPT_SAMPLES, _MOST_KEPT_BYTES = 1024, 512
"""Of a request whose plan is kept, for one like it with another seed."""

Request = (
    generation_service_pb2.SampleRequest
    | generation_service_pb2.EncodeRequest
    | generation_service_pb2.DecodeRequest
    | generation_service_pb2.DenoiseStepRequest
    | generation_service_pb2.ScoreRequest
)


def least_evaluations(request: Request, limits: Limits) -> int:
    """Network rows that a request takes at least if it is valid, told at a glance; 1 where it looks wrong."""
    if isinstance(request, generation_service_pb2.EncodeRequest) and request.HasField("forward_timestep"):
        return 0
    if isinstance(request, generation_service_pb2.SampleRequest):
        steps, rows = _least_steps(request.diffusion, limits), request.sample_count or 1
    else:
        steps, shape = 1, _ROWS_OF[type(request)](request).shape
        rows = shape[0] if shape else 1
    return rows * steps if 1 <= rows <= limits.max_samples else 1


def least_work(request: Request, servable: Servable, limits: Limits) -> Work | None:
    """What a request for samples asks at least of its diffusion model's network; None for any other, which are read as
    quickly as they are looked at.
    """
    if not isinstance(request, generation_service_pb2.SampleRequest) or servable.schedule is None:
        return None
    default = min(wiring(servable).default_step_count, servable.schedule.timestep_count)
    steps, rows = _least_steps(request.diffusion, limits, default), request.sample_count or 1
    if not 1 <= rows <= limits.max_samples or request.HasField("size"):
        return None
    key = key_of(servable.model.name, bundle_pb2.Network.ROLE_DENOISER, servable.size)
    return Work(key, steps, rows, rows * steps)


def _least_steps(options: generation_service_pb2.DiffusionOptions, limits: Limits, default: int = 1) -> int:
    steps = len(options.timesteps) or options.step_count or min(default, limits.max_steps)
    cut_short = options.HasField("start")
    return 1 if cut_short or not 1 <= steps <= limits.max_steps else steps


_ROWS_OF: dict[type, Callable[[Any], tensor_pb2.Tensor]] = {
    generation_service_pb2.EncodeRequest: attrgetter("samples"),
    generation_service_pb2.DecodeRequest: attrgetter("latents"),
    generation_service_pb2.DenoiseStepRequest: attrgetter("noisy_samples"),
    generation_service_pb2.ScoreRequest: attrgetter("samples"),
}


def sample(
    request: generation_service_pb2.SampleRequest, servable: Servable, fresh_seed: int, limits: Limits
) -> Sampling:
    """Resolve Sample; `fresh_seed`, a number nobody else has, is used where the request has none."""
    if not _hangs_on_its_seed_for_noise_alone(request, servable):
        return _sample(request, servable, fresh_seed, limits)
    alike = _sample_of_any_seed(_without_seed(request), servable, limits)
    return _with_seed(alike, request.seed if request.HasField("seed") else fresh_seed)


def _hangs_on_its_seed_for_noise_alone(request: generation_service_pb2.SampleRequest, servable: Servable) -> bool:
    """Whether the plan of a request is worth keeping: it is small, another like it may come, and with another seed it
    has the same labels, jobs and class.
    """
    return (
        0 <= request.sample_count <= _MOST_KEPT_SAMPLES
        and request.ByteSize() <= _MOST_KEPT_BYTES
        and not request.first_sample_index  # who goes through samples asks for each of them once
        and not request.condition.codes
        and (has_label(request.condition) or not servable.model.class_names)
        and servable.decoder is None
        and servable.promise
    )


def _without_seed(request: generation_service_pb2.SampleRequest) -> bytes:
    rest = generation_service_pb2.SampleRequest()
    rest.CopyFrom(request)
    rest.ClearField("seed")
    return rest.SerializeToString()


@lru_cache(maxsize=256)
def _sample_of_any_seed(request: bytes, servable: Servable, limits: Limits) -> Sampling:
    """Most requests are like one before but for their seed."""
    plan = _sample(generation_service_pb2.SampleRequest.FromString(request), servable, 0, limits)
    for shared in (plan.job.sample_indices, plan.labels):
        if shared is not None:
            shared.setflags(write=False)  # it is many requests' from here on
    return plan


def _with_seed(plan: Sampling, seed: int) -> Sampling:
    resolved = generation_service_pb2.SampleRequest()
    resolved.CopyFrom(plan.resolved_request)
    resolved.seed = seed
    return replace(plan, job=replace(plan.job, seed=seed), resolved_request=resolved)


def _sample(
    request: generation_service_pb2.SampleRequest, servable: Servable, fresh_seed: int, limits: Limits
) -> Sampling:
    model = supporting(servable, Model.METHOD_SAMPLE)
    fields = Fields()
    model = _at_size(fields, request, model)
    head = _head(fields, request, model, fresh_seed, limits)
    if model.is_diffusion:
        return walks.sample(fields, request, head, model, limits)[0]
    return calls.sample(fields, request, head, model)


def encode(request: generation_service_pb2.EncodeRequest, servable: Servable, limits: Limits) -> Encoding | Diffusing:
    """Resolve Encode."""
    model = _fitting(supporting(servable, Model.METHOD_ENCODE), request.samples)
    fields = Fields()
    samples = fields.rows(
        request.samples, "samples", model.sample, limits.max_samples, is_sample=True, or_of=model.variants
    )
    if not model.is_diffusion:
        return calls.encode(fields, request, samples, model)
    if request.HasField("forward_timestep"):
        return walks.diffuse(fields, request, samples, model)
    return walks.encode(fields, request, samples, model, limits)


def decode(request: generation_service_pb2.DecodeRequest, servable: Servable, limits: Limits) -> Decoding:
    """Resolve Decode."""
    model = _fitting(supporting(servable, Model.METHOD_DECODE), request.latents)
    fields = Fields()
    latent = model.latent or model.sample
    latents = fields.rows(request.latents, "latents", latent, limits.max_samples, is_sample=False, or_of=model.variants)
    form = fields.form(request.output_data_type, model)
    if model.is_diffusion:
        return walks.decode(fields, request, latents, form, model, limits)
    return calls.decode(fields, request, latents, form, model)


def denoise_step(request: generation_service_pb2.DenoiseStepRequest, servable: Servable, limits: Limits) -> Denoising:
    """Resolve DenoiseStep."""
    model = _fitting(supporting(servable, Model.METHOD_DENOISE), request.noisy_samples)
    return walks.denoise_step(Fields(), request, model, limits)


def score(request: generation_service_pb2.ScoreRequest, servable: Servable, limits: Limits) -> Scoring | Bounding:
    """Resolve Score."""
    model = _fitting(supporting(servable, Model.METHOD_SCORE), request.samples)
    fields = Fields()
    samples = fields.rows(
        request.samples, "samples", model.sample, limits.max_samples, is_sample=True, or_of=model.variants
    )
    if bundle_pb2.Network.ROLE_SCORER in model.graphs:
        return calls.score(fields, request, samples, model, limits)
    return bounds.score(fields, request, samples, model, limits)


def open_loop(
    request: generation_service_pb2.SampleRequest, servable: Servable, fresh_seed: int, limits: Limits
) -> tuple[Loop, LoopPosition]:
    """Resolve `open_denoise`: as Sample, but the caller takes the steps."""
    model = supporting(servable, Model.METHOD_DENOISE)
    fields = Fields()
    if model.decoder is not None:
        request = _among_latents(fields, request)
    model = _at_size(fields, request, model)
    head = _head(fields, request, model, fresh_seed, limits)
    if request.diffusion.preview_interval_steps:
        fields.reject("diffusion.preview_interval_steps", "must be 0: every step of a loop is answered")
    why = "who drives a loop puts what is known into the states that it sends"
    fields.absent(request.diffusion, ("known",), "diffusion.", why)
    return loops.opened(*walks.sample(fields, request, head, model, limits), model)


def _among_latents(
    fields: Fields, request: generation_service_pb2.SampleRequest
) -> generation_service_pb2.SampleRequest:
    """A request to open a loop over latents, which is about latents from end to end."""
    why = "a loop over latents starts from noise, or from the noisy_samples of its first step"
    fields.absent(request.diffusion, ("start",), "diffusion.", why)
    if request.output_mode not in (
        generation_service_pb2.OUTPUT_MODE_UNSPECIFIED,
        generation_service_pb2.OUTPUT_MODE_LATENT,
    ):
        fields.reject("output_mode", "must be unset or LATENT: the steps of this loop are answered with latents")
    looped = generation_service_pb2.SampleRequest()
    looped.CopyFrom(request)
    looped.output_mode = generation_service_pb2.OUTPUT_MODE_LATENT
    return looped


def _at_size(fields: Fields, request: generation_service_pb2.SampleRequest, model: Wiring) -> Wiring:
    """The model at the size of samples that is asked for."""
    if not request.HasField("size"):
        return model
    asked, own = (request.size.height, request.size.width), model.sample.shape
    if len(own) != 3:
        fields.reject("size", "must be unset: samples of this model have no height and width")
    elif asked != own[1:] and asked not in model.variants:
        allowed = ", ".join(map(sizes.text, ((own[1], own[2]), *model.variants)))
        fields.reject("size", f"must be unset or one of {allowed}; got {sizes.text(asked)}")
    return model.variants.get(asked, model)


def _fitting(model: Wiring, tensor: tensor_pb2.Tensor) -> Wiring:
    """The model at the size that a tensor of rows has; the model itself if it has no such size."""
    shape = tensor.shape
    return model.variants.get((shape[2], shape[3]), model) if model.variants and len(shape) == 4 else model


def _head(
    fields: Fields,
    request: generation_service_pb2.SampleRequest,
    model: Wiring,
    fresh_seed: int,
    limits: Limits,
) -> SampleHead:
    count = fields.integer(request.sample_count, "sample_count", 1, limits.max_samples, default=1) or 1
    # Draws are numbered by samples below 2**31.
    first = fields.integer(request.first_sample_index, "first_sample_index", 0, MAX_INT32 - count + 1) or 0
    seed = request.seed if request.HasField("seed") else fresh_seed
    form = fields.form(request.output_data_type, model)
    resolved = generation_service_pb2.SampleRequest(
        model=model.name,
        sample_count=count,
        seed=seed,
        output_data_type=form.data_type,
        output_mode=request.output_mode or generation_service_pb2.OUTPUT_MODE_MEAN,
        first_sample_index=first,
    )
    if request.HasField("condition"):
        resolved.condition.CopyFrom(request.condition)
    if request.HasField("size") or model.variants:
        resolved.size.height, resolved.size.width = model.sample.shape[-2:]
    # Equal classes promise equal bytes, so where nothing is promised every answer has a class of its own.
    name = model.determinism_class if model.promise else f"{model.determinism_class}-{fresh_seed:x}"
    return SampleHead(resolved, np.arange(first, first + count, dtype=np.int64), seed, form, name)
