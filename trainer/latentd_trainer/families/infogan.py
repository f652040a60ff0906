"""InfoGAN: a GAN whose generator keeps what its codes say, so that codes come to mean something by themselves.

Chen et al.: InfoGAN, arXiv 1606.03657. The classes of the data are not used.

    generator     x = G(k, c, z): a categorical code k, uniform over the codes; continuous codes c ~ N(0, I), in the
                  paper U(-1, 1); incompressible noise z ~ N(0, I)
    information   I(k, c; x) >= E ln q(k, c | x) + H(k) + H(c), where (k, c) is drawn from its prior and x = G(k, c, z)
                                                                                                   (eq. 5)
    game          min_G,q max_D V(D, G) - weight * that bound; V as in `gan`                        (eq. 6)
    recognition   q(k, c | x) = Cat(k) N(c; m, diag s^2) by a head on the trunk of D, so that D's features are made to
                  tell codes apart: where the trunk does not learn from it, the bound stays near 0

k is served as the class, c as the latent and z as fresh noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from latentd.v1 import model_pb2, tensor_pb2
from torch import Tensor, nn
from torch.nn import functional

from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Family, Moment, below, outside, setting
from latentd_trainer.families.gan import NO_LIKELIHOOD, Game, GameSettings, Generator, game_optimizer
from latentd_trainer.families.sizes import PyramidSettings
from latentd_trainer.families.vae import normal_log_density
from latentd_trainer.nets import ImageToVector
from latentd_trainer.optimization import Average, Updater
from latentd_trainer.pyramid import Pyramid
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Meaning, Role, ServingSpec, Source, no_likelihood

LOG_VARIANCE_RANGE = (-2.0, 2.0)


@dataclass(frozen=True)
class InfoGanConfig(GameSettings, PyramidSettings):
    """Settings of InfoGAN training; the defaults are the recipe for digits."""

    steps: int = setting(800, "training steps, of both networks")
    batch_size: int = setting(64, "images a step, over all processes")
    learning_rate: float = setting(1e-3, "rate of both Adams, which falls to 0 over the second half of the steps")
    blocks: int = setting(0, "residual blocks at each level, beside the convolution that leads to it")
    hidden: int = setting(128, "width of the linear layer that discriminator and recognition share")
    codes: int = setting(10, "values of the categorical code")
    continuous: int = setting(2, "continuous codes")
    noise: int = setting(32, "dimensions of z")
    code_width: int = setting(16, "width of the categorical code's embedding in the generator")
    information: float = setting(1.0, "weight of the mutual information of images and categorical code")
    continuous_information: float = setting(0.1, "weight of the mutual information of images and continuous codes")
    average_decay: float = setting(0.998, "decay of the moving averages of both networks, which are what is served")

    def __post_init__(self) -> None:
        problems = below(
            self,
            steps=1,
            batch_size=1,
            learning_rate=0,
            hidden=1,
            codes=2,
            continuous=1,
            noise=1,
            code_width=1,
            information=0,
            continuous_information=0,
        )
        problems += outside(self, average_decay=(0, 1))
        problems += self.game_problems() + self.pyramid_problems()
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Codes:
    """What a generator draws n images from."""

    category: Tensor  # [n] i64
    continuous: Tensor  # [n, continuous] f32
    noise: Tensor  # [n, noise] f32


@dataclass(frozen=True)
class Guess:
    """q(k, c | x) of n images."""

    logits: Tensor  # [n, codes] f32, of k
    mean: Tensor  # [n, continuous] f32
    log_variance: Tensor  # [n, continuous] f32

    def log_probability(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Ln q(k | x) and ln q(c | x) of each image in nats, [n] f32 each."""
        category = -functional.cross_entropy(self.logits, codes.category, reduction="none")
        return category, normal_log_density(codes.continuous, self.mean, self.log_variance)


class Critic(nn.Module):
    """D and q on one trunk: images to the logit of being real, and to what their codes may have been."""

    def __init__(self, pyramid: Pyramid, hidden: int, codes: int, continuous: int) -> None:
        super().__init__()
        self.codes, self.continuous = codes, continuous
        self.trunk = ImageToVector(pyramid, hidden, nn.LeakyReLU(0.2))
        self.realness = nn.Linear(hidden, 1)
        self.recognition = nn.Sequential(
            nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, codes + 2 * continuous)
        )

    def forward(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        """The logit of being real, whatever the label: [n, C, H, W] f32 -> [n] f32."""
        logit: Tensor = self.realness(self.trunk(images))[:, 0]
        return logit

    def guess(self, images: Tensor) -> Guess:
        """q(k, c | x), of [n, C, H, W] f32."""
        sizes = (self.codes, self.continuous, self.continuous)
        logits, mean, log_variance = self.recognition(self.trunk(images)).float().split(sizes, dim=1)
        return Guess(logits, mean, log_variance.clamp(*LOG_VARIANCE_RANGE))


class GeneratorGraph(nn.Module):
    """What is served as the decoder: (continuous codes, categorical code, noise) -> image."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, latent: Tensor, label: Tensor, noise: Tensor) -> Tensor:
        """See the class."""
        image: Tensor = self.generator(torch.cat([latent, noise], dim=1), label)
        return image


class RecognitionGraph(nn.Module):
    """What is served as the encoder: sample -> mean and log variance of the continuous codes, P(k | x)."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        guess = self.critic.guess(sample)
        return guess.mean, guess.log_variance, guess.logits.softmax(dim=1)


class RealProbabilityGraph(nn.Module):
    """What is served as the scorer: sample -> D, the probability of being real."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, sample: Tensor) -> Tensor:
        """See the class."""
        return torch.sigmoid(self.critic(sample))


class InfoGan(Family):
    """Generator and critic, which has two heads; an average and an Adam for each."""

    config_type = InfoGanConfig
    config: InfoGanConfig

    def __init__(self, config: InfoGanConfig, info: DataInfo) -> None:
        super().__init__(config, info)
        pyramid = config.pyramid(info.shape)
        self.generator = Generator(pyramid, config.continuous + config.noise, config.code_width, config.codes)
        self.critic = Critic(pyramid, config.hidden, config.codes, config.continuous)
        self.modules = {"generator": self.generator, "critic": self.critic}
        self.averages = {name: Average(module, config.average_decay) for name, module in self.modules.items()}
        self.updaters = {
            name: Updater(module, game_optimizer(module, config.learning_rate)) for name, module in self.modules.items()
        }
        self.game = Game(config, self.critic, self.updaters["critic"])

    def step(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """One step of the critic, then one of the generator; the bound on the information is part of both.

        Losses: `discriminator`, `penalty`, `generator`, and in nats `information`, of the categorical code, and
        `continuous`, of the others.
        """
        rate_factor = min(1.0, 2 - 2 * moment.step / moment.step_count)
        codes = self._draw(batch, moment)
        with torch.no_grad():
            fake = self._generate(codes, moment)
        category, continuous = self._information(fake, codes, moment)
        telling = -(self.config.information * category + self.config.continuous_information * continuous)
        losses = self.game.discriminator_step(
            batch.images, fake, batch.labels, moment, beside=telling, rate_factor=rate_factor
        )

        codes = self._draw(batch, moment)
        fake = self._generate(codes, moment)
        generator = self.game.generator_loss(fake, batch.labels, moment)
        category, continuous = self._information(fake, codes, moment)
        telling = -(self.config.information * category + self.config.continuous_information * continuous)
        self.updaters["generator"].apply(generator + telling, moment.shard, rate_factor)
        for average in self.averages.values():
            average.update(moment.step)
        return losses | {
            "generator": generator.detach(),
            "information": category.detach(),
            "continuous": continuous.detach(),
        }

    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """See `Family.sample`; label k asks for the categorical code k, counted round where there are fewer codes."""
        generator = torch.Generator().manual_seed(seed)
        served = self.averages["generator"].module
        device = next(served.parameters()).device
        latent = torch.randn((len(labels), self.config.continuous + self.config.noise), generator=generator)
        with torch.no_grad():
            images: Tensor = served(latent.to(device), (labels % self.config.codes).to(device)).cpu()
        return images

    def serving_spec(self) -> ServingSpec:
        """The generator as decoder, recognition as encoder, the discriminator as scorer."""
        shape, latent, noise = self.info.shape, (self.config.continuous,), (self.config.noise,)
        sample = GraphInput("sample", Source.SOURCE_SAMPLE, shape)
        critic = self.averages["critic"].module
        assert isinstance(critic, Critic)
        graphs = (
            Graph(
                role=Role.ROLE_DECODER,
                module=GeneratorGraph(self.averages["generator"].module).eval(),
                inputs=(
                    GraphInput("latent", Source.SOURCE_LATENT, latent),
                    GraphInput("label", Source.SOURCE_CLASS_LABEL, (), tensor_pb2.DATA_TYPE_INT64),
                    GraphInput("noise", Source.SOURCE_NORMAL_NOISE, noise),
                ),
                outputs=(GraphOutput("image", Meaning.MEANING_SAMPLE, shape),),
            ),
            Graph(
                role=Role.ROLE_ENCODER,
                module=RecognitionGraph(critic).eval(),
                inputs=(sample,),
                outputs=(
                    GraphOutput("latent_mean", Meaning.MEANING_LATENT_MEAN, latent),
                    GraphOutput("latent_log_variance", Meaning.MEANING_LATENT_LOG_VARIANCE, latent),
                    GraphOutput("code_probability", Meaning.MEANING_CLASS_PROBABILITY, (self.config.codes,)),
                ),
            ),
            Graph(
                role=Role.ROLE_SCORER,
                module=RealProbabilityGraph(critic).eval(),
                inputs=(sample,),
                outputs=(GraphOutput("real_probability", Meaning.MEANING_REAL_PROBABILITY, ()),),
            ),
        )
        return ServingSpec(
            family=model_pb2.Model.FAMILY_INFO_GAN,
            graphs=graphs,
            methods=(
                model_pb2.Model.METHOD_SAMPLE,
                model_pb2.Model.METHOD_ENCODE,
                model_pb2.Model.METHOD_DECODE,
                model_pb2.Model.METHOD_SCORE,
            ),
            sample_shape=shape,
            latent_shape=latent,
            own_classes=tuple(f"code {code}" for code in range(self.config.codes)),
            description=(
                f"InfoGAN: a categorical code of {self.config.codes} values, which is the class here, "
                f"{self.config.continuous} continuous codes, which are the latent, and {self.config.noise} dimensions "
                "of noise. Its codes were found without the classes of the data."
            ),
            reference_uri="https://arxiv.org/abs/1606.03657",
            likelihood=no_likelihood(NO_LIKELIHOOD),
            answers={
                model_pb2.Model.METHOD_SAMPLE: "the sample of a categorical code, for continuous codes and noise drawn",
                model_pb2.Model.METHOD_ENCODE: (
                    "q(codes | sample): mean and log variance of the continuous codes, or a draw; P(categorical code)"
                ),
                model_pb2.Model.METHOD_DECODE: "the sample of given codes, for noise drawn by the seed",
            },
        )

    def _draw(self, batch: Batch, moment: Moment) -> Codes:
        count, generator = len(batch.images) * moment.shard.count, moment.generator
        whole = (
            torch.randint(self.config.codes, (count,), generator=generator),
            torch.randn((count, self.config.continuous), generator=generator),
            torch.randn((count, self.config.noise), generator=generator),
        )
        return Codes(*(moment.shard.rows(part).to(batch.images.device) for part in whole))

    def _generate(self, codes: Codes, moment: Moment) -> Tensor:
        with moment.autocast():
            images: Tensor = self.generator(torch.cat([codes.continuous, codes.noise], dim=1), codes.category)
        return images

    def _information(self, images: Tensor, codes: Codes, moment: Moment) -> tuple[Tensor, Tensor]:
        """The bound on the mutual information of images and their categorical and continuous codes in nats, [] f32."""
        with moment.autocast():
            guess = self.critic.guess(images.float())
        category, continuous = (each.mean() for each in guess.log_probability(codes))
        entropy = self.config.continuous / 2 * math.log(2 * math.pi * math.e)
        return category + math.log(self.config.codes), continuous + entropy
