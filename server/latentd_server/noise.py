"""Counter-based noise: every number is a function of (seed, sample, step, purpose, element) and of nothing else.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is keyed with the seed's
64 bits and counts in four words: (block of four elements, step, sample, purpose and stream). Rows of different requests
are drawn in one call and do not see each other, so a sample's noise is the same alone and in any batch.

The map from integers to normals is in `normal_quantile.py`; like Philox it uses exactly rounded operations only,
so that the bytes depend neither on NumPy's version nor on the CPU.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentd_server.normal_quantile import normal_quantile

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]  # 32-bit words, held in 64 bits so that their products fit

_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_FACTORS = 0xD2511F53, 0xCD9E8D57
_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_MULTIPLIERS = np.array(_FACTORS, dtype=np.uint64)[:, None]
_KEY_INCREMENTS = np.array(_INCREMENTS, dtype=np.uint64)[:, None]
_ROUNDS = 10
_FEW = 8
"""Numbers up to which Python's integers are faster than arrays."""
_BLOCKS_PER_CHUNK = 4096  # what is computed at once stays in a core's caches


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent. The values are part of the byte contract."""

    START = 0  # x_T and latents
    STEP = 1  # the fresh noise of a solver step
    LABEL = 2  # the label of a sample that was asked for without one
    POSTERIOR = 3  # a draw from an encoder's posterior
    OUTPUT = 4  # a draw from a decoder's likelihood
    SCORE = 5  # Monte Carlo draws of a bound
    FORWARD = 6  # q(x_t | x0)
    KNOWN = 7  # q(x_t | x0) of what is known of a sample, at every step


_PURPOSE_BITS = 8


def word(purpose: Purpose, stream: int = 0) -> int:
    """The counter's last word: what a draw is for, and which of several independent draws for it this is.

    Stream 0 is the purpose itself. A graph's noise inputs take streams 0, 1, 2 ... in the graph's order, of whichever
    distribution they are: normals and uniforms of one counter are functions of each other.
    """
    return int(purpose) + (stream << _PURPOSE_BITS)


def normals(
    seeds: Indices, samples: Indices, steps: Indices, purpose: Purpose | Indices, size: int
) -> NDArray[np.float32]:
    """Draw from N(0, 1).

    Args:
        seeds: [n] i64, any value.
        samples: [n] i64 in [0, 2**31); the sample's index under its seed.
        steps: [n] i64 in [0, 2**31); the number of the draw within the sample.
        purpose: What the draws are for: one `Purpose` for all rows, or [n] i64, one `word` for each.
        size: Elements a row.

    Returns:
        [n, size] f32; row i depends on (seeds[i], samples[i], steps[i], purpose of i) alone.

    Raises:
        ValueError: the arrays are not of one length, or an index is out of range.
    """
    return _draw(seeds, samples, steps, purpose, size, lambda words: normal_quantile(_midpoints(words)))


def uniforms(
    seeds: Indices, samples: Indices, steps: Indices, purpose: Purpose | Indices, size: int
) -> NDArray[np.float32]:
    """Draw from U[0, 1), on a grid of 2**-24. Arguments, shapes and errors are those of `normals`."""
    return _draw(seeds, samples, steps, purpose, size, lambda words: (words >> np.uint64(8)) * 2.0**-24)


def labels(seed: int, samples: Indices, cumulative: NDArray[np.float64]) -> Indices:
    """Draw one class label a sample from p(label), by the inverse of its distribution function.

    Args:
        seed: i64.
        samples: [n] i64 in [0, 2**31).
        cumulative: [c] f64, the running sum of p(label); it need not end in exactly 1.

    Returns:
        [n] i64 in [0, c); a class of probability zero is never drawn.

    Raises:
        ValueError: an index is out of range.
    """
    seeds = np.full(samples.shape, seed, dtype=np.int64)
    steps = np.zeros_like(samples)
    _check(seeds, samples, steps)
    if len(samples) <= _FEW:
        first = np.array([_first_word(seed, sample, 0, Purpose.LABEL) for sample in samples.tolist()], np.uint64)
    else:
        rows = np.arange(len(samples))
        first = _blocks(seeds, samples, steps, Purpose.LABEL, rows, np.zeros_like(rows))[0]
    drawn: Indices = np.searchsorted(cumulative, _midpoints(first) * cumulative[-1], side="right")
    return drawn


def philox(counter: Words, key: Words) -> Words:
    """Philox4x32-10, element by element: [4, k] counter words and [2, k] key words give [4, k] random words."""
    even, odd = counter[0::2], counter[1::2]
    rounds = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None]
    for round_key in (key + rounds * _KEY_INCREMENTS) & _WORD:
        product: Words = even * _MULTIPLIERS
        even = (product >> _HALF)[::-1] ^ odd
        even ^= round_key
        odd = (product & _WORD)[::-1]
    return np.stack([even, odd], axis=1).reshape(counter.shape)


def _first_word(seed: int, sample: int, step: int, purpose: int) -> int:
    """What `philox` gives first of block 0, by Python's integers: for one number that is a tenth of NumPy's time."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    a, b, c, d = 0, step, sample, purpose
    for _ in range(_ROUNDS):
        first, second = _FACTORS[0] * a, _FACTORS[1] * c
        a, b, c, d = second >> 32 ^ b ^ low, second & 0xFFFFFFFF, first >> 32 ^ d ^ high, first & 0xFFFFFFFF
        low, high = low + _INCREMENTS[0] & 0xFFFFFFFF, high + _INCREMENTS[1] & 0xFFFFFFFF
    return a


def _draw(
    seeds: Indices,
    samples: Indices,
    steps: Indices,
    purpose: Purpose | Indices,
    size: int,
    convert: Callable[[Words], NDArray[Any]],
) -> NDArray[np.float32]:
    _check(seeds, samples, steps)
    blocks_per_row = -(-size // 4)
    total = len(seeds) * blocks_per_row
    values = np.empty((total, 4), dtype=np.float32)
    for start in range(0, total, _BLOCKS_PER_CHUNK):
        stop = min(start + _BLOCKS_PER_CHUNK, total)
        rows, blocks = np.divmod(np.arange(start, stop), blocks_per_row)
        words = _blocks(seeds, samples, steps, purpose, rows, blocks)
        values[start:stop] = convert(words.ravel()).reshape(words.shape).T
    return np.ascontiguousarray(values.reshape(len(seeds), 4 * blocks_per_row)[:, :size])


def _blocks(
    seeds: Indices, samples: Indices, steps: Indices, purpose: Purpose | Indices, rows: Indices, blocks: Indices
) -> Words:
    """The random words [4, k] of block blocks[i] of row rows[i]."""
    keys = seeds.view(np.uint64)[rows]
    purposes = np.full_like(rows, purpose) if isinstance(purpose, Purpose) else purpose[rows]
    counter = np.stack([blocks, steps[rows], samples[rows], purposes]).view(np.uint64)
    return philox(counter, np.stack([keys & _WORD, keys >> _HALF]))


def _midpoints(words: Words) -> NDArray[np.float64]:
    """The middles of 2**32 equal parts of (0, 1); exact in float64, and never 0, 1/2 or 1."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def _check(seeds: Indices, samples: Indices, steps: Indices) -> None:
    if not seeds.shape == samples.shape == steps.shape:
        raise ValueError("seeds, samples and steps must be of one length")
    for name, indices in (("samples", samples), ("steps", steps)):
        if indices.size and not (indices.min() >= 0 and indices.max() < 2**31):
            raise ValueError(f"{name} must be from 0 to {2**31 - 1}")
