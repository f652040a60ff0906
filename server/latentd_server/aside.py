"""A thread for arithmetic on large arrays that takes no device, so that the event loop goes on meanwhile."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from latentd_server.failures import OverloadedError

SMALL_BYTES = 32 * 2**10
"""What is drawn at once, on the event loop: it takes less than half a millisecond, and handing it over takes some."""
MOST_BYTES = 256 * 2**20
"""What may wait. Requests whose work the engine has accepted pass; their rows are in its backlog until they finish."""
_SHORTEST_RETRY_S, _UNKNOWN_RETRY_S = 0.05, 1.0


class Aside:
    """One thread, first come first served. Methods belong to the event loop's thread."""

    def __init__(self, most_bytes: int = MOST_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes = most_bytes
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, "latentd-aside")  # its thread begins with the first work
        self._held_bytes = 0
        self._bytes_per_s = 0.0  # of the last work; 0 before there was any
        self._idle = asyncio.Event()
        self._idle.set()

    def check_room(self, size: int) -> None:
        """Refuse work on so many bytes if much waits already. Alone, work of any size has room.

        Raises:
            OverloadedError: says when there will be room.
        """
        if size > SMALL_BYTES and self._held_bytes and self._held_bytes + size > self._most_bytes:
            excess = self._held_bytes + size - self._most_bytes
            retry_s = excess / self._bytes_per_s if self._bytes_per_s else _UNKNOWN_RETRY_S
            raise OverloadedError(
                self._held_bytes >> 20,
                self._most_bytes >> 20,
                max(_SHORTEST_RETRY_S, retry_s),
                of="the backlog of draws",
                unit="MiB",
            )

    def do(self, size: int, work: Callable[[], object], then: Callable[[Exception | None], None]) -> None:
        """Work on so many bytes, and say on the event loop when it is done, or what it raised.

        Little is done at once; what it raises is raised here.
        """
        if size <= SMALL_BYTES:
            work()
            then(None)
            return
        self._held_bytes += size
        self._idle.clear()
        loop = asyncio.get_running_loop()

        def timed() -> float:
            began = self._clock()
            work()
            return self._clock() - began

        def tell(done: Future[float]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is going down
                loop.call_soon_threadsafe(self._over, size, then, done)

        self._pool.submit(timed).add_done_callback(tell)

    def _over(self, size: int, then: Callable[[Exception | None], None], done: Future[float]) -> None:
        self._held_bytes -= size
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
