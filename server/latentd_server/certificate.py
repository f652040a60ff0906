"""The certificate that lanes do not see each other: which sizes a graph may be called with, found by trial. Pure.

What is tried. A *trial* has random lanes, as many as the largest call holds, some of them guided (two rows) where
the model allows it. A call of every size is made twice over: once with every other lane made *hostile* (its floats
all NaN, all 3e38 or all 0, in turn), once with the others, so that every slot of every size holds a lane whose
neighbours are hostile, and which lane sits where changes with the size. Sizes below 4 are tried with four seatings.
The largest size, and any whose bytes differ from it, is also tried with no lane hostile.

What is found. A size is *steady* when its lanes give the same bytes among hostile and among harmless neighbours.
Steady sizes that agree on every byte of every lane both have tried are one *class*. Kernels are chosen by shape,
so a size that passes with random numbers is taken to pass with all; the server's self-checks watch that.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np

HOSTILE = (float("nan"), 3e38, 0.0)
_EVERY_SIZE_TO = 32
_SIZES_AN_OCTAVE, _WIDE_SIZES_AN_OCTAVE = 16, 4


class Promise(StrEnum):
    """What is promised of a graph's bytes, and what it takes."""

    BATCHED = "batched"  # lanes share calls of the certified sizes
    ALONE = "alone"  # lanes see each other, so every lane has a call to itself
    NOTHING = "nothing"  # the same call gave two answers, or nothing was asked for


@dataclass(frozen=True)
class Buckets:
    """The sizes a graph may be called with."""

    sizes: tuple[int, ...]  # rising

    def fit(self, rows: int) -> int:
        """The smallest size that holds so many rows."""
        return self.sizes[bisect_left(self.sizes, rows)]


@dataclass(frozen=True)
class Certificate:
    """What was found out about a graph."""

    promise: Promise
    buckets: Buckets  # to be used
    classes: tuple[tuple[int, ...], ...] = ()  # of equal bytes; that of the largest steady size first
    unsteady: tuple[int, ...] = ()  # sizes whose lanes see each other
    witness: str = ""  # SHA-256 of what the smallest bucket answered; see `witness`


@dataclass(frozen=True, slots=True)
class Seat:
    """One lane of a call: the trial's lane of this number, or a hostile one in its place."""

    lane: int
    hostile: float | None = None


class Trial(Protocol):
    """A graph with random lanes to try it with."""

    @property
    def rows(self) -> Sequence[int]:
        """Rows that each lane takes, 1 or 2; the largest call holds all of them together."""

    def run(self, size: int, seats: Sequence[Seat]) -> list[bytes]:
        """Make one call of exactly `size` rows with these lanes, and give each one's outputs."""


def bucket_sizes(max_rows: int, device_kind: str, usual_rows: int | None = None) -> tuple[int, ...]:
    """Sizes worth trying, rising, the limit itself among them.

    On the CPU every size up to 32, then sixteen an octave: a row of padding costs as much as any other. Beyond
    `usual_rows` it is four, for only networks that cost little have such calls, and trying costs more than padding. A
    GPU keeps a captured graph for every size and hardly notices padding: powers of two.
    """
    fine_to = max_rows if usual_rows is None else usual_rows
    sizes = {max_rows}
    size = 1
    while size < max_rows:
        sizes.add(size)
        if device_kind != "cpu":
            size *= 2
        elif size < _EVERY_SIZE_TO:
            size += 1
        else:
            octave = 2 ** (size.bit_length() - 1)
            size += octave // (_SIZES_AN_OCTAVE if size < fine_to else _WIDE_SIZES_AN_OCTAVE)
    return tuple(sorted(sizes))


def certify(trial: Trial, sizes: Sequence[int]) -> Certificate:
    """Try every size, which warms it up too, and choose what is served with.

    The class of the largest size is chosen, since full calls must fit. If the largest size is unsteady, lanes must
    go alone; if not even that gives the same bytes twice, nothing can be promised.
    """
    classes: list[_Class] = []
    unsteady = []
    for size in sorted(sizes, reverse=True):
        answers = _among_hostile(trial, size)
        if answers is not None and (found := next((each for each in classes if each.agrees(answers)), None)):
            found.sizes.append(size)
            continue
        harmless = _Class([size], _answers_of_all(trial, size))
        if answers is not None and harmless.agrees(answers):
            classes.append(harmless)
        else:
            unsteady.append(size)
    found_classes = tuple(tuple(sorted(each.sizes)) for each in classes)
    if found_classes and max(sizes) in found_classes[0]:
        promise, buckets = Promise.BATCHED, Buckets(found_classes[0])
    elif _repeats_alone(trial):
        promise, buckets = Promise.ALONE, Buckets(tuple(sorted(set(trial.rows))))
    else:
        promise, buckets = Promise.NOTHING, Buckets(tuple(sorted(sizes)))
    return Certificate(promise, buckets, found_classes, tuple(sorted(unsteady)), witness(trial, buckets))


def witness(trial: Trial, buckets: Buckets) -> str:
    """SHA-256 of the answer of the smallest bucket that is used: one cheap call that shows whether arithmetic is still
    what it was.
    """
    size = buckets.sizes[0]
    answers = _answers(trial, size, _seating(trial, size, 0))
    return hashlib.sha256(b"".join(answers[lane] for lane in sorted(answers))).hexdigest()


def warm_up(trial: Trial, buckets: Buckets) -> None:
    """Call every bucket once."""
    for size in buckets.sizes:
        _answers(trial, size, _seating(trial, size, 0))


@dataclass
class _Class:
    """Sizes of equal bytes, and those bytes by lane, as the largest of them gave them."""

    sizes: list[int]
    answers: Mapping[int, bytes] = field(repr=False)

    def agrees(self, answers: Mapping[int, bytes]) -> bool:
        """Whether these are the same bytes; a class knows every lane that fits into a size as small."""
        return all(self.answers[lane] == got for lane, got in answers.items())


def _seating(trial: Trial, size: int, first: int) -> list[int]:
    """Lanes that fill a call, counted round from the `first`; those that do not fit any more are left out."""
    lanes, left = [], size
    for lane in np.roll(np.arange(len(trial.rows)), -first).tolist():
        if trial.rows[lane] <= left:
            lanes.append(lane)
            left -= trial.rows[lane]
    return lanes


def _answers(trial: Trial, size: int, lanes: Sequence[int]) -> dict[int, bytes]:
    return dict(zip(lanes, trial.run(size, [Seat(lane) for lane in lanes]), strict=True))


def _answers_of_all(trial: Trial, size: int) -> dict[int, bytes]:
    """The bytes of every lane that fits into such a call, in as many calls as it takes."""
    answers: dict[int, bytes] = {}
    for lane, rows in enumerate(trial.rows):
        if rows <= size and lane not in answers:
            answers |= _answers(trial, size, _seating(trial, size, lane))
    return answers


def _among_hostile(trial: Trial, size: int) -> dict[int, bytes] | None:
    """Every seat's answer among hostile neighbours; None if a lane gave two answers."""
    answers: dict[int, bytes] = {}
    for turn in range(4 if size < 4 else 1):
        lanes = _seating(trial, size, (7 * size + turn) % len(trial.rows))
        for parity in (0, 1):
            seats = [
                Seat(lane, None if place % 2 == parity else HOSTILE[place // 2 % len(HOSTILE)])
                for place, lane in enumerate(lanes)
            ]
            if all(seat.hostile is not None for seat in seats):
                continue
            for seat, got in zip(seats, trial.run(size, seats), strict=True):
                if seat.hostile is None and answers.setdefault(seat.lane, got) != got:
                    return None
    return answers


def _repeats_alone(trial: Trial) -> bool:
    """Whether a few lanes, each in a call to itself, give their bytes again."""
    return all(
        trial.run(trial.rows[lane], [Seat(lane)]) == trial.run(trial.rows[lane], [Seat(lane)])
        for lane in range(min(4, len(trial.rows)))
    )
