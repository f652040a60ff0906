"""Large arrays are drawn beside the event loop, behind a door of their own; small ones at once."""

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from bundles import LATENT, SHAPE
from doors import Front, StaticRegistry, front, until
from grpc import aio
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import noise, respond
from latentd_server.aside import SMALL_BYTES, Aside
from latentd_server.failures import OverloadedError
from manual_engine import ManualEngine

V, D = "tiny-vae", "tiny-diffusion"
MANY, FEW = 1024, 2
"""Rows of 16 elements, which are beyond `SMALL_BYTES` in float32 together, and not."""


@pytest.fixture
def engine() -> ManualEngine:
    return ManualEngine()


@pytest.fixture
async def served(engine: ManualEngine, held: dict[str, Any]) -> AsyncIterator[Front]:
    async with front(engine, StaticRegistry(held)) as running:
        yield running


@pytest.fixture
def drew(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that drew normals, one name a draw."""
    names: list[str] = []
    draw = noise.normals

    def told(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return draw(*arguments)

    monkeypatch.setattr(respond.noise, "normals", told)
    return names


def diffusing(count: int) -> pb.EncodeRequest:
    """So many rows of zeros, of which the noise is all that is left."""
    samples = tensor.encode(np.zeros((count, *SHAPE), np.float32))
    return pb.EncodeRequest(model=D, samples=samples, forward_timestep=3, seed=1)


class Held:
    """Work that keeps the thread until it is let go."""

    def __init__(self, aside: Aside, size: int = SMALL_BYTES + 1) -> None:
        self._go = threading.Event()
        self.failures: list[Exception | None] = []
        aside.do("holder", size, lambda: self._go.wait(10), self.failures.append)

    def let_go(self) -> None:
        self._go.set()


async def test_a_draw_of_q_of_x_t_is_made_beside_the_event_loop(served: Front, drew: list[str]) -> None:
    """Others are answered while a large one waits for its turn, small ones at once; the bytes are the same."""
    held = Held(served.door.aside)
    large = served.stub.Encode(diffusing(MANY))
    small = await served.stub.Encode(diffusing(FEW))
    assert not large.done()
    held.let_go()
    rows = tensor.decode((await large).latents)
    assert [name.split("_")[0] for name in drew] == ["MainThread", "latentd-aside"]
    np.testing.assert_array_equal(rows[:FEW], tensor.decode(small.latents))


async def test_a_draw_from_the_posterior_is_made_beside_the_event_loop(
    served: Front, engine: ManualEngine, drew: list[str]
) -> None:
    """Only where there is much to draw: an answer without a seed, or of a few rows, does not wait for the thread."""
    size = SMALL_BYTES // (4 * LATENT)
    samples = np.zeros((MANY, *SHAPE), np.float32)
    held = Held(served.door.aside)
    answers = []
    for seed, rows in ((None, MANY), (1, FEW), (1, MANY)):
        call = served.stub.Encode(pb.EncodeRequest(model=V, samples=tensor.encode(samples[:rows]), seed=seed))
        await until(lambda: engine.jobs)
        (job_id,) = engine.jobs
        shape = (rows, LATENT * size if rows == MANY else LATENT)
        engine.finish(job_id, outputs={name: np.zeros(shape, np.float32) for name in engine.jobs[job_id].job.outputs})
        answers.append(call)
    await answers[0]
    await answers[1]
    assert drew == ["MainThread"]
    held.let_go()
    drawn = tensor.decode((await answers[2]).latents)
    assert drew[1].startswith("latentd-aside")
    assert 0.9 < drawn.std() < 1.1


async def test_who_leaves_meanwhile_is_answered_no_more_and_counted_once(served: Front, drew: list[str]) -> None:
    """Neither a unary call nor an id of a stream, which goes on."""
    held = Held(served.door.aside)
    left = served.stub.Encode(diffusing(MANY))
    stream = served.stub.Stream()
    await stream.write(pb.StreamRequest(id=1, encode=diffusing(MANY)))
    await stream.write(pb.StreamRequest(id=1, cancel=pb.Cancel()))
    assert (await stream.read()).error.code == 1
    await until(lambda: 'latentd_requests_started_total{method="Encode"} 2.0' in served.metrics)
    left.cancel()
    await until(lambda: 'latentd_requests_in_flight{method="Encode"} 0.0' in served.metrics)
    held.let_go()
    await stream.write(pb.StreamRequest(id=1, encode=diffusing(MANY)))
    assert (await stream.read()).HasField("encode")
    assert len(drew) == 1
    assert 'latentd_requests_total{code="CANCELLED",method="Encode",model="tiny-diffusion@1"} 2.0' in served.metrics


async def test_what_cannot_be_drawn_is_an_error_not_a_silence(served: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the thread ends its request."""
    monkeypatch.setattr(respond.noise, "normals", lambda *_: 1 / 0)
    with pytest.raises(aio.AioRpcError, match="internal error"):
        await served.stub.Encode(diffusing(MANY))


async def test_a_drain_waits_for_what_is_being_drawn(served: Front) -> None:
    """It was accepted, so it is answered before streams are ended."""
    held = Held(served.door.aside)
    stream = served.stub.Stream()
    await stream.write(pb.StreamRequest(id=1, encode=diffusing(MANY)))
    await stream.write(pb.StreamRequest(id=2, encode=diffusing(FEW)))
    assert (await stream.read()).id == 2
    finishing = asyncio.create_task(served.service.finish())
    held.let_go()
    assert (await stream.read()).HasField("encode")
    with pytest.raises(aio.AioRpcError, match="draining"):
        await stream.read()
    await finishing


async def test_what_waits_is_bounded(served: Front) -> None:
    """Who has nothing there has room for anything; others are told, beyond the bound, when there will be room."""
    now = iter([0.0, 2.0])
    aside = Aside(10 * SMALL_BYTES, lambda: next(now))
    aside.check_room("holder", 99 * SMALL_BYTES)
    first = Held(aside, 8 * SMALL_BYTES)
    aside.check_room("holder", 2 * SMALL_BYTES)
    aside.check_room("holder", SMALL_BYTES)  # drawn at once, wherever the others stand
    with pytest.raises(OverloadedError) as refused:
        aside.check_room("holder", 4 * SMALL_BYTES)
    assert refused.value.retry_after_s == 1.0
    aside.check_room("another", 4 * SMALL_BYTES)
    first.let_go()
    await aside.idle()
    assert first.failures == [None]
    second = Held(aside, 8 * SMALL_BYTES)
    with pytest.raises(OverloadedError) as refused:
        aside.check_room("holder", 6 * SMALL_BYTES)
    assert refused.value.retry_after_s == pytest.approx(1.0)  # four too many, of which it took two seconds for eight
    second.let_go()
    await aside.idle()


async def test_callers_take_turns() -> None:
    """Who comes behind a caller with much waits for what has been begun, and not for all of it."""
    aside, order = Aside(), list[str]()
    first = Held(aside)
    for caller, count in (("a", 6), ("b", 2), ("c", 1)):
        for number in range(count):
            aside.do(caller, SMALL_BYTES + 1, partial(order.append, f"{caller}{number}"), first.failures.append)
    first.let_go()
    await aside.idle()
    assert order == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4", "a5"]  # a0 had been begun
    assert first.failures == [None] * 10
