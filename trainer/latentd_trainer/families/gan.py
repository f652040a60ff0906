"""Generative adversarial network, conditioned on the class.

Goodfellow et al.: Generative adversarial nets, arXiv 1406.2661.

    game         min_G max_D  E ln D(x, y) + E ln(1 - D(G(z, y), y)), D = sigmoid(f)                  (eq. 1)
    minimax      G minimises E ln(1 - D(G(z, y), y)), which vanishes while D is sure of itself
    nonsaturating  G maximises E ln D(G(z, y), y) instead                                             (section 3)
    hinge        D minimises E max(0, 1 - f(x, y)) + E max(0, 1 + f(G(z, y), y)), G minimises -E f(G(z, y), y)
                 (Lim, Ye, arXiv 1705.02894)
    projection   f(x, y) = a(phi(x)) + <embedding of y, phi(x)> (Miyato, Koyama, arXiv 1802.05637, eq. 3)
    R1           D also pays gamma / 2 E |grad_x f(x, y)|^2 on real images (Mescheder et al., arXiv 1801.04406, eq. 9),
                 every few steps and as much heavier (StyleGAN2, arXiv 1912.04958, section 3.1)
    shifts       D sees all images, real and generated, moved by random whole pixels through which gradients pass
                 (Zhao et al., arXiv 2006.10738)

There is no likelihood and no inference model; an encoder learns to invert the generator, see `inversion`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from latentd.v1 import model_pb2, tensor_pb2
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Family, Moment, below, outside, setting
from latentd_trainer.families.augmentation import mirrored
from latentd_trainer.families.inversion import Inverse, inversion_step
from latentd_trainer.families.noise import normal
from latentd_trainer.families.sizes import PyramidSettings
from latentd_trainer.nets import ImageToVector, VectorToImage
from latentd_trainer.optimization import Average, Updater
from latentd_trainer.pyramid import Pyramid
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Meaning, Role, ServingSpec, Source, no_likelihood

NO_LIKELIHOOD = (
    "The generator defines samples alone: there is no explicit inference model, and p(sample) cannot be worked out."
)
"""What the cards of the family say."""
LOSSES = ("nonsaturating", "minimax", "hinge")
_OF_ALL_PRESETS = {
    "latent": 128,
    "label_width": 128,
    "largest_shift": 4,
    "blocks": 1,
    "attention_levels": "1",
    "inversion": 0.1,
    "inversion_rate": 5e-4,
}
PRESETS = {
    "28x28": _OF_ALL_PRESETS
    | {"steps": 50_000, "width": 32, "multipliers": "1,2,4", "hidden": 256, "average_decay": 0.999, "largest_shift": 2},
    "32x32": _OF_ALL_PRESETS
    | {
        "steps": 200_000,
        "width": 64,
        "multipliers": "1,2,4,4",
        "hidden": 256,
        "average_decay": 0.999,
        "mirrored": 0.5,
    },
    "32x32-large": _OF_ALL_PRESETS
    | {
        "steps": 400_000,
        "width": 96,
        "multipliers": "1,2,4,4",
        "blocks": 2,
        "attention_heads": 4,
        "hidden": 256,
        "average_decay": 0.9999,
        "mirrored": 0.5,
    },
}
"""Of 6.8, 16.5 and 53.1 million parameters, about a third in each of generator, discriminator and encoder."""


@dataclass(frozen=True)
class GameSettings:
    """The settings of the game between discriminator and generator. The defaults are the recipe for digits."""

    loss: str = setting("nonsaturating", "the game: nonsaturating, minimax or hinge")
    gradient_penalty: float = setting(1.0, "gamma, the weight of R1; 0 is none")
    penalty_interval: int = setting(4, "steps from one R1 to the next")
    largest_shift: int = setting(
        0, "pixels by which images move before the discriminator; 0 suits digits that fill the frame"
    )

    def game_problems(self) -> list[str]:
        """A sentence for each of these settings that is not allowed."""
        problems = below(self, gradient_penalty=0, penalty_interval=1, largest_shift=0)
        if self.loss not in LOSSES:
            problems.append(f"loss={self.loss!r}: must be one of {', '.join(LOSSES)}")
        return problems


@dataclass(frozen=True)
class GanConfig(GameSettings, PyramidSettings):
    """Settings of GAN training; the defaults are the recipe for digits."""

    steps: int = setting(1500, "training steps, of both networks")
    batch_size: int = setting(64, "images a step, over all processes")
    learning_rate: float = setting(2e-4, "rate of both Adams")
    blocks: int = setting(0, "residual blocks at each level, beside the convolution that leads to it")
    hidden: int = setting(128, "width of the discriminator's linear layer")
    latent: int = setting(32, "dimensions of z")
    label_width: int = setting(16, "width of the label's embedding in the generator")
    average_decay: float = setting(0.998, "decay of the generator's moving average, which is what is served")
    inversion: float = setting(
        0.25, "share of the steps, the last ones, in which an encoder learns to invert the generator; 0: no encoder"
    )
    inversion_rate: float = setting(2e-3, "peak rate of the encoder's Adam")
    mirrored: float = setting(0.0, "share of real images shown left for right; 0 where that matters, as for digits")

    def __post_init__(self) -> None:
        problems = below(
            self,
            steps=1,
            batch_size=1,
            learning_rate=0,
            hidden=1,
            latent=1,
            label_width=1,
            inversion_rate=0,
        )
        problems += outside(self, average_decay=(0, 1), inversion=(0, 1), mirrored=(0, 1))
        problems += self.game_problems() + self.pyramid_problems()
        if problems:
            raise ValueError("; ".join(problems))


def discriminator_loss(loss: str, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, from its logits f on real and generated images ([n] f32 each)."""
    if loss == "hinge":
        return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def generator_loss(loss: str, fake: Tensor) -> Tensor:
    """What the generator minimises, from the discriminator's logits f on generated images ([n] f32)."""
    if loss == "hinge":
        return -fake.mean()
    if loss == "minimax":
        return -functional.softplus(fake).mean()
    return functional.softplus(-fake).mean()


def shifted(images: Tensor, shifts: Tensor, largest: int) -> Tensor:
    """Images ([n, C, H, W] f32) moved by whole pixels, with -1 where nothing was; gradients pass through.

    Args:
        images: what is moved.
        shifts: [n, 2] i64, downwards and to the right, from -largest to largest.
        largest: the largest shift.
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (largest,) * 4, value=-1.0)
    top, left = (largest - shifts).unbind(dim=1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    index = rows[:, :, None] * (width + 2 * largest) + columns[:, None, :]
    index = index.reshape(count, 1, height * width).expand(count, channels, -1)
    return padded.flatten(2).gather(2, index).view_as(images)


class Generator(nn.Module):
    """z and labels to images: [n, latent] f32, [n] i64 -> [n, C, H, W] f32 in [-1, 1]."""

    def __init__(self, pyramid: Pyramid, latent: int, label_width: int, classes: int) -> None:
        super().__init__()
        self.embed_label = nn.Embedding(classes, label_width)
        self.trunk = VectorToImage(latent + label_width, pyramid, pyramid.shape[0])

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        return torch.tanh(self.trunk(torch.cat([latent, self.embed_label(label)], dim=1)))


class Discriminator(nn.Module):
    """Images and labels to the logit f of being real: [n, C, H, W] f32, [n] i64 -> [n] f32."""

    def __init__(self, pyramid: Pyramid, hidden: int, classes: int) -> None:
        super().__init__()
        self.trunk = ImageToVector(pyramid, hidden, nn.LeakyReLU(0.2))
        self.realness = nn.Linear(hidden, 1)
        self.embed_label = nn.Embedding(classes, hidden)
        nn.init.normal_(self.embed_label.weight, std=hidden**-0.5)

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        features = self.trunk(images)
        logit: Tensor = self.realness(features)[:, 0] + (self.embed_label(label) * features).sum(dim=1)
        return logit


class RealProbabilityGraph(nn.Module):
    """What is served as the scorer: (sample, label) -> D, the probability of being real.

    Under the hinge loss f is a margin and no log odds: there D orders images by realness, and is no probability.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, sample: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        return torch.sigmoid(self.discriminator(sample, label))


def realness_graph(discriminator: nn.Module, shape: tuple[int, int, int]) -> Graph:
    """The discriminator of images of this shape as it is served: P(real) as the score."""
    return Graph(
        role=Role.ROLE_SCORER,
        module=RealProbabilityGraph(discriminator).eval(),
        inputs=(
            GraphInput("sample", Source.SOURCE_SAMPLE, shape),
            GraphInput("label", Source.SOURCE_CLASS_LABEL, (), tensor_pb2.DATA_TYPE_INT64),
        ),
        outputs=(GraphOutput("real_probability", Meaning.MEANING_REAL_PROBABILITY, ()),),
    )


def realness_answers(loss: str) -> dict[model_pb2.Model.Method.ValueType, str]:
    """What `realness_graph` does not tell of Score, for a discriminator that was trained by this loss."""
    if loss != "hinge":
        return {}
    margin = "the critic's margin squashed to 0 to 1: an order by realness, no probability; given the class"
    return {model_pb2.Model.METHOD_SCORE: margin}


class Game:
    """The game as one side of it sees it: the discriminator learns, and generators are told what they pay."""

    def __init__(self, settings: GameSettings, discriminator: nn.Module, updater: Updater) -> None:
        self.settings, self.discriminator, self.updater = settings, discriminator, updater

    def discriminator_step(
        self,
        real: Tensor,
        fake: Tensor,
        labels: Tensor,
        moment: Moment,
        *,
        beside: Tensor | None = None,
        rate_factor: float = 1.0,
    ) -> dict[str, Tensor]:
        """One step of the discriminator. Losses: `discriminator`, and `penalty` in every `penalty_interval`th step.

        Args:
            real: [n, C, H, W] f32.
            fake: generated images of the same labels, [n, C, H, W], without a gradient.
            labels: [n] i64.
            moment: where in training the step is.
            beside: what the discriminator minimises as well, [] f32.
            rate_factor: of its learning rate.
        """
        with moment.autocast():
            real_logit = self._judge(real, labels, moment)
            fake_logit = self._judge(fake.float(), labels, moment)
        loss = discriminator_loss(self.settings.loss, real_logit.float(), fake_logit.float())
        losses = {"discriminator": loss.detach()}
        if self.settings.gradient_penalty and moment.step % self.settings.penalty_interval == 0:
            penalty = self._gradient_penalty(real, labels)
            losses["penalty"] = penalty.detach()
            loss = loss + self.settings.gradient_penalty / 2 * self.settings.penalty_interval * penalty
        self.updater.apply(loss if beside is None else loss + beside, moment.shard, rate_factor)
        return losses

    def generator_loss(self, fake: Tensor, labels: Tensor, moment: Moment) -> Tensor:
        """What a generator pays for its images ([n, C, H, W]) of these labels, [] f32."""
        with moment.autocast():
            logit = self._judge(fake.float(), labels, moment)
        return generator_loss(self.settings.loss, logit.float())

    def _judge(self, images: Tensor, labels: Tensor, moment: Moment) -> Tensor:
        largest = self.settings.largest_shift
        if largest:
            count = len(images) * moment.shard.count
            shifts = torch.randint(-largest, largest + 1, (count, 2), generator=moment.generator)
            images = shifted(images, moment.shard.rows(shifts).to(images.device), largest)
        logit: Tensor = self.discriminator(images, labels)
        return logit

    def _gradient_penalty(self, images: Tensor, labels: Tensor) -> Tensor:
        """E |grad_x f(x, y)|^2 over real images ([n, C, H, W] f32), [] f32; in fp32, for it is differentiated twice."""
        images = images.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the only form of attention that can be differentiated twice
            logit = self.discriminator(images, labels)
        (gradient,) = torch.autograd.grad(logit.sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(dim=1).mean()


def game_optimizer(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Adam as both sides of the game use it."""
    return torch.optim.Adam(network.parameters(), rate, betas=(0.0, 0.99), fused=True)


class Gan(Family):
    """Generator, its average, discriminator, the encoder that inverts the average, and an Adam for each."""

    config_type = GanConfig
    presets = PRESETS
    config: GanConfig

    def __init__(self, config: GanConfig, info: DataInfo) -> None:
        super().__init__(config, info)
        pyramid, classes = config.pyramid(info.shape), len(info.class_names)
        self.generator = Generator(pyramid, config.latent, config.label_width, classes)
        self.discriminator = Discriminator(pyramid, config.hidden, classes)
        self.modules: dict[str, nn.Module] = {"generator": self.generator, "discriminator": self.discriminator}
        self.averages = {"generator": Average(self.generator, config.average_decay)}
        self.updaters = {
            name: Updater(module, game_optimizer(module, config.learning_rate)) for name, module in self.modules.items()
        }
        self.game = Game(config, self.discriminator, self.updaters["discriminator"])
        if config.inversion:
            inverse = Inverse(pyramid, config.hidden, config.latent, config.label_width, classes)
            self.modules["encoder"] = inverse
            self.updaters["encoder"] = Updater(
                inverse, torch.optim.Adam(inverse.parameters(), config.inversion_rate, fused=True)
            )

    def step(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """One step of the discriminator, then one of the generator, then, towards the end, one of the encoder.

        Losses: `discriminator`, `generator`, `penalty`, and those of `inversion_step`.
        """
        labels = batch.labels
        real = mirrored(batch.images, moment, self.config.mirrored)
        with moment.autocast(), torch.no_grad():
            fake = self.generator(normal(batch, moment, self.config.latent), labels)
        losses = self.game.discriminator_step(real, fake, labels, moment)
        with moment.autocast():
            fake = self.generator(normal(batch, moment, self.config.latent), labels)
        generator = self.game.generator_loss(fake, labels, moment)
        self.updaters["generator"].apply(generator, moment.shard)
        self.averages["generator"].update(moment.step)
        losses["generator"] = generator.detach()
        if "encoder" in self.modules:
            losses |= inversion_step(
                self.updaters["encoder"],
                self.modules["encoder"],
                self.averages["generator"].module,
                normal(batch, moment, self.config.latent),
                Batch(real, labels),
                moment,
                self.config.inversion,
            )
        return losses

    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """See `Family.sample`."""
        generator = self.averages["generator"].module
        device = next(generator.parameters()).device
        latent = torch.randn((len(labels), self.config.latent), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            images: Tensor = generator(latent.to(device), labels.to(device)).cpu()
        return images

    def serving_spec(self) -> ServingSpec:
        """The generator as decoder, its inverse as encoder, the discriminator as scorer."""
        shape, latent = self.info.shape, (self.config.latent,)
        label = GraphInput("label", Source.SOURCE_CLASS_LABEL, (), tensor_pb2.DATA_TYPE_INT64)
        graphs = [
            Graph(
                role=Role.ROLE_DECODER,
                module=self.averages["generator"].module,
                inputs=(GraphInput("latent", Source.SOURCE_LATENT, latent), label),
                outputs=(GraphOutput("image", Meaning.MEANING_SAMPLE, shape),),
            ),
            realness_graph(self.discriminator, shape),
        ]
        methods = [model_pb2.Model.METHOD_SAMPLE, model_pb2.Model.METHOD_DECODE, model_pb2.Model.METHOD_SCORE]
        if "encoder" in self.modules:
            methods.append(model_pb2.Model.METHOD_ENCODE)
            graphs.append(
                Graph(
                    role=Role.ROLE_ENCODER,
                    module=self.modules["encoder"].eval(),
                    inputs=(GraphInput("sample", Source.SOURCE_SAMPLE, shape), label),
                    outputs=(GraphOutput("latent_mean", Meaning.MEANING_LATENT_MEAN, latent),),
                )
            )
        return ServingSpec(
            family=model_pb2.Model.FAMILY_GAN,
            graphs=graphs,
            methods=methods,
            sample_shape=shape,
            latent_shape=latent,
            description=(
                f"Class-conditional generative adversarial network: {self.config.loss} loss, projection "
                f"discriminator, {self.config.latent} latent dimensions."
                + (" Its scores order images by realness; they are no probabilities." * (self.config.loss == "hinge"))
                + (" Its encoder is a learned inverter." * ("encoder" in self.modules))
            ),
            reference_uri="https://arxiv.org/abs/1406.2661",
            likelihood=no_likelihood(NO_LIKELIHOOD),
            answers=self._answers(),
        )

    def _answers(self) -> dict[model_pb2.Model.Method.ValueType, str]:
        """What the graphs do not tell of Encode and Score."""
        answers = {model_pb2.Model.METHOD_ENCODE: "nothing: there is no inference model, and no inverter was trained"}
        if "encoder" in self.modules:
            answers[model_pb2.Model.METHOD_ENCODE] = (
                "a latent for the sample and its class, by a learned inverter of the generator; no posterior"
            )
        return answers | realness_answers(self.config.loss)
