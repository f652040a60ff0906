"""GenerationService: parse, submit, stream out. No arithmetic, no policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import Message
from latentd.v1 import generation_service_pb2, generation_service_pb2_grpc

from latentd_server.accounts import Account
from latentd_server.delivery import MESSAGE_BYTES, Outbox
from latentd_server.exchange import Door, Fill, SampleExchange, SingleExchange
from latentd_server.failures import DrainingError
from latentd_server.handling import Context, Tally, echo, guarded, peer_of
from latentd_server.stream import OUTBOX_BYTES, Session
from latentd_server.wire import Written


class GenerationService(generation_service_pb2_grpc.GenerationServiceServicer):
    """Sample, Encode, Decode, DenoiseStep, Score and Stream, as generation_service.proto describes them."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._sessions: set[Session] = set()
        self._outboxes: set[Outbox] = set()  # of calls of Sample
        self._calls = Tally()
        self._streams = Tally()

    async def finish(self) -> None:
        """End every Stream behind what waits to be read, and wait until every call is answered and every Stream over.

        For a server that has drained: jobs of a Stream that are still with the engine are given up, and so is a reader
        that stands still, however little waits for it.
        """
        await self._door.aside.idle()
        for outbox in self._outboxes:
            outbox.hurry()
        for session in self._sessions:
            session.shut()
        await self._calls.none()
        await self._streams.none()

    async def Encode(
        self, request: generation_service_pb2.EncodeRequest, context: Context
    ) -> generation_service_pb2.EncodeResponse:
        """One answer."""
        response: generation_service_pb2.EncodeResponse = await self._answer("Encode", request, context)
        return response

    async def Decode(
        self, request: generation_service_pb2.DecodeRequest, context: Context
    ) -> generation_service_pb2.DecodeResponse:
        """One answer."""
        response: generation_service_pb2.DecodeResponse = await self._answer("Decode", request, context)
        return response

    async def DenoiseStep(
        self, request: generation_service_pb2.DenoiseStepRequest, context: Context
    ) -> generation_service_pb2.DenoiseStepResponse:
        """One answer."""
        response: generation_service_pb2.DenoiseStepResponse = await self._answer("DenoiseStep", request, context)
        return response

    async def Score(
        self, request: generation_service_pb2.ScoreRequest, context: Context
    ) -> generation_service_pb2.ScoreResponse:
        """One answer."""
        response: generation_service_pb2.ScoreResponse = await self._answer("Score", request, context)
        return response

    # The stubs know generators only; a handler that writes hears of a broken call at once, a generator when collected.
    async def Sample(  # type: ignore[override]
        self, request: generation_service_pb2.SampleRequest, context: Context
    ) -> None:
        """One `accepted`, then previews and results."""
        peer = peer_of(context)
        outbox = Outbox(
            OUTBOX_BYTES,
            0,
            lambda full: exchange.pause(full),
            reader_timeout_s=self._door.limits.reader_timeout_s,
            call_later=asyncio.get_running_loop().call_later,
        )
        exchange = SampleExchange(self._door, peer, "Sample", _OutboxReply(outbox))

        async def serve() -> None:
            exchange.start(request, self._deadline(context))
            await echo(context, peer)
            await outbox.deliver(context.write)

        self._outboxes.add(outbox)
        try:
            with self._calls:
                await guarded(serve(), exchange.end, context, peer)
        finally:
            self._outboxes.discard(outbox)
            outbox.let_go()

    async def Stream(  # type: ignore[override]  # as Sample
        self, requests: AsyncIterator[generation_service_pb2.StreamRequest], context: Context
    ) -> None:
        """Any of the others, many at a time."""
        peer = peer_of(context)
        account = Account(self._door.metrics, self._door.clock, peer, "Stream")
        session = Session(self._door, peer, self._deadline(context))

        def end(code: str, reason: str) -> None:
            session.abandon(code, reason)
            account.close(code, reason)

        async def serve() -> None:
            if self._door.engine.draining:
                raise DrainingError
            await echo(context, peer)
            await session.run(requests, context.write)

        self._sessions.add(session)
        try:
            with self._streams:
                await guarded(serve(), end, context, peer)
        finally:
            self._sessions.discard(session)

    async def _answer(self, method: str, request: Message, context: Context) -> Any:
        peer = peer_of(context)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        exchange = SingleExchange(self._door, peer, method, _FutureReply(answer, _ANSWERS[method]))

        async def serve() -> Message:
            exchange.start(request, self._deadline(context))
            response = await answer
            await echo(context, peer)
            return response

        with self._calls:
            return await guarded(serve(), exchange.end, context, peer)

    def _deadline(self, context: Context) -> float | None:
        remaining = context.time_remaining()
        return None if remaining is None else self._door.clock() + remaining


_ANSWERS: dict[str, type[Message]] = {
    "Encode": generation_service_pb2.EncodeResponse,
    "Decode": generation_service_pb2.DecodeResponse,
    "DenoiseStep": generation_service_pb2.DenoiseStepResponse,
    "Score": generation_service_pb2.ScoreResponse,
}


class _FutureReply:
    """Answers a unary call."""

    def __init__(self, answer: asyncio.Future[Message], kind: type[Message]) -> None:
        self._answer = answer
        self.new = kind

    def send(self, response: Message, size: int, *, final: bool) -> None:
        """Set the answer."""
        if not self._answer.done():  # cancelled, and the engine not told yet
            self._answer.set_result(response)

    def send_written(self, response: Written, *, final: bool) -> None:
        """Parts of an answer are written by themselves; a unary call has one."""
        raise TypeError("a unary call takes one answer")

    def send_later(self, fill: Fill) -> None:
        """A unary call has one answer."""
        raise TypeError("a unary call takes one answer")

    def fail(self, error: Exception) -> None:
        """Set the failure."""
        if not self._answer.done():
            self._answer.set_exception(error)


class _OutboxReply:
    """Answers a Sample call."""

    new = generation_service_pb2.SampleResponse

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def send(self, response: Message, size: int, *, final: bool) -> None:
        """Add a message."""
        self._outbox.put(response, size + MESSAGE_BYTES)
        if final:
            self._outbox.close()

    def send_written(self, response: Written, *, final: bool) -> None:
        """Add a message that is written already."""
        self._outbox.put(response, response.size + MESSAGE_BYTES)
        if final:
            self._outbox.close()

    def send_later(self, fill: Fill) -> None:
        """Add messages that are made when it is their turn."""

        def make() -> list[Message]:
            messages: list[Message] = []

            def new() -> Message:
                messages.append(self.new())
                return messages[-1]

            fill(new)
            return messages

        self._outbox.put_source(make)

    def fail(self, error: Exception) -> None:
        """End behind what waits."""
        self._outbox.close(error)
