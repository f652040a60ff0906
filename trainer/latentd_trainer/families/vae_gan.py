"""VAE-GAN: the decoder of a trained VAE, tuned against a discriminator.

Larsen et al.: Autoencoding beyond pixels using a learned similarity metric, arXiv 1512.09300.

    start        encoder q(z | x) and decoder p(x | z, y) of a trained VAE; the encoder stays as it is
    fake         E p(x | z, y), z ~ N(0, I): the means that the VAE would be sampled by
    game         the discriminator of `gan` sees real images and these, the decoder pays what a generator pays
    loss         L = L_game + w E_q -ln p(x | z, y), over the decoder's weights
    first steps  the discriminator learns alone, lest the decoder follow one that knows nothing

What differs from the paper: it trains all three networks from scratch and together, measures how well an image is
rebuilt in the discriminator's features in place of its pixels, and shows the discriminator rebuilt images too. Here the
pixels' likelihood stays in the loss and the encoder stays the VAE's, so that the model keeps its bound on ln p(x | y)
and can be held against the VAE that it started from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from latentd.v1 import model_pb2
from torch import Tensor, nn

from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Family, Moment, below, outside, setting
from latentd_trainer.families.gan import (
    Discriminator,
    Game,
    GameSettings,
    game_optimizer,
    realness_answers,
    realness_graph,
)
from latentd_trainer.families.noise import normal
from latentd_trainer.families.sizes import PyramidSettings
from latentd_trainer.families.vae import (
    Decoder,
    Encoder,
    VariationalFamily,
    discretized_logistic_log_likelihood,
    discretized_logistic_mean,
    reparameterise,
)
from latentd_trainer.optimization import Average, Updater
from latentd_trainer.spec import Role, ServingSpec

SCORES = ("bound", "realness")


@dataclass(frozen=True)
class VaeGanConfig(GameSettings, PyramidSettings):
    """Settings of the tuning; the defaults are the recipe for digits. The VAE's sizes come from its run."""

    steps: int = setting(700, "training steps")
    batch_size: int = setting(64, "images a step, over all processes")
    learning_rate: float = setting(2e-4, "rate of both Adams")
    discriminator_steps: int = setting(100, "steps at the start in which the discriminator learns alone")
    likelihood_weight: float = setting(0.02, "weight of the pixels' negative log likelihood, in nats an image")
    width: int = setting(48, "channels of all networks at full size; the VAE's")
    blocks: int = setting(0, "residual blocks at each level, beside the convolution that leads to it; the VAE's")
    hidden: int = setting(128, "width of the encoder's and the discriminator's linear layer; the VAE's")
    latent: int = setting(8, "dimensions of z; the VAE's")
    average_decay: float = setting(0.998, "decay of the decoder's moving average, which is what is served")
    score: str = setting("bound", "what Score answers: bound, on ln p(x | y), or realness, the discriminator's P(real)")

    def __post_init__(self) -> None:
        problems = below(
            self,
            steps=1,
            batch_size=1,
            learning_rate=0,
            discriminator_steps=0,
            likelihood_weight=0,
            hidden=1,
            latent=1,
        )
        problems += outside(self, average_decay=(0, 1))
        if self.score not in SCORES:
            problems.append(f"score={self.score!r}: must be one of {', '.join(SCORES)}")
        problems += self.game_problems() + self.pyramid_problems()
        if problems:
            raise ValueError("; ".join(problems))


class VaeGan(VariationalFamily):
    """The VAE's encoder, its decoder with an average, the discriminator, and an Adam for each of the last two."""

    config_type = VaeGanConfig
    starts_from = "vae"
    inherited = ("width", "multipliers", "blocks", "attention_levels", "attention_heads", "hidden", "latent")
    config: VaeGanConfig

    def __init__(self, config: VaeGanConfig, info: DataInfo) -> None:
        super().__init__(config, info)
        pyramid, classes = config.pyramid(info.shape), len(info.class_names)
        self.trained_decoder = Decoder(pyramid, config.hidden, config.latent, classes)
        discriminator = Discriminator(pyramid, config.hidden, classes)
        self.frozen = {"encoder": Encoder(pyramid, config.hidden, config.latent).eval().requires_grad_(False)}
        self.modules = {"decoder": self.trained_decoder, "discriminator": discriminator}
        self.averages = {"decoder": Average(self.trained_decoder, config.average_decay)}
        self.updaters = {
            name: Updater(module, game_optimizer(module, config.learning_rate)) for name, module in self.modules.items()
        }
        self.game = Game(config, discriminator, self.updaters["discriminator"])

    @property
    def encoder(self) -> nn.Module:
        """See `VariationalFamily`; the VAE's."""
        return self.frozen["encoder"]

    @property
    def decoder(self) -> nn.Module:
        """See `VariationalFamily`; the average."""
        return self.averages["decoder"].module

    def start_from(self, trained: Family) -> None:
        """See `Family.start_from`: take over the encoder and the decoder that the VAE serves."""
        assert isinstance(trained, VariationalFamily)
        self.encoder.load_state_dict(trained.encoder.state_dict())
        for decoder in (self.trained_decoder, self.decoder):
            decoder.load_state_dict(trained.decoder.state_dict())

    def step(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """One step of the discriminator, then, after its first ones alone, one of the decoder.

        Losses: those of `Game.discriminator_step`, `generator`, and in nats an image `reconstruction`.
        """
        with torch.no_grad():
            fake = self._prior_means(batch, moment)
        losses = self.game.discriminator_step(batch.images, fake, batch.labels, moment)
        if moment.step < self.config.discriminator_steps:
            return losses
        generator = self.game.generator_loss(self._prior_means(batch, moment), batch.labels, moment)
        reconstruction = self._reconstruction(batch, moment)
        loss = generator + self.config.likelihood_weight * reconstruction
        self.updaters["decoder"].apply(loss, moment.shard)
        self.averages["decoder"].update(moment.step - self.config.discriminator_steps)
        return losses | {"generator": generator.detach(), "reconstruction": reconstruction.detach()}

    def serving_spec(self) -> ServingSpec:
        """A VAE's graphs, so that Score is the bound; or with `score=realness` the discriminator for the scorer."""
        spec = super().serving_spec()
        graphs, answers = list(spec.graphs), dict(spec.answers)
        if self.config.score == "realness":
            graphs = [each for each in graphs if each.role != Role.ROLE_SCORER]
            graphs.append(realness_graph(self.game.discriminator, self.info.shape))
            answers |= realness_answers(self.config.loss)
        return dataclasses.replace(
            spec,
            family=model_pb2.Model.FAMILY_VAE_GAN,
            graphs=graphs,
            answers=answers,
            description=(
                f"VAE-GAN: the decoder of a class-conditional variational autoencoder of {self.config.latent} latent "
                "dimensions, tuned against a projection discriminator with the likelihood of pixels kept in the loss; "
                "the encoder is the autoencoder's."
            ),
            reference_uri="https://arxiv.org/abs/1512.09300",
        )

    def _prior_means(self, batch: Batch, moment: Moment) -> Tensor:
        """E p(x | z, y) for z from the prior and the batch's labels, [n, C, H, W] f32."""
        with moment.autocast():
            location, log_scale = self.trained_decoder(normal(batch, moment, self.config.latent), batch.labels)
        return discretized_logistic_mean(location.float(), log_scale.float(), self.info.levels)

    def _reconstruction(self, batch: Batch, moment: Moment) -> Tensor:
        """One draw's estimate of E_q -ln p(x | z, y) in nats an image, [] f32."""
        with moment.autocast():
            with torch.no_grad():
                mean, log_variance = (part.float() for part in self.encoder(batch.images))
            latent = reparameterise(mean, log_variance, normal(batch, moment, self.config.latent))
            location, log_scale = (part.float() for part in self.trained_decoder(latent, batch.labels))
        return -discretized_logistic_log_likelihood(batch.images, location, log_scale, self.info.levels).mean()
