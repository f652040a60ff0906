"""Standard normals of 32-bit words, by a table of quadratics: a dozen passes over an array, whatever is in it.

A word w, as the signed integer i, stands for the sign of i + 1/2 and the tail probability |i + 1/2| / 2^32. That runs
over the middles of 2^31 equal parts of (0, 1/2), so the normals are those of 2^32 equally likely values. Between
neighbouring powers of two the quantile is cut into 128 equal segments, each with the quadratic that agrees with
`normal_quantile` at its Chebyshev points. The quadratic's error is below 3e-9, a twentieth of what rounding to float32
makes of a normal near 1. Segments that get narrower towards the tail (hierarchical segmentation) are those of Lee,
Cheung, Villasenor, Luk and Leong, "A hardware Gaussian noise generator using hierarchical segmentation and the
inversion method" (IEEE Trans. VLSI 15(8), 2007).

Every operation, of the table and of its use, is one that IEEE 754 rounds exactly (see `normal_quantile.py`).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentd_server.normal_quantile import normal_quantile

Floats = NDArray[np.float64]

_MANTISSA_BITS = 52
_SEGMENT_BITS = 7  # of the mantissa; segments between powers of two
_SHIFT = _MANTISSA_BITS - _SEGMENT_BITS
_OCTAVES = 32  # from 1/2 to 2^31
_LOWEST_EXPONENT = 1022  # of 1/2, as float64 holds it
_SEGMENTS = _OCTAVES << _SEGMENT_BITS
_CHEBYSHEV = 0.8660254037844386  # sqrt(3) / 2, the outer of three points on (-1, 1); 0 is the middle one
_CHUNK = 4096  # what is computed at once stays in a core's caches


def _tabulate() -> Floats:
    """Of each segment its centre and the coefficients about it, constant first: [segments, 4] f64.

    A segment's row is the low bits of the upper bits of the float64s in it: exponent and start of the mantissa.
    """
    numbers = np.arange(_SEGMENTS + 1, dtype=np.int64) + (_LOWEST_EXPONENT << _SEGMENT_BITS)
    edges = (numbers << _SHIFT).view(np.float64)
    centres, halves = (edges[:-1] + edges[1:]) * 0.5, (edges[1:] - edges[:-1]) * 0.5
    apart = halves * _CHEBYSHEV
    left, middle, right = (-normal_quantile((centres + by) * 2.0**-32) for by in (-apart, 0.0, apart))
    rows = [centres, middle, (right - left) / (2 * apart), ((right + left) * 0.5 - middle) / (apart * apart)]
    table = np.empty((_SEGMENTS, 4))
    table[numbers[:-1] & (_SEGMENTS - 1)] = np.stack(rows, axis=1)
    return table


_TABLE = _tabulate()


def write_normals(words: NDArray[np.uint32], out: NDArray[np.float32]) -> None:
    """One normal for each word, [k] u32 to [k] f32; words that are each other's complement have opposite ones."""
    size = min(len(words), _CHUNK)
    scratch = _Scratch(np.empty(size), np.empty(size), np.empty(size), np.empty(size, np.int64), np.empty((size, 4)))
    for start in range(0, len(words), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        _convert(words[chunk], out[chunk], scratch)


class _Scratch(NamedTuple):
    """Memory for one chunk."""

    signed: Floats
    tail: Floats
    z: Floats
    segment: NDArray[np.int64]
    rows: Floats


def _convert(words: NDArray[np.uint32], out: NDArray[np.float32], scratch: _Scratch) -> None:
    count = len(words)
    signed, tail, z = scratch.signed[:count], scratch.tail[:count], scratch.z[:count]
    segment, rows = scratch.segment[:count], scratch.rows[:count]
    np.add(words.view(np.int32), 0.5, out=signed)
    np.abs(signed, out=tail)
    np.right_shift(tail.view(np.int64), _SHIFT, out=segment)
    np.bitwise_and(segment, _SEGMENTS - 1, out=segment)
    np.take(_TABLE, segment, axis=0, out=rows, mode="clip")
    tail -= rows[:, 0]
    np.multiply(rows[:, 3], tail, out=z)
    z += rows[:, 2]
    z *= tail
    z += rows[:, 1]
    np.copysign(z, signed, out=out, casting="same_kind")
