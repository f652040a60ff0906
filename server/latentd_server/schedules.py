"""The noise schedule of a diffusion model, and which of its timesteps a solver visits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from latentd.v1 import model_pb2
from numpy.typing import NDArray

Prediction = model_pb2.DiffusionSpec.Prediction

CLEAN = -1
"""The timestep of clean data: alpha 1, sigma 0."""

SMALLEST_LEVEL = 1e-6
"""Below this an alpha counts as zero, and a sigma as too small to divide by."""

_PREDICTIONS = (Prediction.PREDICTION_EPSILON, Prediction.PREDICTION_V, Prediction.PREDICTION_SAMPLE)


@dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = alphas[t] * x0 + sigmas[t] * eps, timestep 0 the least noisy. Hashable by identity.

    Zero terminal SNR (arXiv 2305.08891) is allowed: the last alpha may be 0 if the network predicts v or x0,
    because an estimate of eps says nothing of x0 there.

    Attributes:
        alphas: [T] f64, read-only.
        sigmas: [T] f64, read-only.
        prediction: What the network predicts.
        clip: Bounds that estimates of x0 are clipped to while sampling, if any.

    Raises:
        ValueError: lists everything that is wrong.
    """

    alphas: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    prediction: Prediction.ValueType
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("alphas", "sigmas"):
            levels = np.array(getattr(self, name), dtype=np.float64)
            levels.setflags(write=False)
            object.__setattr__(self, name, levels)
        if problems := _problems(self):
            raise ValueError("; ".join(problems))

    @classmethod
    def from_spec(cls, spec: model_pb2.DiffusionSpec, state_spec: model_pb2.TensorSpec) -> "Schedule":
        """Read the schedule of a bundle.

        Raises:
            ValueError: lists everything that is wrong with it.
        """
        clip = (state_spec.min_value, state_spec.max_value) if spec.clip_denoised else None
        return cls(np.array(spec.alphas), np.array(spec.sigmas), spec.prediction, clip)

    @property
    def timestep_count(self) -> int:
        """T, the number of timesteps the network was trained on."""
        return len(self.alphas)

    def level(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) at `timestep`; -1 is clean data.

        Raises:
            ValueError: there is no such timestep.
        """
        if timestep == CLEAN:
            return 1.0, 0.0
        if not 0 <= timestep < self.timestep_count:
            raise ValueError(f"timesteps must be from -1 (clean data) to {self.timestep_count - 1}, not {timestep}")
        return float(self.alphas[timestep]), float(self.sigmas[timestep])

    def spaced_timesteps(self, count: int) -> tuple[int, ...]:
        """`count` evenly spaced timesteps, falling from the noisiest, T - 1; the walk over them ends in -1.

        This is the "trailing" spacing of arXiv 2305.08891, table 2, which always visits the noisiest timestep.

        Raises:
            ValueError: `count` is not from 1 to T.
        """
        total = self.timestep_count
        if not 1 <= count <= total:
            raise ValueError(f"must be from 1 to {total}, the model's number of timesteps, not {count}")
        return _spaced(total, count)


@lru_cache(maxsize=1024)
def _spaced(total: int, count: int) -> tuple[int, ...]:
    whole, rest = np.divmod(total * np.arange(count, 0, -1), count)
    rounded_up = (2 * rest > count) | ((2 * rest == count) & (whole % 2 == 1))  # half to even, in integers
    return tuple((whole + rounded_up - 1).tolist())


def from_strength(timesteps: Sequence[int], strength: float) -> tuple[int, ...]:
    """The last ceil(strength * n) of n falling timesteps, at least one: SDEdit's start (arXiv 2108.01073).

    Raises:
        ValueError: `strength` is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"must be above 0 and at most 1, not {strength}")
    # The margin keeps a product that float64 puts a hair above a whole number, as 0.07 * 100, at that number.
    count = max(1, math.ceil(strength * len(timesteps) - 1e-9))
    return tuple(timesteps[-count:])


def _problems(schedule: Schedule) -> list[str]:
    alphas, sigmas = schedule.alphas, schedule.sigmas
    problems = []
    if schedule.prediction not in _PREDICTIONS:
        allowed = ", ".join(Prediction.Name(value) for value in _PREDICTIONS)
        problems.append(f"prediction must be one of {allowed}")
    if schedule.clip is not None:
        low, high = schedule.clip
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            problems.append(f"clipping needs a finite min_value below a finite max_value, not {low} and {high}")
    if alphas.ndim != 1 or alphas.shape != sigmas.shape or not alphas.size:
        return [
            *problems,
            f"alphas and sigmas must be of equal length, at least 1, not {alphas.size} and {sigmas.size}",
        ]
    if not (np.isfinite(alphas).all() and np.isfinite(sigmas).all()):
        return [*problems, "alphas and sigmas must be finite"]

    predicts_noise = schedule.prediction == Prediction.PREDICTION_EPSILON
    positive = alphas if predicts_noise else alphas[:-1]
    if (positive < SMALLEST_LEVEL).any() or alphas[-1] < 0:
        exception = "" if predicts_noise else ", but for the last, which may be 0"
        problems.append(f"alphas must be at least {SMALLEST_LEVEL}{exception}")
    if (sigmas < SMALLEST_LEVEL).any():
        problems.append(f"sigmas must be at least {SMALLEST_LEVEL}")
    off = np.abs(alphas**2 + sigmas**2 - 1)
    if off.max() > 1e-6:
        problems.append(f"alpha^2 + sigma^2 must be 1 to 1e-6; at timestep {off.argmax()} it is off by {off.max():.3g}")
    if not problems:
        ratios = alphas / sigmas
        rises = ratios[1:] > ratios[:-1] * (1 - 1e-9)  # a smaller fall drowns in rounding
        if rises.any():
            problems.append(
                f"alpha / sigma must fall strictly with the timestep; at timestep {rises.argmax() + 1} it does not"
            )
    return problems
