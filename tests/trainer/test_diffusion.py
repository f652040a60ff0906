"""Diffusion's schedules, targets and sampler against independent ones."""

import contextlib

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Moment
from latentd_trainer.families.diffusion import Diffusion, DiffusionConfig, cumulative_alphas
from latentd_trainer.shard import Shard
from torch import Tensor, nn

INFO = DataInfo("tiny", (1, 8, 8), 17, ("a", "b"), (0.5, 0.5), "")
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
NAMES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}


def tiny(**settings: object) -> Diffusion:
    """A tiny model with fresh weights."""
    torch.manual_seed(0)
    return Diffusion(DiffusionConfig(width=8, **settings), INFO)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_are_those_of_diffusers(schedule: str) -> None:
    """abar_t agrees with diffusers' float32 tables, and signal-to-noise falls strictly."""
    ours = cumulative_alphas(schedule, 1000)
    oracle = DDPMScheduler(1000, beta_schedule=NAMES[schedule]).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, oracle, atol=1e-6)
    assert (np.diff(ours) < 0).all()


def test_a_short_linear_schedule_ends_as_noisy_as_a_long_one() -> None:
    """Betas grow as the schedule shortens, so that x_T is noise for every T."""
    assert cumulative_alphas("linear", 100)[-1] < 1e-4


class Exact(nn.Module):
    """The exact prediction for data that are one known image."""

    def __init__(self, model: Diffusion, image: Tensor) -> None:
        super().__init__()
        self.model, self.image = model, image
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = (
            torch.from_numpy(levels)[timestep].float()[:, None, None, None]
            for levels in (self.model.alphas, self.model.sigmas)
        )
        eps = (x - alpha * self.image) / sigma
        return {"eps": eps, "v": alpha * eps - sigma * self.image, "x0": self.image.expand_as(x)}[
            self.model.config.prediction
        ] + 0 * self.weight


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_exact_prediction_has_no_loss_and_samples_the_image(prediction: str, schedule: str) -> None:
    """Targets, forward process and sampler agree: a network that knows the image loses nothing and gives it back."""
    model = tiny(prediction=prediction, schedule=schedule)
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    model.network = Exact(model, image)
    batch = Batch(image.repeat(16, 1, 1, 1), torch.zeros(16, dtype=torch.int64))
    model.updaters["denoiser"].parameters = list(model.network.parameters())
    losses = model.step(batch, moment())
    assert losses["loss"].item() < 1e-6
    model.averages["denoiser"].module = model.network
    samples = model.sample(torch.tensor([0, 1]), seed=0, step_count=10)
    torch.testing.assert_close(samples, image.expand_as(samples), atol=2e-3, rtol=0)


def moment(step: int = 0) -> Moment:
    """A step's moment, in one process."""
    return Moment(step, 100, torch.Generator().manual_seed(step), Shard(), contextlib.nullcontext)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_sampler_walks_as_diffusers_ddim(prediction: str) -> None:
    """A whole chain without fresh noise comes out as diffusers' DDIM, with trailing timesteps and clipped x_0."""
    model = tiny(prediction=prediction)
    network = model.averages["denoiser"].module
    torch.nn.init.normal_(network.last[2].weight, std=0.05)
    labels = torch.tensor([0, 1, 1])
    ours = model.sample(labels, seed=5, step_count=10, eta=0.0)

    oracle = DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type=PREDICTIONS[prediction], timestep_spacing="trailing"
    )
    oracle.set_timesteps(10)
    x = model.sigmas[-1] * torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for t in oracle.timesteps:
            prediction_at_t = network(x, t.expand(3), labels)
            x = oracle.step(prediction_at_t, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)


def test_timesteps_are_spread_over_the_schedule_and_labels_dropped() -> None:
    """One batch takes a timestep from each equal part of the schedule; about the asked share of labels is -1."""
    seen = {}

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            seen.update(timestep=timestep, label=label)
            return x * self.weight

    model = tiny(label_dropout=0.25)
    model.network = Spy()
    model.updaters["denoiser"].parameters = list(model.network.parameters())
    model.step(Batch(torch.zeros(200, 1, 8, 8), torch.ones(200, dtype=torch.int64)), moment())
    assert torch.bincount(seen["timestep"] // 5, minlength=200).max() <= 2
    assert set(torch.bincount(seen["timestep"] // 50).tolist()) <= {9, 10, 11}
    assert set(seen["label"].tolist()) == {-1, 1}
    assert 30 <= (seen["label"] == -1).sum() <= 70


def test_no_label_is_its_own_class() -> None:
    """Label -1 gives another prediction than every class, and guidance is offered only if labels were dropped."""
    model = tiny()
    network = model.averages["denoiser"].module
    torch.nn.init.normal_(network.last[2].weight)
    for block in [*network.down, *network.up, *network.middle]:
        torch.nn.init.normal_(block.second[1].weight, std=0.1)
    x = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    with torch.no_grad():
        out = network(x, torch.tensor([10, 10, 10]), torch.tensor([-1, 0, 1]))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[2])
    assert model.serving_spec().diffusion.guidance_supported
    assert not tiny(label_dropout=0.0).serving_spec().diffusion.guidance_supported


def test_settings_out_of_range_are_refused_together() -> None:
    """Every setting that is not allowed is named in one error."""
    with pytest.raises(ValueError, match=r"timestep_count=1.*; schedule='quadratic'.*; prediction='score'.*dropout=2"):
        DiffusionConfig(timestep_count=1, schedule="quadratic", prediction="score", label_dropout=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_norm": -1.0},
        {"weight_decay": -0.1},
        {"average_decay": 1.5},
        {"average_decay": float("nan")},
        {"schedule": "linear", "timestep_count": 10},
        {"schedule": "cosine", "timestep_count": 200_000, "prediction": "eps"},
    ],
)
def test_settings_that_would_waste_the_training_are_refused(wrong: dict[str, object]) -> None:
    """Steps away from the minimum, an average that runs away, a schedule that export would refuse: told before."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DiffusionConfig(**wrong)
