"""What is special about calls that share a stream. Otherwise they are like all calls, as the tests of `client` show."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import QUICK
from fake_server import SHAPE, FakeServer, Fault, info, retry_after, wait_until
from latentd.reasons import Reason
from latentd.v1 import generation_service_pb2 as pb
from latentd_client import (
    AsyncClient,
    Cancelled,
    DeadlineExceeded,
    FieldsInvalid,
    MessageTooLarge,
    Overloaded,
    Retries,
    ServerUnavailable,
)

LATENTS = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    """A multiplexed client that knows the models already."""
    async with made(server) as client:
        await client.model("toy")
        await client.model("toy-diffusion")
        yield client


def made(server: FakeServer, **arguments: Any) -> AsyncClient:
    """A multiplexed client."""
    return AsyncClient(
        **({"target": server.target, "retries": QUICK, "timeout": 30.0, "multiplexed": True} | arguments)
    )


def decodes(client: AsyncClient, count: int = len(LATENTS)) -> list[Any]:
    """As many decodes, not yet awaited."""
    return [client.decode("toy", latent, label=1) for latent in LATENTS[:count]]


def assert_decoded(answers: list[Any]) -> None:
    """Each has its own latent's sample."""
    got = np.stack([answer.array[0].reshape(-1)[:3] for answer in answers])
    np.testing.assert_array_equal(got, LATENTS[: len(answers)])


def own_calls(server: FakeServer, rpc: str) -> int:
    """How often an RPC was called without a stream around it."""
    return len(server.requests(rpc)) - server.shared_requests[rpc]


def waiting_at_all(client: AsyncClient) -> int:
    """Requests whose answers are still to come on a stream."""
    assert client._multiplexer is not None
    return sum(len(stream.shared._unanswered) for stream in client._multiplexer._streams)


async def until(condition: Any) -> None:
    """Wait for what the server is about to do."""
    await asyncio.to_thread(wait_until, condition)


async def test_what_is_asked_at_one_moment_is_one_message(client: AsyncClient, server: FakeServer) -> None:
    """200 calls take one message there and one back, and no call of their own; 300 take two."""
    server.answers_at_once = 200
    assert_decoded(await asyncio.gather(*decodes(client)))
    (message,) = server.requests("StreamRequest")
    assert len(message.batch.requests) == 200
    assert server.batches_sent == [200]
    assert own_calls(server, "Decode") == 0
    server.answers_at_once = 1
    await asyncio.gather(*decodes(client), *decodes(client, 100))
    assert [len(more.batch.requests) for more in server.requests("StreamRequest")] == [200, 256, 44]
    assert server.shared_streams == 1


async def test_many_calls_answer_as_calls_of_their_own(client: AsyncClient, server: FakeServer) -> None:
    """A crowd of every kind gets the very bytes that the plain client gets."""

    def every_kind(of: AsyncClient) -> list[Any]:
        calls = []
        for seed in range(50):
            noise = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
            calls += [
                of.encode("toy", noise),
                of.decode("toy", LATENTS[seed], label=1),
                of.score("toy", noise),
                of.denoise_step("toy-diffusion", noise, 9, 6),
            ]
        return calls

    async with AsyncClient(server.target) as plain:
        wanted = await asyncio.gather(*every_kind(plain))
    got = await asyncio.gather(*every_kind(client))
    assert server.shared_streams == 1
    for ours, theirs in zip(got, wanted, strict=True):
        assert type(ours) is type(theirs)
        for name in ("array", "values", "state", "noise", "log_variance"):
            np.testing.assert_array_equal(getattr(ours, name, None), getattr(theirs, name, None))


async def test_a_server_that_answers_one_by_one_is_understood(client: AsyncClient, server: FakeServer) -> None:
    """Batches are the server's choice."""
    server.answers_in_batches = False
    assert_decoded(await asyncio.gather(*decodes(client)))
    assert server.batches_sent == []


async def test_a_server_that_knows_no_batches_is_asked_by_calls(client: AsyncClient, server: FakeServer) -> None:
    """An older server refuses the first batch; what was in it, and all that follows, is asked the old way."""
    server.knows_batches = False
    assert_decoded(await asyncio.gather(*decodes(client, 20)))
    assert_decoded(await asyncio.gather(*decodes(client, 20)))
    assert own_calls(server, "Decode") == 40
    assert server.shared_streams == 1


async def test_an_error_is_one_calls_own(client: AsyncClient, server: FakeServer) -> None:
    """A call that is refused raises its reason, and no other notices."""
    server.fail("Score", Fault(code=grpc.StatusCode.INVALID_ARGUMENT, details=[info(Reason.FIELD_INVALID)]))
    refused, *answers = await asyncio.gather(
        client.score("toy", np.zeros(SHAPE)), *decodes(client, 50), return_exceptions=True
    )
    assert type(refused) is FieldsInvalid
    assert_decoded(answers)
    assert server.shared_streams == 1


async def test_priorities_and_deadlines_are_each_calls_own(client: AsyncClient, server: FakeServer) -> None:
    """Calls of all classes and timeouts share a message; the stream itself has neither."""
    await asyncio.gather(
        client.decode("toy", LATENTS[0], label=1, priority="high", timeout=15.0),
        client.decode("toy", LATENTS[1], label=1),
        client.decode("toy", LATENTS[2], label=1, priority="low", timeout=math.inf),
    )
    (message,) = server.requests("StreamRequest")
    first, second, third = message.batch.requests
    assert [one.priority for one in (first, second, third)] == [
        pb.PRIORITY_HIGH,
        pb.PRIORITY_NORMAL,
        pb.PRIORITY_LOW,
    ]
    assert 0 < first.timeout.seconds < 15 <= second.timeout.seconds < 30
    assert not third.HasField("timeout")


async def test_a_cancelled_await_gives_its_request_up(client: AsyncClient, server: FakeServer) -> None:
    """The server is told, asyncio's own cancellation passes unchanged, and others on the stream go on."""
    server.fail("Encode", Fault(delay_s=30.0))
    waiting = asyncio.create_task(client.encode("toy", np.zeros(SHAPE)))
    await until(lambda: server.requests("Encode"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: server.requests("Cancel"))
    assert_decoded(await asyncio.gather(*decodes(client, 20)))
    assert server.shared_streams == 1


async def test_a_deadline_is_kept_here_too(client: AsyncClient, server: FakeServer) -> None:
    """A server that says nothing is left when the time is up, and told so."""
    server.fail("Encode", Fault(delay_s=30.0))
    with pytest.raises(DeadlineExceeded, match="of 2 s has passed"):
        await client.encode("toy", np.zeros(SHAPE), timeout=2)
    await until(lambda: server.requests("Cancel"))
    assert_decoded(await asyncio.gather(*decodes(client, 20)))


async def test_a_broken_stream_is_mended(client: AsyncClient, server: FakeServer) -> None:
    """All 200 calls under way are asked again, together, four times. A break counts as one failure."""
    server.fail("SharedStream", *[Fault()] * 4)
    assert_decoded(await asyncio.gather(*decodes(client)))
    assert server.shared_streams == 5
    assert [len(message.batch.requests) for message in server.requests("StreamRequest")] == [200]


async def test_attempts_are_bounded(client: AsyncClient, server: FakeServer) -> None:
    """A stream that breaks at every attempt fails its calls with the stream's own error."""
    server.fail("SharedStream", *[Fault(message="not today")] * 5)
    outcomes = await asyncio.gather(*decodes(client, 20), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ServerUnavailable}
    assert {outcome.message for outcome in outcomes} == {"not today"}
    assert len({id(outcome) for outcome in outcomes}) == 20  # an exception has one traceback
    assert server.shared_streams == 5
    assert_decoded(await asyncio.gather(*decodes(client, 20)))


async def test_a_stream_that_ends_early_is_broken(client: AsyncClient, server: FakeServer) -> None:
    """A server that ends it well, with requests unanswered, is asked again."""
    server.fail("SharedStream", Fault(code=None))
    assert_decoded(await asyncio.gather(*decodes(client, 20)))
    assert server.shared_streams == 2


async def test_a_restarted_server_is_found_again(server: FakeServer) -> None:
    """What was under way when the server died is asked of the one that comes after it; so is what comes later."""
    async with made(server, retries=Retries(max_attempts=60, initial_backoff_s=0.01, max_backoff_s=0.5)) as client:
        server.fail("Encode", Fault(delay_s=30.0))
        waiting = asyncio.create_task(client.encode("toy", np.zeros(SHAPE)))
        await until(lambda: server.requests("Encode"))
        await asyncio.to_thread(server.stop)
        server.start()
        assert (await waiting).array.shape == (1, 3)
        assert_decoded(await asyncio.gather(*decodes(client, 20)))


async def test_a_draining_server_is_left_in_peace(client: AsyncClient, server: FakeServer) -> None:
    """What a draining server refuses is asked on a new stream, while the old one still answers what it had accepted."""
    server.fail("Encode", Fault(code=None, delay_s=0.3))
    accepted = asyncio.create_task(client.encode("toy", np.zeros(SHAPE)))
    await until(lambda: server.requests("Encode"))
    server.fail("Score", Fault(details=[info(Reason.DRAINING)]))
    assert (await client.score("toy", np.zeros(SHAPE))).values.shape == (1,)
    assert server.shared_streams == 2
    assert (await accepted).array.shape == (1, 3)
    await until(lambda: server.open_streams == 1)  # the old one has ended
    assert server.half_closed_streams == 1


async def test_the_hint_when_to_retry_is_obeyed(client: AsyncClient, server: FakeServer) -> None:
    """A call that the server would have back too late fails at once, with the server's reason."""
    server.fail("Encode", Fault(details=[info(Reason.OVERLOADED), retry_after(60)]))
    with pytest.raises(Overloaded) as caught:
        await client.encode("toy", np.zeros(SHAPE), timeout=20)
    assert caught.value.retry_after_s == 60
    server.fail("Encode", Fault(details=[info(Reason.OVERLOADED), retry_after(0.02)]))
    await client.encode("toy", np.zeros(SHAPE))
    assert server.shared_streams == 1


async def test_what_a_stream_cannot_carry_harms_nobody(server: FakeServer) -> None:
    """One answer that is too large breaks the stream for all; alone, each call gets what it would have got."""
    async with made(server, channel_options=[("grpc.max_receive_message_length", 20_000)]) as client:
        await client.model("toy")
        large, *answers = await asyncio.gather(
            client.decode("toy", np.zeros((1000, 3)), label=1), *decodes(client, 20), return_exceptions=True
        )
        assert type(large) is MessageTooLarge
        assert_decoded(answers)
        streams = server.shared_streams
        assert_decoded(await asyncio.gather(*decodes(client, 20)))
        assert server.shared_streams == streams + 1  # streams are not given up for good


async def test_where_streams_are_refused_calls_are_made(client: AsyncClient, server: FakeServer) -> None:
    """A proxy that knows no streams is asked once."""
    server.fail("SharedStream", *[Fault(code=grpc.StatusCode.UNIMPLEMENTED)] * 9)
    assert_decoded(await asyncio.gather(*decodes(client, 20)))
    assert_decoded(await asyncio.gather(*decodes(client, 20)))
    assert server.shared_streams == 1


async def test_large_requests_go_alone(client: AsyncClient, server: FakeServer) -> None:
    """A request that fills a message by itself is a call of its own."""
    await client.encode("toy", np.zeros((20_000, *SHAPE)))
    assert own_calls(server, "Encode") == 1
    assert server.shared_streams == 0


async def test_close_ends_an_idle_stream_in_words(server: FakeServer) -> None:
    """The server sees the end of the requests, not a broken call."""
    async with made(server) as client:
        await client.decode("toy", LATENTS[0], label=1)
    await until(lambda: server.open_streams == 0)
    assert server.half_closed_streams == 1


async def test_close_fails_what_is_open(server: FakeServer) -> None:
    """Calls under way, and those between two attempts, end at once with Cancelled, and the stream with them."""
    client = made(server)
    server.fail("Encode", Fault(delay_s=30.0))
    server.fail("Score", Fault(details=[info(Reason.OVERLOADED), retry_after(20)]))
    asked = asyncio.create_task(client.encode("toy", np.zeros(SHAPE)))
    paused = asyncio.create_task(client.score("toy", np.zeros(SHAPE)))
    await until(lambda: server.requests("Encode") and server.requests("Score"))
    await until(lambda: waiting_at_all(client) == 1)
    await client.close()
    for task in (asked, paused):
        with pytest.raises(Cancelled, match="the client was closed"):
            await asyncio.wait_for(task, 10)
    await until(lambda: server.open_streams == 0)
    assert len(server.requests("Score")) == 1


async def test_what_is_settled_while_it_waits_is_not_asked_again(client: AsyncClient, server: FakeServer) -> None:
    """The next attempt may fall due at the very moment at which the caller is told that there will be none."""
    server.fail("Score", Fault(details=[info(Reason.OVERLOADED), retry_after(20)]))
    paused = asyncio.create_task(client.score("toy", np.zeros(SHAPE)))
    await until(lambda: server.requests("Score") and waiting_at_all(client) == 0)
    multiplexer = client._multiplexer
    assert multiplexer is not None
    (asked,) = multiplexer._asked.values()
    asked.settle(Cancelled("no more"))
    multiplexer._put(asked)
    assert waiting_at_all(client) == 0
    with pytest.raises(Cancelled, match="no more"):
        await paused


async def test_streams_that_are_full_give_way(client: AsyncClient, server: FakeServer) -> None:
    """More calls than one stream may carry take several, and all but the newest end."""
    assert client._multiplexer is not None
    client._multiplexer._limit = 64
    assert_decoded(await asyncio.gather(*decodes(client)))
    assert server.shared_streams == 4
    await until(lambda: server.open_streams == 1)


async def test_nothing_is_kept_of_what_is_over(client: AsyncClient, server: FakeServer) -> None:
    """Answered, refused, cancelled or out of time: nothing of a call remains."""
    server.fail("Score", Fault(code=grpc.StatusCode.INTERNAL, details=[info(Reason.RUNTIME_FAILURE)]))
    server.fail("Encode", Fault(delay_s=30.0))
    await asyncio.gather(
        *decodes(client, 50),
        client.score("toy", np.zeros(SHAPE)),
        client.encode("toy", np.zeros(SHAPE), timeout=2),
        return_exceptions=True,
    )
    assert client._multiplexer is not None
    assert client._multiplexer._asked == {}
    await until(lambda: waiting_at_all(client) == 0)  # the server has confirmed that it gave up
