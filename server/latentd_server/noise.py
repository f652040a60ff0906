"""Counter-based noise: every number is a function of (seed, sample, step, purpose, element) and of nothing else.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is keyed with the seed's
64 bits and counts in four words: (block of four elements, step, sample, purpose). Rows of different requests
are drawn in one call and do not see each other, so a sample's noise is the same alone and in any batch.

The map from integers to normals is ours, because NumPy promises neither its own streams across versions nor
equal bytes of `log` and `exp` across CPUs. It uses only operations that IEEE 754 rounds exactly (+ - * / sqrt)
and integer ones, so its bytes hold wherever float64 does.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

UINT64 = NDArray[np.uint64]
FLOAT64 = NDArray[np.float64]


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent. The values are part of the byte contract."""

    START = 0  # x_T and latents
    STEP = 1  # the fresh noise of a solver step
    LABEL = 2  # the label of a sample that was asked for without one
    POSTERIOR = 3  # a draw from an encoder's posterior
    OUTPUT = 4  # a draw from a decoder's likelihood
    SCORE = 5  # Monte Carlo draws of a bound
    FORWARD = 6  # q(x_t | x0)


def normals(
    seeds: NDArray[np.int64], samples: NDArray[np.int64], steps: NDArray[np.int64], purpose: Purpose, size: int
) -> NDArray[np.float32]:
    """Draw from N(0, 1).

    Args:
        seeds: [n] i64, any value.
        samples: [n] i64 in [0, 2**31); the sample's index under its seed.
        steps: [n] i64 in [0, 2**31); the number of the draw within the sample.
        purpose: What the draw is for.
        size: Elements a row.

    Returns:
        [n, size] f32; row i depends on (seeds[i], samples[i], steps[i], purpose) alone.

    Raises:
        ValueError: the arrays are not of one length, or an index is out of range.
    """
    raise NotImplementedError


def uniforms(
    seeds: NDArray[np.int64], samples: NDArray[np.int64], steps: NDArray[np.int64], purpose: Purpose, size: int
) -> NDArray[np.float32]:
    """Draw from U[0, 1), on a grid of 2**-24. Arguments, shapes and errors are those of `normals`."""
    raise NotImplementedError


def labels(seed: int, samples: NDArray[np.int64], cumulative: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw one class label a sample from p(label).

    Args:
        seed: i64.
        samples: [n] i64 in [0, 2**31).
        cumulative: [c] f64, the running sum of p(label); it need not end in exactly 1.

    Returns:
        [n] i64 in [0, c); a class of probability zero is never drawn.
    """
    raise NotImplementedError
