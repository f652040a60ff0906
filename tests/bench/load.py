"""Load from a process of its own: a closed loop of so many requests in flight, over one connection.

Run as `python -m tests.bench.load TARGET KIND CONCURRENCY SECONDS`; prints one JSON line.
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
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc, model_pb2, model_service_pb2, model_service_pb2_grpc

STEPS = (10, 25, 50)
SAMPLERS = ("ddim", "ddpm", "dpmpp-2m", "euler", "dpmpp-2m-sde")
VAE, DIFFUSION = "digits-vae", "digits-diffusion"


def decode_request(index: int, rows: int, model: model_pb2.Model) -> pb.DecodeRequest:
    """Rows of latents of one class."""
    latents = np.random.default_rng(index).standard_normal((rows, model.latent_spec.shape[0]), np.float32)
    condition = pb.Condition(class_label=index % len(model.class_names))
    return pb.DecodeRequest(model=VAE, latents=tensor.encode(latents), condition=condition)


def sample_request(index: int, model: model_pb2.Model) -> pb.SampleRequest:
    """One sample; step counts and samplers take turns."""
    options = pb.DiffusionOptions(step_count=STEPS[index % len(STEPS)], sampler=SAMPLERS[index % len(SAMPLERS)])
    return pb.SampleRequest(
        model=DIFFUSION,
        seed=index,
        diffusion=options,
        condition=pb.Condition(class_label=index % len(model.class_names)),
    )


class Multiplexed:
    """Requests over one Stream call, answered by id."""

    def __init__(self, stub: Any) -> None:
        self._outgoing: asyncio.Queue[pb.StreamRequest | None] = asyncio.Queue()
        self._call = stub.Stream(self._requests())
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._ids = itertools.count()
        self._reader = asyncio.create_task(self._read())

    async def _requests(self) -> AsyncIterator[pb.StreamRequest]:
        """One writer: gRPC takes one write at a time."""
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _read(self) -> None:
        async for response in self._call:
            if response.WhichOneof("response") == "error":
                raise RuntimeError(response.error.message)
            if response.final:
                self._waiting.pop(response.id).set_result(None)

    async def ask(self, **request: Any) -> None:
        """Send one request and wait for its final answer."""
        number = next(self._ids)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._outgoing.put_nowait(pb.StreamRequest(id=number, **request))
        await future

    async def close(self) -> None:
        """End the stream."""
        self._outgoing.put_nowait(None)
        await self._reader


async def load(target: str, kind: str, concurrency: int, seconds: float) -> dict[str, Any]:
    """Drive one kind of load and say what came of it."""
    options = [("grpc.max_receive_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        vae, diffusion = await _model(channel, VAE), await _model(channel, DIFFUSION)
        multiplexed = Multiplexed(stub) if kind.startswith("stream") else None

        async def unary_decode(index: int, rows: int = 1) -> None:
            await stub.Decode(decode_request(index, rows, vae))

        async def stream_decode(index: int) -> None:
            assert multiplexed is not None
            await multiplexed.ask(decode=decode_request(index, 1, vae))

        async def stream_sample(index: int) -> None:
            assert multiplexed is not None
            await multiplexed.ask(sample=sample_request(index, diffusion))

        async def unary_sample(index: int) -> None:
            async for _ in stub.Sample(sample_request(index, diffusion)):
                pass

        async def sample_256(index: int) -> None:
            async for _ in stub.Sample(pb.SampleRequest(model=VAE, seed=index, sample_count=256)):
                pass

        kinds: dict[str, tuple[Callable[[int], Awaitable[None]], int]] = {
            "unary-decode": (unary_decode, 1),
            "unary-decode-16": (lambda index: unary_decode(index, 16), 16),
            "stream-decode": (stream_decode, 1),
            "stream-sample": (stream_sample, 1),
            "sample": (unary_sample, 1),
            "sample-256": (sample_256, 256),
        }
        ask, rows = kinds[kind]
        latencies: list[float] = []
        numbers = itertools.count()
        await ask(next(numbers))  # the connection is up and everything is warm
        print("ready", flush=True)
        started = time.perf_counter()

        async def worker() -> None:
            while time.perf_counter() - started < seconds:
                asked = time.perf_counter()
                await ask(next(numbers))
                latencies.append(time.perf_counter() - asked)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        elapsed = time.perf_counter() - started
        if multiplexed is not None:
            await multiplexed.close()
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return {
        "requests": len(latencies),
        "rows_per_second": len(latencies) * rows / elapsed,
        "rows": len(latencies) * rows,
        "p50_ms": p50,
        "p99_ms": p99,
    }


async def _model(channel: Any, name: str) -> model_pb2.Model:
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    answer: model_service_pb2.GetModelResponse = await stub.GetModel(model_service_pb2.GetModelRequest(name=name))
    return answer.model


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))))
