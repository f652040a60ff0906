"""Load from a process of its own: a closed loop of so many requests in flight, over one connection.

Run as `python -m tests.bench.load TARGET KIND MODEL CONCURRENCY SECONDS`; prints one JSON line.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import uvloop
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc, model_pb2, model_service_pb2, model_service_pb2_grpc

STEPS = (10, 25, 50)
SAMPLERS = ("ddim", "ddpm", "dpmpp-2m", "euler", "dpmpp-2m-sde")
WARM_UP = 5
_REQUESTS = 510
"""Requests made beforehand, which take turns; a multiple of all that takes turns in them."""


def decode_requests(model: model_pb2.Model, rows: int) -> list[pb.DecodeRequest]:
    """Latents for so many rows each; classes take turns where there are any."""
    latents = np.random.default_rng(0).standard_normal((_REQUESTS, rows, *model.latent_spec.shape), np.float32)
    return [
        pb.DecodeRequest(
            model=model.name,
            latents=tensor.encode(values),
            condition=pb.Condition(class_label=index % len(model.class_names)) if model.class_names else None,
        )
        for index, values in enumerate(latents)
    ]


def sample_requests(model: model_pb2.Model, count: int) -> list[pb.SampleRequest]:
    """So many samples each; of diffusion models step counts, samplers and classes take turns."""
    requests = [pb.SampleRequest(model=model.name, seed=index, sample_count=count) for index in range(_REQUESTS)]
    for index, request in enumerate(requests):
        if model.HasField("diffusion"):
            request.diffusion.step_count = STEPS[index % len(STEPS)]
            request.diffusion.sampler = SAMPLERS[index % len(SAMPLERS)]
            request.condition.class_label = index % len(model.class_names)
    return requests


class Multiplexed:
    """Requests over one Stream call, answered by id. What gathers while a message is written goes out in the next."""

    def __init__(self, stub: Any) -> None:
        self._outgoing: list[pb.StreamRequest] = []
        self._something = asyncio.Event()
        self._closed = False
        self._call = stub.Stream(self._requests())
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._ids = itertools.count()
        self._reader = asyncio.create_task(self._read())

    async def _requests(self) -> AsyncIterator[pb.StreamRequest]:
        yield pb.StreamRequest(batch=pb.StreamRequestBatch())  # so that answers come in batches too
        while self._outgoing or not self._closed:
            if self._outgoing:
                requests, self._outgoing = self._outgoing, []
                first, *more = requests
                yield pb.StreamRequest(batch=pb.StreamRequestBatch(requests=requests)) if more else first
            else:
                self._something.clear()
                await self._something.wait()

    async def _read(self) -> None:
        async for message in self._call:
            batched = message.WhichOneof("response") == "batch"
            for response in message.batch.responses if batched else (message,):
                if response.WhichOneof("response") == "error":
                    self._waiting.pop(response.id).set_exception(RuntimeError(response.error.message))
                elif response.final:
                    self._waiting.pop(response.id).set_result(None)

    async def ask(self, **request: Any) -> None:
        """Send one request and wait for its final answer."""
        number = next(self._ids)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._outgoing.append(pb.StreamRequest(id=number, **request))
        self._something.set()
        await future

    async def close(self) -> None:
        """End the stream."""
        self._closed = True
        self._something.set()
        await self._reader


async def load(target: str, kind: str, name: str, concurrency: int, seconds: float) -> dict[str, Any]:
    """Drive one kind of load: [stream-]METHOD[-ROWS]."""
    options = [("grpc.max_receive_message_length", 64 << 20)]
    method, _, rows_text = kind.removeprefix("stream-").partition("-")
    rows = int(rows_text or 1)
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        model = await _model(channel, name)
        requests: list[Any] = (decode_requests if method == "decode" else sample_requests)(model, rows)
        multiplexed = Multiplexed(stub) if kind.startswith("stream-") else None

        async def ask(index: int) -> None:
            request = requests[index % _REQUESTS]
            if multiplexed is not None:
                await multiplexed.ask(**{method: request})
            elif method == "decode":
                await stub.Decode(request)
            else:
                async for _ in stub.Sample(request):
                    pass

        latencies: list[float] = []
        numbers = itertools.count()
        for _ in range(WARM_UP):  # the connection is up and everything is warm
            await ask(next(numbers))
        print("ready", flush=True)
        started = time.perf_counter()

        async def worker() -> None:
            while time.perf_counter() - started < seconds:
                asked = time.perf_counter()
                await ask(next(numbers))
                latencies.append(time.perf_counter() - asked)

        before = time.process_time()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        elapsed = time.perf_counter() - started
        spent = time.process_time() - before
        if multiplexed is not None:
            await multiplexed.close()
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return {
        "requests": len(latencies),
        "rows_per_second": len(latencies) * rows / elapsed,
        "rows": len(latencies) * rows,
        "client_cpu_us_per_request": spent / len(latencies) * 1e6,
        "p50_ms": p50,
        "p99_ms": p99,
    }


async def _model(channel: Any, name: str) -> model_pb2.Model:
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    answer: model_service_pb2.GetModelResponse = await stub.GetModel(model_service_pb2.GetModelRequest(name=name))
    return answer.model


if __name__ == "__main__":
    target, kind, name = sys.argv[1:4]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(load(target, kind, name, int(sys.argv[4]), float(sys.argv[5])))))
