"""Requests to diffusion models -> `StepJob`s: from where, down or up which timesteps, under which labels. Pure."""

from collections.abc import Sequence

import numpy as np
from latentd.v1 import bundle_pb2, generation_service_pb2
from numpy.typing import NDArray

from latentd_server import calls, noise, samplers
from latentd_server import latents as spaces
from latentd_server.fields import MAX_INT32, Fields, has_label
from latentd_server.job import Job, Start, StepJob, stages
from latentd_server.known_pixels import Known, levels
from latentd_server.options import Walk, read_guidance, read_walk, schedule_of
from latentd_server.plans import Decoding, Denoising, Diffusing, Encoding, Limits, OutputForm, SampleHead, Sampling
from latentd_server.schedules import CLEAN
from latentd_server.wiring import Graph, Wiring

DDIM = "ddim"
UNCONDITIONAL = -1
"""The label of the unconditional network."""


def sample(
    fields: Fields,
    request: generation_service_pb2.SampleRequest,
    head: SampleHead,
    model: Wiring,
    limits: Limits,
) -> tuple[Sampling, Walk]:
    """From noise, or from a noised start point, down to data."""
    fields.absent(request, ("temperature",), "", "this is a diffusion model, whose noise has a scale of its own")
    _check_mode(fields, request.output_mode, model)
    count = len(head.indices)
    graph = _denoiser(model)
    labels = fields.labels(request.condition, count, model, graph)
    fields.codes(request.condition, count, graph)
    latent = spaces.is_latent(request.output_mode)
    form, preview_form = head.form, None
    if model.decoder is not None:
        preview_form = spaces.form(fields, head.form, model, of_results=latent)
        form = preview_form if latent else form
    walk = read_walk(fields, request.diffusion, model, limits, count, model.samplers[0], model.samplers)
    if walk is None:
        raise fields.error()
    has_classes = graph.takes_label and model.class_count > 0
    if labels is None:
        labels = noise.labels(head.seed, head.indices, model.cumulative) if has_classes else _unconditional(count)
    schedule = schedule_of(model)
    alpha, sigma = schedule.level(walk.visited[0])
    start = Start(noise_scale=sigma)
    if walk.start is not None:  # SDEdit, arXiv 2108.01073
        start = Start(noise_scale=sigma, values=walk.start if model.decoder is None else None, scale=alpha)
    table = samplers.descent(schedule, walk.sampler, walk.visited, walk.eta)
    job = StepJob(
        model=model.name,
        lane_count=count,
        tables=(table,),
        start=start,
        seed=head.seed,
        sample_indices=head.indices,
        labels=labels,
        guidance_scale=walk.guidance_scale,
        guidance_interval=walk.guidance_interval,
        preview_interval=walk.preview_interval,
        known=None if walk.known is None else Known(*walk.known, levels(schedule, table)),
        size=model.size,
    )
    whole: Job = job
    samples, latents = "sample", None
    if model.decoder is not None:
        if not latent:
            job, samples, latents = spaces.decoded(job, request.output_mode, model, head.seed)
            whole = job
        if walk.start is not None:
            whole = spaces.encoded(fields, job, walk.start, model, "diffusion.start.samples")
    _check_cost(fields, whole, limits, "sample_count")
    fields.check()
    head.resolved_request.diffusion.CopyFrom(walk.options)
    plan = Sampling(
        job=whole,
        resolved_request=head.resolved_request,
        determinism_class=head.determinism_class,
        form=form,
        samples=samples,
        latents=latents,
        labels=labels if has_classes else None,
        preview_form=preview_form,
    )
    return plan, walk


def encode(
    fields: Fields,
    request: generation_service_pb2.EncodeRequest,
    samples: NDArray[np.float32] | None,
    model: Wiring,
    limits: Limits,
) -> Encoding:
    """DDIM inversion: from data up to noise, without fresh noise."""
    fields.absent(request, ("seed",), "", "DDIM inversion is deterministic; forward_timestep draws from q(x_t | x0)")
    _check_not_sampling(fields, request.diffusion)
    if request.diffusion.eta:
        fields.reject(
            "diffusion.eta", f"must be unset or 0: DDIM inversion is deterministic; got {request.diffusion.eta:g}"
        )
    walk = read_walk(fields, request.diffusion, model, limits, None, DDIM, (DDIM,))
    labels = labels_or_unconditional(fields, request.condition, samples, model, walk.guidance_scale if walk else 1.0)
    if walk is None or samples is None:
        raise fields.error()
    job = StepJob(
        model=model.name,
        lane_count=len(samples),
        tables=(samplers.inversion(schedule_of(model), walk.timesteps),),
        start=Start(noise_scale=0.0, values=samples if model.decoder is None else None),
        size=model.size,
        seed=0,
        sample_indices=np.arange(len(samples), dtype=np.int64),
        labels=labels,
        guidance_scale=walk.guidance_scale,
        guidance_interval=walk.guidance_interval,
    )
    whole: Job = job if model.decoder is None else spaces.encoded(fields, job, samples, model, "samples")
    _check_cost(fields, whole, limits, "diffusion.step_count")
    fields.check()
    return Encoding(whole, latents="sample")


def diffuse(
    fields: Fields,
    request: generation_service_pb2.EncodeRequest,
    samples: NDArray[np.float32] | None,
    model: Wiring,
) -> Diffusing:
    """A draw from q(x_t | x0), without the network."""
    schedule = schedule_of(model)
    if model.decoder is not None:
        why = f"what is diffused is a latent of {model.decoder.name}, which its Encode gives"
        fields.reject("forward_timestep", f"must be unset: {why}")
    why = "forward_timestep draws from q(x_t | x0), which takes no network"
    fields.absent(request, ("condition", "diffusion"), "", why)
    timestep = fields.integer(request.forward_timestep, "forward_timestep", 0, schedule.timestep_count - 1)
    if not request.HasField("seed"):
        fields.reject("seed", "must be set with forward_timestep: it draws noise")
    fields.check()
    assert samples is not None
    assert timestep is not None
    alpha, sigma = schedule.level(timestep)
    return Diffusing(model.name, samples, alpha, sigma, request.seed)


def decode(
    fields: Fields,
    request: generation_service_pb2.DecodeRequest,
    latents: NDArray[np.float32] | None,
    form: OutputForm,
    model: Wiring,
    limits: Limits,
) -> Decoding:
    """From given x_t at the first timestep down to data; DDIM without fresh noise unless asked otherwise."""
    _check_mode(fields, request.output_mode, model)
    _check_not_sampling(fields, request.diffusion)
    latent = spaces.is_latent(request.output_mode)
    if model.decoder is not None:
        calls.check_seed(fields, request)
        form = spaces.form(fields, form, model, of_results=True) if latent else form
    graph = _denoiser(model)
    count = None if latents is None else len(latents)
    labels = fields.labels(request.condition, count, model, graph)
    fields.codes(request.condition, count, graph)
    walk = read_walk(fields, request.diffusion, model, limits, None, DDIM, (*model.samplers, DDIM))
    if walk is None or latents is None:
        raise fields.error()
    indices = np.arange(len(latents), dtype=np.int64)
    if labels is None:
        has_classes = graph.takes_label and model.class_count
        labels = noise.labels(request.seed, indices, model.cumulative) if has_classes else _unconditional(len(latents))
    job = StepJob(
        model=model.name,
        lane_count=len(latents),
        tables=(samplers.descent(schedule_of(model), walk.sampler, walk.timesteps, walk.eta),),
        start=Start(noise_scale=0.0, values=latents),
        size=model.size,
        seed=request.seed,
        sample_indices=indices,
        labels=labels,
        guidance_scale=walk.guidance_scale,
        guidance_interval=walk.guidance_interval,
    )
    if job.tables[0].stochastic.any() and not request.HasField("seed"):
        fields.reject("seed", f"must be set: {walk.sampler} draws fresh noise at every step")
    name = "sample"
    if model.decoder is not None and not latent:
        job, name, _ = spaces.decoded(job, request.output_mode, model, request.seed)
    _check_cost(fields, job, limits, "diffusion.step_count")
    fields.check()
    return Decoding(job, form, samples=name)


def denoise_step(
    fields: Fields, request: generation_service_pb2.DenoiseStepRequest, model: Wiring, limits: Limits
) -> Denoising:
    """One evaluation at the caller's x_t and, where asked, one step of DDIM(eta)."""
    schedule = schedule_of(model)
    last = schedule.timestep_count - 1
    states = fields.rows(
        request.noisy_samples,
        "noisy_samples",
        model.state,
        limits.max_samples,
        is_sample=False,
        or_of=model.variants,
    )
    count = None if states is None else len(states)
    currents = _per_row(fields, request.timesteps, "timesteps", count, 0, last)
    followings: list[int] | list[None] = [None] * len(currents)
    if request.next_timesteps:
        followings = _per_row(fields, request.next_timesteps, "next_timesteps", count, CLEAN, last - 1)
    guidance = read_guidance(fields, request, "guidance_scale", model)
    labels = labels_or_unconditional(fields, request.condition, states, model, guidance)
    eta = fields.number(request.eta, "eta", 0, 1)
    if request.eta > 0 and not request.HasField("seed"):
        fields.reject("seed", "must be set where eta is above 0: the step draws fresh noise")
    step_index = fields.integer(request.step_index, "step_index", 0, MAX_INT32 - 1)
    if not fields.violations:
        _check_downward(fields, currents, followings, shared=len(request.next_timesteps) == 1)
    fields.check()
    assert states is not None
    assert step_index is not None
    tables = tuple(samplers.single_step(schedule, *pair, eta) for pair in zip(currents, followings, strict=True))
    job = StepJob(
        model=model.name,
        lane_count=len(states),
        tables=tables[:1] if len(set(zip(currents, followings, strict=True))) == 1 else tables,
        start=Start(noise_scale=0.0, values=states),
        size=model.size,
        seed=request.seed,
        sample_indices=np.arange(len(states), dtype=np.int64),
        labels=labels,
        guidance_scale=guidance,
        first_step_index=step_index,
        estimates_wanted=True,
    )
    return Denoising(job, stepped=len(request.next_timesteps) > 0)


def _denoiser(model: Wiring) -> Graph:
    return model.graphs[bundle_pb2.Network.ROLE_DENOISER]


def _unconditional(count: int) -> NDArray[np.int64]:
    return np.full(count, UNCONDITIONAL, np.int64)


def labels_or_unconditional(
    fields: Fields,
    condition: generation_service_pb2.Condition,
    rows: NDArray[np.float32] | None,
    model: Wiring,
    guidance_scale: float,
) -> NDArray[np.int64]:
    """Labels of rows; where none are given, those of the unconditional network, if there is one."""
    graph = _denoiser(model)
    count = None if rows is None else len(rows)
    fields.codes(condition, count, graph)
    labels = fields.labels(condition, count, model, graph)
    if labels is not None:
        return labels
    if not has_label(condition) and model.class_count:
        if guidance_scale != 1:
            fields.reject("condition.class_label", "must be set, or class_labels: guidance needs a class")
        elif graph.takes_label and not model.guidance_supported:
            why = "this model has no unconditional network"
            fields.reject("condition.class_label", f"must be set, or class_labels: {why}")
    return _unconditional(count or 1)


def _per_row(fields: Fields, values: Sequence[int], path: str, count: int | None, low: int, high: int) -> list[int]:
    """One value for each of `count` rows, from one for each or one for all."""
    if len(values) not in (1, count or 1):
        many = "" if count in (None, 1) else f" or {count}, one for each row"
        fields.reject(path, f"must hold 1 value{many}; got {len(values)}")
    fields.integers(values, path, low, high)
    return list(values) * (count or 1) if len(values) == 1 else list(values)


def _check_downward(fields: Fields, currents: Sequence[int], followings: Sequence[int | None], *, shared: bool) -> None:
    for row, (current, following) in enumerate(zip(currents, followings, strict=True)):
        if following is not None and following >= current:
            path = "next_timesteps[0]" if shared else f"next_timesteps[{row}]"
            fields.reject(
                path, f"must be from -1 (clean data) to {current - 1}, below row {row}'s timestep; got {following}"
            )
            if shared:
                return


def _check_mode(fields: Fields, mode: generation_service_pb2.OutputMode.ValueType, model: Wiring) -> None:
    if model.decoder is not None:
        spaces.check_mode(fields, mode, model)
    elif mode not in (
        generation_service_pb2.OUTPUT_MODE_UNSPECIFIED,
        generation_service_pb2.OUTPUT_MODE_MEAN,
    ):
        fields.reject("output_mode", "must be unset or MEAN: a diffusion model's walk ends in the sample itself")


def _check_not_sampling(fields: Fields, options: generation_service_pb2.DiffusionOptions) -> None:
    why = "only Sample starts from a start point, is given known pixels and sends previews"
    fields.absent(options, ("start", "known", "preview_interval_steps"), "diffusion.", why)


def _check_cost(fields: Fields, job: Job, limits: Limits, path: str) -> None:
    each = sum(stage.evaluations_per_lane for stage in stages(job))
    cost = job.lane_count * each
    if cost > limits.max_evaluations:
        fields.reject(
            path,
            f"{job.lane_count} samples of {each} evaluations each make {cost}; "
            f"at most {limits.max_evaluations} are allowed in one request",
        )
