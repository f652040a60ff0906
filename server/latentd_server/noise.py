"""Counter-based noise: every number is a function of (seed, purpose, sample, step, element) and of nothing else.

The integers are those of NumPy's `Philox`, which is Philox4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", SC 2011), whose stream NumPy keeps as it is (NEP 19). Its key is the seed and the purpose, 64 bits each. Its
counter begins at (row x blocks of a row, the other index, 0, 0); a block is eight numbers. Which of sample and step is
the row, and which the other index, is the purpose's (`_BY_STEP`): what is usually drawn together lies together, and is
made in one call. Rows of different requests do not see each other, so a sample's noise is the same alone and in any
batch.

The map from integers to normals is in `quantile_table.py`; like Philox it uses exactly rounded operations only,
so that the bytes depend neither on NumPy's version nor on the CPU.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentd_server.quantile_table import write_normals

Words = NDArray[np.uint32]

_WORD = 2**64 - 1
_PER_BLOCK = 8  # 32-bit words; a block is four of 64 bits
_MOST = 2**31
_PURPOSE_BITS = 8
_AT_ONCE = 8192  # words of 64 bits


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


_BY_STEP = frozenset({Purpose.STEP, Purpose.SCORE})
"""Purposes of which one sample's draws lie behind one another; of the others, one draw's samples do."""


def word(purpose: Purpose, stream: int = 0) -> int:
    """The key's second half: what a draw is for, and which of several independent draws for it this is.

    Stream 0 is the purpose itself. A graph's noise inputs take streams 0, 1, 2 ... in the graph's order, of whichever
    distribution they are: normals and uniforms of one counter are functions of each other.
    """
    return int(purpose) + (stream << _PURPOSE_BITS)


class Run(NamedTuple):
    """Rows that lie behind one another under one key."""

    seed: int
    word: int
    first: int  # row
    other: int  # index
    length: int  # rows


def runs(word: int, seed: int, samples: Sequence[int], steps: Sequence[int] | None = None) -> list[Run]:
    """The rows of samples and steps, one for each, in as few runs as there are.

    Args:
        word: `word`'s.
        seed: Any i64.
        samples: Each from 0 to 2**31 - 1; a sample's index under its seed.
        steps: As many, of the same range: the number of the draw within the sample. All 0 if there are none.

    Raises:
        ValueError: the two are not of one length, or an index is out of range.
    """
    count = len(samples)
    steps = [0] * count if steps is None else steps
    if len(steps) != count:
        raise ValueError("samples and steps must be of one length")
    if not count:
        return []
    rows, others = (steps, samples) if word & (2**_PURPOSE_BITS - 1) in _BY_STEP else (samples, steps)
    is_one_run = others.count(others[0]) == count and list(rows) == list(range(rows[0], rows[0] + count))
    for name, indices in (("samples", samples), ("steps", steps)):
        least, most = (indices[0], indices[-1]) if is_one_run else (min(indices), max(indices))
        if least < 0 or most >= _MOST:
            raise ValueError(f"{name} must be from 0 to {_MOST - 1}")
    if is_one_run:
        return [Run(seed, word, rows[0], others[0], count)]
    found, start = [], 0
    for at in range(1, count + 1):
        if at == count or rows[at] != rows[at - 1] + 1 or others[at] != others[start]:
            found.append(Run(seed, word, rows[start], others[start], at - start))
            start = at
    return found


def normals(wanted: Sequence[Run], size: int) -> NDArray[np.float32]:
    """Draw from N(0, 1).

    Args:
        wanted: The rows, run by run.
        size: Elements a row.

    Returns:
        [n, size] f32; a row depends on its seed, word, sample and step, and on `size`, alone.
    """
    return _draw(wanted, size, write_normals)


def uniforms(wanted: Sequence[Run], size: int) -> NDArray[np.float32]:
    """Draw from U[0, 1), on a grid of 2**-24. Arguments and shapes are those of `normals`."""
    return _draw(wanted, size, _write_uniforms)


def labels(seed: int, samples: NDArray[np.int64], cumulative: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw one class label a sample from p(label), by the inverse of its distribution function.

    Args:
        seed: i64.
        samples: [n] i64 from 0 to 2**31 - 1.
        cumulative: [c] f64, the running sum of p(label); it need not end in exactly 1.

    Returns:
        [n] i64 in [0, c); a class of probability zero is never drawn.

    Raises:
        ValueError: an index is out of range.
    """
    points = _draw(runs(word(Purpose.LABEL), seed, samples.tolist()), 1, _write_midpoints, np.float64)[:, 0]
    drawn: NDArray[np.int64] = np.searchsorted(cumulative, points * cumulative[-1], side="right")
    return drawn


_spare: list[np.random.Philox] = []
"""Generators that nobody uses now; who draws takes one out. To place one takes half a microsecond, to make one six."""
_EMPTY = (0, 0, 0, 0)  # a buffer with nothing in it


def _draw(
    wanted: Sequence[Run], size: int, write: Callable[[Words, NDArray[Any]], None], dtype: type = np.float32
) -> NDArray[Any]:
    """Rows of what `write` makes of the random words, some at a time: they take more memory than what they become."""
    blocks = -(-size // _PER_BLOCK)
    rows: NDArray[Any] = np.empty((sum(run.length for run in wanted), _PER_BLOCK * blocks), dtype)
    flat, done = rows.reshape(-1), 0
    words = np.empty(min(rows.size // 2, _AT_ONCE), np.uint64)
    filled = 0

    def flush() -> None:
        nonlocal done, filled
        halves = words[:filled].astype("<u8", copy=False).view("<u4").astype(np.uint32, copy=False)
        write(halves, flat[done : done + 2 * filled])
        done, filled = done + 2 * filled, 0

    try:
        philox = _spare.pop()
    except IndexError:
        philox = np.random.Philox(key=0)
    for seed, own, first, other, length in wanted:
        state: Any = {  # NumPy takes tuples too, and faster
            "bit_generator": "Philox",
            "state": {"counter": (first * blocks, other, 0, 0), "key": (seed & _WORD, own)},
            "buffer": _EMPTY,
            "buffer_pos": len(_EMPTY),
            "has_uint32": 0,
            "uinteger": 0,
        }
        philox.state = state
        left = length * blocks * len(_EMPTY)
        while left:
            count = min(left, len(words) - filled)
            words[filled : filled + count] = philox.random_raw(count)
            filled, left = filled + count, left - count
            if filled == len(words):
                flush()
    _spare.append(philox)
    if filled:
        flush()
    return np.ascontiguousarray(rows[:, :size])


def _write_uniforms(words: Words, out: NDArray[Any]) -> None:
    np.multiply(words >> np.uint32(8), 2.0**-24, out=out, casting="same_kind")


def _write_midpoints(words: Words, out: NDArray[Any]) -> None:
    """The middles of 2**32 equal parts of (0, 1); exact in float64, and never 0 or 1."""
    np.multiply(words + 0.5, 2.0**-32, out=out)
