"""Diffusers pipelines with random weights, imported and served, against diffusers itself with the very same noise.

The noise is the server's: it is a function of (seed, sample, step), so that what the server draws can be drawn here too
and be handed to diffusers.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
)
from diffusers.schedulers import (
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
)
from latentd_client import Client
from latentd_server.noise import Purpose, normals, runs
from latentd_trainer import cli
from numpy.typing import NDArray
from processes import Running, start_server
from typer.testing import CliRunner

# NumPy says this of torch tensors, which diffusers gives to np.array.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

SEED, COUNT, STEPS = 11, 3, 10  # diffusers steps by T // STEPS, which must divide
TOLERANCE = 1e-4  # relative to the largest value where that is above 1
TRAILED = {"timestep_spacing": "trailing"}
TRAILING = range(99, -1, -10)  # the timesteps of STEPS such steps
DRAWING = (scheduling_ddpm, scheduling_dpmsolver_multistep, scheduling_euler_ancestral_discrete)


def unet(channels: int, **options: Any) -> UNet2DModel:
    """Two levels of 8 x 8 and 4 x 4, with attention at the lower."""
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    )


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Pixels; pixels of four classes, the last of which means none; latents of an autoencoder."""
    torch.manual_seed(0)
    cosine = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    return {
        "pixels": DDPMPipeline(unet(3), DDPMScheduler(num_train_timesteps=100, beta_end=0.1)),
        "classes": DDPMPipeline(
            unet(1, num_class_embeds=4), DDIMScheduler(num_train_timesteps=100, clip_sample=False, **cosine)
        ),
        "latents": LDMPipeline(
            autoencoder, unet(4), DDIMScheduler(num_train_timesteps=100, beta_schedule="scaled_linear", beta_end=0.1)
        ),
    }


@pytest.fixture(scope="module")
def server(
    pipelines: dict[str, Any], server_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server with the pipelines, each saved by diffusers and imported by the command."""
    root = tmp_path_factory.mktemp("pipelines")
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
        arguments = ["import", "diffusers", str(root / name), "--name", name, "--models", str(root / "models")]
        done = CliRunner().invoke(cli.app, arguments + ["--unconditional-class", "3"] * (name == "classes"))
        assert done.exit_code == 0, done.output
    running = start_server(server_python, root / "models", root / "server.log")
    yield running
    assert running.stop() == 0, running.log.read_text()


class Tape:
    """The noise that the server draws for the samples 0 .. COUNT - 1 of SEED, in the order in which it is asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape, self._step = shape, 0

    def start(self) -> torch.Tensor:
        """Z of x_T = sigma_T z."""
        return self._draw(Purpose.START, 0)

    def randn_tensor(self, *_: Any, **__: Any) -> torch.Tensor:
        """The fresh noise of the next step."""
        self._step += 1
        return self._draw(Purpose.STEP, self._step - 1)

    def _draw(self, purpose: Purpose, step: int) -> torch.Tensor:
        rows = normals(runs(purpose, SEED, range(COUNT), [step] * COUNT), int(np.prod(self._shape)))
        return torch.from_numpy(rows.reshape(COUNT, *self._shape))


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tape]:
    """Makes diffusers' schedulers draw from a tape."""

    def begin(*shape: int) -> Tape:
        tape = Tape(shape)
        for module in DRAWING:
            monkeypatch.setattr(module, "randn_tensor", tape.randn_tensor)
        return tape

    return begin


@torch.no_grad()
def walked(network: Any, scheduler: Any, tape: Tape, label: torch.Tensor | None = None, scale: float = 1.0) -> Any:
    """The loop of diffusers' pipelines, [COUNT, C, H, W] f32; guided by class 3 where `scale` is not 1."""
    sigma = float((1 - scheduler.alphas_cumprod[int(scheduler.timesteps[0])]).sqrt())
    latents = tape.start() * (sigma if float(scheduler.init_noise_sigma) == 1 else float(scheduler.init_noise_sigma))
    for timestep in scheduler.timesteps:
        told = scheduler.scale_model_input(latents, timestep)
        output = network(told, timestep, class_labels=label).sample
        if scale != 1:
            without = network(told, timestep, class_labels=torch.full((COUNT,), 3)).sample
            output = without + scale * (output - without)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents.numpy()


def assert_close(served: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert served.shape == expected.shape
    assert np.abs(served - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


def whole(scheduler: Any) -> list[int]:
    """A scheduler's timesteps, which must be whole numbers to be asked for."""
    assert all(float(t) == int(t) for t in scheduler.timesteps)
    return [int(t) for t in scheduler.timesteps]


SCHEDULERS = {
    "ddpm": (DDPMScheduler, {"timestep_spacing": "leading"}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {"timestep_spacing": "leading"}),
    "dpmpp-2m-sde": (
        DPMSolverMultistepScheduler,
        {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"},
    ),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
}


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_every_sampler_gives_what_its_scheduler_gives(
    sampler: str, server: Running, pipelines: dict[str, Any], tape: Callable[..., Tape]
) -> None:
    """A class-conditional network that predicts v, cosine schedule: each sampler at the timesteps of its scheduler."""
    pipeline = pipelines["classes"]
    kind, options = SCHEDULERS[sampler]
    scheduler = kind.from_config(pipeline.scheduler.config, clip_sample=False, **options)
    scheduler.set_timesteps(STEPS)
    label = [2, 0, 1]
    expected = walked(pipeline.unet, scheduler, tape(1, 8, 8), torch.tensor(label))
    with Client(server.target) as client:
        served = client.sample("classes", seed=SEED, label=label, sampler=sampler, timesteps=whole(scheduler))
    assert_close(served.array, expected)


def test_the_unconditional_class_guides(server: Running, pipelines: dict[str, Any], tape: Callable[..., Tape]) -> None:
    """The class that was named unconditional is label -1: guidance with it is classifier-free guidance."""
    pipeline = pipelines["classes"]
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    expected = walked(pipeline.unet, scheduler, tape(1, 8, 8), torch.tensor([1, 1, 2]), scale=3.0)
    with Client(server.target) as client:
        assert client.model("classes").class_names == ("0", "1", "2")
        served = client.sample("classes", seed=SEED, label=[1, 1, 2], sampler="ddim", steps=STEPS, guidance=3.0)
    assert_close(served.array, expected)


def test_the_pipeline_of_pixels_is_the_served_one(
    server: Running, pipelines: dict[str, Any], tape: Callable[..., Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDPMPipeline itself, all 100 steps with clipped x0, gives the images that the default walk gives."""
    pipeline = pipelines["pixels"]
    drawn = tape(3, 8, 8)
    sigma = (1 - pipeline.scheduler.alphas_cumprod[-1]).sqrt()
    draws = iter([lambda: sigma * drawn.start()])
    module = sys.modules[DDPMPipeline.__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws)())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=COUNT, num_inference_steps=100, output_type="pt").images
    with Client(server.target) as client:
        assert client.model("pixels").samplers[0] == "ddpm"
        served = client.sample("pixels", COUNT, seed=SEED)
    assert_close((served.array / 2 + 0.5).clip(0, 1), images.numpy())


def test_the_pipeline_of_latents_is_one_call(
    server: Running, pipelines: dict[str, Any], tape: Callable[..., Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LDMPipeline itself gives the images that one Sample gives; it knows of no shift, so that is undone for it."""
    pipeline = pipelines["latents"]
    drawn, decode = tape(4, 8, 8), pipeline.vqvae.decode
    sigma = (1 - pipeline.scheduler.alphas_cumprod[TRAILING[0]]).sqrt()
    monkeypatch.setattr(sys.modules[LDMPipeline.__module__], "randn_tensor", lambda *_, **__: sigma * drawn.start())
    monkeypatch.setattr(pipeline.vqvae, "decode", lambda latents, **options: decode(latents + 0.1, **options))
    monkeypatch.setattr(pipeline, "scheduler", DDIMScheduler.from_config(pipeline.scheduler.config, **TRAILED))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=COUNT, num_inference_steps=STEPS, output_type="np").images
    with Client(server.target) as client:
        assert client.model("latents").sample_shape == (3, 16, 16)
        served = client.sample("latents", COUNT, seed=SEED, steps=STEPS)
    assert_close((served.array / 2 + 0.5).clip(0, 1), images.transpose(0, 3, 1, 2))


def test_a_latent_pipeline_is_two_models(server: Running, pipelines: dict[str, Any], tape: Callable[..., Tape]) -> None:
    """One call gives the latents of the pipeline's loop, and the images; the other model decodes and encodes on their
    scale, and encodes images to start from.
    """
    pipeline = pipelines["latents"]
    autoencoder, scheduler = pipeline.vqvae, pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    expected = walked(pipeline.unet, scheduler, tape(4, 8, 8))
    with torch.no_grad():
        image = autoencoder.decode(torch.from_numpy(expected) / 0.7 + 0.1).sample.clamp(-1, 1)
        posterior = autoencoder.encode(image).latent_dist
    with Client(server.target) as client:
        samples = client.sample("latents", COUNT, seed=SEED, timesteps=whole(scheduler))
        assert samples.latents is not None
        decoded = client.decode("latents-vae", samples.latents).array
        begun = client.sample("latents", COUNT, seed=SEED, steps=STEPS, start=image.numpy(), strength=0.5)
        encoded = client.encode("latents-vae", image.numpy())
    assert_close(samples.latents, expected)
    assert np.array_equal(samples.array, decoded)
    assert_close(decoded.clip(-1, 1), image.numpy())
    assert begun.array.shape == image.shape
    assert encoded.mean is not None
    assert encoded.log_variance is not None
    assert_close(encoded.mean, ((posterior.mean - 0.1) * 0.7).numpy())
    assert_close(encoded.log_variance, (posterior.logvar + 2 * np.log(0.7)).numpy())
