"""Predictability minimization: a code whose units cannot be guessed from one another. The first adversarial game.

Schmidhuber: Learning factorial codes by predictability minimization, Neural Computation 4 (1992).

    code          y = E(x) in (0, 1)^d
    predictors    P_i(y without y_i) guesses y_i; each minimises (P_i - y_i)^2
    encoder       maximises the same sum, so that every unit escapes the guesses of all others
    decoder       D(y) gives the image back, without which a code could be noise; encoder and decoder minimise
                  |x - D(E(x))|^2 - weight * |P - y|^2, both in the mean over pixels or units
    binary        a unit that cannot be predicted moves its square error up by moving away from its mean, hence to the
                  ends of (0, 1)
    prior         if units are binary and independent, p(y) is the product of their own P(y_i = 1), which are counted
                  while training; from it images are drawn

With a weight of 0 this is a plain autoencoder, the baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from latentd.v1 import model_pb2
from torch import Tensor, nn

from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Family, Moment, below, setting
from latentd_trainer.optimization import Updater, warm_up_then_cosine
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Meaning, Role, ServingSpec, Source, no_likelihood

_PRIOR_DECAY = 0.99
_LARGEST_BELOW_ONE = 1 - 2**-24


@dataclass(frozen=True)
class PredictabilityMinimizationConfig:
    """Settings of predictability minimization; the defaults are the recipe for digits."""

    steps: int = setting(4000, "training steps, of encoder, decoder and predictors")
    batch_size: int = setting(64, "images a step, over all processes")
    learning_rate: float = setting(3e-3, "peak rate of Adam for encoder and decoder, which falls along a cosine")
    weight: float = setting(1.5, "weight of the predictors' error in what the encoder maximises; 0: an autoencoder")
    warm_up: float = setting(0.5, "share of the steps in which that weight grows from 0")
    predictor_rate: float = setting(1e-2, "the same for the predictors, who must keep up with the code")
    predictor_steps: int = setting(3, "steps of the predictors in each training step")
    units: int = setting(16, "units of the code")
    hidden: int = setting(128, "width of the hidden layer of encoder and decoder")
    predictor_hidden: int = setting(32, "width of the hidden layer of each predictor")

    def __post_init__(self) -> None:
        problems = below(self, steps=1, batch_size=1, learning_rate=0, weight=0, units=2, hidden=1, predictor_hidden=1)
        if problems:
            raise ValueError("; ".join(problems))


class Autoencoder(nn.Module):
    """Images to codes in (0, 1), and codes to images: [n, C, H, W] -> [n, units], and back."""

    chance: Tensor
    """P(unit > 1/2) over the images of late, [units] f32."""

    def __init__(self, shape: tuple[int, int, int], hidden: int, units: int) -> None:
        super().__init__()
        pixels = math.prod(shape)
        self.shape = shape
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, hidden), nn.SiLU(), nn.Linear(hidden, units), nn.Sigmoid()
        )
        self.decoder = nn.Sequential(nn.Linear(units, hidden), nn.SiLU(), nn.Linear(hidden, pixels), nn.Tanh())
        self.register_buffer("chance", torch.full((units,), 0.5))

    def encode(self, images: Tensor) -> Tensor:
        """Return y = E(x)."""
        code: Tensor = self.encoder(images)
        return code

    def decode(self, code: Tensor) -> Tensor:
        """Return D(y)."""
        images: Tensor = self.decoder(code)
        return images.reshape(-1, *self.shape)


class Predictors(nn.Module):
    """A guess at every unit of a code from all the others: [n, units] -> [n, units] in (0, 1).

    Each unit has a network of its own, with one hidden layer; the unit itself enters it as 0.
    """

    def __init__(self, units: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(units, units, hidden) * units**-0.5)  # [guessed, seen, hidden]
        self.offset = nn.Parameter(torch.zeros(units, hidden))
        self.second = nn.Parameter(torch.randn(units, hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(units))
        self.seen: Tensor
        self.register_buffer("seen", 1 - torch.eye(units), persistent=False)

    def forward(self, code: Tensor) -> Tensor:
        """See the class."""
        visible = code[:, None, :] * self.seen  # [n, guessed, seen]
        hidden = torch.tanh(torch.einsum("nij,ijh->nih", visible, self.first) + self.offset)
        return torch.sigmoid((hidden * self.second).sum(dim=2) + self.bias)


class EncoderGraph(nn.Module):
    """What is served as the encoder: sample -> code."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, sample: Tensor) -> Tensor:
        """See the class."""
        return self.autoencoder.encode(sample)


class DecoderGraph(nn.Module):
    """What is served as the decoder: code -> image.

    With `binary`, a unit counts as 1 above 1 - P(unit = 1), else as 0: codes near 0 or 1 stand for those, and uniform
    codes are draws from the factorial prior.
    """

    def __init__(self, autoencoder: Autoencoder, *, binary: bool) -> None:
        super().__init__()
        self.autoencoder, self.binary = autoencoder, binary

    def forward(self, latent: Tensor) -> Tensor:
        """See the class."""
        if self.binary:
            latent = (latent > (1 - self.autoencoder.chance).clamp(max=_LARGEST_BELOW_ONE)).float()
        return self.autoencoder.decode(latent)


class PredictabilityMinimization(Family):
    """The autoencoder and its opponents, and an Adam for each."""

    config_type = PredictabilityMinimizationConfig
    config: PredictabilityMinimizationConfig

    def __init__(self, config: PredictabilityMinimizationConfig, info: DataInfo) -> None:
        super().__init__(config, info)
        self.autoencoder = Autoencoder(info.shape, config.hidden, config.units)
        self.predictors = Predictors(config.units, config.predictor_hidden)
        self.modules = {"autoencoder": self.autoencoder, "predictors": self.predictors}
        self.averages = {}
        self.updaters = {
            name: Updater(module, torch.optim.Adam(module.parameters(), rate, fused=True))
            for (name, module), rate in zip(
                self.modules.items(), (config.learning_rate, config.predictor_rate), strict=True
            )
        }

    def step(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """One step of both sides. Losses: mean square errors of the image, `reconstruction`, and of the guesses."""
        with moment.autocast():
            code = self.autoencoder.encode(batch.images).float()
            images = self.autoencoder.decode(code).float()
            guess = self.predictors(code).float()
        reconstruction = (images - batch.images).square().mean()
        unpredictability = (guess - code).square().mean()
        factor = warm_up_then_cosine(moment.step, moment.step_count, 0)
        loss = reconstruction - self._weight(moment) * unpredictability
        self.updaters["autoencoder"].apply(loss, moment.shard, factor)
        for _ in range(self.config.predictor_steps):
            with moment.autocast():
                error = (self.predictors(code.detach()).float() - code.detach()).square().mean()
            self.updaters["predictors"].apply(error, moment.shard, factor)
        on = moment.shard.mean((code > 0.5).float().mean(dim=0))
        self.autoencoder.chance.lerp_(on, 1 - min(_PRIOR_DECAY, (1 + moment.step) / (10 + moment.step)))
        return {"reconstruction": reconstruction.detach(), "unpredictability": unpredictability.detach()}

    def _weight(self, moment: Moment) -> float:
        """Of the game: 0 at first, for units that flee from predictors before they say anything get stuck at an end."""
        warm_up = self.config.warm_up * moment.step_count
        return self.config.weight * min(1.0, moment.step / warm_up if warm_up else 1.0)

    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """See `Family.sample`; decoded draws from the factorial prior, whatever the labels."""
        uniform = torch.rand((len(labels), self.config.units), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            chance = self.autoencoder.chance.cpu()
            code = (uniform < chance).float() if self.config.weight else uniform
            return self.autoencoder.decode(code.to(self.autoencoder.chance.device)).cpu()

    def serving_spec(self) -> ServingSpec:
        """Encoder and decoder; the predictors' work is done."""
        shape, units = self.info.shape, (self.config.units,)
        graphs = (
            Graph(
                role=Role.ROLE_DECODER,
                module=DecoderGraph(self.autoencoder, binary=self.config.weight > 0).eval(),
                inputs=(GraphInput("latent", Source.SOURCE_LATENT, units),),
                outputs=(GraphOutput("image", Meaning.MEANING_SAMPLE, shape),),
            ),
            Graph(
                role=Role.ROLE_ENCODER,
                module=EncoderGraph(self.autoencoder).eval(),
                inputs=(GraphInput("sample", Source.SOURCE_SAMPLE, shape),),
                outputs=(GraphOutput("code", Meaning.MEANING_LATENT_MEAN, units),),
            ),
        )
        what = (
            f"Predictability minimization: a code of {self.config.units} nearly binary units that cannot be guessed "
            "from one another, and its decoder. Samples are decoded draws from the product of the units' own "
            "distributions. There is no likelihood: it is no model of pixels."
            if self.config.weight
            else f"Plain autoencoder with a code of {self.config.units} units in 0 to 1: the baseline of "
            "predictability minimization. It has no prior; samples are decoded uniform codes. There is no likelihood."
        )
        return ServingSpec(
            family=model_pb2.Model.FAMILY_PREDICTABILITY_MINIMIZATION,
            graphs=graphs,
            methods=(
                model_pb2.Model.METHOD_SAMPLE,
                model_pb2.Model.METHOD_ENCODE,
                model_pb2.Model.METHOD_DECODE,
            ),
            sample_shape=shape,
            latent_shape=units,
            latent_range=(0.0, 1.0),
            class_conditional=False,
            description=what,
            reference_uri="https://doi.org/10.1162/neco.1992.4.6.863",
            likelihood=no_likelihood("It models the code and how images are rebuilt from it; there is no p(sample)."),
            answers={
                model_pb2.Model.METHOD_ENCODE: "the code, units from 0 to 1",
                model_pb2.Model.METHOD_SCORE: "there is no likelihood and no critic",
            },
        )
