"""The historical ladder: closed forms that are exact, EM that never loses, and every rung above the one before."""

import itertools

import numpy as np
import pytest
from latentd_trainer import ladder
from latentd_trainer.data import Dataset, load
from latentd_trainer.mixture import BernoulliMixture, expectation_maximisation, fit_classes, fit_weighted

QUICK = {
    "helmholtz": {"steps": 20, "batch_size": 16, "lower": 6, "upper": 3, "draws": 2},
    "vae": {"steps": 3, "batch_size": 8, "width": 8, "hidden": 8, "latent": 2},
}


@pytest.fixture(scope="module", name="digits")
def digits_of_sklearn() -> Dataset:
    return load("digits")


def images_of(dataset: Dataset) -> np.ndarray:
    return ladder.binarised(dataset).train.pixels.reshape(len(dataset.train.labels), -1).astype(np.float64)


def test_a_mixture_is_a_distribution() -> None:
    """Its probabilities over all images of six pixels sum to 1, and are the weighted sums of the components'."""
    generator = np.random.default_rng(0)
    mixture = BernoulliMixture(np.array([0.2, 0.8]), generator.uniform(0.1, 0.9, (2, 6)))
    every = np.array(list(itertools.product((0.0, 1.0), repeat=6)))
    assert np.exp(mixture.log_likelihood(every)).sum() == pytest.approx(1)
    p = mixture.probabilities
    by_hand = (mixture.weights * (p ** every[:, None] * (1 - p) ** (1 - every[:, None])).prod(axis=2)).sum(axis=1)
    np.testing.assert_allclose(np.exp(mixture.log_likelihood(every)), by_hand)


def test_naive_bayes_counts() -> None:
    """Classes and their pixels have the shares of images that have them, half an image of every kind added."""
    images, labels = np.array([[1.0, 0], [1, 1], [0, 0]]), np.array([0, 0, 1])
    model = fit_classes(images, labels, 2)
    np.testing.assert_allclose(model.weights, [2.5 / 4, 1.5 / 4])
    np.testing.assert_allclose(model.probabilities, [[2.5 / 3, 1.5 / 3], [0.5 / 2, 0.5 / 2]])


@pytest.mark.parametrize("components", [2, 10, 30])
def test_em_never_loses(digits: Dataset, components: int) -> None:
    """What EM maximises rises in each of 60 steps, by 30 nats an image in all, and so does the likelihood alone."""
    images = images_of(digits)
    steps = list(expectation_maximisation(images, components, 60, seed=0))
    likelihoods = np.array([mixture.log_likelihood(images).sum() for mixture in steps])
    objective = likelihoods + [mixture.log_prior() for mixture in steps]
    assert (np.diff(objective) >= -1e-9 * np.abs(objective[1:])).all()
    assert (np.diff(likelihoods) > -1e-3).all()
    assert likelihoods[-1] > likelihoods[0] + len(images)


def test_em_finds_the_components_of_what_a_mixture_drew() -> None:
    """From 2000 images of two well-parted components, their pixels and weights."""
    generator = np.random.default_rng(1)
    truth = np.array([[0.9, 0.9, 0.1, 0.1, 0.9], [0.1, 0.2, 0.9, 0.8, 0.1]])
    which = (generator.random(2000) < 0.7).astype(int)
    images = (generator.random((2000, 5)) < truth[which]).astype(np.float64)
    *_, found = expectation_maximisation(images, 2, 60, seed=0)
    order = np.argsort(found.weights)
    np.testing.assert_allclose(found.weights[order], [0.3, 0.7], atol=0.04)
    np.testing.assert_allclose(found.probabilities[order], truth, atol=0.06)


def test_shares_may_be_split() -> None:
    """Half of every image in each component gives two equal components."""
    images = np.random.default_rng(0).integers(0, 2, (6, 3)).astype(np.float64)
    mixture = fit_weighted(images, np.full((6, 2), 0.5))
    np.testing.assert_allclose(mixture.probabilities[0], mixture.probabilities[1])


def test_binarised_images_are_of_two_levels_and_no_class(digits: Dataset) -> None:
    """Pixels from the middle level on are 1, in both splits, and the classes are forgotten."""
    plain = ladder.binarised(digits)
    assert np.array_equal(plain.train.pixels, digits.train.pixels >= 8)
    assert np.array_equal(plain.test.pixels, digits.test.pixels >= 8)
    assert (plain.info.levels, plain.info.class_names) == (2, ("unlabelled",))
    assert not plain.train.labels.any()


def test_the_closed_forms_stand_in_their_order(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent pixels < naive Bayes < a mixture that EM fitted, on held-out digits; the bounds come after them."""
    monkeypatch.setattr(ladder, "BOUND_DRAWS", 3)
    rungs = ladder.climb(digits, settings=QUICK)
    values = [rung.log_likelihood for rung in rungs]
    assert values[0] + 4 < values[1] < values[2] < -19
    assert [rung.exact for rung in rungs] == [True] * 3 + [False] * 3
    assert np.isfinite(values).all()
    assert ladder.markdown(rungs).count("\n") == 1 + len(rungs)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1])
def test_every_rung_is_above_the_one_before(digits: Dataset, seed: int) -> None:
    """Each model in history's order gives held-out binary digits more probability; wake-sleep reaches its bars."""
    rungs = ladder.climb(digits, seed)
    values = [rung.log_likelihood for rung in rungs]
    assert values == sorted(values), ladder.markdown(rungs)
    assert len(set(values)) == 6
    assert values[3] >= -19.0
    assert values[4] >= -18.0
