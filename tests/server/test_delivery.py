"""What waits for a reader: order, bounds, and of previews the newest."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from latentd_server.delivery import Outbox, Previews
from latentd_server.failures import ReaderTooSlowError
from latentd_server.job import Preview


def message(value: int) -> Int32Value:
    return Int32Value(value=value)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self._now = 0.0
        self._timers: list[_Timer] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "_Timer":
        timer = _Timer(self._now + delay_s, callback)
        self._timers.append(timer)
        return timer

    def pass_by(self, seconds: float) -> None:
        """Let time pass, and what is due happen."""
        self._now += seconds
        for timer in [timer for timer in self._timers if timer.when <= self._now]:
            timer.cancel()
            timer.callback()

    @property
    def waits(self) -> int:
        """Calls that are yet to come."""
        return sum(timer.when < float("inf") for timer in self._timers)


@dataclass
class _Timer:
    when: float
    callback: Callable[[], None]

    def cancel(self) -> None:
        self.when = float("inf")


@dataclass
class Reader:
    """What was written to it; takes a message when a test says so."""

    written: list[int] = field(default_factory=list)
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def write(self, entry: Any) -> None:
        await self.turn.acquire()
        self.written.append(entry.value)

    async def take(self, count: int) -> None:
        """Take messages, and let the writer come to the next one."""
        for _ in range(count):
            self.turn.release()
        for _ in range(4 * count):
            await asyncio.sleep(0)


def box(
    limit_bytes: int = 100,
    limit_messages: int = 100,
    on_full: Callable[[bool], None] = lambda full: None,
    reader_timeout_s: float = 30.0,
    clock: Clock | None = None,
) -> Outbox:
    call_later = (clock or Clock()).call_later
    return Outbox(limit_bytes, limit_messages, on_full, reader_timeout_s=reader_timeout_s, call_later=call_later)


async def rest(outbox: Outbox) -> list[int]:
    return [entry.value async for entry in outbox]


async def test_messages_keep_their_order_and_end_behind_the_last() -> None:
    """Closing loses nothing that waits."""
    outbox = box()
    for value in range(3):
        outbox.put(message(value))
    outbox.close()
    assert await rest(outbox) == [0, 1, 2]


async def test_a_failure_comes_behind_what_waits() -> None:
    """What was ready is read before the failure is heard of."""
    outbox = box()
    outbox.put(message(1))
    outbox.close(ValueError("no more"))
    outbox.close()
    assert (await anext(outbox)).value == 1
    with pytest.raises(ValueError, match="no more"):
        await anext(outbox)


async def test_a_reader_that_waits_is_woken() -> None:
    """Messages, sources and the end each wake the reader."""
    outbox = box()
    reading = asyncio.create_task(rest(outbox))
    await asyncio.sleep(0)
    outbox.put(message(1))
    await asyncio.sleep(0)
    outbox.put_source(lambda: [message(2), message(3)])
    await asyncio.sleep(0)
    outbox.close()
    assert await reading == [1, 2, 3]


async def test_a_source_makes_its_messages_when_their_turn_comes() -> None:
    """What may be superseded is not made early, and may turn out to be nothing."""
    made: list[Any] = []
    outbox = box()
    outbox.put(message(0))
    outbox.put_source(lambda: made)
    outbox.put_source(lambda: [])
    outbox.put(message(9))
    outbox.close()
    assert (await anext(outbox)).value == 0
    made += [message(1), message(2)]
    assert await rest(outbox) == [1, 2, 9]


async def test_it_says_when_it_is_full_and_when_half_of_that_is_written() -> None:
    """Bytes count until the next message is asked for, which is when they have been written."""
    said: list[bool] = []
    outbox = box(on_full=said.append)
    for value in range(4):
        outbox.put(message(value), 40)
    assert said == [True]
    assert outbox.full
    await anext(outbox)
    await anext(outbox)
    await anext(outbox)
    assert said == [True]  # 40 waiting and 40 being written
    await anext(outbox)
    assert said == [True, False]
    assert not outbox.full


async def test_there_is_room_until_too_many_messages_wait() -> None:
    """Small messages are bounded by number, so that a reader that stops cannot hoard errors."""
    outbox = box(10**9, 2)
    for value in range(3):
        outbox.put(message(value))
    waiting = asyncio.create_task(outbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await anext(outbox)
    await asyncio.wait_for(waiting, 5)


async def delivering(outbox: Outbox, reader: Reader, messages: int) -> "asyncio.Task[None]":
    """Messages of 40 bytes, on their way."""
    for value in range(messages):
        outbox.put(message(value), 40)
    task = asyncio.create_task(outbox.deliver(reader.write))
    await reader.take(0)
    await asyncio.sleep(0)
    return task


async def test_a_reader_that_stands_still_is_given_up() -> None:
    """A full outbox ends its delivery once no write has finished for the time allowed, and keeps nothing."""
    clock, reader = Clock(), Reader()
    outbox = box(clock=clock)
    task = await delivering(outbox, reader, 4)
    clock.pass_by(29)
    await asyncio.sleep(0)
    assert not task.done()
    clock.pass_by(1)
    with pytest.raises(ReaderTooSlowError, match="too little was read in 30 s"):
        await asyncio.wait_for(task, 5)
    assert reader.written == []
    outbox.close()
    assert await rest(outbox) == []
    assert clock.waits == 0


async def sipped(messages: int, a_sip: int) -> tuple[list[int], int]:
    """What a reader was given that takes so many messages of 4 bytes every 29 s, and how often it was asked."""
    clock, reader = Clock(), Reader()
    outbox = box(1600, clock=clock)
    for value in range(messages):
        outbox.put(message(value), 4)
    task = asyncio.create_task(outbox.deliver(reader.write))
    await reader.take(0)
    await asyncio.sleep(0)
    sips = 0
    while outbox.full and not task.done():
        clock.pass_by(29)
        await reader.take(a_sip)
        sips += 1
    outbox.close()
    if not task.done():
        await reader.take(messages - sips * a_sip)
    await asyncio.wait_for(task, 5)
    return reader.written, sips


async def test_a_reader_that_takes_a_little_now_and_then_is_given_up() -> None:
    """An eighth of what may wait, in the time allowed, is the least; so a reader holds others up for a bounded time."""
    with pytest.raises(ReaderTooSlowError, match="too little was read in 30 s"):
        await sipped(messages=500, a_sip=1)
    with pytest.raises(ReaderTooSlowError):
        await sipped(messages=500, a_sip=24)
    written, sips = await sipped(messages=500, a_sip=50)
    assert written == list(range(500))
    assert sips == 6  # until 800 bytes of 2000 are left


async def test_every_write_gives_a_slow_reader_its_time_anew() -> None:
    """A reader that takes an eighth of what may wait now and then is served to the end, however long that takes."""
    clock, reader = Clock(), Reader()
    outbox = box(clock=clock)
    task = await delivering(outbox, reader, 9)
    for _ in range(6):
        assert outbox.full
        clock.pass_by(29)
        await reader.take(1)
    outbox.close()
    await reader.take(3)
    await asyncio.wait_for(task, 5)
    assert reader.written == list(range(9))
    assert clock.waits == 0


@pytest.mark.parametrize(("messages", "reader_timeout_s"), [(2, 30.0), (4, 0.0)], ids=["not full", "no limit"])
async def test_a_reader_may_rest(messages: int, reader_timeout_s: float) -> None:
    """While nothing is held up for it, or where the operator sets no limit, a reader has all the time there is."""
    clock, reader = Clock(), Reader()
    outbox = box(clock=clock, reader_timeout_s=reader_timeout_s)
    task = await delivering(outbox, reader, messages)
    clock.pass_by(1e9)
    outbox.close()
    await reader.take(messages)
    await asyncio.wait_for(task, 5)
    assert reader.written == list(range(messages))


async def test_in_a_hurry_a_reader_that_stands_still_is_given_up_too() -> None:
    """However little waits: it has its time from then on, anew with every message it takes."""
    clock, reader = Clock(), Reader()
    outbox = box(clock=clock)
    task = await delivering(outbox, reader, 2)
    clock.pass_by(1e9)
    outbox.close()
    outbox.hurry()
    clock.pass_by(29)
    await reader.take(1)
    clock.pass_by(29)
    await asyncio.sleep(0)
    assert not task.done()
    clock.pass_by(1)
    with pytest.raises(ReaderTooSlowError, match="too little was read in 30 s"):
        await asyncio.wait_for(task, 5)
    assert reader.written == [0]


async def test_a_timeout_of_the_write_itself_is_not_the_readers() -> None:
    """What a write raises is passed on as it is."""

    async def write(entry: Any) -> None:
        raise TimeoutError("of its own")

    outbox = box()
    outbox.put(message(1))
    with pytest.raises(TimeoutError, match="of its own"):
        await outbox.deliver(write)


def look(lanes: list[int], completed: int) -> Preview:
    return Preview(np.array(lanes), completed, 10, np.full((len(lanes), 1), completed, np.float32))


def test_a_newer_look_replaces_older_ones_lane_by_lane() -> None:
    """Looks at other lanes stay."""
    previews = Previews()
    assert previews.add(look([0, 1, 2], 1))
    assert not previews.add(look([1], 2))
    kept = previews.take()
    assert [(preview.lanes.tolist(), preview.completed_steps) for preview in kept] == [([0, 2], 1), ([1], 2)]
    assert kept[0].estimates.shape == (2, 1)
    assert previews.take() == []


def test_looks_at_finished_lanes_are_dropped() -> None:
    """Nobody is shown the past of a sample that is there."""
    previews = Previews()
    previews.add(look([0, 1], 1))
    previews.drop(np.array([0, 1]))
    assert previews.take() == []
    assert previews.add(look([3], 1))


async def test_what_waits_is_packed_up_to_about_a_mebibyte() -> None:
    """In order; what is made later, and what would make the message too big, goes out on its own or in the next."""
    outbox = box(limit_bytes=2**30)
    outbox.pack = lambda messages: Int32Value(value=int("".join(str(message.value) for message in messages)))
    for value, size in ((1, 0), (2, 2**19), (3, 2**19 - 2), (4, 1), (5, 0)):
        outbox.put(message(value), size)
    outbox.put_source(lambda: [message(6), message(7)])
    outbox.put(message(8))
    outbox.close()
    assert await rest(outbox) == [123, 45, 678]


async def test_what_is_made_when_its_turn_comes_is_packed_by_its_size_too() -> None:
    """Large previews do not make one message that is larger than a client takes."""
    outbox = box()

    def pack(messages: list[StringValue]) -> StringValue:
        return StringValue(value="".join(message.value for message in messages))

    outbox.pack = pack
    outbox.put_source(lambda: [StringValue(value="x" * 2**18) for _ in range(16)])
    outbox.close()
    sizes = [entry.ByteSize() async for entry in outbox]
    assert len(sizes) == 6, "three fit into each message"
    assert max(sizes) <= 2**20
