"""A reader that has stopped, over real gRPC: what sits out for it is given up, and nobody else notices."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from doors import until
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc, model_pb2
from latentd_server import rpc, stream
from latentd_server.app import Serving, serving
from latentd_server.config import Config
from latentd_server.models import Registry
from latentd_server.runtime import Device

MANY = 40_000
HUGE = pb.SampleRequest(model="tiny-vae", sample_count=MANY)
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0)]
"""Lets gRPC run 64 KiB ahead of a reader instead of megabytes."""


@pytest.fixture
def outbox_bytes() -> int:
    return 2**16


@pytest.fixture
def seconds() -> dict[str, float]:
    return {"reader_timeout": 2, "drain_seconds": 5}


@pytest.fixture
async def running(
    models_root: Path, outbox_bytes: int, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Serving]:
    for module in (rpc, stream):
        monkeypatch.setattr(module, "OUTBOX_BYTES", outbox_bytes)
    local = "127.0.0.1:0"
    limits: dict[str, Any] = {"max_samples": MANY, "max_backlog": 3 * MANY, **seconds}
    config = Config(models=models_root, listen=local, http=local, threads=1, **limits)
    async with serving(config, Device("cpu")) as running:
        await until(lambda: not running.health.why_not_serving)
        yield running


def reason(error: aio.AioRpcError) -> str:
    """`ErrorInfo.reason` of a failed call."""
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    return info.reason


async def open_sample(stub: Any) -> tuple[Any, str]:
    return stub.Sample(HUGE), 'code="RESOURCE_EXHAUSTED",method="Sample",model="tiny-vae@1"} 1.0'


async def open_stream(stub: Any) -> tuple[Any, str]:
    call = stub.Stream()
    for request_id in (1, 2):
        await call.write(pb.StreamRequest(id=request_id, sample=HUGE))
    return call, 'code="RESOURCE_EXHAUSTED",method="Sample",model="tiny-vae@1"} 2.0'


async def read_to_the_end(call: Any) -> list[Message]:
    """Every message of a call that ends well."""
    messages = []
    while (message := await call.read()) is not aio.EOF:
        messages.append(message)
    return messages


@pytest.mark.parametrize("open_call", [open_sample, open_stream], ids=["Sample", "Stream"])
async def test_a_reader_that_stops_gives_its_backlog_back(open_call: Any, running: Serving) -> None:
    """Its jobs leave the engine and are counted, its neighbour is served, no drain waits for it, and it is told why."""
    address = running.addresses["grpc"]
    async with aio.insecure_channel(address, options=SMALL_WINDOW) as channel, aio.insecure_channel(address) as other:
        call, counted = await open_call(generation_service_pb2_grpc.GenerationServiceStub(channel))
        await call.read()
        assert running.engine.backlog > MANY / 2
        neighbour = generation_service_pb2_grpc.GenerationServiceStub(other)
        answers = await read_to_the_end(neighbour.Sample(pb.SampleRequest(model="tiny-vae", sample_count=500)))
        assert sum(len(answer.result.sample_indices) for answer in answers) == 500  # type: ignore[attr-defined]

        await until(lambda: not running.engine.queue_depth and not running.engine.backlog)
        exposition = running.door.metrics.exposition().decode()
        assert "latentd_backlog_evaluations 0.0" in exposition
        assert counted in exposition
        assert 'latentd_requests_in_flight{method="Sample"} 0.0' in exposition
        await asyncio.wait_for(running.service.finish(), 10)

        with pytest.raises(aio.AioRpcError) as caught:
            await asyncio.wait_for(read_to_the_end(call), 10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(caught.value) == "READER_TOO_SLOW"
    assert "too little was read in 2 s" in caught.value.details()


@pytest.mark.parametrize("outbox_bytes", [2**30])
@pytest.mark.parametrize("open_call", [open_sample, open_stream], ids=["Sample", "Stream"])
async def test_a_drain_gives_a_reader_up_that_stands_still(open_call: Any, running: Serving) -> None:
    """Also where everything is computed and little enough waits: its time is then its own, but not a drain's."""
    address = running.addresses["grpc"]
    async with aio.insecure_channel(address, options=SMALL_WINDOW) as channel:
        call, counted = await open_call(generation_service_pb2_grpc.GenerationServiceStub(channel))
        await call.read()
        await asyncio.wait_for(running.engine.drained(), 30)
        assert counted.rpartition(" ")[0] not in running.door.metrics.exposition().decode()
        running.engine.drain()
        await asyncio.wait_for(running.service.finish(), 10)


@pytest.mark.parametrize("seconds", [{"reader_timeout": 0, "drain_seconds": 0.1}])
@pytest.mark.parametrize("open_call", [open_sample, open_stream], ids=["Sample", "Stream"])
async def test_a_reader_that_may_stop_for_ever_does_not_keep_its_model(open_call: Any, running: Serving) -> None:
    """Unloading gives up what is not finished in time; the reader is told so behind what it has yet to read."""
    async with aio.insecure_channel(running.addresses["grpc"], options=SMALL_WINDOW) as channel:
        call, _ = await open_call(generation_service_pb2_grpc.GenerationServiceStub(channel))
        await call.read()
        assert isinstance(running.door.registry, Registry)
        unloaded = await asyncio.wait_for(running.door.registry.unload("tiny-vae@1"), 10)
        assert unloaded.state == model_pb2.Model.STATE_UNLOADED
        await until(lambda: not running.engine.queue_depth and not running.engine.backlog)
        assert running.engine.lanes_held == 0
        if isinstance(call, aio.StreamStreamCall):
            await call.done_writing()
            *_, last = await asyncio.wait_for(read_to_the_end(call), 10)
            assert last.final
            told = last.error.message  # type: ignore[attr-defined]  # untyped stubs
        else:
            with pytest.raises(aio.AioRpcError) as caught:
                await asyncio.wait_for(read_to_the_end(call), 10)
            assert reason(caught.value) == "DRAINING"
            told = caught.value.details() or ""
    assert told == "tiny-vae@1 is being unloaded, and this was not finished within 0.1 s"
