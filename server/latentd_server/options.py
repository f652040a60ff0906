"""`DiffusionOptions`, checked and with every default filled in: which timesteps are visited, by which sampler. Pure."""

from dataclasses import dataclass

import numpy as np
from latentd import tensor as codec
from latentd.v1 import generation_service_pb2, tensor_pb2
from numpy.typing import NDArray

from latentd_server import samplers, schedules
from latentd_server.fields import Fields, quoted
from latentd_server.plans import Limits
from latentd_server.schedules import Schedule
from latentd_server.wiring import Wiring

DiffusionOptions = generation_service_pb2.DiffusionOptions

MAX_GUIDANCE = 1000.0
DEFAULT_STRENGTH = 0.5


@dataclass(frozen=True, slots=True)
class Walk:
    """`DiffusionOptions` with every default filled in."""

    sampler: str
    timesteps: tuple[int, ...]  # before `strength` cuts them
    explicit: bool  # whether the caller listed them
    eta: float | None
    guidance_scale: float
    guidance_interval: tuple[int, int] | None  # timesteps, both ends included; None is all
    preview_interval: int
    strength: float | None  # set where there is a start point
    start: NDArray[np.float32] | None  # [1 or n, *sample]
    known: tuple[NDArray[np.float32], NDArray[np.bool_]] | None  # values and mask, [1 or n, *sample] each

    @property
    def visited(self) -> tuple[int, ...]:
        """The timesteps the network is evaluated at."""
        if self.strength is None:
            return self.timesteps
        return schedules.from_strength(self.timesteps, self.strength)

    @property
    def options(self) -> generation_service_pb2.DiffusionOptions:
        """As options that ask for this very walk, but for the start point's samples and for what is known."""
        options = DiffusionOptions(
            sampler=self.sampler,
            step_count=len(self.timesteps),
            guidance_scale=self.guidance_scale,
            eta=self.eta,
            preview_interval_steps=self.preview_interval,
            timesteps=self.timesteps if self.explicit else (),
        )
        if self.strength is not None:
            options.start.strength = self.strength
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            options.guidance_interval.min_timestep, options.guidance_interval.max_timestep = low, high
        return options


def read_walk(
    fields: Fields,
    options: generation_service_pb2.DiffusionOptions,
    model: Wiring,
    limits: Limits,
    count: int | None,
    default_sampler: str,
    allowed_samplers: tuple[str, ...],
) -> Walk | None:
    """Check `diffusion` and fill in its defaults; None if anything in it is wrong."""
    found = len(fields.violations)
    sampler = options.sampler or default_sampler
    is_known = sampler in allowed_samplers
    if not is_known:
        got = quoted(sampler)
        allowed = ", ".join(dict.fromkeys(allowed_samplers))
        fields.reject("diffusion.sampler", f"must be one of {allowed}; got {got}")
    walk = Walk(
        sampler=sampler,
        timesteps=_timesteps(fields, options, model, limits),
        explicit=bool(options.timesteps),
        eta=_eta(fields, options, sampler) if is_known else None,
        guidance_scale=read_guidance(fields, options, "diffusion.guidance_scale", model),
        guidance_interval=_guidance_interval(fields, options, model),
        preview_interval=options.preview_interval_steps,
        strength=_strength(fields, options),
        start=_start(fields, options, model, count),
        known=_known(fields, options, model, count),
    )
    fields.integer(walk.preview_interval, "diffusion.preview_interval_steps", 0, limits.max_steps)
    return walk if len(fields.violations) == found else None


def _timesteps(
    fields: Fields, options: generation_service_pb2.DiffusionOptions, model: Wiring, limits: Limits
) -> tuple[int, ...]:
    schedule = schedule_of(model)
    last = schedule.timestep_count - 1
    most = min(limits.max_steps, schedule.timestep_count)
    listed = tuple(options.timesteps)
    if not listed:
        default = min(model.default_step_count, most)
        step_count = fields.integer(options.step_count, "diffusion.step_count", 1, most, default=default)
        return () if step_count is None else schedule.spaced_timesteps(step_count)
    if len(listed) > most:
        fields.reject("diffusion.timesteps", f"must hold at most {most} timesteps; got {len(listed)}")
        return ()
    if options.step_count not in (0, len(listed)):
        fields.reject(
            "diffusion.step_count", f"must be 0 or {len(listed)}, the number of timesteps; got {options.step_count}"
        )
    for index, timestep in enumerate(listed):
        path = f"diffusion.timesteps[{index}]"
        in_range = fields.integer(timestep, path, 0, last) is not None
        if in_range and index and timestep >= listed[index - 1]:
            fields.reject(path, f"timesteps must fall strictly; {timestep} follows {listed[index - 1]}")
    return listed


def _eta(fields: Fields, options: generation_service_pb2.DiffusionOptions, sampler: str) -> float | None:
    default = samplers.default_eta(sampler)
    if not options.HasField("eta"):
        return default
    if default is None:
        takers = ", ".join(name for name in samplers.SAMPLERS if samplers.default_eta(name) is not None)
        fields.reject("diffusion.eta", f"must be unset for {sampler}; the samplers that take one are {takers}")
        return None
    return fields.number(options.eta, "diffusion.eta", 0, 1)


def _strength(fields: Fields, options: generation_service_pb2.DiffusionOptions) -> float | None:
    if not options.HasField("start"):
        return None
    if not options.start.HasField("strength"):
        return DEFAULT_STRENGTH
    if 0 < options.start.strength <= 1:
        return options.start.strength
    fields.reject("diffusion.start.strength", f"must be above 0 and at most 1; got {options.start.strength:g}")
    return None


def _start(
    fields: Fields, options: generation_service_pb2.DiffusionOptions, model: Wiring, count: int | None
) -> NDArray[np.float32] | None:
    if not options.HasField("start"):
        return None
    return _samples(fields, options.start.samples, "diffusion.start.samples", model, count)


def _samples(
    fields: Fields, tensor: tensor_pb2.Tensor, path: str, model: Wiring, count: int | None
) -> NDArray[np.float32] | None:
    """One sample for all, or one for each."""
    samples = fields.rows(tensor, path, model.sample, max(1, count or 1), is_sample=True)
    if samples is not None and count is not None and len(samples) not in (1, count):
        fields.reject(f"{path}.shape", f"must hold 1 sample, or {count}, one for each sample; got {len(samples)}")
    return samples


def _known(
    fields: Fields, options: generation_service_pb2.DiffusionOptions, model: Wiring, count: int | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]] | None:
    if not options.HasField("known"):
        return None
    if model.decoder is not None:
        fields.reject("diffusion.known", "must be unset: this model walks over latents, which have no known pixels")
        return None
    samples = _samples(fields, options.known.samples, "diffusion.known.samples", model, count)
    mask = _mask(fields, options.known.mask, model.sample.shape, count)
    return None if samples is None or mask is None else (samples, mask)


def _mask(
    fields: Fields, tensor: tensor_pb2.Tensor, shape: tuple[int, ...], count: int | None
) -> NDArray[np.bool_] | None:
    """Zeros and ones as [1 or n, *sample] bool; one for all channels is repeated for each."""
    path = "diffusion.known.mask"
    if not tensor.ByteSize():
        fields.reject(path, "must be set: it says where samples are known")
        return None
    try:
        mask = codec.decode(tensor, path)
    except codec.TensorError as error:
        fields.reject(error.path, error.description)
        return None
    if mask.dtype == np.int64:
        fields.reject(f"{path}.data_type", "must be UINT8, FLOAT32 or FLOAT16; got DATA_TYPE_INT64")
    rows = (1,) if count is None else tuple(dict.fromkeys((1, count)))
    if not mask.shape or mask.shape[1:] not in (shape, (1, *shape[1:])) or mask.shape[0] not in rows:
        many = " or ".join(map(str, rows))
        extents = ", ".join(map(str, shape[1:]))
        channels = " or ".join(dict.fromkeys(("1", str(shape[0]))))
        fields.reject(f"{path}.shape", f"must be [{many}, {channels}, {extents}]; got {list(mask.shape)}")
        return None
    if wrong := int(mask.size - np.count_nonzero((mask == 0) | (mask == 1))):
        fields.reject(f"{path}.data", f"must be 0 or 1 everywhere; {wrong} of {mask.size} values are not")
        return None
    known: NDArray[np.bool_] = np.broadcast_to(mask == 1, (len(mask), *shape))
    return known


def read_guidance(
    fields: Fields,
    message: generation_service_pb2.DiffusionOptions | generation_service_pb2.DenoiseStepRequest,
    path: str,
    model: Wiring,
) -> float:
    """The guidance scale, 1 if unset."""
    if not message.HasField("guidance_scale") or message.guidance_scale == 1:
        return 1.0
    if not model.guidance_supported:
        fields.reject(path, "must be unset or 1: this model was not trained for guidance")
    fields.number(message.guidance_scale, path, -MAX_GUIDANCE, MAX_GUIDANCE)
    return message.guidance_scale


def _guidance_interval(
    fields: Fields, options: generation_service_pb2.DiffusionOptions, model: Wiring
) -> tuple[int, int] | None:
    """The first and the last timestep that are guided, if not all are."""
    if not options.HasField("guidance_interval"):
        return None
    path = "diffusion.guidance_interval"
    if not options.HasField("guidance_scale"):
        fields.reject(path, "must be unset where guidance_scale is: without guidance there is nothing to confine")
    interval, last = options.guidance_interval, schedule_of(model).timestep_count - 1
    noisiest = interval.max_timestep if interval.HasField("max_timestep") else last
    low = fields.integer(interval.min_timestep, f"{path}.min_timestep", 0, last)
    high = fields.integer(noisiest, f"{path}.max_timestep", 0, last)
    if low is None or high is None:
        return None
    if low > high:
        fields.reject(path, f"min_timestep must be at most max_timestep; got {low} and {high}")
    return low, high


def schedule_of(model: Wiring) -> Schedule:
    """The schedule of a diffusion model."""
    if model.schedule is None:
        raise TypeError(f"{model.name} is no diffusion model")
    return model.schedule
