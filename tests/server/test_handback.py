"""The hand-back from the device thread to the event loop."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentd_server.failures import DrainingError
from latentd_server.handback import EVENT_BYTES, Events, HandBack, weight
from latentd_server.job import Cost, Failed, Finished, Preview

LIMIT = 10_000
PATIENCE_S = 30.0


class Loop:
    """Keeps what it is asked to call until it is told to turn."""

    def __init__(self) -> None:
        self.soon: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.closed = False

    def call_soon_threadsafe(self, callback: Callable[..., None], *arguments: Any) -> None:
        if self.closed:
            raise RuntimeError("closed")
        self.soon.put(lambda: callback(*arguments))

    def is_closed(self) -> bool:
        return self.closed

    def turn(self) -> None:
        """Make one call, of the oldest; waits for it if there is none yet."""
        self.soon.get(timeout=PATIENCE_S)()


class Scene:
    """A hand-back with a loop of its own, and a thread that hands over what it is given."""

    def __init__(self, deliver: Callable[[Events], None] | None = None) -> None:
        self.loop = Loop()
        self.delivered: list[Events] = []
        way = deliver or self.delivered.append
        self.hand_back = HandBack(cast(asyncio.AbstractEventLoop, self.loop), way, LIMIT)
        self.handed = 0
        self.failure: RuntimeError | None = None
        self._thread: threading.Thread | None = None

    def hand(self, *batches: Events) -> None:
        """Begin to hand them over."""

        def run() -> None:
            try:
                for events in batches:
                    self.hand_back.wait_for_room()
                    self.hand_back.hand(events)
                    self.handed += 1
            except RuntimeError as failure:
                self.failure = failure

        self._thread = threading.Thread(target=run, daemon=True)  # a test that fails leaves it waiting
        self._thread.start()

    @property
    def at_rest(self) -> bool:
        """Whether the thread waits for the loop, or is done."""
        assert self._thread is not None
        return self.hand_back.waiting or not self._thread.is_alive()

    def settle(self) -> None:
        """Until the thread can do no more."""
        rest = threading.Event()
        for _ in range(int(PATIENCE_S / 0.001)):
            if self.at_rest:
                return
            rest.wait(0.001)
        raise AssertionError("the thread never came to rest")

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


def batch(size: int, job: int = 1) -> Events:
    """One event that weighs so much."""
    samples = np.zeros(size - EVENT_BYTES, np.uint8)
    return [(job, Finished(np.arange(1), {"samples": samples}, Cost(), last=False))]


@pytest.fixture
def scene() -> Scene:
    """Nothing has been handed over yet."""
    return Scene()


def test_a_loop_that_is_behind_holds_the_thread_up(scene: Scene) -> None:
    """Once more than the limit is on the way nothing is added, until enough of it has been delivered."""
    scene.hand(*[batch(4_000) for _ in range(8)])
    scene.settle()
    assert scene.handed == 4  # the newest, and 12,000 bytes
    scene.loop.turn()
    scene.settle()
    assert scene.handed == 5
    for _ in range(7):
        scene.loop.turn()
    scene.join()
    assert len(scene.delivered) == 8
    assert scene.hand_back.on_the_way_bytes == 0


def test_one_batch_may_be_larger_than_the_limit(scene: Scene) -> None:
    """It goes at once and the next waits for it, so that results that are merely large do not hold the device up."""
    scene.hand(batch(LIMIT // 2), batch(10 * LIMIT), batch(10 * LIMIT), batch(EVENT_BYTES))
    scene.settle()
    assert scene.handed == 3
    scene.loop.turn()
    scene.settle()
    assert scene.handed == 3
    scene.loop.turn()
    scene.join()
    assert scene.handed == 4


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(EVENT_BYTES, 3 * LIMIT), min_size=1, max_size=30))
def test_order_and_bound_hold_for_any_sizes(sizes: list[int]) -> None:
    """Everything arrives once, in order, and beside the two newest batches never more than the limit is on the way."""
    scene = Scene()
    scene.hand(*[batch(size, job) for job, size in enumerate(sizes)])
    for count in range(len(sizes)):
        scene.settle()
        waiting = sizes[count : scene.handed]
        assert sum(waiting[:-2]) <= LIMIT
        assert scene.handed == len(sizes) or sum(waiting[:-1]) > LIMIT  # it does not wait for nothing
        scene.loop.turn()
    scene.join()
    assert [events[0][0] for events in scene.delivered] == list(range(len(sizes)))


def test_a_delivery_that_fails_makes_room_all_the_same() -> None:
    """What a loop could not deliver is not on the way any more; the failure is the loop's to report."""

    def fail(events: Events) -> None:
        raise ValueError("no such sink")

    scene = Scene(fail)
    scene.hand(batch(2 * LIMIT), batch(2 * LIMIT), batch(2 * LIMIT))
    for _ in range(3):
        with pytest.raises(ValueError, match="no such sink"):
            scene.loop.turn()
    scene.join()
    assert scene.hand_back.on_the_way_bytes == 0


def test_a_closed_loop_is_waited_for_by_nobody(scene: Scene) -> None:
    """A thread that waits when the loop closes goes on, and is told."""
    scene.hand(batch(2 * LIMIT), batch(LIMIT), batch(LIMIT))
    scene.settle()
    assert scene.handed == 2
    scene.loop.closed = True
    scene.join()
    assert scene.handed == 2
    assert isinstance(scene.failure, RuntimeError)


def test_events_weigh_what_they_hold() -> None:
    """Results and looks by their arrays, and something for each event."""
    floats = np.zeros((3, 5), np.float32)
    finished = Finished(np.arange(3), {"samples": floats, "latents": floats[:, :2]}, Cost(), last=True)
    look = Preview(np.arange(3), 1, 2, floats)
    assert weight([(1, finished), (2, look), (3, Failed(DrainingError()))]) == 3 * EVENT_BYTES + 60 + 24 + 60
