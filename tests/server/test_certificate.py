"""The certificate: sizes of equal bytes, found by trial."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from latentd_server.certificate import (
    Buckets,
    Promise,
    Seat,
    bucket_sizes,
    certify,
    warm_up,
    witness,
)

Array = Any
MAX = 8


class FakeTrial:
    """Rows through a function; every third lane takes two rows, the second one its negative, if `paired`."""

    def __init__(self, function: Callable[[Array], Array], paired: bool = False) -> None:
        rows = [2 if paired and lane % 3 == 1 else 1 for lane in range(MAX)]
        self.rows = rows[: int(np.searchsorted(np.cumsum(rows), MAX, side="right"))]
        self._function = function
        self._values = np.random.default_rng(0).standard_normal((len(self.rows), 5), np.float32)
        self.calls: list[tuple[int, list[Seat]]] = []

    def run(self, size: int, seats: Sequence[Seat]) -> list[bytes]:
        self.calls.append((size, list(seats)))
        x = np.zeros((size, 5), np.float32)
        second = len(seats)
        partners = {}
        for place, seat in enumerate(seats):
            x[place] = self._values[seat.lane] if seat.hostile is None else seat.hostile
            if self.rows[seat.lane] == 2:
                x[second], partners[place] = -x[place], second
                second += 1
        with np.errstate(all="ignore"):
            y = self._function(x)
        return [y[place].tobytes() + y[partners.get(place, place)].tobytes() for place in range(len(seats))]


def test_every_size_is_a_bucket_on_the_cpu() -> None:
    """Up to 32 nothing is ever padded, beyond by at most a sixteenth, and the limit is always there."""
    assert bucket_sizes(10, "cpu") == tuple(range(1, 11))
    sizes = bucket_sizes(1000, "cpu")
    assert sizes[:33] == (*range(1, 33), 34)
    assert sizes[-1] == 1000
    assert all(Buckets(sizes).fit(rows) <= rows * 17 / 16 for rows in range(1, 1001))


def test_beyond_the_usual_rows_sizes_are_coarser() -> None:
    """Only what costs little has calls of so many rows: at most a quarter is padded, and there are few to try."""
    sizes = bucket_sizes(1024, "cpu", 64)
    assert sizes[: len(bucket_sizes(64, "cpu"))] == bucket_sizes(64, "cpu")
    assert sizes[len(bucket_sizes(64, "cpu")) :][:5] == (80, 96, 112, 128, 160)
    assert sizes[-1] == 1024
    assert all(Buckets(sizes).fit(rows) <= rows * 5 / 4 for rows in range(1, 1025))
    assert bucket_sizes(64, "cpu", 64) == bucket_sizes(64, "cpu")
    assert bucket_sizes(64, "cpu", 8) == (*range(1, 33), 40, 48, 56, 64)


def test_buckets_of_a_gpu_are_few() -> None:
    """Powers of two, and the limit."""
    assert bucket_sizes(32, "cuda") == (1, 2, 4, 8, 16, 32)
    assert bucket_sizes(24, "cuda") == (1, 2, 4, 8, 16, 24)


@pytest.mark.parametrize("paired", [False, True])
def test_rows_that_do_not_see_each_other_are_certified(paired: bool) -> None:
    """An elementwise function gives equal bytes in every size, so all of them may be used."""
    found = certify(FakeTrial(np.tanh, paired), range(1, MAX + 1))
    assert (found.promise, found.buckets.sizes) == (Promise.BATCHED, tuple(range(1, MAX + 1)))
    assert (found.classes, found.unsteady) == ((found.buckets.sizes,), ())


def test_every_slot_of_every_size_is_tried_among_hostile_neighbours() -> None:
    """In each size every slot holds a live lane whose neighbours are NaN, huge or zero, all three of them."""
    trial = FakeTrial(np.tanh)
    certify(trial, range(1, MAX + 1))
    for size in range(2, MAX + 1):
        calls = [seats for tried, seats in trial.calls if tried == size]
        live = {place for seats in calls for place, seat in enumerate(seats) if seat.hostile is None and len(seats) > 1}
        assert live == set(range(size))
        for seats in calls:
            hostile = [seat.hostile is not None for seat in seats]
            assert not any(hostile) or all(one != other for one, other in pairwise(hostile))
    spoilers = {str(seat.hostile) for _, seats in trial.calls for seat in seats}
    assert spoilers == {"None", "nan", "3e+38", "0.0"}


def test_guided_lanes_are_tried_with_their_neighbours() -> None:
    """Lanes of two rows and of one sit in the same calls, in every size that holds both."""
    trial = FakeTrial(np.tanh, paired=True)
    certify(trial, range(1, MAX + 1))
    mixed = {size for size, seats in trial.calls if {trial.rows[seat.lane] for seat in seats} == {1, 2}}
    assert mixed == set(range(3, MAX + 1))
    assert any(size == 2 and [trial.rows[seat.lane] for seat in seats] == [2] for size, seats in trial.calls)


LEAKS = {
    "mean over the batch": lambda x: x - x.mean(axis=0),
    "scale over the batch": lambda x: np.round(x / np.abs(x).max()),
    "product with a mask": lambda x: x + 0 * x.sum(axis=0),
    "the row before": lambda x: x + np.roll(x, 1, axis=0),
    "the last row": lambda x: np.where(np.arange(len(x))[:, None] == len(x) - 2, x + x[-1], x),
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_rows_that_see_each_other_are_found_out(leak: Callable[[Array], Array]) -> None:
    """Whatever a row sees of another, lanes then have calls to themselves."""
    found = certify(FakeTrial(leak), range(1, MAX + 1))
    assert found.promise is Promise.ALONE
    assert found.buckets.sizes == (1,)
    assert MAX in found.unsteady


def test_guided_lanes_alone_take_calls_of_two() -> None:
    """Alone, a lane's own rows are the whole call."""
    found = certify(FakeTrial(LEAKS["mean over the batch"], paired=True), range(1, MAX + 1))
    assert (found.promise, found.buckets.sizes) == (Promise.ALONE, (1, 2))


def test_a_size_with_other_bytes_is_left_out() -> None:
    """Sizes whose bytes differ from the largest one's are not used; the others stay."""
    found = certify(FakeTrial(lambda x: x / 2 + np.float32(len(x) < 3)), range(1, MAX + 1))
    assert found.buckets.sizes == (3, 4, 5, 6, 7, 8)
    assert found.classes == ((3, 4, 5, 6, 7, 8), (1, 2))


def test_a_slot_with_other_bytes_makes_its_size_unsteady() -> None:
    """It is enough that one slot of one size computes differently, wherever it is."""

    def tail(x: Array) -> Array:
        return x + np.float32((np.arange(len(x)) == 5) & (len(x) == 7))[:, None]

    found = certify(FakeTrial(tail), range(1, MAX + 1))
    assert found.buckets.sizes == (1, 2, 3, 4, 5, 6, 8)
    assert found.promise is Promise.BATCHED


def test_a_graph_that_does_not_repeat_itself_promises_nothing() -> None:
    """Where the same call gives two answers, not even lanes alone can be promised."""
    rng = np.random.default_rng()
    found = certify(FakeTrial(lambda x: x + rng.random()), range(1, MAX + 1))
    assert found.promise is Promise.NOTHING
    assert found.buckets.sizes == tuple(range(1, MAX + 1))


def test_a_witness_tells_arithmetics_apart() -> None:
    """It takes one call of the smallest size, and an ulp changes it."""
    trial, buckets = FakeTrial(np.tanh), Buckets((1, 4))
    assert witness(trial, buckets) == witness(FakeTrial(np.tanh), buckets) == certify(trial, (1, 4, 8)).witness
    assert witness(FakeTrial(lambda x: np.nextafter(np.tanh(x), np.float32(2))), buckets) != witness(trial, buckets)
    trial.calls.clear()
    witness(trial, buckets)
    assert [size for size, _ in trial.calls] == [1]


def test_warming_up_calls_every_bucket() -> None:
    """And no other size."""
    trial = FakeTrial(np.tanh)
    warm_up(trial, Buckets((2, 8)))
    assert [size for size, _ in trial.calls] == [2, 8]
