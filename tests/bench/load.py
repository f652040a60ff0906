"""Load from a process of its own: a closed loop of so many requests in flight, over one connection.

Run as `python -m tests.bench.load TARGET KIND MODEL CONCURRENCY SECONDS`. It says "ready", begins when a line comes in,
and prints one line of JSON. Kinds are METHOD[-ROWS] with METHOD `decode`, `sample` or `mix`, after `stream-` where
requests share one Stream call. `mix` is `sample` with previews, guidance and client-driven loops among plain requests.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import uvloop
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc, model_pb2, model_service_pb2, model_service_pb2_grpc

STEPS = (10, 25, 50)
SAMPLERS = ("ddim", "ddpm", "dpmpp-2m", "euler", "dpmpp-2m-sde")
_WARM_UP = 5  # requests before the time is taken
_REQUESTS = 510
"""Requests made beforehand, which take turns; a multiple of all that takes turns in them."""


def decode_requests(model: model_pb2.Model, rows: int) -> list[pb.StreamRequest]:
    """Latents for so many rows each; classes take turns where there are any."""
    latents = np.random.default_rng(0).standard_normal((_REQUESTS, rows, *model.latent_spec.shape), np.float32)
    requests = [
        pb.StreamRequest(decode=pb.DecodeRequest(model=model.name, latents=tensor.encode(values))) for values in latents
    ]
    for index, request in enumerate(requests):
        if model.class_names:
            request.decode.condition.class_label = index % len(model.class_names)
    return requests


def sample_requests(model: model_pb2.Model, count: int) -> list[pb.StreamRequest]:
    """So many samples each; of diffusion models step counts, samplers and classes take turns."""
    requests = [
        pb.StreamRequest(sample=pb.SampleRequest(model=model.name, seed=index, sample_count=count))
        for index in range(_REQUESTS)
    ]
    for index, request in enumerate(requests):
        if model.HasField("diffusion"):
            request.sample.diffusion.step_count = STEPS[index % len(STEPS)]
            request.sample.diffusion.sampler = SAMPLERS[index % len(SAMPLERS)]
            request.sample.condition.class_label = index % len(model.class_names)
    return requests


def mixed_requests(model: model_pb2.Model, count: int) -> list[pb.StreamRequest]:
    """As `sample_requests`, but of four requests one asks for previews, one for guidance, and one is a loop."""
    requests = sample_requests(model, count)
    for index, request in enumerate(requests):
        kind = index // len(STEPS) % 4
        if kind == 1:
            request.sample.diffusion.preview_interval_steps = 2
        elif kind == 2:
            request.sample.diffusion.guidance_scale = 2.0
        elif kind == 3:
            request.sample.diffusion.sampler = "ddim"
            opening = request.sample
            requests[index] = pb.StreamRequest(open_denoise=opening)
    return requests


_KINDS: dict[str, Callable[[model_pb2.Model, int], list[pb.StreamRequest]]] = {
    "decode": decode_requests,
    "sample": sample_requests,
    "mix": mixed_requests,
}


def step_count(request: pb.StreamRequest) -> int:
    """Solver steps a request asks for; 0 where there are none."""
    kind = request.WhichOneof("request") or ""
    return int(getattr(request, kind).diffusion.step_count)


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
                kind = response.WhichOneof("response")
                if kind == "error":
                    self._waiting.pop(response.id).set_exception(RuntimeError(response.error.message))
                elif response.final:
                    self._waiting.pop(response.id).set_result(None)
                elif kind == "loop":
                    self._send(pb.StreamRequest(id=response.id, take_step=pb.TakeStep()))

    def _send(self, request: pb.StreamRequest) -> None:
        self._outgoing.append(request)
        self._something.set()

    async def ask(self, request: pb.StreamRequest) -> None:
        """Send one request and wait for its final answer. Loops are driven a step at a time."""
        number = next(self._ids)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        mine = pb.StreamRequest()
        mine.CopyFrom(request)
        mine.id = number
        self._send(mine)
        await future

    async def close(self) -> None:
        """End the stream."""
        self._closed = True
        self._something.set()
        await self._reader


def _on_its_own(stub: Any) -> Callable[[pb.StreamRequest], Awaitable[None]]:
    async def ask(request: pb.StreamRequest) -> None:
        if request.HasField("decode"):
            await stub.Decode(request.decode)
        else:
            async for _ in stub.Sample(request.sample):
                pass

    return ask


async def load(target: str, kind: str, name: str, concurrency: int, seconds: float) -> dict[str, Any]:
    """Drive one kind of load and say what came of it."""
    options = [("grpc.max_receive_message_length", 64 << 20)]
    method, _, rows_text = kind.removeprefix("stream-").partition("-")
    rows = int(rows_text or 1)
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        requests = _KINDS[method](await _model(channel, name), rows)
        multiplexed = Multiplexed(stub) if kind.startswith("stream-") else None
        ask = _on_its_own(stub) if multiplexed is None else multiplexed.ask
        numbers = itertools.count()
        for _ in range(_WARM_UP):  # the connection is up and everything is warm
            await ask(requests[next(numbers) % _REQUESTS])
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)  # until told to begin
        latencies: list[tuple[int, float]] = []  # by step count
        started, before = time.perf_counter(), time.process_time()

        async def worker() -> None:
            while time.perf_counter() - started < seconds:
                request, asked = requests[next(numbers) % _REQUESTS], time.perf_counter()
                await ask(request)
                latencies.append((step_count(request), time.perf_counter() - asked))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        elapsed, spent = time.perf_counter() - started, time.process_time() - before
        if multiplexed is not None:
            await multiplexed.close()
    p50, p99 = np.percentile([latency for _, latency in latencies], [50, 99]) * 1e3
    return {
        "requests": len(latencies),
        "seconds": elapsed,
        "rows": len(latencies) * rows,
        "rows_per_second": len(latencies) * rows / elapsed,
        "client_cpu_us_per_request": spent / len(latencies) * 1e6,
        "p50_ms": p50,
        "p99_ms": p99,
        "p50_ms_by_steps": {
            steps: float(np.median([latency for own, latency in latencies if own == steps])) * 1e3
            for steps in sorted({steps for steps, _ in latencies})
        },
    }


async def _model(channel: Any, name: str) -> model_pb2.Model:
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    answer: model_service_pb2.GetModelResponse = await stub.GetModel(model_service_pb2.GetModelRequest(name=name))
    return answer.model


if __name__ == "__main__":
    target, kind, name = sys.argv[1:4]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(load(target, kind, name, int(sys.argv[4]), float(sys.argv[5])))))
