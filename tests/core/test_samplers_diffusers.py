"""Whole chains against diffusers' schedulers, in float64.

Several of those schedulers hold their levels in float32 and cast the state to float32 at every step, which alone
moves a chain by 1e-5. Their modules are given a `torch` and a `numpy` whose float32 is float64, so that what is
compared is the method and 1e-8 is a fair demand. Their noise is replaced by the noise of our chain.

What diffusers does not offer is not compared: clipping in its DPM-Solver++ and Euler schedulers, eta in its
ancestral one, x0 prediction in its ancestral one.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddim_inverse,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
)
from latentd_server import samplers, solvers
from numpy.typing import NDArray

# NumPy says this of torch tensors, which diffusers gives to np.array.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

Array = NDArray[np.float64]

SHAPE = (1, 64)
TOLERANCE = 1e-8  # relative to the largest element of diffusers' state; measured: below 1e-9
MODULES = (
    scheduling_ddim,
    scheduling_ddim_inverse,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
)
KINDS = ("linear", "cosine")
CLIPS = (None, (-1.0, 1.0))


class InDouble:
    """A numeric library whose float32 is its float64."""

    def __init__(self, library: ModuleType) -> None:
        self._library = library
        self.float32 = library.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


class Tape:
    """Hands a scheduler the noise that our evaluation draws."""

    def __init__(self) -> None:
        self.noise: Array = np.zeros(SHAPE)

    def randn_tensor(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.from_numpy(self.noise)


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tape]:
    """Diffusers in float64, drawing its noise from the tape."""
    tape = Tape()
    for module in MODULES:
        monkeypatch.setattr(module, "torch", InDouble(torch))
        monkeypatch.setattr(module, "np", InDouble(np))
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", tape.randn_tensor)
    return tape


def network(x: Array, timestep: int) -> Array:
    """A fixed, smooth, nonlinear stand-in for a denoiser; its x0 often leaves [-1, 1]."""
    return np.tanh(1.3 * x + 0.002 * timestep) + 0.2 * np.cos(np.roll(x, 1, axis=-1) - 0.004 * timestep)


def start_and_noise(evaluations: int) -> tuple[Array, Array]:
    draw = np.random.default_rng(7)
    return draw.normal(size=SHAPE), draw.normal(size=(evaluations, *SHAPE))


def settings(kind: str, prediction: str, make_betas: Callable[..., Array]) -> dict[str, Any]:
    return {
        "num_train_timesteps": 1000,
        "trained_betas": make_betas(kind, 1000),
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
    }


def clipping(clip: tuple[float, float] | None) -> dict[str, Any]:
    return {"clip_sample": clip is not None, "clip_sample_range": 1.0}


def assert_same_chain(ours: list[Array], theirs: list[Array]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(mine - other).max() <= TOLERANCE * np.abs(other).max()


def chain(scheduler: Any, timesteps: Any, x: Array, noise: Array, tape: Tape, **options: Any) -> list[Array]:
    """Diffusers' states after each step, for schedulers that keep x itself."""
    states = []
    for index, timestep in enumerate(timesteps):
        tape.noise = noise[index]
        output = torch.from_numpy(network(x, int(timestep)))
        x = scheduler.step(output, int(timestep), torch.from_numpy(x), **options).prev_sample.numpy()
        states.append(x)
    return states


def scaled_chain(scheduler: Any, x: Array, noise: Array, tape: Tape) -> list[Array]:
    """Diffusers' states after each step, for schedulers that keep X = x / alpha; returned as x."""

    def alpha(index: int) -> float:
        return float(1 / torch.sqrt(scheduler.sigmas[index] ** 2 + 1))

    states, scaled = [], x / alpha(0)
    for index, timestep in enumerate(scheduler.timesteps):
        tape.noise = noise[index]
        told = scheduler.scale_model_input(torch.from_numpy(scaled), timestep).numpy()
        output = torch.from_numpy(network(told, int(timestep)))
        scaled = scheduler.step(output, timestep, torch.from_numpy(scaled)).prev_sample.numpy()
        states.append(scaled * alpha(index + 1))
    return states


@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_ddpm(kind, prediction, clip, count, tape, walk, make_schedule, make_betas):
    """`ddpm` is DDPMScheduler with its default fixed-small variance, over any list of timesteps."""
    schedule = make_schedule(kind, prediction, clip)
    timesteps = schedule.spaced_timesteps(count)
    x, noise = start_and_noise(count)
    options = settings(kind, prediction, make_betas) | clipping(clip)
    scheduler = scheduling_ddpm.DDPMScheduler(**options)
    scheduler.set_timesteps(timesteps=list(timesteps))
    ours = walk(samplers.descent_evaluations(schedule, "ddpm", timesteps, 1.0), network, x, noise)
    assert_same_chain(ours, chain(scheduler, timesteps, x, noise, tape))


@pytest.mark.parametrize("count", [1, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_ddim(kind, prediction, clip, eta, count, tape, walk, make_schedule, make_betas):
    """`ddim` is DDIMScheduler at every eta; it too keeps the raw eps where x0 is clipped."""
    schedule = make_schedule(kind, prediction, clip)
    timesteps = schedule.spaced_timesteps(count)
    x, noise = start_and_noise(count)
    scheduler = scheduling_ddim.DDIMScheduler(**settings(kind, prediction, make_betas), **clipping(clip))
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == list(timesteps)
    ours = walk(samplers.descent_evaluations(schedule, "ddim", timesteps, eta), network, x, noise)
    assert_same_chain(ours, chain(scheduler, timesteps, x, noise, tape, eta=eta))


@pytest.mark.parametrize("count", [1, 10, 50])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_inversion(kind, clip, count, tape, walk, make_schedule, make_betas):
    """`inversion` is DDIMInverseScheduler where the network predicts eps."""
    schedule = make_schedule(kind, "epsilon", clip)
    timesteps = schedule.spaced_timesteps(count)
    x, noise = start_and_noise(count)
    scheduler = scheduling_ddim_inverse.DDIMInverseScheduler(**settings(kind, "epsilon", make_betas), **clipping(clip))
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == list(timesteps[::-1])
    ours = walk(solvers.inversion(schedule, timesteps), network, x)
    assert_same_chain(ours, chain(scheduler, timesteps[::-1], x, noise, tape))


@pytest.mark.parametrize("count", [1, 2, 10, 25])
@pytest.mark.parametrize("sampler", ["dpmpp-2m", "dpmpp-2m-sde"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_dpm_solver(kind, prediction, sampler, count, tape, walk, make_schedule, make_betas):
    """`dpmpp-2m` and `dpmpp-2m-sde` are DPMSolverMultistepScheduler of order 2 that ends at clean data."""
    schedule = make_schedule(kind, prediction)
    timesteps = schedule.spaced_timesteps(count)
    x, noise = start_and_noise(count)
    scheduler = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler(
        **settings(kind, prediction, make_betas),
        algorithm_type="sde-dpmsolver++" if sampler.endswith("sde") else "dpmsolver++",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=list(timesteps))
    eta = samplers.SAMPLERS[sampler].eta
    ours = walk(samplers.descent_evaluations(schedule, sampler, timesteps, eta), network, x, noise)
    assert_same_chain(ours, chain(scheduler, timesteps, x, noise, tape))


@pytest.mark.parametrize("count", [1, 10, 25])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_euler(kind, prediction, count, tape, walk, make_schedule, make_betas):
    """`euler` is EulerDiscreteScheduler, carried from X = x / alpha to x."""
    schedule = make_schedule(kind, prediction)
    timesteps = schedule.spaced_timesteps(count)
    x, noise = start_and_noise(count)
    scheduler = scheduling_euler_discrete.EulerDiscreteScheduler(**settings(kind, prediction, make_betas))
    scheduler.set_timesteps(count)
    ours = walk(samplers.descent_evaluations(schedule, "euler", timesteps, 0.0), network, x)
    assert_same_chain(ours, scaled_chain(scheduler, x, noise, tape))


@pytest.mark.parametrize("count", [1, 10, 25])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS)
def test_euler_ancestral(kind, prediction, count, tape, walk, make_schedule, make_betas):
    """`euler-ancestral` at eta 1 is EulerAncestralDiscreteScheduler, carried from X = x / alpha to x."""
    schedule = make_schedule(kind, prediction)
    timesteps = schedule.spaced_timesteps(count)
    x, noise = start_and_noise(count)
    scheduler = scheduling_euler_ancestral_discrete.EulerAncestralDiscreteScheduler(
        **settings(kind, prediction, make_betas)
    )
    scheduler.set_timesteps(count)
    ours = walk(samplers.descent_evaluations(schedule, "euler-ancestral", timesteps, 1.0), network, x, noise)
    assert_same_chain(ours, scaled_chain(scheduler, x, noise, tape))


@pytest.mark.parametrize("count", [1, 10, 25])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_heun(kind, prediction, clip, count, tape, walk, make_schedule, make_betas):
    """`heun` is HeunDiscreteScheduler, carried from X = x / alpha to x, from where sigma / alpha is at most 200."""
    schedule = make_schedule(kind, prediction, clip)
    timesteps = (990, *schedule.spaced_timesteps(count)[1:])
    x, noise = start_and_noise(2 * count - 1)
    scheduler = scheduling_heun_discrete.HeunDiscreteScheduler(
        **settings(kind, prediction, make_betas), **clipping(clip)
    )
    scheduler.set_timesteps(timesteps=list(timesteps))
    evaluations = list(samplers.descent_evaluations(schedule, "heun", timesteps, 0.0))
    assert [evaluation.timestep for evaluation in evaluations] == scheduler.timesteps.long().tolist()
    assert_same_chain(walk(evaluations, network, x), scaled_chain(scheduler, x, noise, tape))
