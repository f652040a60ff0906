"""What a model file says of how a denoiser is walked with."""

from typing import Self

import numpy as np
from latentd import names
from latentd.v1 import model_pb2
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from latentd_trainer.contract import schedule_violations
from latentd_trainer.importers import noise_schedules
from latentd_trainer.importers.words import Prediction, Sampler

_DEFAULT_STEP_COUNT = 50


class Part(BaseModel):
    """A part of a model file: what it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(Part):
    """abar by timestep, least noisy first: by name, or as a list of betas or of abar themselves."""

    kind: str | None = None
    timesteps: int = Field(default=1000, ge=1, le=100_000)
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    betas: tuple[float, ...] | None = None
    alphas_cumprod: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [name for name in ("kind", "betas", "alphas_cumprod") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must have exactly one of kind, betas, alphas_cumprod; got {', '.join(given) or 'none'}")
        if self.kind is not None and self.kind not in noise_schedules.KINDS:
            raise ValueError(f"kind must be one of {', '.join(noise_schedules.KINDS)}; got {self.kind!r}")
        values = self.betas or self.alphas_cumprod or (0.5,)
        if not all(0 <= value <= 1 for value in values):
            raise ValueError("every value must be from 0 to 1")
        return self

    def cumulative(self) -> NDArray[np.float64]:
        """The abar, [T] f64."""
        if self.alphas_cumprod is not None:
            return np.array(self.alphas_cumprod, dtype=np.float64)
        if self.kind is not None:
            betas = noise_schedules.betas(self.kind, self.timesteps, self.beta_start, self.beta_end)
        else:
            betas = np.array(self.betas, dtype=np.float64)
        return noise_schedules.cumulative(betas)


class Diffusion(Part):
    """How a denoiser is walked with."""

    prediction: Prediction
    schedule: Schedule
    samplers: tuple[Sampler, ...] = names.SAMPLERS  # the first is the default
    clip: bool = False  # estimates of x0 to the range of samples
    steps: PositiveInt = _DEFAULT_STEP_COUNT
    guidance: bool = False  # whether label -1 is the network without a label

    @model_validator(mode="after")
    def _servable(self) -> Self:
        if violations := schedule_violations(self.spec()):
            raise ValueError("the schedule cannot be walked along: " + "; ".join(violations))
        return self

    def spec(self) -> model_pb2.DiffusionSpec:
        """What a bundle says of it."""
        cumulative = self.schedule.cumulative()
        spec = model_pb2.DiffusionSpec(
            samplers=self.samplers,
            prediction=self.prediction,
            clip_denoised=self.clip,
            default_step_count=min(self.steps, len(cumulative)),
            guidance_supported=self.guidance,
        )
        return noise_schedules.with_levels(spec, cumulative)
