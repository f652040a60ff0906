"""The ring of eight: what counts as found, seeds that run side by side, and models that learn."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from latentd_trainer.study import kept, ring_of_eight
from latentd_trainer.study.ensemble import Ensemble, generators, normal
from latentd_trainer.study.point_models import PointDiffusion, PointGan, PointModel, PointVae, Recipe
from latentd_trainer.study.ring_of_eight import CENTRES, KINDS, MODES, Found, data
from latentd_trainer.study.section import Settings
from torch import nn

TINY = Recipe(steps=10, batch_size=16, width=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_ring_itself_is_found() -> None:
    """Of its own points all modes, 98.9 % within three deviations (1 - exp(-9/2)) and none between."""
    points = data(20_000, generators([0]))[0].numpy()
    found = Found.of(points)
    assert (found.modes, found.between) == (MODES, 0)
    assert found.near == pytest.approx(1 - np.exp(-4.5), abs=0.003)
    assert points.mean(axis=0) == pytest.approx([0, 0], abs=0.05)


def test_points_between_modes_are_not_near_them() -> None:
    """Half of the points on three modes, a quarter midway between two, a quarter NaN: 3 found, half near them."""
    centres = CENTRES.numpy()
    on = np.repeat(centres[:3], 100, axis=0)
    midway = np.repeat(centres[:2].mean(axis=0, keepdims=True), 150, axis=0)
    found = Found.of(np.concatenate([on, midway, np.full((150, 2), np.nan, np.float32)]))
    assert (found.modes, found.near, found.between) == (3, 0.5, 0.5)


def test_a_mode_needs_a_tenth_of_its_share() -> None:
    """Of 800 points 10 near a mode are enough and 9 are not."""
    centres = CENTRES.numpy()
    for count, modes in ((10, 2), (9, 1)):
        points = np.concatenate([np.repeat(centres[:1], 800 - count, axis=0), np.repeat(centres[1:2], count, axis=0)])
        assert Found.of(points).modes == modes


def test_an_ensemble_is_its_members() -> None:
    """Each member equals a perceptron with its weights, and changes nothing in the others."""
    ensemble = Ensemble([2, 5, 3], generators([0, 1]))
    rows = normal((7, 2), generators([2, 3]))
    together = ensemble(rows)
    for member in range(2):
        (first, last), (bias, last_bias) = ensemble.weights, ensemble.biases
        hidden = nn.functional.silu(rows[member] @ first[member] + bias[member])
        torch.testing.assert_close(together[member], hidden @ last[member] + last_bias[member])


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_does_not_depend_on_its_neighbours(kind: str) -> None:
    """Trained and drawn beside seed 7, seed 3 gives the points that it gives alone."""

    def drawn(seeds: list[int]) -> dict[str, torch.Tensor]:
        model = KINDS[kind].build(
            dataclasses.replace(KINDS[kind].recipe, steps=10, batch_size=16, width=8), generators(seeds)
        )
        model.fit(data, generators([seed + 100 for seed in seeds]))
        return dict(model.sample(6, generators([seed + 200 for seed in seeds])))

    alone, beside = drawn([3]), drawn([3, 7])
    for way, points in alone.items():
        torch.testing.assert_close(points[0], beside[way][0], rtol=1e-4, atol=1e-5)
        assert not torch.equal(beside[way][0], beside[way][1])


def near(model: PointModel, way: str) -> float:
    return Found.of(model.sample(1000, generators([2]))[way][0].numpy()).near


@pytest.mark.parametrize(
    ("build", "way", "least"),
    [
        (PointVae, "mean", 0.2),
        (lambda recipe, g: PointGan(recipe, g, "nonsaturating", 0.05), "", 0.2),
        (PointDiffusion, "", 0.25),
    ],
    ids=["vae", "gan", "diffusion"],
)
def test_models_learn_the_ring(build, way: str, least: float) -> None:
    """In 500 steps the share of points near a mode rises above what an even ring would have, or noise (under .12)."""
    model = build(Recipe(steps=500, width=48, learning_rate=1e-2), generators([0]))
    assert near(model, way) < 0.12
    model.fit(data, generators([1]))
    assert near(model, way) > least


def test_the_penalty_is_the_gradient_s_square() -> None:
    """Sum of |grad f|^2 over points, against central differences of the discriminator."""
    model = PointGan(TINY, generators([0]), "nonsaturating", 1.0).double()
    points = normal((5, 2), generators([1])).double()
    step = 1e-5
    expected = 0.0
    for axis in range(2):
        moved = torch.zeros(2, dtype=torch.float64)
        moved[axis] = step
        with torch.no_grad():
            slope = (model.discriminator(points + moved) - model.discriminator(points - moved)) / (2 * step)
        expected += float(slope.square().sum())
    assert model._squared_gradient(points).item() == pytest.approx(expected, rel=1e-6)


def test_what_was_trained_is_not_trained_again(tmp_path: Path) -> None:
    """The same recipe fills the module from its file, another is trained; a damaged file is trained anew."""
    trained: list[int] = []

    def load(recipe: int) -> float:
        module = nn.Linear(1, 1)

        def train() -> None:
            trained.append(recipe)
            nn.init.constant_(module.weight, recipe)

        kept.load_or_train(tmp_path, "line", {"recipe": recipe}, module, train)
        return module.weight.item()

    assert [load(1), load(1), load(2)] == [1, 1, 2]
    assert trained == [1, 2]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:10])
    assert load(1) == 1
    assert trained == [1, 2, 1]


def test_the_claim_is_studied_alike_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seeds of every kind and the ring; figures from weights that were kept equal those just trained."""
    monkeypatch.setattr(ring_of_eight, "SAMPLES", 200)
    settings = Settings(seed=0, quick=True, trained=tmp_path)
    first = ring_of_eight.study(settings)
    assert first.figures["real/modes"] == MODES
    assert {name.partition("/")[0] for name in first.figures} == {
        "real", "vae-mean", "vae-draw", "gan-minimax", "gan-nonsaturating", "gan-r1", "diffusion",
    }  # fmt: skip
    monkeypatch.setattr(PointVae, "fit", lambda *_: pytest.fail("was trained again"))
    again = ring_of_eight.study(settings)
    assert again.figures == first.figures
    assert again.pictures[0].png == first.pictures[0].png
