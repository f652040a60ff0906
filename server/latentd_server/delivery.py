"""What waits to be written to one reader. Results keep their order and are never dropped; of previews only the newest
look at each sample is kept, so that a slow reader skips frames and loses nothing.

gRPC itself runs some megabytes ahead of a reader that has stopped; the outbox bounds what waits behind that. It
says when it is full, so that the owner stops making more, and when there is room again. If it is full and too little is
read for too long, it gives the reader up: what sits out for one reader counts against everybody.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import Message

from latentd_server.failures import ReaderTooSlowError
from latentd_server.job import Array, Preview
from latentd_server.wire import Written

Source = Callable[[], list[Message]]
"""Makes messages when it is their turn; for what may be superseded until then."""


class Timer(Protocol):
    """What a `CallLater` returns."""

    def cancel(self) -> None:
        """Do not call."""


CallLater = Callable[[float, Callable[[], None]], Timer]
"""As the event loop's `call_later`."""

MESSAGE_BYTES = 2048
"""What a message takes in memory beside its payload, about; of small samples it is most of what waits."""
LEAST_SHARE = 8
"""Of what may wait for a reader, it must take this part in every `reader_timeout` while more than that waits."""
_PACK_BYTES = 2**20
_PACK_MESSAGES = 256
"""How much is packed into one message, about: enough to share its cost, and little to wait for."""


class Outbox:
    """One reader's messages. Belongs to the event loop; one task reads it."""

    def __init__(
        self,
        limit_bytes: int,
        limit_messages: int,
        on_full: Callable[[bool], None],
        *,
        reader_timeout_s: float,
        call_later: CallLater,
    ) -> None:
        """`on_full` is told True when more than the limit waits, and False once half of it is gone.

        `reader_timeout_s` is how long the reader may take over an eighth of the limit while it is full; 0 is for ever.
        """
        self._limit_bytes = limit_bytes
        self._limit_messages = limit_messages
        self._on_full = on_full
        self._waiting: deque[tuple[Message | Written | Source, int]] = deque()
        self._bytes = 0  # waiting, or being written
        self._writing = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._reader_timeout_s = reader_timeout_s
        self._call_later = call_later
        self._delivery: asyncio.Timeout | None = None
        self._timer: Timer | None = None
        self._hurried = False
        self._least_bytes = limit_bytes // LEAST_SHARE
        self._taken = 0  # bytes, since the timer was set
        self.full = False
        self.pack: Callable[[list[Any]], Any] | None = None
        """Makes one message of several that wait; None for a reader that takes them one by one."""

    def put(self, message: Message | Written, size: int = 0) -> None:
        """Add a message of about `size` bytes."""
        self._waiting.append((message, size))
        self._bytes += size
        self._measure()
        self._wake()

    def put_source(self, source: Source) -> None:
        """Add messages that are made when their turn comes."""
        self._waiting.append((source, 0))
        self._measure()
        self._wake()

    def close(self, failure: BaseException | None = None) -> None:
        """Nothing more will come; reading ends behind what waits, with `failure` if there is one."""
        if not self._closed:
            self._closed = True
            self._failure = failure
            self._wake()

    def let_go(self) -> None:
        """The call is over: drop what waits and tell nobody. Owner and outbox would hold each other for nothing."""
        self._on_full = _tell_nobody
        self._waiting.clear()

    def hurry(self) -> None:
        """Give the reader up too if it is slow while little waits: all is there, and the server is to go."""
        self._hurried = True
        self._watch()

    async def room(self) -> None:
        """Wait until little enough waits to take on more work for this reader."""
        await self._room.wait()

    async def deliver(self, write: Callable[[Any], Awaitable[None]]) -> None:
        """Write every message, each when the one before it is written, until nothing more will come.

        Raises:
            ReaderTooSlowError: it was full, or hurried, and too little was read for too long; what waits is dropped.
            Exception: what it was closed with.
        """
        try:
            async with asyncio.timeout(None) as delivery:
                self._delivery = delivery
                async for message in self:
                    await write(message)
        except TimeoutError:
            if not delivery.expired():
                raise
            self._waiting.clear()
            raise ReaderTooSlowError(self._reader_timeout_s) from None
        finally:
            self._delivery = None
            self._watch()

    def __aiter__(self) -> "Outbox":
        return self

    async def __anext__(self) -> Any:
        """The next message. Asking for it says that the one before it has been written."""
        if self._writing:
            self._bytes -= self._writing
            self._taken += self._writing
            self._writing = 0
            self._measure()
        if self._timer is None or self._taken >= self._least_bytes:
            self._watch()
        while True:
            if not self._waiting:
                if self._closed:
                    raise self._failure or StopAsyncIteration
                self._arrival = asyncio.get_running_loop().create_future()
                await self._arrival
                continue
            message, size = self._waiting.popleft()
            if not isinstance(message, Message | Written):
                self._waiting.extendleft((made, 0) for made in reversed(message()))
                continue
            if self.pack is not None and self._waiting:
                message, size = self._packed(message, size)
            self._writing = size
            self._measure()
            return message

    def _packed(self, first: Message | Written, size: int) -> tuple[Any, int]:
        """One message of the first and those that wait behind it, as far as they are made already."""
        messages: list[Message | Written] = [first]
        packed = size or first.ByteSize()  # what was made just now is counted nowhere else
        while self._waiting and len(messages) < _PACK_MESSAGES:
            message, its_size = self._waiting[0]
            if not isinstance(message, Message | Written):
                break
            packed += its_size or message.ByteSize()
            if packed > _PACK_BYTES:
                break
            self._waiting.popleft()
            messages.append(message)
            size += its_size
        assert self.pack is not None
        return (self.pack(messages) if len(messages) > 1 else first), size

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _watch(self) -> None:
        """Give the reader its time from now on; all the time there is, unless somebody else waits for it."""
        self._taken = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (self.full or self._hurried) and self._delivery is not None and self._reader_timeout_s:
            self._timer = self._call_later(self._reader_timeout_s, self._give_up)

    def _give_up(self) -> None:
        if self._delivery is not None:
            self._delivery.reschedule(0)  # long ago

    def _measure(self) -> None:
        if not self.full and self._bytes > self._limit_bytes:
            self.full = True
            self._watch()
            self._on_full(True)
        elif self.full and self._bytes * 2 <= self._limit_bytes:
            self.full = False
            self._watch()
            self._on_full(False)
        if self.full or len(self._waiting) > self._limit_messages:
            self._room.clear()
        else:
            self._room.set()


def _tell_nobody(full: bool) -> None:
    """Where nobody makes messages any more."""


class Previews:
    """The newest look at each sample under way."""

    def __init__(self) -> None:
        self._looks: list[Preview] = []

    def add(self, look: Preview) -> bool:
        """Keep a look in place of older ones at the same lanes; whether there were none at all before."""
        first = not self._looks
        self.drop(look.lanes)
        self._looks.append(look)
        return first

    def drop(self, lanes: Array) -> None:
        """Forget looks at lanes: they are finished, or there are newer ones."""
        kept = []
        for look in self._looks:
            stays = ~np.isin(look.lanes, lanes)
            if stays.all():
                kept.append(look)
            elif stays.any():
                kept.append(Preview(look.lanes[stays], look.completed_steps, look.total_steps, look.estimates[stays]))
        self._looks = kept

    def take(self) -> list[Preview]:
        """Take all of them out."""
        looks, self._looks = self._looks, []
        return looks
