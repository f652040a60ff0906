"""Densities of binary pixels that have closed forms: independent pixels, naive Bayes, and mixtures fitted by EM. Pure.

Images are [n, pixels] of 0 and 1, float64; likelihoods are in nats an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PSEUDO_COUNT = 0.5
"""Images added to every component, and of each kind to every pixel of it, so that nothing has probability zero: what is
fitted is the mode under a Dirichlet prior of the weights and a Beta prior of the pixels, all with parameters 3/2."""


@dataclass(frozen=True)
class BernoulliMixture:
    """p(x) = sum_k w_k prod_j p_kj^x_j (1 - p_kj)^(1 - x_j)."""

    weights: Floats  # [components], summing to 1
    probabilities: Floats  # [components, pixels], inside (0, 1)

    def log_joint(self, images: Floats) -> Floats:
        """Return ln p(x, k), [n, components]."""
        on, off = np.log(self.probabilities), np.log1p(-self.probabilities)
        joint: Floats = images @ (on - off).T + off.sum(axis=1) + np.log(self.weights)
        return joint

    def log_likelihood(self, images: Floats) -> Floats:
        """Return ln p(x), [n]."""
        total: Floats = np.logaddexp.reduce(self.log_joint(images), axis=1)
        return total

    def log_prior(self) -> float:
        """Log density of the prior, up to a constant, which EM maximises along with the likelihood."""
        pixels = np.log(self.probabilities).sum() + np.log1p(-self.probabilities).sum()
        return PSEUDO_COUNT * float(pixels + np.log(self.weights).sum())


def fit_weighted(images: Floats, shares: Floats) -> BernoulliMixture:
    """The most probable mixture where `shares` [n, components] of every image belong to each component."""
    counts = shares.sum(axis=0)
    probabilities = (shares.T @ images + PSEUDO_COUNT) / (counts[:, None] + 2 * PSEUDO_COUNT)
    weights = (counts + PSEUDO_COUNT) / (len(images) + PSEUDO_COUNT * len(counts))
    return BernoulliMixture(weights, probabilities)


def fit_classes(images: Floats, labels: NDArray[np.int64], class_count: int) -> BernoulliMixture:
    """Bernoulli naive Bayes: a component for each class, from labels [n]. With one class, independent pixels."""
    return fit_weighted(images, np.eye(class_count)[labels])


def expectation_maximisation(images: Floats, components: int, steps: int, seed: int) -> Iterator[BernoulliMixture]:
    """EM for a mixture (Dempster, Laird, Rubin, JRSS B 39, 1977), from the start on: yields `steps` + 1 mixtures.

    E: r_nk = P(k | x_n) under the mixture so far. M: the most probable mixture with these shares. No step lowers
    ln p(images) + ln p(mixture). The start has random shares.
    """
    generator = np.random.default_rng(seed)
    mixture = fit_weighted(images, generator.dirichlet(np.ones(components), size=len(images)))
    yield mixture
    for _ in range(steps):
        joint = mixture.log_joint(images)
        mixture = fit_weighted(images, np.exp(joint - np.logaddexp.reduce(joint, axis=1)[:, None]))
        yield mixture
