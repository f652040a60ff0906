"""A VAE, a GAN and a diffusion model of points in the plane, small enough to be trained for many seeds at once.

Their losses are those of the families of images (`families`); only the networks are others. All arrays have a row for
each seed first, [seeds, n, ...] f32, and no seed's run depends on another's.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from latentd.v1 import model_pb2
from torch import Tensor, nn

from latentd_trainer import chains
from latentd_trainer.families.diffusion import cumulative_alphas
from latentd_trainer.families.gan import discriminator_loss, generator_loss
from latentd_trainer.families.vae import kl_to_standard_normal, normal_log_density, reparameterise
from latentd_trainer.optimization import warm_up_then_cosine
from latentd_trainer.study.ensemble import Ensemble, normal, uniform

Generators = Sequence[torch.Generator]


@dataclass(frozen=True)
class Recipe:
    """How a model of points is trained."""

    steps: int
    batch_size: int = 256
    width: int = 64
    latent: int = 2
    learning_rate: float = 2e-3
    warm_up_steps: int = 50


class PointModel(nn.Module):
    """A model of points [seeds, n, 2]."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    @abstractmethod
    def fit(self, data: Callable[[int, Generators], Tensor], generators: Generators) -> None:
        """Train on batches that `data(n, generators)` draws."""

    @abstractmethod
    def sample(self, count: int, generators: Generators) -> Mapping[str, Tensor]:
        """Draw `count` points a seed in every way the model has, by the way's name, [seeds, count, 2] f32."""

    def _descend(self, rows: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
        """One step on a loss that sums over seeds, so that each follows its own gradient."""
        for parameter, gradient in zip(rows, torch.autograd.grad(loss, rows), strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * warm_up_then_cosine(
                step, self.recipe.steps, self.recipe.warm_up_steps
            )
        optimizer.step()


class PointVae(PointModel):
    """p(x | z) = N(m(z), s(z)^2) with a deviation for each coordinate, q(z | x) normal; arXiv 1312.6114."""

    def __init__(self, recipe: Recipe, generators: Generators) -> None:
        super().__init__(recipe)
        width, latent = recipe.width, recipe.latent
        self.encoder = Ensemble([2, width, width, 2 * latent], generators)
        self.decoder = Ensemble([latent, width, width, 4], generators)

    def fit(self, data: Callable[[int, Generators], Tensor], generators: Generators) -> None:
        """See the base class. Maximises the evidence lower bound."""
        rows = list(self.parameters())
        optimizer = torch.optim.Adam(rows, self.recipe.learning_rate, fused=True)
        for step in range(self.recipe.steps):
            points = data(self.recipe.batch_size, generators)
            mean, log_variance = self.encoder(points).chunk(2, dim=2)
            latent = reparameterise(mean, log_variance, normal(mean.shape[1:], generators))
            location, spread = self._decode(latent)
            flat = [part.flatten(0, 1) for part in (points, location, spread, mean, log_variance)]
            bound = normal_log_density(*flat[:3]) - kl_to_standard_normal(*flat[3:]).sum(dim=1)
            self._descend(rows, optimizer, -bound.sum() / self.recipe.batch_size, step)

    @torch.no_grad()
    def sample(self, count: int, generators: Generators) -> Mapping[str, Tensor]:
        """The mean of p(x | z), and a draw from it."""
        location, spread = self._decode(normal((count, self.recipe.latent), generators))
        return {"mean": location, "draw": reparameterise(location, spread, normal((count, 2), generators))}

    def _decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        location, spread = self.decoder(latent).chunk(2, dim=2)
        return location, spread.clamp(-12, 4)


class PointGan(PointModel):
    """A generator and a discriminator; arXiv 1406.2661. R1 as in arXiv 1801.04406, eq. 9, every `_PENALTY_INTERVAL`."""

    def __init__(self, recipe: Recipe, generators: Generators, loss: str, penalty: float) -> None:
        super().__init__(recipe)
        width = recipe.width
        self.loss, self.penalty = loss, penalty
        self.generator = Ensemble([recipe.latent, width, width, 2], generators)
        self.discriminator = Ensemble([2, width, width, 1], generators)

    def fit(self, data: Callable[[int, Generators], Tensor], generators: Generators) -> None:
        """See the base class. A step of the discriminator, then one of the generator."""
        count, latent = self.recipe.batch_size, self.recipe.latent
        players = [list(player.parameters()) for player in (self.discriminator, self.generator)]
        optimizers = [torch.optim.Adam(rows, self.recipe.learning_rate, (0.5, 0.99), fused=True) for rows in players]
        seeds = len(generators)
        for step in range(self.recipe.steps):
            real = data(count, generators)
            with torch.no_grad():
                fake = self.generator(normal((count, latent), generators))
            loss = seeds * discriminator_loss(self.loss, self.discriminator(real), self.discriminator(fake))
            if self.penalty:
                loss = loss + self.penalty / 2 * self._squared_gradient(real) / count
            self._descend(players[0], optimizers[0], loss, step)
            fake = self.generator(normal((count, latent), generators))
            loss = seeds * generator_loss(self.loss, self.discriminator(fake))
            self._descend(players[1], optimizers[1], loss, step)

    @torch.no_grad()
    def sample(self, count: int, generators: Generators) -> Mapping[str, Tensor]:
        """What the generator makes of normal noise."""
        return {"": self.generator(normal((count, self.recipe.latent), generators))}

    def _squared_gradient(self, points: Tensor) -> Tensor:
        """Sum of |grad_x f(x)|^2 over all points, [] f32."""
        points = points.requires_grad_()
        (gradient,) = torch.autograd.grad(self.discriminator(points).sum(), points, create_graph=True)
        return gradient.square().sum()


TIMESTEPS = 100
_FREQUENCIES = 4


class PointDiffusion(PointModel):
    """A network that predicts v; arXiv 2006.11239, 2202.00512. Sampled by DDIM over the whole schedule."""

    def __init__(self, recipe: Recipe, generators: Generators) -> None:
        super().__init__(recipe)
        width = recipe.width
        self.network = Ensemble([2 + 2 * _FREQUENCIES, width, width, width, 2], generators)
        cumulative = cumulative_alphas("cosine", TIMESTEPS)
        self.schedule = model_pb2.DiffusionSpec(
            alphas=np.sqrt(cumulative), sigmas=np.sqrt(1 - cumulative), prediction=model_pb2.DiffusionSpec.PREDICTION_V
        )

    def fit(self, data: Callable[[int, Generators], Tensor], generators: Generators) -> None:
        """See the base class. Minimises the squared error of v, timesteps drawn evenly."""
        rows = list(self.parameters())
        optimizer = torch.optim.Adam(rows, self.recipe.learning_rate, fused=True)
        alphas, sigmas = (
            torch.tensor(levels, dtype=torch.float32) for levels in (self.schedule.alphas, self.schedule.sigmas)
        )
        for step in range(self.recipe.steps):
            points = data(self.recipe.batch_size, generators)
            timestep = (uniform(points.shape[1:2], generators) * TIMESTEPS).long()
            alpha, sigma = alphas[timestep][..., None], sigmas[timestep][..., None]
            eps = normal(points.shape[1:], generators)
            error = self._predict(alpha * points + sigma * eps, timestep) - (alpha * eps - sigma * points)
            self._descend(rows, optimizer, error.square().sum() / self.recipe.batch_size, step)

    @torch.no_grad()
    def sample(self, count: int, generators: Generators) -> Mapping[str, Tensor]:
        """DDIM in as many steps as there are timesteps."""

        def denoise(x: chains.Floats, timestep: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> chains.Floats:
            rows = torch.from_numpy(timestep)[:, None].expand(-1, count)
            return self._predict(torch.from_numpy(x), rows).numpy()

        points = chains.walk(
            denoise,
            self.schedule,
            normal((count, 2), generators).numpy(),
            TIMESTEPS,
            eta=0.0,
            clip=(-math.inf, math.inf),
            generator=np.random.default_rng(),  # draws nothing without eta
        )
        return {"": torch.from_numpy(points)}

    def _predict(self, points: Tensor, timestep: Tensor) -> Tensor:
        angles = (timestep / TIMESTEPS)[..., None] * math.pi * 2.0 ** torch.arange(_FREQUENCIES)
        prediction: Tensor = self.network(torch.cat([points, angles.sin(), angles.cos()], dim=2))
        return prediction
