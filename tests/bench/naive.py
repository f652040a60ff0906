"""Servers that a few lines of grpc.aio make: what serving a network costs without any of what latentd does.

Run as `python -m tests.bench.naive BUNDLE THREADS [--empty]`. It serves Decode and Sample of one bundle on loopback,
one call of ONNX Runtime for each request in the handler itself, with latents by NumPy's own generator, or, with
`--empty`, a ready answer (of zeros, to Sample); and prints its port. It ends when its input does.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop
from latentd import tensor
from latentd.v1 import bundle_pb2, generation_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc
from latentd.v1 import generation_service_pb2 as pb

from tests.bench import bare
from tests.bench.served import Server


class _Models(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, bundle: bundle_pb2.Bundle) -> None:
        self._bundle = bundle

    async def GetModel(self, request: Any, context: Any) -> model_service_pb2.GetModelResponse:
        return model_service_pb2.GetModelResponse(model=self._bundle.model)


class _Decodes(generation_service_pb2_grpc.GenerationServiceServicer):
    def __init__(self, directory: Path, bundle: bundle_pb2.Bundle, threads: int) -> None:
        (network,) = bundle.networks
        self._session = bare.session(directory, network, threads)
        self._input, self._output = network.inputs[0].name, network.outputs[0].name
        self._shape = tuple(network.inputs[0].spec.shape)

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> pb.DecodeResponse:
        (samples,) = self._session.run([self._output], {self._input: tensor.decode(request.latents)})
        return pb.DecodeResponse(samples=tensor.encode(samples))

    async def Sample(self, request: pb.SampleRequest, context: Any) -> None:  # type: ignore[override]  # stubs: generators
        shape = (request.sample_count, *self._shape)
        latents = np.random.default_rng(request.seed).standard_normal(shape, np.float32)
        (samples,) = self._session.run([self._output], {self._input: latents})
        await context.write(_result(samples))


def _result(samples: Any) -> pb.SampleResponse:
    response = pb.SampleResponse()
    response.result.sample_indices.extend(range(len(samples)))
    tensor.pack(samples, response.result.samples)
    return response


class _Empty(generation_service_pb2_grpc.GenerationServiceServicer):
    def __init__(self, bundle: bundle_pb2.Bundle) -> None:
        self._answer = pb.DecodeResponse()
        self._shape = tuple(bundle.model.sample_spec.shape)
        self._results: dict[int, pb.SampleResponse] = {}  # by count

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> pb.DecodeResponse:
        return self._answer

    async def Sample(self, request: pb.SampleRequest, context: Any) -> None:  # type: ignore[override]  # stubs: generators
        count = request.sample_count
        if count not in self._results:
            self._results[count] = _result(np.zeros((count, *self._shape), np.float32))
        await context.write(self._results[count])


async def _serve(directory: Path, threads: int, *, empty: bool) -> None:
    bundle = bare.read(directory)
    server = grpc.aio.server()
    servicer = _Empty(bundle) if empty else _Decodes(directory, bundle, threads)
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]  # stubs
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(_Models(bundle), server)  # type: ignore[no-untyped-call]  # stubs
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


@contextmanager
def server(directory: Path, threads: int, *, empty: bool = False) -> Iterator[Server]:
    """Run one until it is no longer needed."""
    command = [sys.executable, "-m", "tests.bench.naive", str(directory), str(threads), *["--empty"] * empty]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Server(f"127.0.0.1:{int(process.stdout.readline())}", "", process.pid, 0.0)
        process.stdin.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(sys.argv[1]), int(sys.argv[2]), empty="--empty" in sys.argv))
