"""How close generated images are to real ones, from features of both. Pure numpy and scipy.

Features are `[n, d]` arrays, one row an image, from a network that knows the classes (`classifier`).
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Floats = NDArray[np.floating]
Labels = NDArray[np.int64]

NEIGHBOURS = 5
"""k of the neighbourhoods that precision, recall, density and coverage are made of."""


def frechet_distance(one: Floats, other: Floats) -> float:
    """Squared Frechet (2-Wasserstein) distance between the normals fitted to two sets of features [n, d], [m, d].

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), as in Heusel et al., 2017 (arXiv 1706.08500, eq. 6).

    Raises:
        ValueError: fewer than two rows in a set, which fit no normal.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"needs two rows on each side, got {len(one)} and {len(other)}")
    mean_one, mean_other = one.mean(0, np.float64), other.mean(0, np.float64)
    covariance_one = np.atleast_2d(np.cov(one, rowvar=False, dtype=np.float64))
    covariance_other = np.atleast_2d(np.cov(other, rowvar=False, dtype=np.float64))
    root = _root(covariance_one)
    # The eigenvalues of a product of two covariances are real and not negative; only rounding makes them so.
    shared = np.sqrt(np.clip(scipy.linalg.eigvalsh(root @ covariance_other @ root), 0, None)).sum()
    distance = np.sum((mean_one - mean_other) ** 2) + np.trace(covariance_one + covariance_other) - 2 * shared
    return max(0.0, float(distance))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = scipy.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Neighbourhoods:
    """What the neighbourhoods of two sets of features say of each other, each but density in 0 to 1."""

    precision: float  # share of generated rows that lie among real ones
    recall: float  # share of real rows that lie among generated ones
    density: float  # how many real neighbourhoods a generated row lies in, over k; 1 for equal distributions
    coverage: float  # share of real neighbourhoods with a generated row in them


def neighbourhoods(real: Floats, generated: Floats, k: int = NEIGHBOURS) -> Neighbourhoods:
    """Compare two sets of features, [n, d] and [m, d], by balls that reach to each row's k-th neighbour in its set.

    Precision and recall: Kynkaanniemi et al., 2019 (arXiv 1904.06991, eq. 1-3). Density and coverage: Naeem et
    al., 2020 (arXiv 2002.09797, eq. 4-5). A row on the rim of a ball is outside it.

    Raises:
        ValueError: a set has no more than k rows.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"needs more than k = {k} rows on each side, got {len(real)} and {len(generated)}")
    distances = cdist(real, generated)
    within_real = distances < _radii(real, k)[:, None]
    within_generated = distances < _radii(generated, k)[None, :]
    return Neighbourhoods(
        precision=float(within_real.any(0).mean()),
        recall=float(within_generated.any(1).mean()),
        density=float(within_real.sum(0).mean() / k),
        coverage=float(within_real.any(1).mean()),
    )


def _radii(rows: Floats, k: int) -> NDArray[np.float64]:
    """Distance of each row to its k-th nearest other row."""
    radii: NDArray[np.float64] = np.partition(cdist(rows, rows), k, axis=1)[:, k]  # column 0 is the row itself
    return radii


def nearest_neighbour_ratio(generated: Floats, train: Floats, held_out: Floats) -> float:
    """Median distance of generated rows to their nearest training row, over the same of held-out rows.

    About 1 where generated rows are as new as held-out ones, and towards 0 where they are copies.

    Raises:
        ValueError: held-out rows lie on training rows, so that nothing can be measured against them.
    """
    reference = float(np.median(_nearest(held_out, train)))
    if reference == 0:
        raise ValueError("half of the held-out rows are copies of training rows")
    return float(np.median(_nearest(generated, train))) / reference


def _nearest(rows: Floats, others: Floats) -> NDArray[np.float64]:
    """Distance of each row to the nearest of the others, a few rows at a time."""
    return np.concatenate([cdist(part, others).min(1) for part in np.array_split(rows, -(-len(rows) // _ROWS_AT_ONCE))])


def laplacian_power(images: Floats) -> float:
    """Mean square of the discrete Laplacian over all inner pixels of images [n, C, H, W]: the power of fine detail.

    Four times a pixel less its four neighbours. Blur lowers it, edges raise it, and so does noise.

    Raises:
        ValueError: images without inner pixels.
    """
    if min(images.shape[2:]) < 3:
        raise ValueError(f"needs images of 3 x 3 pixels or more, got {images.shape[2]} x {images.shape[3]}")
    centre = images[:, :, 1:-1, 1:-1]
    upright = images[:, :, :-2, 1:-1] + images[:, :, 2:, 1:-1]
    across = images[:, :, 1:-1, :-2] + images[:, :, 1:-1, 2:]
    return float(np.square(4 * centre - upright - across).mean(dtype=np.float64))


def class_histogram_distance(one: Labels, other: Labels, class_count: int) -> float:
    """Total variation distance between two sets of labels, [n] and [m]: 0 for equal shares, 1 for disjoint classes."""
    shares = [np.bincount(labels, minlength=class_count) / len(labels) for labels in (one, other)]
    return 0.5 * float(np.abs(shares[0] - shares[1]).sum())


def agreement(predicted: Labels, asked: Labels) -> float:
    """Share of samples that a classifier takes for the class that was asked for, [n] and [n]."""
    return float(np.mean(predicted == asked))


def bits_per_dimension(log_likelihood: float, dimensions: int) -> float:
    """A log-likelihood in nats an image as bits a pixel and channel; lower is better."""
    return -log_likelihood / (dimensions * float(np.log(2)))


def importance_weighted_bound(log_weights: Floats) -> NDArray[np.float64]:
    """Ln 1/K sum_k w_k of each row: log weights [K, n] in nats to bounds on ln p(x) [n].

    Burda et al., 2016 (arXiv 1509.00519, eq. 8). K = 1 is a one-draw estimate of the ELBO.
    """
    bound: NDArray[np.float64] = np.logaddexp.reduce(log_weights.astype(np.float64), axis=0) - np.log(len(log_weights))
    return bound


def pairwise_mutual_information(units: NDArray[np.bool_]) -> float:
    """Mutual information of two binary units in nats, averaged over all pairs of [n, units]; 0 for a factorial code.

    From counts, which alone would give 1 / 2n for independent units: that is taken off (Miller, Note on the bias of
    information estimates, 1955). So it may come out a little below 0.

    Raises:
        ValueError: fewer than two units.
    """
    count, width = units.shape
    if width < 2:
        raise ValueError(f"needs two units, got {width}")
    states = np.stack([~units, units]).astype(np.float64)  # [2, n, units]
    joint = np.einsum("ank,bnl->abkl", states, states) / count
    marginal = states.mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = joint * np.log(joint / (marginal[:, None, :, None] * marginal[None, :, None, :]))
    information = np.where(joint > 0, terms, 0.0).sum(axis=(0, 1))
    each: NDArray[np.float64] = information[np.triu_indices(width, 1)]
    return float(each.mean() - 1 / (2 * count))


def near_binary_share(codes: Floats, margin: float = 0.1) -> float:
    """Share of the elements of codes in 0 to 1 that lie within `margin` of 0 or of 1."""
    near: NDArray[np.bool_] = np.minimum(codes, 1 - codes) < margin
    return float(near.mean())


def normal_divergence(mean: Floats, log_variance: Floats) -> NDArray[np.float64]:
    """Average over rows of KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, [n, *latent] to [*latent].

    Kingma & Welling, 2014 (arXiv 1312.6114, appendix B).
    """
    each = 0.5 * (np.square(mean) + np.exp(log_variance) - 1 - log_variance)
    divergence: NDArray[np.float64] = each.mean(0, np.float64)
    return divergence
