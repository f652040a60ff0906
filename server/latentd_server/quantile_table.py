"""Standard normals of 32-bit words, by a table of quadratics: seven passes over an array, whatever is in it.

A word w, as the signed integer i, stands for the sign of i + 1/2 and the tail probability |i + 1/2| / 2^32. That runs
over the middles of 2^31 equal parts of (0, 1/2), so the normals are those of 2^32 equally likely values. Rounded to
float32, i says by its upper 16 bits (sign, exponent, 7 bits of mantissa) in which of 128 equal segments between
neighbouring powers of two it lies. Each segment has the quadratic that agrees with `normal_quantile` at its Chebyshev
points. Segments that get narrower towards the tail (hierarchical segmentation) are those of Lee, Cheung, Villasenor,
Luk and Leong, "A hardware Gaussian noise generator using hierarchical segmentation and the inversion method" (IEEE
Trans. VLSI 15(8), 2007).

The quadratics' error is below 3e-9. What float32 adds is about one unit in the last place of normals beyond 0.1, and
1e-9 nearer to 0; and where i is not a float32 itself, the distance of its neighbours that are: normals near 0 lie on a
grid of 1e-7. Together that is at most 8e-8, or two units in the last place where these are more.

Every operation, of the table and of its use, is one that IEEE 754 rounds exactly (see `normal_quantile.py`).
"""

import sys

import numpy as np
from numpy.typing import NDArray

from latentd_server.normal_quantile import Float64s, normal_quantile

Float32s = NDArray[np.float32]

_LOWEST, _HIGHEST = 127 << 7, 158 << 7  # upper halves of the float32s 1 and 2^31
_NEGATIVE = 1 << 15  # in them
_UPPER = slice(int(sys.byteorder == "little"), None, 2)  # of a float32's two halves
_CHEBYSHEV = 0.8660254037844386  # sqrt(3) / 2, the outer of three points on (-1, 1); 0 is the middle one
_CHUNK = 4096  # what is computed at once stays in a core's caches


def _tabulate() -> Float32s:
    """Of each segment its centre and the coefficients about it, constant first: [2^16, 4] f32, by the upper half of the
    float32s in it. Most of the rows are of no integer's; nobody touches them, so they take no memory.
    """
    table = np.zeros((1 << 16, 4), np.float32)
    halves = np.arange(_LOWEST, _HIGHEST + 1, dtype=np.uint32)
    left, right = ((each << 16).view(np.float32).astype(np.float64) for each in (halves, halves + 1))
    centres, apart = (left + right) * 0.5, (right - left) * (0.5 * _CHEBYSHEV)
    for sign, rows in ((1.0, halves), (-1.0, halves + _NEGATIVE)):
        low, middle, high = (_normal(sign * (centres + by)) for by in (-apart, 0.0, apart))
        slope, curve = sign * (high - low) / (2 * apart), ((high + low) * 0.5 - middle) / (apart * apart)
        table[rows] = np.stack([sign * centres, middle, slope, curve], axis=1)
    table[0, 1] = _normal(np.zeros(1))[0]
    return table


def _normal(i: Float64s) -> Float64s:
    """The normal that an integer stands for, and what lies between those of two integers: [k] f64 to [k] f64."""
    shifted = i + 0.5
    # The last segment begins at 2^31, where the normal is 0, and goes on past it.
    return np.copysign(normal_quantile(np.minimum(np.abs(shifted), 2.0**31) * 2.0**-32), shifted)


_TABLE = _tabulate()


def write_normals(words: NDArray[np.uint32], out: Float32s) -> None:
    """One normal for each word, [k] u32 to [k] f32."""
    integers = words.view(np.int32)
    rows = np.empty((min(len(words), _CHUNK), 4), np.float32)
    for start in range(0, len(words), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        z = out[chunk]
        z[...] = integers[chunk]
        centre, constant, slope, curve = np.take(_TABLE, z.view(np.uint16)[_UPPER], 0, rows[: len(z)], "clip").T
        z -= centre
        curve *= z
        curve += slope
        z *= curve
        z += constant
