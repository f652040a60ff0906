"""The certificate that rows do not see each other: which sizes a graph may be called with, found by trial."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentd_server.runtime import Array, CompiledGraph, Feeds


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Sizes that calls are padded to: 1, 2, 4, then multiples of 4, up to the limit itself."""
    sizes = {1, 2, *range(4, max_rows, 4), max_rows}
    return tuple(sorted(size for size in sizes if size <= max_rows))


@dataclass(frozen=True)
class Buckets:
    """The sizes a graph may be called with."""

    sizes: tuple[int, ...]  # rising
    certified: bool  # whether a row's bytes are the same in all of them, whatever else is in the call

    def fit(self, rows: int) -> int:
        """The smallest size that holds so many rows."""
        return next(size for size in self.sizes if size >= rows)


def certify(graph: CompiledGraph, make: Callable[[int, np.random.Generator], Feeds], max_rows: int) -> Buckets:
    """Run every bucket once and find those that agree on every byte; this is the warm-up too.

    Each bucket is given the first of the same random rows, then the first row again in its first, middle and
    last slot among hostile neighbours (NaN, huge, zero). The largest bucket that passes sets the class, and the
    buckets that give its bytes are kept.

    Args:
        graph: What to try.
        make: Random feeds for so many rows, every array batched on its first axis but for `coefficients`,
            which is batched on its second.
        max_rows: The largest bucket.
    """
    rows = make(max_rows, np.random.default_rng(0))
    answers: dict[int, list[Array]] = {}
    for size in bucket_sizes(max_rows):
        answer = graph.run(graph.outputs, _take(rows, np.arange(size)))
        if _is_steady(graph, rows, size, answer):
            answers[size] = answer
    if not answers:
        return Buckets(bucket_sizes(max_rows), certified=False)
    reference = answers[max(answers)]
    same = tuple(
        size
        for size, answer in sorted(answers.items())
        if all(got.tobytes() == want[:size].tobytes() for got, want in zip(answer, reference, strict=True))
    )
    if max(same) < max_rows:  # guided lanes and full batches must fit somewhere
        return Buckets(bucket_sizes(max_rows), certified=False)
    return Buckets(same, certified=True)


def _is_steady(graph: CompiledGraph, rows: Feeds, size: int, answer: list[Array]) -> bool:
    want = [output[0].tobytes() for output in answer]
    for slot, hostile in ((0, np.nan), (size // 2, 3e38), (size - 1, 0.0)):
        feeds = _take(rows, np.zeros(size, np.int64))
        for name, array in feeds.items():
            if array.dtype == np.float32:
                others = np.arange(size) != slot
                array[(slice(None), others) if name == "coefficients" else others] = hostile
        got = [output[slot].tobytes() for output in graph.run(graph.outputs, feeds)]
        if got != want:
            return False
    return True


def _take(rows: Feeds, which: NDArray[np.int64]) -> Feeds:
    taken = {name: array[:, which] if name == "coefficients" else array[which] for name, array in rows.items()}
    for name in ("slot", "lane", "row_u", "row_c"):  # these say which row belongs to which: every row to itself
        if name in taken:
            taken[name] = np.arange(len(which))
    return {name: np.ascontiguousarray(array) for name, array in taken.items()}
