"""How the device thread hands events to the event loop: all of a batch in one hop, and never far ahead of it."""

import asyncio
import threading
from collections.abc import Callable

from latentd_server.job import Event, Finished, Preview

Events = list[tuple[int, Event]]
"""By job."""

LIMIT_BYTES = 2**20
EVENT_BYTES = 1024
"""What an event takes beside its arrays, about."""
_LOOK_S = 1.0
"""Who waits looks so often whether the loop is still there."""


def weight(events: Events) -> int:
    """Bytes that events take, about."""
    size = EVENT_BYTES * len(events)
    for _, event in events:
        if isinstance(event, Finished):
            size += sum(values.nbytes for values in event.outputs.values())
        elif isinstance(event, Preview):
            size += event.estimates.nbytes
    return size


class HandBack:
    """The way from the device thread to the event loop. What is on it is bounded, whatever holds the loop up: one that
    is behind learns late that a reader is slow, and a call of a network can be shorter than writing down what it gave.

    So that the device need not wait for the loop as a rule, the newest batch may be on its way beside the limit. Who
    waits does so before a batch is begun, when no time is taken and nobody has a seat yet.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Events], None], limit_bytes: int = LIMIT_BYTES
    ) -> None:
        """`deliver` is called on the loop, with events in the order they were handed over."""
        self._loop = loop
        self._deliver = deliver
        self._limit_bytes = limit_bytes
        self._sent_bytes = 0  # ever; the device's side
        self._newest_bytes = 0  # of the last events; the device's side
        self._delivered_bytes = 0  # ever; the loop's side
        self._moved = threading.Event()
        self._waits = False  # the device's side

    @property
    def on_the_way_bytes(self) -> int:
        """What was handed over and is not delivered."""
        return self._sent_bytes - self._delivered_bytes

    @property
    def has_room(self) -> bool:
        """Whether another batch may be begun."""
        return self.on_the_way_bytes - self._newest_bytes <= self._limit_bytes

    @property
    def is_behind(self) -> bool:
        """Whether so much is on its way that what there is should be handed over before another batch is begun."""
        return self.on_the_way_bytes > self._limit_bytes

    @property
    def waiting(self) -> bool:
        """Whether the device's side waits for room, and must."""
        return self._waits and not self.has_room

    def wait_for_room(self) -> None:
        """For the device's side, before it begins a batch: wait for the loop, unless that is closed."""
        while not self.has_room and not self._loop.is_closed():
            self._moved.clear()
            self._waits = True
            if self.waiting:  # still, now that what moves will be noticed
                self._moved.wait(_LOOK_S)
        self._waits = False

    def hand(self, events: Events) -> None:
        """Send events off. One thread at a time may do so; it never waits.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._newest_bytes = weight(events)
        self._sent_bytes += self._newest_bytes
        self._loop.call_soon_threadsafe(self._arrive, events, self._newest_bytes)

    def _arrive(self, events: Events, size: int) -> None:
        try:
            self._deliver(events)
        finally:
            self._delivered_bytes += size
            if not self._moved.is_set():
                self._moved.set()
