"""The variational bound of a diffusion model, term by term, in nats and float64. Pure.

With x_t = alpha_t x + sigma_t eps, snr = alpha^2 / sigma^2, x^ the network's estimate of x, and T timesteps from 0 on
(Ho et al., arXiv 2006.11239, eq. 5; Kingma et al., arXiv 2107.00630, sections 3.5 and 4):

    -ln p(x) <= L_T + L_1 + ... + L_{T-1} + L_0

    L_T = KL(q(x_{T-1} | x) || N(0, I))
    L_t = KL(q(x_{t-1} | x_t, x) || q(x_{t-1} | x_t, x^(x_t, t))) = (snr_{t-1} - snr_t) / 2 |x - x^(x_t, t)|^2
    L_0 = -ln p(x | x_0), normal around x^(x_0, 0) with deviation sigma_0; of data with levels, the part of it between
          the middles to the levels beside (DDPM, eq. 13)

L_t and L_0 are means over x_t ~ q(x_t | x); the model is the chain that `ddpm` samples, its clipping included.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_HALF_LN_TAU = 0.5 * math.log(2 * math.pi)
_TAIL = -20.0
"""Below this many deviations the normal distribution function is computed by its asymptotic series."""


@dataclass(frozen=True, slots=True)
class Levels:
    """The values that elements of data can have, evenly spaced."""

    low: float
    high: float
    count: int  # at least 2

    @property
    def spacing(self) -> float:
        """From one level to the next."""
        return (self.high - self.low) / (self.count - 1)

    def nearest(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Every element's nearest level; same shape."""
        index = np.clip(np.rint((values.astype(np.float64) - self.low) / self.spacing), 0, self.count - 1)
        return (self.low + index * self.spacing).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Decoder:
    """p(x | x_0): each element is normal around its estimate, rounded to the levels if there are any."""

    sigma: float
    levels: Levels | None

    def surprise(self, samples: Floats, estimates: Floats) -> Floats:
        """-ln p(x | x_0) of each element; same shape."""
        off = (samples - estimates) / self.sigma
        if self.levels is None:
            return np.asarray(0.5 * off**2 + (math.log(self.sigma) + _HALF_LN_TAU))
        half = self.levels.spacing / 2
        reach = half / self.sigma
        below = np.where(samples < self.levels.low + half, -np.inf, off - reach)
        above = np.where(samples > self.levels.high - half, np.inf, off + reach)
        return -log_normal_between(below, above)


@dataclass(frozen=True, slots=True, eq=False)
class BoundTerms:
    """Lanes of one evaluation each: x_t drawn from q(x_t | x), and what that x_t tells of one term of its row's bound.

    Attributes:
        samples: [n, *S] f32, x.
        rows: [lanes] i64, whose term a lane is.
        draws: [lanes] i64, the number of its noise under (seed, row).
        alphas: [lanes] f32.
        sigmas: [lanes] f32.
        weights: [lanes] f64: how often the lane's nats count.
        halves: [lanes] f64, (snr_{t-1} - snr_t) / 2; NaN at timestep 0, which is the decoder's.
        decoder: p(x | x_0).
    """

    samples: NDArray[np.float32]
    rows: NDArray[np.int64]
    draws: NDArray[np.int64]
    alphas: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    weights: Floats
    halves: Floats
    decoder: Decoder

    def means(self, lanes: slice) -> NDArray[np.float32]:
        """alpha_t x of lanes, [k, *S] f32."""
        alphas = self.alphas[lanes]
        return alphas.reshape(-1, *[1] * (self.samples.ndim - 1)) * self.samples[self.rows[lanes]]

    def nats(self, lanes: slice, estimates: NDArray[Any]) -> Floats:
        """What lanes add to the bounds of their rows, by the estimates of x [k, *S] f32: [k] f64.

        Every lane's elements are added up by themselves, so that its number does not depend on the lanes beside it.
        """
        rows = self.rows[lanes]
        samples = self.samples[rows].reshape(len(rows), -1).astype(np.float64)
        guesses = estimates.reshape(len(rows), -1).astype(np.float64)
        halves = self.halves[lanes]
        last = np.isnan(halves)
        each = np.square(samples - guesses)
        if last.any():
            each[last] = self.decoder.surprise(samples[last], guesses[last])
        totals = np.array([row.sum() for row in each])
        return totals * np.where(last, 1.0, halves) * self.weights[lanes]

    def of_lanes(self, lanes: NDArray[np.int64]) -> "BoundTerms":
        """Those of some lanes, [k] i64; shares no memory with the others."""
        return replace(
            self,
            samples=self.samples[self.rows[lanes]],
            rows=np.arange(len(lanes)),
            draws=self.draws[lanes],
            alphas=self.alphas[lanes],
            sigmas=self.sigmas[lanes],
            weights=self.weights[lanes],
            halves=self.halves[lanes],
        )


def prior_divergence(samples: NDArray[np.float32], alpha: float, sigma: float) -> Floats:
    """L_T of rows, KL(N(alpha x, sigma^2 I) || N(0, I)): [n, *S] f32 -> [n] f64."""
    squares = np.square(alpha * samples.reshape(len(samples), -1).astype(np.float64))
    return np.array([0.5 * (row + sigma**2 - 1 - 2 * math.log(sigma)).sum() for row in squares])


def halved_falls(alphas: Floats, sigmas: Floats) -> Floats:
    """(snr_{t-1} - snr_t) / 2 for t = 0 .. T - 1, NaN for t = 0: [T] f64."""
    ratios = np.square(alphas / sigmas)
    return np.concatenate([[np.nan], -0.5 * np.diff(ratios)])


def log_normal_between(below: Floats, above: Floats) -> Floats:
    """Logarithm of Phi(above) - Phi(below) where below < above; one of them may be infinite. Accurate in both tails."""
    with np.errstate(invalid="ignore"):  # a network that answers NaN or infinity scores so
        mirrored = below + above > 0
        low, high = np.where(mirrored, -above, below), np.where(mirrored, -below, above)
        log_high = _log_normal_cdf(high)
        apart = np.where(np.isneginf(low), -np.inf, _log_normal_cdf(low) - log_high)
        return np.asarray(log_high + np.log1p(-np.exp(apart)))


def _log_normal_cdf(values: Floats) -> Floats:
    """The logarithm of Phi; by the series of Mills' ratio far to the left (Abramowitz & Stegun, 26.2.12)."""
    tail = values < _TAIL
    near, far = np.where(tail, _TAIL, values), np.where(tail & np.isfinite(values), values, _TAIL)
    complements = 0.5 * _erfc(near / math.sqrt(2))  # 1 - Phi
    with np.errstate(divide="ignore"):
        log_near = np.where(near > 0, np.log1p(-complements), np.log(0.5 * _erfc(-near / math.sqrt(2))))
    inverse = far**-2
    series = 1 - inverse * (1 - 3 * inverse * (1 - 5 * inverse * (1 - 7 * inverse * (1 - 9 * inverse))))
    log_far = -0.5 * far**2 - _HALF_LN_TAU - np.log(-far) + np.log(series)
    return np.where(tail, np.where(np.isneginf(values), -np.inf, log_far), log_near)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])
