"""What every handler does around its work: who calls, how the call ended, and what a failure looks like.

Two habits of grpc.aio shape this file: a handler blocked in `write` sees `InternalError`, not `CancelledError`, when
its call is cancelled; and headers commit a call, so they are sent only once a request has been accepted, for until
then a refusal lets gRPC retry the call by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from grpc import aio
from latentd.names import CALLER_KEY, REQUEST_ID_KEY

from latentd_server import errors
from latentd_server.accounts import Peer

Context = aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")

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
    """Who calls: the name the caller gives, else its connection."""
    caller = request_id = ""
    for key, value in context.invocation_metadata() or ():
        if key == CALLER_KEY:
            caller = str(value)[:_MAX_HEADER]
        elif key == REQUEST_ID_KEY:
            request_id = str(value)[:_MAX_HEADER]
    return Peer(caller or context.peer(), request_id)


async def echo(context: Context, peer: Peer) -> None:
    """Send the caller's request id back, and with it the headers."""
    if peer.request_id:
        await context.send_initial_metadata(((REQUEST_ID_KEY, peer.request_id),))


async def guarded(work: Awaitable[Answer], end: Callable[[str, str], None], context: Context, peer: Peer) -> Answer:
    """Await a handler's work; tell its end to the books, and its failure to the caller."""
    try:
        answer = await work
    except asyncio.CancelledError:
        end("DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED", "")
        raise
    except aio.InternalError:  # raised by a write to a call that is over
        end("CANCELLED", "")
        raise asyncio.CancelledError from None
    except Exception as error:
        refusal = errors.refusal(error)
        end(refusal.code.name, refusal.reason)
        trailers = (*refusal.trailers, (REQUEST_ID_KEY, peer.request_id)) if peer.request_id else refusal.trailers
        await context.abort(refusal.code, refusal.status.message, trailers)
        raise AssertionError("abort does not return") from error
    end("OK", "")
    return answer
