"""What waits for a reader: order, bounds, and of previews the newest."""

import asyncio
from typing import Any

import numpy as np
import pytest
from google.protobuf.wrappers_pb2 import Int32Value
from latentd_server.delivery import Outbox, Previews
from latentd_server.job import Preview


def message(value: int) -> Int32Value:
    return Int32Value(value=value)


async def rest(outbox: Outbox) -> list[int]:
    return [entry.value async for entry in outbox]


async def test_messages_keep_their_order_and_end_behind_the_last() -> None:
    """Closing loses nothing that waits."""
    outbox = Outbox(100, 100, lambda full: None)
    for value in range(3):
        outbox.put(message(value))
    outbox.close()
    assert await rest(outbox) == [0, 1, 2]


async def test_a_failure_comes_behind_what_waits() -> None:
    """What was ready is read before the failure is heard of."""
    outbox = Outbox(100, 100, lambda full: None)
    outbox.put(message(1))
    outbox.close(ValueError("no more"))
    outbox.close()
    assert (await anext(outbox)).value == 1
    with pytest.raises(ValueError, match="no more"):
        await anext(outbox)


async def test_a_reader_that_waits_is_woken() -> None:
    """Messages, sources and the end each wake the reader."""
    outbox = Outbox(100, 100, lambda full: None)
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
    outbox = Outbox(100, 100, lambda full: None)
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
    outbox = Outbox(100, 100, said.append)
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
    outbox = Outbox(10**9, 2, lambda full: None)
    for value in range(3):
        outbox.put(message(value))
    waiting = asyncio.create_task(outbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await anext(outbox)
    await asyncio.wait_for(waiting, 5)


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
