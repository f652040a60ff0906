"""Gaussian naive Bayes against scikit-learn's, the floor that is chosen, and what is served."""

import contextlib
import math

import numpy as np
import pytest
import torch
from latentd_trainer.checkpoint import build_family
from latentd_trainer.data import DataInfo, Dataset, load, scale
from latentd_trainer.families import Batch, Moment
from latentd_trainer.families.naive_bayes import (
    FLOORS,
    ClassNormals,
    LikelihoodGraph,
    NaiveBayes,
    PosteriorGraph,
    SampleGraph,
    choose_floor,
)
from latentd_trainer.shard import Shard
from sklearn.naive_bayes import GaussianNB
from torch import Tensor


@pytest.fixture(scope="module", name="digits")
def digits_of_sklearn() -> Dataset:
    return load("digits")


def flat(dataset: Dataset) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, held-out images and labels; images [n, pixels] f64."""
    found: list[Tensor] = []
    for split in (dataset.train, dataset.test):
        images = torch.from_numpy(scale(split.pixels, dataset.info.levels)).flatten(1).double()
        found += [images, torch.from_numpy(split.labels)]
    return found[0], found[1], found[2], found[3]


def moment(seed: int = 0, shard: Shard | None = None) -> Moment:
    return Moment(0, 1, torch.Generator().manual_seed(seed), shard or Shard(), contextlib.nullcontext)


def fitted(dataset: Dataset, seed: int = 0, **settings: float) -> NaiveBayes:
    """The family, fitted to the training split."""
    family = build_family("naive_bayes", settings, dataset.info, seed)
    images = torch.from_numpy(scale(dataset.train.pixels, dataset.info.levels))
    family.step(Batch(images, torch.from_numpy(dataset.train.labels)), moment(seed))
    assert isinstance(family, NaiveBayes)
    return family


@pytest.mark.parametrize("floor", [0.01, 0.0625, 1.0])
def test_the_fit_is_that_of_scikit_learn(digits: Dataset, floor: float) -> None:
    """Means, variances, priors, joint densities and posteriors are GaussianNB's with the same floor, to 1e-10."""
    x, y, held_out, _ = flat(digits)
    model = ClassNormals(10, 64)
    model.fit(x, y, floor)
    oracle = GaussianNB(var_smoothing=floor / x.numpy().var(axis=0).max()).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(model.mean, oracle.theta_, atol=1e-10)
    np.testing.assert_allclose(model.variance, oracle.var_, atol=1e-10)
    np.testing.assert_allclose(model.log_prior.exp(), oracle.class_prior_, atol=1e-10)
    joint = model.log_joint(held_out)
    np.testing.assert_allclose(joint, oracle.predict_joint_log_proba(held_out.numpy()), rtol=1e-10)
    np.testing.assert_allclose(joint.softmax(dim=1), oracle.predict_proba(held_out.numpy()), atol=1e-10)


def test_digits_are_classified_as_well_as_they_can_be(digits: Dataset) -> None:
    """Nine in ten held-out digits or more, with a floor that was found inside the grid, the same for every seed."""
    family = fitted(digits)
    _, _, held_out, labels = flat(digits)
    right = family.model.log_joint(held_out).argmax(dim=1) == labels
    assert right.double().mean() >= 0.90
    floor = float(family.model.variance.min())
    assert any(math.isclose(floor, each, rel_tol=1e-6) for each in FLOORS[1:-1])
    assert torch.equal(fitted(digits, seed=5).model.variance, family.model.variance)


def test_leaving_one_out_is_fitting_to_the_others(digits: Dataset) -> None:
    """The floor is the one that as many fits as there are images, each without one, would have chosen."""
    x, y, *_ = (part[:60] for part in flat(digits))
    model, right = ClassNormals(10, 64), dict.fromkeys(FLOORS, 0)
    for floor in FLOORS:
        for left_out in range(60):
            rest = torch.arange(60) != left_out
            model.fit(x[rest], y[rest], floor)
            right[floor] += int(model.log_joint(x[left_out : left_out + 1]).argmax() == y[left_out])
    best = max(right.values())
    enough = best - math.sqrt(best * (60 - best) / 60)
    assert choose_floor(x, y, 10) == max(floor for floor in FLOORS if right[floor] >= enough)


def test_a_floor_that_is_given_is_taken(digits: Dataset) -> None:
    """Pixels that never vary in a class have just the floor as variance."""
    assert float(fitted(digits, variance_floor=0.25).model.variance.min()) == 0.25


def test_among_equal_floors_the_largest_is_chosen() -> None:
    """Classes far apart are told apart with any floor, so that the data ask for no small one."""
    labels = torch.arange(40) % 2
    noise = 0.01 * torch.randn((40, 8), generator=torch.Generator().manual_seed(0)).double()
    assert choose_floor(2.0 * labels[:, None] - 1 + noise, labels, 2) == FLOORS[-1]


def test_the_served_scores_sum_to_the_exact_likelihood(digits: Dataset) -> None:
    """The sum over classes of p(y) p(x | y), from the served graph, is p(x) in float64 to float32's precision."""
    family = fitted(digits)
    _, _, held_out, _ = flat(digits)
    images = held_out.float().view(-1, 1, 8, 8)
    graph = LikelihoodGraph(family.model)
    each = torch.stack([graph(images, torch.full((len(images),), k)) for k in range(10)], dim=1).double()
    served = (each + torch.tensor(digits.info.class_probabilities).log()).logsumexp(dim=1)
    torch.testing.assert_close(served, family.model.log_joint(held_out).logsumexp(dim=1), rtol=1e-6, atol=1e-4)
    normal = torch.distributions.Normal(family.model.mean[3], family.model.variance[3].sqrt())
    torch.testing.assert_close(each[:, 3], normal.log_prob(held_out).sum(dim=1), rtol=1e-6, atol=1e-4)


def test_the_served_posterior_sums_to_one_far_from_the_data(digits: Dataset) -> None:
    """Where joint densities differ by thousands of nats the posterior is still one, and no NaN."""
    posterior = PosteriorGraph(fitted(digits).model)(torch.full((2, 1, 8, 8), 1.0))
    assert posterior.dtype == torch.float32
    torch.testing.assert_close(posterior.sum(dim=1), torch.ones(2))


def test_a_latent_of_zeros_decodes_to_the_mean_of_the_class(digits: Dataset) -> None:
    """And a latent of ones to the mean and one standard deviation."""
    model = fitted(digits).model
    graph = SampleGraph(model, (1, 8, 8))
    labels = torch.tensor([7, 2])
    torch.testing.assert_close(graph(torch.zeros(2, 1, 8, 8), labels).flatten(1), model.mean[labels].float())
    above = (model.mean + model.variance.sqrt())[labels].float()
    torch.testing.assert_close(graph(torch.ones(2, 1, 8, 8), labels).flatten(1), above)


def test_samples_follow_their_class_and_seed(digits: Dataset) -> None:
    """Many samples of a class have its mean and variance; equal seeds give equal samples."""
    family = fitted(digits)
    samples = family.sample(torch.full((4000,), 5), seed=1)
    assert torch.equal(samples, family.sample(torch.full((4000,), 5), seed=1))
    deviation = family.model.variance[5].sqrt().float()
    assert ((samples.flatten(1).mean(dim=0) - family.model.mean[5].float()).abs() < 5 * deviation / 4000**0.5).all()
    torch.testing.assert_close(samples.flatten(1).std(dim=0), deviation, rtol=0.08, atol=0)


def test_what_cannot_be_fitted_is_said() -> None:
    """Classes without images, too few images to choose a floor on, and several processes are named."""
    info = DataInfo("tiny", (1, 2, 2), 17, ("a", "b", "c"), (0.5, 0.25, 0.25), "0" * 64)
    images = torch.rand((6, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    given = build_family("naive_bayes", {"variance_floor": 0.1}, info, 0)
    with pytest.raises(ValueError, match=r"needs an image of every class; there is none of 1, 2"):
        given.step(Batch(images, torch.zeros(6, dtype=torch.int64)), moment())
    chosen = build_family("naive_bayes", {}, info, 0)
    with pytest.raises(ValueError, match="takes two images of every class; set variance_floor"):
        chosen.step(Batch(images, torch.tensor([0, 0, 0, 1, 1, 2])), moment())
    with pytest.raises(ValueError, match="fitted in closed form, by one process"):
        given.step(Batch(images, torch.arange(6) % 3), moment(shard=Shard(0, 2)))
    with pytest.raises(ValueError, match=r"steps=3: must be 1: .*; variance_floor=-1.0: must be at least 0"):
        build_family("naive_bayes", {"steps": 3, "variance_floor": -1.0}, info, 0)
