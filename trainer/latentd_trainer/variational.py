"""The variational bound of a diffusion model on ln p(image), in float64, as the server's Score defines it.

    -ln p(x) <= L_T + L_1 + ... + L_{T-1} + L_0                            (Ho et al., arXiv 2006.11239, eq. 5)
    L_T = KL(q(x_{T-1} | x) || N(0, I))
    L_t = (snr_{t-1} - snr_t) / 2 |x - x^(x_t, t)|^2, snr = alpha^2 / sigma^2   (Kingma et al., arXiv 2107.00630)
    L_0 = -ln P(x | x_0), normal around x^(x_0, 0) with deviation sigma_0, rounded to the data's levels      (eq. 13)

x^ is the network's estimate of x at x_t = alpha_t x + sigma_t eps.
"""

import itertools

import numpy as np
from latentd.v1 import model_pb2
from numpy.typing import NDArray
from scipy.special import log_ndtr

from latentd_trainer import metrics
from latentd_trainer.chains import Denoise, Floats
from latentd_trainer.served import Given, Graphs
from latentd_trainer.spec import Meaning, Role, Source

IMAGES, TERMS = 144, 100
"""How many held-out images are scored, and by how many evaluations each: a sixth of what evaluation's samples take."""


def measure(graphs: Graphs, given: Given, generator: np.random.Generator) -> dict[str, float]:
    """The mean bound on ln p(image given label) of evenly spread images in nats and, of levels, in bits a dimension."""
    count = len(given[Source.SOURCE_SAMPLE])
    size = min(count, IMAGES)
    rows = np.arange(size) * count // size
    part = {source: values[rows] for source, values in given.items()}
    model = graphs.bundle.model

    def denoise(x: Floats, t: NDArray[np.int64]) -> Floats:
        asked: Given = {**part, Source.SOURCE_SAMPLE: x, Source.SOURCE_TIMESTEP: t}
        return graphs.run(Role.ROLE_DENOISER, asked, generator)[Meaning.MEANING_PREDICTION]

    terms = min(TERMS, len(model.diffusion.alphas))
    nats = float(bound(denoise, model, part[Source.SOURCE_SAMPLE], terms, generator).mean())
    found = {"elbo": nats}
    if model.sample_spec.level_count:
        found["bits-per-dimension"] = metrics.bits_per_dimension(nats, int(np.prod(model.sample_spec.shape)))
    return found


def bound(
    denoise: Denoise, model: model_pb2.Model, images: Floats, term_count: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """An unbiased estimate of the bound on ln p of each image in nats, [n] f64.

    Args:
        denoise: The network, at the images' labels.
        model: Schedule, prediction, clipping and levels; without levels the bound is on a density.
        images: [n, C, H, W] f32, on the levels.
        term_count: Evaluations of the network for each image: timestep 0, and one timestep of each of so many less
            one equal parts of the rest, which stands for its part. At least 2, or 1 of a single timestep; at most all.
        generator: Draws the timesteps, then the noise, [n, C, H, W] f32 a term.
    """
    spec, item = model.diffusion, model.sample_spec
    alphas, sigmas = np.array(spec.alphas), np.array(spec.sigmas)
    falls = -np.diff(np.square(alphas / sigmas), prepend=np.nan)
    x = images.astype(np.float64)
    prior = 0.5 * (np.square(alphas[-1] * x) + sigmas[-1] ** 2 - 1) - np.log(sigmas[-1])
    total = _sums(prior)
    for timesteps, weight in _visits(len(images), len(alphas), term_count, generator):
        alpha, sigma = (levels[timesteps][:, None, None, None] for levels in (alphas, sigmas))
        noisy = (alpha * x + sigma * generator.standard_normal(images.shape, np.float32)).astype(np.float32)
        prediction = denoise(noisy, timesteps).astype(np.float64)
        estimate = _estimate(noisy, prediction, alpha, sigma, spec.prediction)
        if spec.clip_denoised:
            estimate = estimate.clip(item.min_value, item.max_value)
        if timesteps[0] == 0:
            total += _sums(_surprise(x, estimate, sigmas[0], item))
        else:
            total += weight * 0.5 * falls[timesteps] * _sums(np.square(x - estimate))
    return -total


def _visits(
    count: int, timestep_count: int, term_count: int, generator: np.random.Generator
) -> list[tuple[NDArray[np.int64], int]]:
    """Each term's timestep for every image, [n] i64, and how many timesteps it stands for."""
    edges = 1 + np.arange(term_count) * (timestep_count - 1) // max(1, term_count - 1)
    drawn = [
        (generator.integers(first, last, count), last - first) for first, last in itertools.pairwise(edges.tolist())
    ]
    return [(np.zeros(count, np.int64), 1), *drawn]


def _estimate(
    noisy: Floats, prediction: NDArray[np.float64], alpha: NDArray[np.float64], sigma: NDArray[np.float64], kind: int
) -> NDArray[np.float64]:
    """The estimate of x, with float64 coefficients."""
    if kind == model_pb2.DiffusionSpec.PREDICTION_SAMPLE:
        return prediction
    if kind == model_pb2.DiffusionSpec.PREDICTION_V:
        return np.asarray(alpha * noisy - sigma * prediction)
    return np.asarray((noisy - sigma * prediction) / alpha)


def _surprise(
    x: NDArray[np.float64], estimate: NDArray[np.float64], sigma: float, item: model_pb2.TensorSpec
) -> NDArray[np.float64]:
    """-ln P(x | x_0) of every pixel, or of a density where there are no levels."""
    off = (x - estimate) / sigma
    if not item.level_count:
        return np.asarray(0.5 * off**2 + np.log(sigma * np.sqrt(2 * np.pi)))
    half = (item.max_value - item.min_value) / (item.level_count - 1) / 2
    low = np.where(x < item.min_value + half, -np.inf, off - half / sigma)
    high = np.where(x > item.max_value - half, np.inf, off + half / sigma)
    mirrored = low + high > 0  # so that both ends lie in the left tail, where the logarithms are accurate
    low, high = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    return np.asarray(-(log_ndtr(high) + np.log1p(-np.exp(log_ndtr(low) - log_ndtr(high)))))


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over everything but the first axis."""
    return np.asarray(values.reshape(len(values), -1).sum(1))
