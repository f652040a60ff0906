"""How the event loop hands commands to the device thread: together, where that makes better batches."""

import asyncio
import queue
from collections.abc import Callable

Command = Callable[[], None] | None

QUIET_TURNS = 32
"""Turns of the event loop without another job after which no more are expected. gRPC accepts a call every few turns, so
calls that arrive together are spread over some."""
LONGEST_S = 0.004
"""No job waits for others longer than this, unless they come close behind one another."""
BUSY_TURNS, BUSIEST_S = 8, 0.016
"""With so few turns between jobs the event loop has hardly time for anything else: they may gather for that long."""
_FULL = 1 - 1e-6  # of a batch: sums of shares are rounded
LONELY = 8
"""Jobs in a row, each submitted while there was no other, after which a caller counts as alone."""


class HandOver:
    """Puts commands into a queue as lists, in order. All of it belongs to the event loop's thread.

    What one turn of the loop asks for goes together always. Where calls of the network are short, waking a thread for a
    job costs more than its call does, so while jobs overlap they are kept until none has come for some turns of the
    loop, or a batch is full. Long calls collect jobs by themselves, and a caller that is alone waits for nobody.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        to: queue.SimpleQueue[list[Command]],
    ) -> None:
        self.calls_are_short = False  # the device thread says so
        self._loop = loop
        self._clock = clock
        self._to = to
        self._commands: list[Command] = []
        self._since_s = 0.0  # when the first of them came
        self._jobs = 0  # among them
        self._filled = 0.0  # batches that those fill, whatever graphs they are for
        self._jobs_seen = 0  # at the last turn
        self._turns_left = 0
        self._lonely = LONELY  # jobs in a row that were alone; at first nobody has company

    def tell(self, command: Command) -> None:
        """Hand a command over at the end of this turn, and all before it."""
        self._add(command)
        self._turns_left = 0

    def submit(self, command: Command, share: float, *, alone: bool) -> None:
        """Hand over a command that brings a job; `share` is the part of a batch that it fills, 1 or more for all of it,
        and `alone` whether there is no other job.
        """
        self._lonely = self._lonely + 1 if alone else 0
        self._jobs += 1
        self._filled += share
        self._add(command)
        if self._filled > _FULL:
            self._turns_left = 0

    def _add(self, command: Command) -> None:
        if not self._commands:
            self._since_s = self._clock()
            self._jobs_seen, self._turns_left = 0, QUIET_TURNS
            self._loop.call_soon(self._turn)
        self._commands.append(command)

    def _turn(self) -> None:
        if self._turns_left and self.calls_are_short and self._lonely < LONELY:
            self._turns_left = QUIET_TURNS if self._jobs > self._jobs_seen else self._turns_left - 1
            self._jobs_seen = self._jobs
            is_busy = self._turns_left > QUIET_TURNS - BUSY_TURNS
            if self._clock() - self._since_s < (BUSIEST_S if is_busy else LONGEST_S):
                self._loop.call_soon(self._turn)
                return
        commands, self._commands, self._jobs, self._filled = self._commands, [], 0, 0.0
        self._to.put(commands)
