"""The hand-over from the event loop to the device thread."""

import asyncio
import queue
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentd_server.handover import BUSIEST_S, BUSY_TURNS, LONELY, LONGEST_S, QUIET_TURNS, Command, HandOver

FULL = 100
"""Lanes that fill a batch."""


class Loop:
    """Turns when it is told to; `call_soon` is all there is of an event loop."""

    def __init__(self) -> None:
        self._soon: deque[Callable[[], None]] = deque()

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def turn(self) -> None:
        for _ in range(len(self._soon)):
            self._soon.popleft()()

    @property
    def resting(self) -> bool:
        return not self._soon


class Scene:
    """A hand-over with short calls, a loop and a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.loop = Loop()
        self._queue: queue.SimpleQueue[list[Command]] = queue.SimpleQueue()
        self.hand_over = HandOver(cast(asyncio.AbstractEventLoop, self.loop), lambda: self.now_s, self._queue)
        self.hand_over.calls_are_short = True

    def taken(self) -> list[list[Any]]:
        lists: list[list[Any]] = []
        while not self._queue.empty():
            lists.append(self._queue.get())
        return lists

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.loop.turn()


@pytest.fixture
def scene() -> Scene:
    """Nothing has been asked for yet."""
    return Scene()


def command() -> Command:
    """One that can be told from others."""
    return lambda: None


def test_jobs_that_follow_each_other_closely_ride_together(scene: Scene) -> None:
    """Overlapping jobs of short calls are handed over when none has come for so many turns, not before."""
    commands = [command() for _ in range(5)]
    for each in commands:
        scene.hand_over.submit(each, 1 / FULL, alone=False)
        scene.turns(QUIET_TURNS // 2)
        assert not scene.taken()
    scene.turns(QUIET_TURNS + 1)
    assert scene.taken() == [commands]
    assert scene.loop.resting


@pytest.mark.parametrize(("turns_between", "longest_s"), [(BUSY_TURNS - 1, BUSIEST_S), (BUSY_TURNS + 1, LONGEST_S)])
def test_no_job_waits_longer_than_the_bound(scene: Scene, turns_between: int, longest_s: float) -> None:
    """Jobs that never stop coming do not hold back the first; close behind one another they may gather for longer."""
    step_s = longest_s / 10
    gathered = 0
    while not (taken := scene.taken()):
        scene.hand_over.submit(command(), 1 / 10**6, alone=False)
        gathered += 1
        scene.turns(turns_between)
        scene.now_s += step_s
    assert [len(each) for each in taken] == [gathered]
    assert longest_s <= scene.now_s <= longest_s + 2 * step_s


def test_a_full_batch_does_not_wait(scene: Scene) -> None:
    """Jobs that fill a batch together are handed over at the end of the turn, and the next ones gather anew."""
    scene.hand_over.submit(command(), (FULL - 1) / FULL, alone=False)
    scene.turns(1)
    assert not scene.taken()
    scene.hand_over.submit(command(), 1 / FULL, alone=False)
    scene.turns(1)
    assert [len(each) for each in scene.taken()] == [2]
    scene.hand_over.submit(command(), (FULL - 1) / FULL, alone=False)
    scene.turns(1)
    assert not scene.taken()


@pytest.mark.parametrize(
    "shares",
    [(1 / 2, 1 / 2), (1 / 3, 1 / 3, 1 / 3), (1 / 2, 3 / 8, 1 / 8), (0.1,) * 10, (1 / 64,) * 32 + (1 / 512,) * 256],
    ids=["halves", "thirds", "unequal", "tenths", "of two sizes"],
)
def test_shares_of_different_graphs_add_up(scene: Scene, shares: tuple[float, ...]) -> None:
    """Jobs whose graphs have batches of different sizes are waited for until they fill one together, and not longer;
    nothing of it counts for those that come after.
    """
    for _ in range(2):
        for share in shares[:-1]:
            scene.hand_over.submit(command(), share, alone=False)
            scene.turns(1)
            assert not scene.taken()
        scene.hand_over.submit(command(), shares[-1], alone=False)
        assert not scene.taken(), "what comes in the same turn still rides along"
        scene.turns(1)
        assert [len(each) for each in scene.taken()] == [len(shares)]
    scene.turns(1)
    assert scene.loop.resting


def test_a_job_that_fills_a_batch_or_more_goes_at_once(scene: Scene) -> None:
    """And takes along those that waited; half of a batch of a graph whose batches are twice as wide is kept."""
    for share in (1.0, 2.5):
        scene.hand_over.submit(command(), share, alone=False)
        scene.turns(1)
        assert [len(each) for each in scene.taken()] == [1]
    scene.hand_over.submit(command(), 0.5, alone=False)
    scene.turns(QUIET_TURNS)
    assert not scene.taken()
    scene.hand_over.submit(command(), 1.0, alone=False)
    scene.turns(1)
    assert [len(each) for each in scene.taken()] == [2]


def test_long_calls_are_not_waited_for(scene: Scene) -> None:
    """Where calls are long a job is handed over at the end of the turn it came in, with all that came in it."""
    scene.hand_over.calls_are_short = False
    scene.hand_over.submit(command(), 1 / FULL, alone=False)
    scene.hand_over.submit(command(), 1 / FULL, alone=False)
    scene.turns(1)
    assert [len(each) for each in scene.taken()] == [2]


def test_a_caller_that_is_alone_waits_for_nobody(scene: Scene) -> None:
    """After some jobs one after another each is handed over at once, until two overlap."""
    for _ in range(LONELY):
        scene.hand_over.submit(command(), 1 / FULL, alone=True)
        scene.turns(QUIET_TURNS + 2)
    scene.taken()
    scene.hand_over.submit(command(), 1 / FULL, alone=True)
    scene.turns(1)
    assert [len(each) for each in scene.taken()] == [1]
    scene.hand_over.submit(command(), 1 / FULL, alone=False)
    scene.turns(1)
    assert not scene.taken()


def test_a_cancel_is_not_kept_waiting(scene: Scene) -> None:
    """What is no job goes at the end of the turn and takes along what waited before it, in order."""
    job, cancel = command(), command()
    scene.hand_over.submit(job, 1 / FULL, alone=False)
    scene.turns(3)
    scene.hand_over.tell(cancel)
    scene.turns(1)
    assert scene.taken() == [[job, cancel]]


@given(st.lists(st.sampled_from(["job", "lonely job", "tell", "turn", "late", "short", "long"]), max_size=80))
def test_nothing_is_lost_and_order_is_kept(acts: list[str]) -> None:
    """Whatever happens, every command comes out once, in order, and then the loop is left in peace."""
    scene, asked = Scene(), []
    for act in acts:
        if act in {"job", "lonely job", "tell"}:
            asked.append(command())
            if act == "tell":
                scene.hand_over.tell(asked[-1])
            else:
                scene.hand_over.submit(asked[-1], 1 / FULL, alone=act == "lonely job")
        elif act == "late":
            scene.now_s += LONGEST_S / 3
        elif act == "turn":
            scene.turns(1)
        else:
            scene.hand_over.calls_are_short = act == "short"
    scene.turns(2 * QUIET_TURNS)
    assert [each for commands in scene.taken() for each in commands] == asked
    assert scene.loop.resting
