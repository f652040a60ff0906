"""What every handler does around its work."""

import asyncio
from typing import Any, NoReturn

import pytest
from grpc import aio
from latentd_server.accounts import Peer
from latentd_server.failures import DrainingError
from latentd_server.handling import guarded


class Gone:
    """A call that is over: gRPC cannot send anything on it any more."""

    async def abort(self, *_: Any) -> NoReturn:
        raise aio.InternalError("Failed to execute batch")


async def test_who_left_before_a_refusal_is_no_bug_of_ours() -> None:
    """The end is counted as the refusal it was, and gRPC is told that the call is cancelled, which it does not log."""
    ends: list[tuple[str, str]] = []

    async def work() -> None:
        raise DrainingError

    with pytest.raises(asyncio.CancelledError):
        await guarded(work(), lambda code, reason: ends.append((code, reason)), Gone(), Peer("me", ""))  # type: ignore[arg-type]
    assert ends == [("UNAVAILABLE", "DRAINING")]
