"""Many requests of one `AsyncClient` over one Stream call, for a fraction of what a call each would cost the server.

A request costs a future and a timer, no task; a stream costs two tasks. Callers notice nothing: errors, deadlines,
retries and priorities are those of unary calls. When a stream breaks, what it leaves unanswered is asked again on a new
one; where that cannot help, as after an answer that was too large, each is asked on a call of its own, so that the
culprit alone fails and everybody gets the very error that a call gives.
"""

import asyncio
import copy
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from latentd.reasons import Reason
from latentd.v1 import generation_service_pb2 as pb

from latentd_client import errors
from latentd_client.calls import Priority, Unary
from latentd_client.channels import Settings, Terms, new_request_id, translate
from latentd_client.retries import Attempts
from latentd_client.shared_stream import UNANSWERED, Question, SharedStream

_FIELDS: Mapping[str, str] = {
    "Encode": "encode",
    "Decode": "decode",
    "DenoiseStep": "denoise_step",
    "Score": "score",
}
"""Of StreamRequest and StreamResponse, by the RPC that they stand for."""
_PRIORITIES: Mapping[Priority, pb.Priority.ValueType] = {
    "high": pb.PRIORITY_HIGH,
    "normal": pb.PRIORITY_NORMAL,
    "low": pb.PRIORITY_LOW,
}
_FAREWELL_S = 1.0  # how long `close` waits for the server to end a stream on which nothing is left to do


@dataclass(slots=True, eq=False)
class _Asked(Question):
    """A question, and who waits for its answer.

    The future's result is the answer, or None for a question that is to be asked on a call of its own.
    """

    terms: Terms
    attempts: Attempts
    answer: asyncio.Future[Message | None]
    stream: "_Stream | None" = None  # that has it now; none between two attempts
    timers: list[asyncio.TimerHandle] = field(default_factory=list)

    def settle(self, outcome: Message | errors.LatentdError | None) -> None:
        """Let the caller go on; only the first time counts."""
        if self.answer.done():
            return
        if isinstance(outcome, errors.LatentdError):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


class Multiplexer:
    """The shared streams of one client: the newest takes questions, others only answer. Belongs to one event loop.

    Args:
        open_stream: the RPC.
        settings: the client's.
    """

    def __init__(self, open_stream: Callable[..., Any], settings: Settings) -> None:
        self._open_stream = open_stream
        self._settings = settings
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}  # all that somebody waits for, by id
        self._streams: list[_Stream] = []  # oldest first
        self._limit = UNANSWERED
        self._understood = True  # as far as is known, the server speaks this part of the contract

    async def ask(self, ask: Unary, terms: Terms) -> Any:
        """The answer to a unary call; None for what must be asked on a call of its own.

        Raises:
            LatentdError: the call failed, as it would have on its own.
        """
        if ask.rpc not in _FIELDS or not self._understood:
            return None
        timeout_s = terms.timeout()
        loop = asyncio.get_running_loop()
        asked = _Asked(
            id=next(self._ids),
            field=_FIELDS[ask.rpc],
            request=ask.request,
            size=ask.request.ByteSize(),
            priority=_PRIORITIES[terms.priority],
            deadline_s=terms.at_s,
            terms=terms,
            attempts=self._settings.attempts(),
            answer=loop.create_future(),
        )
        if not asked.fits:
            return None
        if timeout_s is not None:
            asked.timers.append(loop.call_later(timeout_s, self._expire, asked))
        self._asked[asked.id] = asked
        try:
            self._put(asked)
            return await asked.answer
        finally:  # answered, failed, out of time, or nobody waits any more
            self._forget(asked)

    async def close(self) -> None:
        """Fail what is unanswered, and end the streams."""
        for asked in self._asked.values():
            asked.settle(errors.Cancelled("the client was closed"))
        readers = [stream.reader for stream in self._streams]
        for stream in self._streams:
            stream.close()
        if readers:
            await asyncio.wait(readers, timeout=_FAREWELL_S)

    def hear(self, stream: "_Stream", response: pb.StreamResponse) -> None:
        """Take an answer.

        Raises:
            ProtocolError: it contradicts the contract.
        """
        heard = stream.shared.receive(response)
        if heard is None:
            return
        asked, outcome = heard
        asked.stream = None
        if not isinstance(outcome, errors.LatentdError):
            self._settings.throttle.succeeded()
            asked.settle(outcome)
        elif _of_the_stream(outcome) and stream.shared.limit > 1:
            # The server takes fewer on one stream than was thought. A call of its own would know no such limit.
            stream.retire()
            self._limit = min(self._limit, stream.shared.limit // 2)
            self._put(asked)
        elif isinstance(outcome, errors.Draining):  # and will say so to all that is new here
            counted = not stream.shared.retired
            stream.retire()
            self._again(outcome, [asked], counted=counted)
        else:
            self._again(outcome, [asked])

    def lose(self, stream: "_Stream", failure: errors.LatentdError) -> None:
        """A stream is over: ask what it leaves unanswered again."""
        self._streams.remove(stream)
        left = stream.shared.abandon()
        for asked in left:
            asked.stream = None
        if failure.retryable:
            self._again(failure, left)
            return
        if isinstance(failure, errors.ProtocolError) or failure.code is errors.Code.UNIMPLEMENTED:
            self._understood = False
        for asked in left:
            asked.settle(None)

    def _put(self, asked: _Asked) -> None:
        if asked.answer.done():  # while it waited for its next attempt
            return
        stream = self._streams[-1] if self._streams else None
        if stream is None or stream.shared.retired:
            stream = _Stream(self, self._open_stream, self._settings, self._limit)
            self._streams.append(stream)
        asked.stream = stream
        stream.put(asked)

    def _again(self, failure: errors.LatentdError, left: Sequence[_Asked], *, counted: bool = True) -> None:
        """Ask anew what one failure left unanswered, all at one time and on one stream, or pass the failure on."""
        loop, chance = asyncio.get_running_loop(), random.random()
        now_s = loop.time()
        for asked in left:
            error = copy.copy(failure)  # an exception has one traceback, and these are raised in many places
            try:
                delay_s = asked.attempts.delay_s(
                    error, progress=0, remaining_s=asked.terms.remaining_s, chance=chance, counted=counted
                )
            except errors.LatentdError:
                asked.settle(error)
            else:
                asked.timers.append(loop.call_at(now_s + delay_s, self._put, asked))
            counted = False

    def _expire(self, asked: _Asked) -> None:
        asked.settle(errors.DeadlineExceeded(f"the timeout of {asked.terms.timeout_s:g} s has passed"))

    def _forget(self, asked: _Asked) -> None:
        del self._asked[asked.id]
        for timer in asked.timers:
            timer.cancel()
        if asked.stream is not None:
            asked.stream.withdraw(asked)
        if asked.answer.done() and not asked.answer.cancelled():
            asked.answer.exception()  # its caller may have been cancelled at the same moment, and never look


class _Stream:
    """One Stream call."""

    def __init__(self, owner: Multiplexer, open_stream: Callable[..., Any], settings: Settings, limit: int) -> None:
        self.shared: SharedStream[_Asked] = SharedStream(new_request_id(), limit)
        self._owner = owner
        self._something = asyncio.Event()
        self._over = False
        metadata = settings.metadata(self.shared.request_id, Terms.never())
        self._call = open_stream(self._messages(), metadata=metadata)  # a grpc.aio.StreamStreamCall
        self.reader = asyncio.create_task(self._read())

    def put(self, asked: _Asked) -> None:
        """Ask with the next message."""
        self.shared.put(asked)
        self._something.set()

    def withdraw(self, asked: _Asked) -> None:
        """Give a question up."""
        self.shared.withdraw(asked)
        self._something.set()

    def retire(self) -> None:
        """End the stream once all that it was asked is answered."""
        self.shared.retired = True
        self._something.set()

    def close(self) -> None:
        """End the stream now: in words if nothing is left to be said."""
        self.retire()
        if not self.shared.idle:
            self._call.cancel()

    async def _messages(self) -> AsyncIterator[pb.StreamRequest]:
        """What to write; gRPC asks for the next message when it has written the one before it."""
        while not self._over:
            self._something.clear()
            message = self.shared.next_message(time.monotonic())
            if message is not None:
                yield message
            elif self.shared.retired and self.shared.idle:
                return
            else:
                await self._something.wait()

    async def _read(self) -> None:
        request_id = self.shared.request_id
        failure: errors.LatentdError = errors.Cancelled("the stream was given up", request_id=request_id)
        try:
            async for message in self._call:
                for response in message.batch.responses if message.HasField("batch") else (message,):
                    self._owner.hear(self, response)
                if self.shared.retired:
                    self._something.set()  # that may have been the last answer
            failure = errors.ServerUnavailable("the server ended the stream", request_id=request_id)
        except grpc.RpcError as error:
            failure = translate(error, request_id)
        except errors.LatentdError as error:
            failure = error
        finally:
            self._over = True
            self._something.set()
            self._call.cancel()
            self._owner.lose(self, failure)


def _of_the_stream(error: errors.LatentdError) -> bool:
    """Whether the stream carries more than the server takes on one, of which the caller knows nothing."""
    return error.reason is Reason.QUOTA_EXCEEDED and error.metadata.get("subject") == "stream"
