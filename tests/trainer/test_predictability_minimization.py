"""Predictability minimization: the game's two sides, the code it leads to, and what is served of it."""

import contextlib

import pytest
import torch
from latentd_trainer import metrics
from latentd_trainer.checkpoint import build_family
from latentd_trainer.data import DataInfo, Dataset, load, scale
from latentd_trainer.families import Batch, Moment
from latentd_trainer.families.predictability_minimization import (
    Autoencoder,
    DecoderGraph,
    PredictabilityMinimization,
    Predictors,
)
from latentd_trainer.ladder import train
from latentd_trainer.shard import Shard

INFO = DataInfo("tiny", (1, 2, 3), 2, ("a",), (1.0,), "0" * 64)


def tiny(**settings: float) -> PredictabilityMinimization:
    family = build_family("predictability_minimization", {"units": 4, "hidden": 16, **settings}, INFO, 0)
    assert isinstance(family, PredictabilityMinimization)
    return family


def one_step(family: PredictabilityMinimization, step: int, images: torch.Tensor) -> dict[str, torch.Tensor]:
    moment = Moment(step, 100, torch.Generator().manual_seed(step), Shard(), contextlib.nullcontext)
    return family.step(Batch(images, torch.zeros(len(images), dtype=torch.int64)), moment)


def test_a_unit_does_not_see_itself() -> None:
    """The guess at a unit depends on every other unit and not on its own value."""
    torch.manual_seed(0)
    predictors, code = Predictors(5, 8), torch.rand(1, 5)
    guessed = torch.autograd.functional.jacobian(predictors, code)[0, :, 0]
    assert torch.equal(guessed.diagonal(), torch.zeros(5))
    assert (guessed[~torch.eye(5, dtype=torch.bool)] != 0).all()


def test_predictors_learn_what_one_unit_tells_of_another() -> None:
    """Of a code whose second unit repeats the first, both are guessed; its third, a fair coin, stays a coin."""
    torch.manual_seed(0)
    predictors = Predictors(3, 8)
    optimizer = torch.optim.Adam(predictors.parameters(), 0.05)
    coins = (torch.rand((256, 2), generator=torch.Generator().manual_seed(1)) < 0.5).float()
    code = coins[:, [0, 0, 1]]
    for _ in range(150):
        error = (predictors(code) - code).square().mean(dim=0)
        optimizer.zero_grad()
        error.sum().backward()
        optimizer.step()
    assert error[:2].max() < 0.01
    assert error[2] > 0.23


def test_the_encoder_plays_against_the_predictors() -> None:
    """On the same weights its gradient with the game is the autoencoder's less the predictors' error's."""
    images = torch.rand((8, 1, 2, 3), generator=torch.Generator().manual_seed(2)) * 2 - 1
    gradients = {}
    for weight in (0.0, 1.0):
        family = tiny(weight=weight, warm_up=0, learning_rate=0.0)
        one_step(family, 5, images)
        gradients[weight] = family.autoencoder.encoder[1].weight.grad
    family = tiny()
    code = family.autoencoder.encode(images)
    error = (family.predictors(code) - code).square().mean()
    (expected,) = torch.autograd.grad(error, family.autoencoder.encoder[1].weight)
    torch.testing.assert_close(gradients[0.0] - gradients[1.0], expected)


def test_the_game_begins_gently() -> None:
    """Over the warm-up its weight grows from nothing to all of it."""
    family = tiny(weight=2.0, warm_up=0.5)
    weights = [
        family._weight(Moment(step, 100, torch.Generator(), Shard(), contextlib.nullcontext))
        for step in (0, 25, 50, 99)
    ]
    assert weights == [0.0, 1.0, 2.0, 2.0]


def test_the_prior_counts_how_often_units_are_on() -> None:
    """A unit that is always on, and one that never is, are so in samples too."""
    family = tiny(learning_rate=0.0)
    with torch.no_grad():
        family.autoencoder.encoder[3].bias.copy_(torch.tensor([50.0, -50.0, 0.0, 0.0]))
    images = torch.rand((8, 1, 2, 3), generator=torch.Generator().manual_seed(3)) * 2 - 1
    for step in range(30):
        one_step(family, step, images)
    chance = family.autoencoder.chance
    assert chance[0] > 0.95
    assert chance[1] < 0.05


def test_codes_are_rounded_by_the_prior_where_the_code_is_binary() -> None:
    """Ends stand for themselves, uniform codes are on as often as the prior says; a plain autoencoder keeps all."""
    torch.manual_seed(0)
    autoencoder = Autoencoder((1, 2, 3), 8, 3)
    autoencoder.chance.copy_(torch.tensor([0.0, 0.3, 1.0]))
    graph = DecoderGraph(autoencoder, binary=True)
    for bits in (torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([[1.0, 0.0, 1.0]])):
        torch.testing.assert_close(graph(bits), autoencoder.decode(bits))
    torch.testing.assert_close(graph(torch.tensor([[0.9, 0.71, 0.1]])), autoencoder.decode(torch.tensor([[0.0, 1, 1]])))
    soft = torch.tensor([[0.2, 0.5, 0.9]])
    torch.testing.assert_close(DecoderGraph(autoencoder, binary=False)(soft), autoencoder.decode(soft))


def test_settings_that_are_not_allowed_are_named() -> None:
    """A code of one unit has no pair to be independent."""
    with pytest.raises(ValueError, match=r"weight=-1: must be at least 0; units=1: must be at least 2"):
        build_family("predictability_minimization", {"units": 1, "weight": -1}, INFO, 0)


def measured(dataset: Dataset, **settings: float) -> dict[str, float]:
    """What held-out codes are like after training with the recipe."""
    family = train("predictability_minimization", settings, dataset, seed=0)
    assert isinstance(family, PredictabilityMinimization)
    images = torch.from_numpy(scale(dataset.test.pixels, dataset.info.levels))
    with torch.no_grad():
        code = family.autoencoder.encode(images)
        error = (family.autoencoder.decode(code) - images).square().mean().item()
    return {
        "information": metrics.pairwise_mutual_information(code.numpy() > 0.5),
        "binary": metrics.near_binary_share(code.numpy()),
        "error": error,
    }


@pytest.mark.soak
def test_the_code_is_factorial_and_binary_where_the_autoencoder_s_is_not() -> None:
    """Pairs of units share at most a third of the information, and nearly all units are near an end."""
    digits = load("digits")
    game, plain = measured(digits), measured(digits, weight=0.0)
    assert 3 * game["information"] <= plain["information"]
    assert game["binary"] >= 0.8 > plain["binary"]
    assert plain["error"] < game["error"] <= 0.15
