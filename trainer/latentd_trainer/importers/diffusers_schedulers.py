"""A diffusers scheduler's settings as a schedule and samplers of ours, and what of them is served otherwise."""

from dataclasses import dataclass, field
from typing import Any

import diffusers
from latentd import names
from latentd.v1 import model_pb2

from latentd_trainer.importers import ImportingError, noise_schedules

_PREDICTIONS = {
    "epsilon": model_pb2.DiffusionSpec.PREDICTION_EPSILON,
    "v_prediction": model_pb2.DiffusionSpec.PREDICTION_V,
    "sample": model_pb2.DiffusionSpec.PREDICTION_SAMPLE,
}
_SAMPLERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
}
_NEAREST = "dpmpp-2m"  # in place of samplers that are not ours, which like it are for few steps
_OTHER_SCHEDULERS = (
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
_OTHERWISE = {
    "use_karras_sigmas": "spaces its noise levels as Karras et al. do",
    "use_exponential_sigmas": "spaces its noise levels exponentially",
    "use_beta_sigmas": "spaces its noise levels by a beta distribution",
    "use_lu_lambdas": "spaces its noise levels evenly in log SNR",
    "use_flow_sigmas": "spaces its noise levels as flows do",
    "thresholding": "clips estimates of x0 to quantiles (dynamic thresholding)",
    "euler_at_final": "makes its last step by Euler",
}
_DEFAULT_STEP_COUNT = 50


@dataclass(frozen=True)
class Walk:
    """How a pipeline walks, in our terms."""

    spec: model_pb2.DiffusionSpec
    clip_range: float | None  # samples are clipped to +- this
    notes: list[str] = field(default_factory=list)  # what is served otherwise than by diffusers' defaults


def read(folder: str, class_name: str, step_count: int | None) -> Walk:
    """Read the scheduler in `folder`.

    Args:
        folder: With `scheduler_config.json`.
        class_name: As the pipeline's index names it.
        step_count: The default number of steps; what the pipeline has if not given.

    Raises:
        ImportingError: it is none that can be served; says which can.
    """
    known = (*_SAMPLERS, *_OTHER_SCHEDULERS)
    if class_name not in known:
        raise ImportingError(f"scheduler {class_name}: must be one of {', '.join(known)}")
    scheduler = getattr(diffusers, class_name).from_pretrained(folder, local_files_only=True)
    config = scheduler.config
    problems = []
    if config.prediction_type not in _PREDICTIONS:
        problems.append(f"prediction_type {config.prediction_type!r}: must be one of {', '.join(_PREDICTIONS)}")
    if "learned" in str(config.get("variance_type") or ""):
        problems.append(f"variance_type {config.variance_type!r}: learned variances cannot be served")
    if problems:
        raise ImportingError("\n".join(f"scheduler: {problem}" for problem in problems))
    abars = noise_schedules.cumulative(scheduler.betas.double().numpy())
    sampler = _sampler(class_name, config)
    usual = len(abars) if sampler == "ddpm" else _DEFAULT_STEP_COUNT
    clip = bool(config.get("clip_sample", False))
    spec = model_pb2.DiffusionSpec(
        samplers=[sampler, *(name for name in names.SAMPLERS if name != sampler)],
        prediction=_PREDICTIONS[config.prediction_type],
        clip_denoised=clip,
        default_step_count=min(step_count or usual, len(abars)),
    )
    clip_range = float(config.get("clip_sample_range") or 1.0) if clip else None
    return Walk(noise_schedules.with_levels(spec, abars), clip_range, _notes(class_name, sampler, config))


def _sampler(class_name: str, config: Any) -> str:
    if class_name == "DPMSolverMultistepScheduler" and config.algorithm_type == "sde-dpmsolver++":
        return "dpmpp-2m-sde"
    return _SAMPLERS.get(class_name, _NEAREST)


def _notes(class_name: str, sampler: str, config: Any) -> list[str]:
    """Every setting that makes diffusers' walk another than ours over the same number of steps."""
    found = [f"the scheduler {text}; served walks do not" for key, text in _OTHERWISE.items() if config.get(key)]
    if class_name not in _SAMPLERS:
        found.append(f"{class_name} is not served; the default sampler is {sampler}")
    spacing = config.get("timestep_spacing", "leading")
    if spacing != "trailing":
        offset = config.get("steps_offset", 0)
        found.append(
            f"the scheduler's timesteps are spaced {spacing!r} (offset {offset}); those of a served walk are "
            "'trailing', from the noisiest on, unless the request gives `timesteps`"
        )
    if config.get("variance_type") in ("fixed_large", "fixed_large_log"):
        found.append("the scheduler's variance is the forward process's; served DDPM has the posterior's (fixed_small)")
    if config.get("set_alpha_to_one") is False:
        found.append("the scheduler's last step ends at timestep 0; served walks end at clean data")
    if config.get("final_sigmas_type") == "sigma_min":
        found.append("the scheduler's last step ends at its smallest noise level; served walks end at clean data")
    if class_name == "DPMSolverMultistepScheduler":
        if config.solver_order != 2 or config.solver_type != "midpoint":
            found.append(f"the solver is of order {config.solver_order} ({config.solver_type}); served is 2 (midpoint)")
        if not config.algorithm_type.endswith("dpmsolver++"):
            found.append(f"the algorithm is {config.algorithm_type}; served is dpmsolver++")
    return found
