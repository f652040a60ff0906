"""A second thread for the host work of one call while the call before is on the device."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Found = TypeVar("Found")


class Lookahead(Generic[Found]):
    """Does one piece of work at a time, between `begin` and `end`, while its owner waits for something else.

    What both touch is the worker's from `begin` to `end` and the owner's at all other times; they need no lock.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], Found] | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[Found | BaseException] = queue.SimpleQueue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[], Found]) -> None:
        """Have the thread work."""
        self._over.clear()
        self._work.put(work)

    def until_over(self, seconds: float) -> None:
        """For the worker: wait so long, or until the owner has come back if that is sooner."""
        if seconds > 0:
            self._over.wait(seconds)

    def over(self) -> None:
        """For the owner: what it waited for is over."""
        self._over.set()

    def end(self) -> Found:
        """Wait for the work, and take what it gave or raised."""
        self._over.set()
        found = self._found.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                self._found.put(work())
            except BaseException as error:  # the owner's to deal with
                self._found.put(error)
