"""Deadlines, retries by gRPC, closing, forking: what a client is like to live with."""

import asyncio
import math
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fake_server import SHAPE, FakeServer, Fault, info, retry_after, wait_until
from latentd.reasons import Reason
from latentd_client import (
    TLS,
    AsyncClient,
    Cancelled,
    Client,
    ClientClosed,
    ClientForked,
    DeadlineExceeded,
    Retries,
    ServerUnavailable,
)

CALLS = {
    "sample": lambda client, **more: client.sample("toy", **more),
    "sample_stream": lambda client, **more: list(client.sample_stream("toy", **more)),
    "encode": lambda client, **more: client.encode("toy", np.zeros(SHAPE), **more),
    "decode": lambda client, **more: client.decode("toy", np.zeros(3), label=1, **more),
    "denoise_step": lambda client, **more: client.denoise_step("toy-diffusion", np.zeros(SHAPE), 9, **more),
    "score": lambda client, **more: client.score("toy", np.zeros(SHAPE), **more),
    "interpolate": lambda client, **more: client.interpolate("toy", 1, 2, **more),
    "models": lambda client, **more: client.models(**more),
    "model": lambda client, **more: client.model("toy", **more),
    "reproduce": lambda client, **more: client.reproduce(client.sample("toy"), **more),
    "denoise_loop": lambda client, **more: _opened(client.denoise_loop("toy-diffusion", **more)),
}


def _opened(loop: Any) -> Any:
    with loop:
        return list(loop)


def test_every_public_method_is_tried_here() -> None:
    """The table of calls leaves no method out."""
    assert set(CALLS) == {name for name in vars(Client) if not name.startswith("_")} - {"close"}


@pytest.mark.parametrize("method", CALLS)
def test_every_call_carries_a_deadline(client: Any, server: FakeServer, method: str) -> None:
    """Without a word about it, each RPC of each method has the client's timeout; a call may have its own."""
    CALLS[method](client)
    arrived = [seen for seen in server.seen if seen.rpc != "StreamRequest"]
    assert all(seen.time_remaining_s is not None and 20 < seen.time_remaining_s < 31 for seen in arrived)
    server.seen.clear()
    CALLS[method](client, timeout=5.0)
    last = [seen for seen in server.seen if seen.rpc != "StreamRequest"][-1]
    assert last.time_remaining_s is not None
    assert last.time_remaining_s < 6.0


@pytest.mark.parametrize("method", CALLS)
def test_no_deadline_must_be_said_in_so_many_words(client: Any, server: FakeServer, method: str) -> None:
    """Only an infinite timeout sends none."""
    CALLS[method](client, timeout=math.inf)
    last = [seen for seen in server.seen if seen.rpc != "StreamRequest"][-1]
    assert last.time_remaining_s is None or last.time_remaining_s > 10**6


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.nan])
def test_a_timeout_is_a_positive_number(connect: Any, timeout: float) -> None:
    """Nonsense is refused by the constructor and by each call."""
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
        connect(timeout=timeout)
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
        connect().models(timeout=timeout)


@pytest.mark.parametrize("method", ["sample", "encode", "denoise_loop"])
def test_a_slow_server_is_left_at_the_deadline(client: Any, server: FakeServer, method: str) -> None:
    """Streams and unary calls end with DeadlineExceeded, which is a TimeoutError."""
    rpc = {"sample": "Sample", "encode": "Encode", "denoise_loop": "Stream"}[method]
    server.fail(rpc, Fault(delay_s=30.0))
    with pytest.raises(TimeoutError) as caught:
        CALLS[method](client, timeout=0.2)
    assert isinstance(caught.value, DeadlineExceeded)


def test_unary_calls_are_retried(client: Any, server: FakeServer) -> None:
    """A call of one answer survives a server that is unavailable for a moment, with the same request."""
    server.fail("Encode", Fault(details=[info(Reason.DRAINING)]), Fault())
    client.encode("toy", np.zeros(SHAPE))
    assert len(server.requests("Encode")) == 3
    assert len({request.SerializeToString() for request in server.requests("Encode")}) == 1


@pytest.mark.parametrize("connect", ["sync", "aio"], indirect=True)  # on a shared stream the id is the stream's
def test_an_attempt_keeps_the_request_id(client: Any, server: FakeServer) -> None:
    """The server's log tells which lines are attempts of one call."""
    server.fail("Encode", Fault())
    client.encode("toy", np.zeros(SHAPE))
    tries = [seen for seen in server.seen if seen.rpc == "Encode"]
    assert len(tries) == 2
    assert len({seen.metadata["x-request-id"] for seen in tries}) == 1


def test_unary_retries_are_bounded(client: Any, server: FakeServer) -> None:
    """There are five attempts, by gRPC or by those who share a stream."""
    server.fail("Encode", *[Fault()] * 9)
    with pytest.raises(ServerUnavailable):
        client.encode("toy", np.zeros(SHAPE))
    assert len(server.requests("Encode")) == 5


@pytest.mark.parametrize("connect", ["sync", "aio"], indirect=True)  # a request of a stream has no trailers
def test_pushback_is_obeyed(client: Any, server: FakeServer) -> None:
    """A pushback below zero forbids the retry that would otherwise follow."""
    server.fail("Encode", Fault(trailers=[("grpc-retry-pushback-ms", "-1")]))
    with pytest.raises(ServerUnavailable):
        client.encode("toy", np.zeros(SHAPE))
    assert len(server.requests("Encode")) == 1


@pytest.mark.parametrize("rpc", ["Encode", "Sample"])
def test_retries_can_be_turned_off(connect: Any, server: FakeServer, rpc: str) -> None:
    """One attempt means one attempt, of streams and unary calls."""
    client = connect(retries=Retries(max_attempts=1))
    server.fail(rpc, Fault())
    with pytest.raises(ServerUnavailable):
        client.encode("toy", np.zeros(SHAPE)) if rpc == "Encode" else client.sample("toy")
    assert len(server.requests(rpc)) == 1


def test_only_unavailable_is_retried(client: Any, server: FakeServer) -> None:
    """A runtime failure of a unary call is told at once."""
    server.fail("Encode", Fault(code=grpc.StatusCode.INTERNAL, details=[info(Reason.RUNTIME_FAILURE)]))
    with pytest.raises(Exception, match="a fault"):
        client.encode("toy", np.zeros(SHAPE))
    assert len(server.requests("Encode")) == 1


def test_a_failing_server_is_not_stormed(client: Any, server: FakeServer) -> None:
    """While most streams fail, retries stop: a hundred doomed calls make few more attempts than calls."""
    server.fail("Sample", *[Fault()] * 1000)
    for _ in range(100):
        with pytest.raises(ServerUnavailable):
            client.sample("toy")
    assert len(server.requests("Sample")) <= 150


def test_the_caller_is_named(connect: Any, server: FakeServer) -> None:
    """Every call says who calls, and carries an id of its own."""
    client = connect(caller="batch-7")
    client.sample("toy")
    client.models()
    assert {seen.metadata["x-latentd-caller"] for seen in server.seen} == {"batch-7"}
    assert len({seen.metadata["x-request-id"] for seen in server.seen}) == 4


@pytest.mark.parametrize("method", [method for method in CALLS if method not in ("model", "models")])
def test_every_call_has_a_priority(method: str, connect: Any, server: FakeServer) -> None:
    """The call's own, else the client's; normal, which is what a call without a word has, is not sent."""

    def sent() -> list[Any]:
        calls = [seen.metadata.get("x-latentd-priority") for seen in server.seen if seen.rpc != "StreamRequest"]
        server.seen.clear()
        return calls

    client = connect(priority="low")
    CALLS[method](client)
    assert set(sent()) == {"low"}
    CALLS[method](client, priority="high")
    assert sent()[-1] == "high"
    CALLS[method](client, priority="normal")
    assert sent()[-1] is None


def test_an_unknown_priority_is_refused_with_what_there_is(connect: Any) -> None:
    """As an argument of a client and of a call."""
    with pytest.raises(ValueError, match="one of high, normal, low, got 'urgent'"):
        connect(priority="urgent")
    with pytest.raises(ValueError, match="one of high, normal, low, got 'urgent'"):
        connect().sample("toy", priority="urgent")


def test_messages_beyond_grpcs_default_are_received(connect: Any, server: FakeServer) -> None:
    """An answer of 5 MiB arrives; the default limit of 4 MiB would refuse it. The limit can be lowered."""
    latents = np.zeros((1_400_000, 3), np.float32)
    assert len(connect().decode("toy", latents[:80_000], label=1)) == 80_000
    with pytest.raises(Exception, match="larger than max") as caught:
        connect(channel_options=[("grpc.max_receive_message_length", 1000)]).decode("toy", latents[:1000], label=1)
    assert type(caught.value).__name__ == "MessageTooLarge"


def test_a_server_that_is_not_there_is_named(connect: Any) -> None:
    """Nobody listening is ServerUnavailable, and the message has the address."""
    with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
        connect(target="127.0.0.1:1", timeout=5.0).models()


def test_a_closed_client_says_so(connect: Any) -> None:
    """Every method of a closed client raises ClientClosed; closing twice is fine."""
    client = connect()
    client.close()
    client.close()
    for method in ("sample", "sample_stream", "encode", "models", "denoise_loop"):
        with pytest.raises(ClientClosed):
            CALLS[method](client)


def test_close_gives_up_a_stream_in_another_thread(server: FakeServer) -> None:
    """A thread blocked on a stream is released at once, with Cancelled, and the server's side ends too."""
    client = Client(server.target)
    server.fail("Sample", Fault(after=1, delay_s=30.0))
    outcome: list[BaseException] = []

    def read() -> None:
        try:
            list(client.sample_stream("toy", 3))
        except Exception as error:
            outcome.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: server.open_streams == 1)
    client.close()
    reader.join(10)
    assert not reader.is_alive()
    assert isinstance(outcome[0], Cancelled)
    wait_until(lambda: server.open_streams == 0)


def test_close_ends_the_wait_between_attempts(server: FakeServer) -> None:
    """A client that waits to try again does not keep its closer waiting."""
    client = Client(server.target)
    server.fail("Sample", Fault(details=[info(Reason.OVERLOADED), retry_after(20)]))
    outcome: list[BaseException] = []

    def read() -> None:
        try:
            client.sample("toy", 3)
        except Exception as error:
            outcome.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: len(server.requests("Sample")) == 1)
    client.close()
    reader.join(10)
    assert isinstance(outcome[0], ClientClosed | Cancelled)


async def test_close_gives_up_a_stream_in_another_task(server: FakeServer) -> None:
    """A task blocked on a stream is released at once, with Cancelled."""
    client = AsyncClient(server.target)
    server.fail("Sample", Fault(after=1, delay_s=30.0))

    async def read() -> None:
        async for _ in client.sample_stream("toy", 3):
            pass

    reader = asyncio.create_task(read())
    await asyncio.to_thread(wait_until, lambda: server.open_streams == 1)
    await client.close()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(reader, 10)


async def test_cancelling_a_task_cancels_its_call(server: FakeServer) -> None:
    """Asyncio's own cancellation passes through unchanged and reaches the server."""
    async with AsyncClient(server.target) as client:
        server.fail("Sample", Fault(after=1, delay_s=30.0))
        reader = asyncio.create_task(client.sample("toy", 3))
        await asyncio.to_thread(wait_until, lambda: server.open_streams == 1)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await asyncio.to_thread(wait_until, lambda: server.open_streams == 0)


async def test_many_calls_share_one_async_client(server: FakeServer) -> None:
    """Concurrent calls each get their own samples."""
    async with AsyncClient(server.target) as client:
        results = await asyncio.gather(*(client.sample("toy", 2, seed=i) for i in range(20)))
    assert [samples.seed for samples in results] == list(range(20))


def test_a_client_is_shared_by_threads(server: FakeServer) -> None:
    """Threads using one client each get their own samples."""
    from concurrent.futures import ThreadPoolExecutor

    with Client(server.target) as client, ThreadPoolExecutor(8) as pool:
        seeds = list(pool.map(lambda i: client.sample("toy", 2, seed=i).seed, range(20)))
    assert seeds == list(range(20))


def _use_after_fork(client: Any, report: Any) -> None:
    try:
        client.models(timeout=5.0)
    except BaseException as error:
        report.send((type(error).__name__, str(error)))
    else:
        report.send(("nothing", ""))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_use_after_fork_is_refused(server: FakeServer) -> None:
    """A child process that inherits a client is told to make its own, instead of hanging."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with Client(server.target) as client:
        child = context.Process(target=_use_after_fork, args=(client, theirs))
        child.start()
        assert ours.poll(20), "the child hangs"
        kind, message = ours.recv()
        child.join(10)
    assert kind == ClientForked.__name__
    assert "do not survive fork" in message


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_attempts": 0},
        {"initial_backoff_s": 0.001},
        {"initial_backoff_s": 9.0},
        {"backoff_multiplier": 0.5},
    ],
)
def test_retries_that_make_no_sense_are_refused(arguments: dict[str, float]) -> None:
    """A policy is checked when it is made."""
    with pytest.raises(ValueError, match=r"must be at least 1|need 0\.01"):
        Retries(**arguments)  # type: ignore[arg-type]  # wrong on purpose


def test_a_certificate_needs_its_key(tmp_path: Path) -> None:
    """Half a client identity is refused before any connection is made."""
    with pytest.raises(ValueError, match="certificate and key go together"):
        Client("localhost:1", tls=TLS(certificate=tmp_path / "client.pem"))


def test_the_repr_says_where_and_whether(server: FakeServer) -> None:
    """A client shows its target and its state."""
    client = Client(server.target)
    assert repr(client) == f"<Client of {server.target}>"
    client.close()
    assert repr(client) == f"<Client of {server.target}, closed>"


def test_an_async_client_needs_its_event_loop() -> None:
    """Made outside an event loop, an AsyncClient says so at once instead of hanging later."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("localhost:1")
