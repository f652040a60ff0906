"""The Stream RPC: many requests over one bidirectional stream, each with an id of its own.

One task reads and one writes; a request costs no task, no future and no header. Every id that is taken up ends with
exactly one `final` message. The rules:

* an error ends its own id only; a message that names an id wrongly (one in use, an open loop where there is none)
  is refused with an error that leaves the id's own request alone, and is not `final` while that goes on;
* when the client half-closes, what was accepted is finished; loops left open are then given up, and told so;
* nothing more is read while much waits to be written; a client that hardly reads meanwhile is given up;
* a message costs more than a small request in it, so both sides may send several in one. Nobody waits for that: what
  has gathered while the message before was written goes out together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf.message import Message
from latentd.v1 import generation_service_pb2 as pb

from latentd_server import errors
from latentd_server.accounts import Peer
from latentd_server.delivery import MESSAGE_BYTES, Outbox, Source
from latentd_server.exchange import Door, Exchange, Fill, LoopExchange, SampleExchange, SingleExchange
from latentd_server.failures import (
    CancelledError,
    DrainingError,
    FieldsInvalidError,
    QuotaExceededError,
    Violation,
)
from latentd_server.handling import Junk
from latentd_server.priority import of_field
from latentd_server.wire import Written, inside, written

OUTBOX_BYTES = 8 * 2**20
"""What may wait for a reader before the jobs it waits for sit out."""
AHEAD_BYTES = 8 * 2**20
"""What may be lined up behind the steps under way of a stream's loops."""


_BATCH = pb.StreamResponse.BATCH_FIELD_NUMBER
_RESPONSES = pb.StreamResponseBatch.RESPONSES_FIELD_NUMBER

_TURN_REQUESTS = 64
"""Requests of a batch that are taken up before others have their turn on the event loop."""


class Session:
    """One Stream call."""

    def __init__(self, door: Door, peer: Peer, deadline: float | None) -> None:
        self._door = door
        self._peer = peer
        self._deadline = deadline
        self._open: dict[int, Exchange] = {}
        self._half_closed = False
        self._outbox = Outbox(
            OUTBOX_BYTES,
            door.limits.max_open_ids,
            self._reader_is_slow,
            reader_timeout_s=door.limits.reader_timeout_s,
            call_later=asyncio.get_running_loop().call_later,
        )

    async def run(
        self,
        requests: AsyncIterator[pb.StreamRequest | Junk],
        write: Callable[[pb.StreamResponse | Written], Awaitable[None]],
    ) -> None:
        """Serve the stream until both sides are done with it.

        Raises:
            ReaderTooSlowError: the client hardly reads.
        """
        reader = asyncio.create_task(self._read(requests))
        try:
            await self._outbox.deliver(write)
        finally:
            reader.cancel()

    def abandon(self, code: str, reason: str) -> None:
        """The call is over, and with it whatever is still open."""
        for exchange in self._open.values():
            exchange.end(code, reason)
        self._open.clear()
        self._outbox.let_go()

    def shut(self) -> None:
        """The server goes down: give up what is open, and end the stream behind what waits to be written."""
        for exchange in list(self._open.values()):
            exchange.reply.fail(DrainingError())
        self._outbox.close(DrainingError())
        self._outbox.hurry()

    def put(self, response: pb.StreamResponse | Written, size: int) -> None:
        """Send a message."""
        self._outbox.put(response, size + MESSAGE_BYTES)

    def put_source(self, source: Source) -> None:
        """Send messages that are made when it is their turn."""
        self._outbox.put_source(source)

    def end(self, request_id: int, code: str, reason: str) -> None:
        """An id has had its final message."""
        self._open.pop(request_id).end(code, reason)
        self.close_if_done()

    async def _read(self, requests: AsyncIterator[pb.StreamRequest | Junk]) -> None:
        try:
            async for request in requests:
                if isinstance(request, Junk):  # whose id nobody knows
                    raise request.error
                if request.WhichOneof("request") == "batch":
                    await self._take_up_batch(request.batch)
                else:
                    self._take_up(request)
                await self._outbox.room()
            self._half_closed = True
            self.close_if_done()
        except Exception as error:
            self._outbox.close(error)

    async def _take_up_batch(self, batch: pb.StreamRequestBatch) -> None:
        self._outbox.pack = _packed
        for number, request in enumerate(batch.requests, 1):
            self._take_up(request)
            if number % _TURN_REQUESTS == 0:
                await asyncio.sleep(0)
                await self._outbox.room()

    def _take_up(self, request: pb.StreamRequest) -> None:
        """Begin what a message asks for. Whatever is wrong with it is answered, never raised."""
        kind = request.WhichOneof("request")
        if kind is None or kind == "batch":
            self._refuse(request.id, "request", "must hold one of the requests this API version knows, and no batch")
        elif kind == "cancel":
            if request.id in self._open:  # an unknown id has just been answered
                self._open[request.id].reply.fail(CancelledError())
        elif kind == "take_step":
            self._take_step(request)
        elif request.id in self._open:
            self._refuse(request.id, "id", f"must be unique among unfinished requests; {request.id} is unfinished")
        else:
            self._begin(request, kind)

    def _begin(self, request: pb.StreamRequest, kind: str) -> None:
        exchange_type, method, field = _KINDS[kind]
        reply = IdReply(self, request.id, field)
        exchange = self._open[request.id] = exchange_type(self._door, self._peer, method, reply)
        try:
            self._check_quota(request)
            exchange.start(getattr(request, kind), self._deadline_of(request), of_field(request.priority))
        except Exception as error:
            reply.fail(error)
        else:
            if self._outbox.full:
                exchange.pause(True)

    def _take_step(self, request: pb.StreamRequest) -> None:
        exchange = self._open.get(request.id)
        if not isinstance(exchange, LoopExchange):
            self._refuse(request.id, "id", f"must name an open loop; {request.id} names none")
        elif exchange.steps_ahead >= exchange.steps_left:
            self._refuse(request.id, "take_step", f"the loop's {exchange.steps_left} last steps are under way already")
        else:
            try:
                self._check_ahead(exchange, request.take_step)
                exchange.take_step(request.take_step, self._deadline_of(request))
            except Exception as error:
                exchange.reply.fail(error)

    def _check_ahead(self, exchange: LoopExchange, step: pb.TakeStep) -> None:
        """States may be sent ahead of the steps that use them, but not without end: they are in no backlog."""
        if not exchange.busy or not step.noisy_samples.data:
            return
        held = sum(other.bytes_ahead for other in self._open.values() if isinstance(other, LoopExchange))
        if held + step.ByteSize() > AHEAD_BYTES:
            most = AHEAD_BYTES // 2**20
            raise QuotaExceededError("stream", f"the loops of a stream may have {most} MiB of steps lined up at most")

    def _refuse(self, request_id: int, path: str, description: str) -> None:
        """Answer a message that was not taken up; a request that is under way with its id goes on."""
        error = errors.refusal(FieldsInvalidError([Violation(path, description)])).stream_error
        self.put(pb.StreamResponse(id=request_id, final=request_id not in self._open, error=error), 0)

    def _check_quota(self, request: pb.StreamRequest) -> None:
        limits = self._door.limits
        if len(self._open) > limits.max_open_ids:
            raise QuotaExceededError("stream", f"a stream may have {limits.max_open_ids} unfinished requests at most")
        if request.HasField("open_denoise"):
            held = sum(other.lane_count for other in self._open.values() if isinstance(other, LoopExchange))
            if held + request.open_denoise.sample_count > limits.max_loop_samples:
                most = limits.max_loop_samples
                description = f"the loops of a stream may hold {most} samples at most; they hold {held}"
                raise QuotaExceededError("stream", description)

    def _deadline_of(self, request: pb.StreamRequest) -> float | None:
        if not request.HasField("timeout"):
            return self._deadline
        seconds = request.timeout.seconds + request.timeout.nanos / 1e9
        if seconds <= 0:
            raise FieldsInvalidError([Violation("timeout", f"must be above 0 s; got {seconds:g} s")])
        own = self._door.clock() + seconds
        return own if self._deadline is None else min(own, self._deadline)

    def _reader_is_slow(self, slow: bool) -> None:
        for exchange in self._open.values():
            exchange.pause(slow)

    def close_if_done(self) -> None:
        """After half-close: once nothing is under way, loops that nobody can drive any more are given up."""
        if not self._half_closed or any(exchange.busy for exchange in self._open.values()):
            return
        self._half_closed = False  # what follows comes back here
        for exchange in list(self._open.values()):
            exchange.reply.fail(
                CancelledError("the client closed its side of the stream, so this loop can go no further")
            )
        self._outbox.close()


class IdReply:
    """Answers one id of a session."""

    def __init__(self, session: Session, request_id: int, field: str) -> None:
        self._session = session
        self._id = request_id
        self._field = field

    def new(self) -> Any:
        """An empty response inside the message it will travel in."""
        self._draft = pb.StreamResponse(id=self._id)
        return getattr(self._draft, self._field)

    def send(self, response: Message, size: int, *, final: bool) -> None:
        """Pass on the response that `new` gave."""
        if final:
            self._draft.final = True
        self._put(self._draft, size, final=final)

    def send_written(self, response: Written, *, final: bool) -> None:
        """Pass on a response that is written already."""
        around = pb.StreamResponse(id=self._id, final=final).SerializeToString()
        whole = Written([around, *inside(_NUMBERS[self._field], response)])
        self._put(whole, whole.size, final=final)

    def _put(self, message: pb.StreamResponse | Written, size: int, *, final: bool) -> None:
        self._session.put(message, size)
        if final:
            self._session.end(self._id, "OK", "")
        else:
            self._session.close_if_done()

    def send_later(self, fill: Fill) -> None:
        """Pass on responses that are made when it is their turn."""

        def make() -> list[Message]:
            messages: list[Message] = []

            def new() -> Any:
                response = self.new()
                messages.append(self._draft)
                return response

            fill(new)
            return messages

        self._session.put_source(make)

    def fail(self, error: Exception) -> None:
        """End this id without a (further) answer."""
        refusal = errors.refusal(error)
        self._session.put(pb.StreamResponse(id=self._id, final=True, error=refusal.stream_error), 0)
        self._session.end(self._id, refusal.code.name, refusal.reason)


def _packed(responses: list[pb.StreamResponse | Written]) -> Written:
    """A `StreamResponse` with a batch of these."""
    pieces: list[bytes] = []
    for response in responses:
        pieces += inside(_RESPONSES, written(response))
    return Written(inside(_BATCH, Written(pieces)))


_NUMBERS = {field.name: field.number for field in pb.StreamResponse.DESCRIPTOR.fields}

_KINDS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "sample": (SampleExchange, "Sample", "sample"),
    "encode": (SingleExchange, "Encode", "encode"),
    "decode": (SingleExchange, "Decode", "decode"),
    "denoise_step": (SingleExchange, "DenoiseStep", "denoise_step"),
    "score": (SingleExchange, "Score", "score"),
    "open_denoise": (LoopExchange, "DenoiseLoop", "loop"),
}
"""Fields of StreamRequest: what handles them, the method's name, and the field of StreamResponse that answers."""
