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
    """The logarithm of Phi, by rational functions of erf and of exp(a^2) erfc(a), to 3e-15 (Cephes, ndtr.c)."""
    scaled = values / -math.sqrt(2)  # Phi(v) = erfc(scaled) / 2
    size = np.clip(np.abs(scaled), 1, _FARTHEST)
    inner, outer = np.minimum(size, _FAR), np.maximum(size, _FAR)
    ratio = np.where(size < _FAR, _quotient(_ERFCX, inner), _quotient(_FAR_ERFCX, outer))
    log_tail = np.log(0.5 * ratio) - size**2
    middle = np.clip(scaled, -1, 1)
    log_middle = np.log(0.5 - 0.5 * middle * _quotient(_ERF, middle**2))
    log_outside = np.where(scaled > 0, log_tail, np.log1p(-np.exp(log_tail)))
    return np.where(np.isneginf(values), -np.inf, np.where(np.abs(scaled) < 1, log_middle, log_outside))


def _quotient(polynomials: tuple[tuple[float, ...], tuple[float, ...]], at: Floats) -> Floats:
    above, below = polynomials
    return np.asarray(np.polyval(above, at) / np.polyval(below, at))


_FAR, _FARTHEST = 8.0, 1e30
_ERF = (  # erf(x) / x by x^2, for |x| <= 1
    (9.60497373987051638749e0, 9.00260197203842689217e1, 2.23200534594684319226e3, 7.00332514112805075473e3,
     5.55923013010394962768e4),
    (1.0, 3.35617141647503099647e1, 5.21357949780152679795e2, 4.59432382970980127987e3, 2.26290000613890934246e4,
     4.92673942608635921086e4),
)  # fmt: skip
_ERFCX = (  # exp(a^2) erfc(a), for 1 <= a < 8
    (2.46196981473530512524e-10, 5.64189564831068821977e-1, 7.46321056442269912687e0, 4.86371970985681366614e1,
     1.96520832956077098242e2, 5.26445194995477358631e2, 9.34528527171957607540e2, 1.02755188689515710272e3,
     5.57535335369399327526e2),
    (1.0, 1.32281951154744992508e1, 8.67072140885989742329e1, 3.54937778887819891062e2, 9.75708501743205489753e2,
     1.82390916687909736289e3, 2.24633760818710981792e3, 1.65666309194161350182e3, 5.57535340817727675546e2),
)  # fmt: skip
_FAR_ERFCX = (  # and for 8 <= a
    (5.64189583547755073984e-1, 1.27536670759978104416e0, 5.01905042251180477414e0, 6.16021097993053585195e0,
     7.40974269950448939160e0, 2.97886665372100240670e0),
    (1.0, 2.26052863220117276590e0, 9.39603524938001434673e0, 1.20489539808096656605e1, 1.70814450747565897222e1,
     9.60896809063285878198e0, 3.36907645100081516050e0),
)  # fmt: skip
