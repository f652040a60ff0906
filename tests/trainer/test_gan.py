"""The GAN's losses and shifts against their definitions, and the encoder that inverts its generator."""

import contextlib

import pytest
import torch
from latentd.v1 import model_pb2
from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Moment
from latentd_trainer.families.gan import (
    LOSSES,
    Discriminator,
    Gan,
    GanConfig,
    discriminator_loss,
    generator_loss,
    shifted,
)
from latentd_trainer.families.inversion import Inverse, inversion_step
from latentd_trainer.families.sizes import PyramidSettings
from latentd_trainer.optimization import Updater
from latentd_trainer.shard import Shard
from latentd_trainer.spec import Role
from torch.nn import functional

REAL, FAKE = torch.tensor([0.3, -2.0, 40.0]), torch.tensor([-0.5, 1.5, -40.0])


@pytest.mark.parametrize("loss", ["minimax", "nonsaturating"])
def test_the_discriminator_maximises_the_value_of_the_game(loss: str) -> None:
    """Its loss is -(E ln D(real) + E ln(1 - D(fake))), finite where D is 0 or 1 in f32 (Goodfellow et al., eq. 1)."""
    real, fake = torch.sigmoid(REAL.double()), torch.sigmoid(FAKE.double())
    value = real.log().mean() + (1 - fake).log().mean()
    torch.testing.assert_close(discriminator_loss(loss, REAL, FAKE).double(), -value, atol=1e-5, rtol=1e-5)


def test_generator_losses_follow_their_definitions() -> None:
    """Minimax is E ln(1 - D), nonsaturating -E ln D, hinge -E f."""
    probability = torch.sigmoid(FAKE.double())
    torch.testing.assert_close(generator_loss("minimax", FAKE).double(), (1 - probability).log().mean())
    torch.testing.assert_close(generator_loss("nonsaturating", FAKE).double(), -probability.log().mean())
    torch.testing.assert_close(generator_loss("hinge", FAKE), -FAKE.mean())


def test_hinge_discriminator_has_no_gradient_beyond_its_margin() -> None:
    """Logits beyond 1 on the right side cost nothing; on the wrong side they cost their distance to the margin."""
    assert discriminator_loss("hinge", torch.tensor([1.5]), torch.tensor([-1.5])) == 0
    assert discriminator_loss("hinge", torch.tensor([-1.0]), torch.tensor([1.0])) == 4


def test_minimax_saturates_and_nonsaturating_does_not() -> None:
    """Where the discriminator is sure, the minimax gradient vanishes and the nonsaturating one is full (section 3)."""
    gradients = {}
    for loss in ("minimax", "nonsaturating"):
        logits = torch.tensor([-10.0], requires_grad=True)
        (gradients[loss],) = torch.autograd.grad(generator_loss(loss, logits), logits)
    assert abs(gradients["minimax"].item()) < 1e-4
    assert abs(gradients["nonsaturating"].item()) > 0.999
    assert gradients["minimax"].sign() == gradients["nonsaturating"].sign()


def test_nonsaturating_loss_is_the_variational_em_step() -> None:
    """-E ln q(y = real | x) over generated images, as in the reading of GANs as variational EM, is the same loss."""
    targets = torch.ones_like(FAKE)
    torch.testing.assert_close(
        generator_loss("nonsaturating", FAKE), functional.binary_cross_entropy_with_logits(FAKE, targets)
    )


def test_shifts_move_whole_pixels_and_fill_with_the_darkest_level() -> None:
    """Each image moves by its own shift, down and right; what comes in from outside is -1."""
    image = torch.arange(9.0).reshape(1, 1, 3, 3).repeat(3, 2, 1, 1)
    moved = shifted(image, torch.tensor([[0, 0], [1, 0], [-1, -1]]), 1)
    assert torch.equal(moved[0], image[0])
    assert moved[1, 1].tolist() == [[-1, -1, -1], [0, 1, 2], [3, 4, 5]]
    assert moved[2, 0].tolist() == [[4, 5, -1], [7, 8, -1], [-1, -1, -1]]


def test_gradients_pass_through_shifts() -> None:
    """A pixel that stays in view has gradient 1, one that is moved out has none."""
    image = torch.zeros(1, 1, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(shifted(image, torch.tensor([[1, 0]]), 1).sum(), image)
    assert gradient[0, 0].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]


def test_projection_adds_the_label_s_embedding_times_the_features() -> None:
    """The logits of two labels differ by the difference of their embeddings, projected on the features."""
    torch.manual_seed(0)
    network = Discriminator(PyramidSettings(width=8, blocks=0).pyramid((1, 8, 8)), hidden=16, classes=2)
    images = torch.randn(5, 1, 8, 8)
    first, second = (network(images, torch.full((5,), label)) for label in (0, 1))
    direction = network.embed_label.weight[0] - network.embed_label.weight[1]
    torch.testing.assert_close(first - second, network.trunk(images) @ direction)


def test_settings_out_of_range_are_refused_together() -> None:
    """Every setting that is not allowed is named in one error."""
    with pytest.raises(ValueError, match=r"penalty_interval=0.*; loss='wasserstein': must be one of .*; width=0"):
        GanConfig(loss="wasserstein", penalty_interval=0, width=0)


def test_the_served_generator_is_the_average() -> None:
    """Samples come from the moving average, not from the weights under training."""
    torch.manual_seed(0)
    gan = Gan(GanConfig(width=8, hidden=16), DataInfo("tiny", (1, 8, 8), 17, ("a", "b"), (0.5, 0.5), ""))
    labels = torch.tensor([0, 1, 1])
    before = gan.sample(labels, seed=3)
    with torch.no_grad():
        for parameter in gan.generator.parameters():
            parameter.add_(1)
    assert torch.equal(gan.sample(labels, seed=3), before)
    assert not torch.equal(gan.sample(labels, seed=4), before)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_card_says_where_scores_are_no_probabilities(loss: str) -> None:
    """A hinge discriminator's logits are margins; its card says so, and the others' do not."""
    info = DataInfo("tiny", (1, 8, 8), 17, ("a", "b"), (0.5, 0.5), "0" * 64)
    description = Gan(GanConfig(loss=loss, width=8), info).serving_spec().description
    assert ("they are no probabilities" in description) == (loss == "hinge")


def test_the_encoder_learns_in_the_last_steps_and_leaves_the_game_alone() -> None:
    """Of ten steps it takes the last three, first on samples, then on data too; the two players never notice."""
    info = DataInfo("tiny", (1, 8, 8), 17, ("a", "b"), (0.5, 0.5), "0" * 64)
    players = {}
    for share in (0.3, 0.0):
        torch.manual_seed(0)
        gan = Gan(GanConfig(width=8, hidden=16, latent=4, inversion=share), info)
        losses = []
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            batch = Batch(torch.rand((4, 1, 8, 8), generator=generator), torch.tensor([0, 1, 0, 1]))
            losses.append(gan.step(batch, Moment(step, 10, generator, Shard(), contextlib.nullcontext)))
        players[share] = [*gan.generator.parameters(), *gan.discriminator.parameters()]
        turns = ["inversion" in each for each in losses], ["reconstruction" in each for each in losses]
        learnt = ([False] * 7 + [True] * 3, [False] * 8 + [True] * 2) if share else ([False] * 10, [False] * 10)
        assert turns == learnt
    assert all(torch.equal(one, other) for one, other in zip(*players.values(), strict=True))


def test_the_encoder_finds_the_latents_of_samples_and_the_generator_gives_images_back() -> None:
    """Against a generator that is linear in z, two hundred steps find z, and data that it can draw come back."""
    torch.manual_seed(0)
    pyramid = PyramidSettings(width=8, blocks=0).pyramid((1, 8, 8))
    inverse, generator = Inverse(pyramid, 16, 2, 4, 2), LinearGenerator()
    updater = Updater(inverse, torch.optim.Adam(inverse.parameters(), 1e-2))
    labels = torch.arange(32) % 2
    for step in range(200):
        draws = torch.Generator().manual_seed(step)
        latent, hidden = torch.randn((2, 32, 2), generator=draws)
        batch = Batch(generator(hidden, labels), labels)
        moment = Moment(step, 200, draws, Shard(), contextlib.nullcontext)
        losses = inversion_step(updater, inverse, generator, latent, batch, moment, 1.0)
    assert losses["inversion"] < 0.02  # guessing the prior's mean costs 1
    assert losses["reconstruction"] < 0.002  # of pixels with a variance of .125


class LinearGenerator(torch.nn.Module):
    """The first latent lights the upper half, the second the lower; the label swaps them."""

    def forward(self, latent: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        halves = torch.where((label == 1)[:, None], latent.flip(1), latent)
        return 0.25 * halves[:, None, :, None].repeat_interleave(4, 2).expand(-1, 1, 8, 8)


def test_without_an_encoder_there_is_no_encode() -> None:
    """With `inversion=0` nothing is trained or served for it, and the card does not speak of it."""
    info = DataInfo("tiny", (1, 8, 8), 17, ("a", "b"), (0.5, 0.5), "0" * 64)
    for share in (0.0, 0.25):
        spec = Gan(GanConfig(width=8, inversion=share), info).serving_spec()
        assert (model_pb2.Model.METHOD_ENCODE in spec.methods) == (share > 0)
        assert (Role.ROLE_ENCODER in {graph.role for graph in spec.graphs}) == (share > 0)
        assert ("learned inverter" in spec.description) == (share > 0)
        assert ("learned inverter" in spec.answers[model_pb2.Model.METHOD_ENCODE]) == (share > 0)
        assert spec.likelihood is not None
        assert "no explicit inference model" in spec.likelihood.explanation
