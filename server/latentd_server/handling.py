"""What every handler does around its work: who calls, how the call ended, and what a failure looks like.

Three habits of grpc.aio shape this file: a handler blocked in `write` sees `InternalError`, not `CancelledError`, when
its call is cancelled; headers commit a call, so they are sent only once a request has been accepted, for until
then a refusal lets gRPC retry the call by itself; and a call keeps the exception that aborts it, and with its stack all
that the handlers on it hold, itself among them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio
from latentd.names import CALLER_KEY, PRIORITY_KEY, REQUEST_ID_KEY
from latentd.v1 import generation_service_pb2

from latentd_server import batches, errors
from latentd_server.accounts import Peer
from latentd_server.failures import FieldsInvalidError, ReaderTooSlowError, Violation
from latentd_server.wire import Written

Context = aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")

_SAME_DEADLINE_S = 0.1
"""A deadline travels as time left, so the client's passes before ours, and its cancel may be heard first."""
_MAX_HEADER = 128  # characters of a caller's name or request id that are kept


class Tally:
    """How many of something are under way; entered and left as a context manager."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._count += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    async def none(self) -> None:
        """Wait until there are none."""
        await self._none.wait()


def peer_of(context: Context) -> Peer:
    """Who calls: the name the caller gives, else its connection; and what else its metadata say."""
    caller = request_id = priority = ""
    for key, value in context.invocation_metadata() or ():
        if key == CALLER_KEY:
            caller = str(value)[:_MAX_HEADER]
        elif key == REQUEST_ID_KEY:
            request_id = str(value)[:_MAX_HEADER]
        elif key == PRIORITY_KEY:
            priority = str(value)[:_MAX_HEADER]
    return Peer(caller or context.peer(), request_id, priority)


async def echo(context: Context, peer: Peer) -> None:
    """Send the caller's request id back, and with it the headers."""
    if peer.request_id:
        await context.send_initial_metadata(((REQUEST_ID_KEY, peer.request_id),))


def register(server: aio.Server, service: ServiceDescriptor, servicer: object) -> None:
    """Add a service, as its generated function would, but for bytes that are no message.

    grpc.aio takes those for a bug of the handler: the caller gets UNKNOWN and the log a stack for every one of them.
    Here they are a wrong request like any other.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        serve = getattr(servicer, method.name)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        handlers[method.name] = make(
            _handler(serve),
            request_deserializer=_reader(GetMessageClass(method.input_type)),
            response_serializer=_serialized,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


class UnregisteredMethods:
    """A server as generated functions add services to, with nothing but generic handlers.

    For every method that is registered grpc.aio waits for a call of its own, and looks after all of these whenever it
    accepts one: with eleven methods that was a sixth of an empty call.
    """

    def __init__(self, server: aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Add them."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service_name: str, handlers: object) -> None:
        """They are among the generic ones too."""


@dataclass(frozen=True, slots=True)
class Junk:
    """Bytes that are no message of the type that was due, or that are not worth reading."""

    type_name: str
    violation: Violation | None = None  # what is wrong with them, where that is another thing

    @property
    def error(self) -> FieldsInvalidError:
        """What the caller is told."""
        text = f"the request is no {self.type_name}: its bytes cannot be read"
        return FieldsInvalidError([self.violation or Violation("", text)])


def _reader(kind: type[Message]) -> Callable[[bytes], Message | Junk]:
    batched = kind is generation_service_pb2.StreamRequest

    def read(data: bytes) -> Message | Junk:
        if batched and (wrong := batches.problem(data)) is not None:
            return Junk(kind.DESCRIPTOR.full_name, Violation("batch", wrong))
        try:
            return kind.FromString(data)
        except DecodeError:
            return Junk(kind.DESCRIPTOR.full_name)

    return read


def _serialized(response: Message | Written) -> bytes:
    return response.SerializeToString()


def _handler(serve: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    """What gRPC calls: refuses junk, and lets a broken call go without waiting for the garbage collector."""

    async def handle(request: Any, context: Context) -> Any:
        try:
            if isinstance(request, Junk):
                await _refuse(errors.refusal(request.error), context, peer_of(context))
            return await serve(request, context)
        except (aio.AbortError, asyncio.CancelledError) as over:
            del request, context
            over.__context__ = None
            raise over.with_traceback(None) from None

    return handle


async def _refuse(refusal: errors.Refusal, context: Context, peer: Peer) -> NoReturn:
    trailers = (*refusal.trailers, (REQUEST_ID_KEY, peer.request_id)) if peer.request_id else refusal.trailers
    await context.abort(refusal.code, refusal.status.message, trailers)
    raise AssertionError("abort does not return")


_left: set[asyncio.Task[None]] = set()
"""Refusals on their way behind messages that nobody reads; held, or they might be collected."""


def _leave_word(refusal: errors.Refusal, context: Context, peer: Peer) -> None:
    """Refuse without waiting for it: the status travels behind what was written, which may never be read."""

    async def refuse() -> None:
        try:
            with contextlib.suppress(aio.InternalError):  # the call is over
                await _refuse(refusal, context, peer)
        except aio.AbortError as sent:
            sent.__traceback__ = sent.__context__ = None  # as in `_handler`

    task = asyncio.create_task(refuse())
    _left.add(task)
    task.add_done_callback(_left.discard)


def _why_cut_off(context: Context) -> str:
    left_s = context.time_remaining()
    return "CANCELLED" if left_s is None or left_s > _SAME_DEADLINE_S else "DEADLINE_EXCEEDED"


async def guarded(work: Awaitable[Answer], end: Callable[[str, str], None], context: Context, peer: Peer) -> Answer:
    """Await a handler's work; tell its end to the books, and its failure to the caller."""
    try:
        answer = await work
    except asyncio.CancelledError:
        end(_why_cut_off(context), "")
        raise
    except aio.InternalError:  # raised by a write to a call that is over
        end(_why_cut_off(context), "")
        raise asyncio.CancelledError from None
    except Exception as error:
        refusal = errors.refusal(error)
        error.__traceback__ = error.__context__ = error.__cause__ = None  # whoever keeps it would keep this call
        end(refusal.code.name, refusal.reason)
        if isinstance(error, ReaderTooSlowError):
            _leave_word(refusal, context, peer)
            raise asyncio.CancelledError from None
        try:
            await _refuse(refusal, context, peer)
        except aio.InternalError:  # the call is over, and nobody is there to be refused
            raise asyncio.CancelledError from None
    end("OK", "")
    return answer
