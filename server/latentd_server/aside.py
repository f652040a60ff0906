"""A thread for arithmetic on large arrays that takes no device, so that the event loop goes on meanwhile."""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from latentd_server.failures import OverloadedError

SMALL_BYTES = 32 * 2**10
"""What is drawn at once, on the event loop: less than a tenth of a millisecond, and handing over takes as long."""
MOST_BYTES = 256 * 2**20
"""What may wait. Requests whose work the engine has accepted pass; their rows are in its backlog until they finish."""
_SHORTEST_RETRY_S, _UNKNOWN_RETRY_S = 0.05, 1.0
_MOST_AHEAD = 2
"""Work that the thread has, or is about to begin when it is done; whose turn comes after that is still open."""

_Then = Callable[[Exception | None], None]


class Aside:
    """One thread, for callers in turns, each first come first served. Methods belong to the event loop's thread."""

    def __init__(self, most_bytes: int = MOST_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes = most_bytes
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, "latentd-aside")  # its thread begins with the first work
        self._waiting: dict[str, deque[tuple[int, Callable[[], object], _Then]]] = {}  # by caller; whose turn is first
        self._ahead = 0
        self._held_bytes = 0
        self._held_by: Counter[str] = Counter()
        self._bytes_per_s = 0.0  # of the last work; 0 before there was any
        self._idle = asyncio.Event()
        self._idle.set()

    def check_room(self, caller: str, size: int) -> None:
        """Refuse work on so many bytes if much waits already. Who has none may always bring one, of any size.

        Raises:
            OverloadedError: says when there will be room.
        """
        if size > SMALL_BYTES and self._held_by[caller] and self._held_bytes + size > self._most_bytes:
            excess = self._held_bytes + size - self._most_bytes
            retry_s = excess / self._bytes_per_s if self._bytes_per_s else _UNKNOWN_RETRY_S
            raise OverloadedError(
                self._held_bytes >> 20,
                self._most_bytes >> 20,
                max(_SHORTEST_RETRY_S, retry_s),
                of="the backlog of draws",
                unit="MiB",
            )

    def do(self, caller: str, size: int, work: Callable[[], object], then: _Then) -> None:
        """Work on so many bytes, and say on the event loop when it is done, or what it raised.

        Little is done at once; what it raises is raised here.
        """
        if size <= SMALL_BYTES:
            work()
            then(None)
            return
        self._held_bytes += size
        self._held_by[caller] += size
        self._idle.clear()
        self._waiting.setdefault(caller, deque()).append((size, work, then))
        self._begin()

    def _begin(self) -> None:
        """Give the thread something to do, of the callers whose turn it is."""
        while self._waiting and self._ahead < _MOST_AHEAD:
            self._ahead += 1
            caller = next(iter(self._waiting))
            queue = self._waiting.pop(caller)
            size, work, then = queue.popleft()
            if queue:
                self._waiting[caller] = queue  # behind the others
            self._submit(work, partial(self._over, caller, size, then))

    def _submit(self, work: Callable[[], object], over: Callable[[Future[float]], None]) -> None:
        loop = asyncio.get_running_loop()

        def timed() -> float:
            began = self._clock()
            work()
            return self._clock() - began

        def tell(done: Future[float]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is going down
                loop.call_soon_threadsafe(over, done)

        self._pool.submit(timed).add_done_callback(tell)

    def _over(self, caller: str, size: int, then: _Then, done: Future[float]) -> None:
        self._ahead -= 1
        self._begin()
        self._held_bytes -= size
        self._held_by[caller] -= size
        if not self._held_by[caller]:
            del self._held_by[caller]
        failure = done.exception()
        assert failure is None or isinstance(failure, Exception)
        if failure is None:
            self._bytes_per_s = size / max(done.result(), 1e-9)
        if not self._held_bytes:
            self._idle.set()
        then(failure)

    async def idle(self) -> None:
        """Wait until nothing is left to do."""
        await self._idle.wait()
