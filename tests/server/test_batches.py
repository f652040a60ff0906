"""A message of very many small requests is refused before it is parsed, which would take thirty times its bytes."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from bundles import LATENT
from doors import Front, StaticRegistry, front
from google.protobuf.message import DecodeError
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import batches
from manual_engine import ManualEngine

Request = pb.StreamRequest
LARGE = Request(
    id=1, decode=pb.DecodeRequest(model="m", latents=tensor.encode(np.zeros(batches.LOOKED_AT_BYTES // 4, np.float32)))
)


def batch(*requests: pb.StreamRequest) -> bytes:
    return Request(id=9, batch=pb.StreamRequestBatch(requests=requests)).SerializeToString()


def test_requests_of_large_messages_are_counted() -> None:
    """One too many is, whatever else is in the message, whether in one batch or in several that add up."""
    full = [LARGE, *[Request()] * (batches.MOST_REQUESTS - 1)]
    assert batches.problem(batch(*full)) is None
    assert "at most 16384 requests" in str(batches.problem(batch(*full, Request())))
    assert "at most 16384 requests" in str(batches.problem(batch(*full) + batch(Request())))


def test_a_batch_inside_a_batch_hides_nothing() -> None:
    """Nor do fields that repeat, each of which replaces the one before."""
    hidden = Request(batch=pb.StreamRequestBatch(requests=[Request()] * 200_000))
    assert "none of which is a batch" in str(batches.problem(batch(hidden)))
    assert "at most 64 fields" in str(
        batches.problem(LARGE.SerializeToString() + 64 * Request(id=3).SerializeToString())
    )
    assert batches.problem(LARGE.SerializeToString() + 8 * Request(id=3).SerializeToString()) is None


def test_small_messages_are_left_alone() -> None:
    """They are bounded by their bytes, and looking costs time."""
    assert batches.problem(batch(*[Request()] * 100_000)) is None


@given(st.binary(max_size=200), st.integers(0, 3))
def test_bytes_that_are_no_message_are_left_to_the_parser(junk: bytes, place: int) -> None:
    """Whatever they are, they are looked at without an error; and what can be parsed and holds little passes."""
    whole = LARGE.SerializeToString()
    data = (whole + junk, junk + whole, batch(LARGE)[:-1] + junk, whole[:300_000] + junk)[place]
    found = batches.problem(data)
    try:
        parsed = Request.FromString(data)
    except DecodeError:
        return
    assert found is None or len(parsed.batch.requests) > 0 or "fields" in found


@pytest.fixture
async def served(held: dict[str, Any]) -> AsyncIterator[Front]:
    async with front(ManualEngine(), StaticRegistry(held)) as running:
        yield running


async def test_a_stream_is_told_what_a_batch_may_hold(served: Front) -> None:
    """Its ids cannot be told, so the stream ends; a large request in a batch is taken up."""
    call = served.stub.Stream()
    latents = tensor.encode(np.zeros((2**15, LATENT), np.float32))
    large = Request(id=1, decode=pb.DecodeRequest(model="tiny-vae", latents=latents))
    await call.write(Request(batch=pb.StreamRequestBatch(requests=[large])))
    assert "n from 1 to 1024" in (await call.read()).error.message
    await call.write(Request(batch=pb.StreamRequestBatch(requests=[Request()] * 200_000)))
    with pytest.raises(aio.AioRpcError, match="batch: must hold at most 16384 requests") as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
