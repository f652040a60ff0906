"""Sharing rows out by weight. Pure.

Every claimant has a clock, `served`: the rows it was given while it had to share, divided by its weight. Sharing by
weight is keeping the clocks together (start-time fair queueing: Goyal, Vin and Cheng 1996). Rows are poured as water
is into vessels as wide as the weights: to those whose clock is behind first, and to nobody more than it wants.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Clock(Protocol):
    """Something rows are shared out to."""

    served: float  # rows by weight
    weight: float


class Claim(NamedTuple):
    """How far somebody's clock stands, how slow it runs, and what it could use now."""

    served: float
    weight: float
    wanted: float


def level(rows: float, claims: Sequence[Claim]) -> float:
    """The clock that everybody reaches who wants more, if rows are divisible."""
    edges = [(served, weight) for served, weight, _ in claims]
    edges += [(served + wanted / weight, -weight) for served, weight, wanted in claims]
    edges.sort()
    clock, width, left = edges[0][0], 0.0, float(rows)
    for point, change in edges:
        poured = width * (point - clock)
        if poured >= left:
            return clock + left / width if width > 0 else clock
        left -= poured
        clock = point
        width += change
    return clock


def divide(rows: int, claims: Sequence[Claim]) -> list[int]:
    """Whole rows for each claim: `rows` of them together, or as many as are wanted if that is less.

    Clocks of those who want more end together, up to one row; of what does not divide, who is behind gets the first.
    """
    reached = level(rows, claims) + 1e-9
    given = [
        int(min(wanted, (reached - served) * weight)) if reached > served else 0 for served, weight, wanted in claims
    ]
    left = rows - sum(given)
    if left > 0:
        clocks = sorted(
            (served + got / weight, index)
            for index, ((served, weight, wanted), got) in enumerate(zip(claims, given, strict=True))
            if got < wanted
        )
        for _, index in clocks[:left]:
            given[index] += 1
    return given


def settle(clocks: Sequence[Clock], wanted: Sequence[int], taken: Sequence[int], level: float) -> float:
    """Move the clocks on after rows were taken; returns where newcomers start, which was `level` before.

    Who got all that it wanted keeps no claim to the rest of its share: its clock is put where the hungry stand.
    """
    hungry = math.inf
    for clock, most, rows in zip(clocks, wanted, taken, strict=True):
        if rows:
            clock.served += rows / clock.weight
        if rows < most and clock.served < hungry:
            hungry = clock.served
    if hungry < math.inf:
        level = max(level, hungry)
        for clock in clocks:
            if clock.served < level:
                clock.served = level
    return level
