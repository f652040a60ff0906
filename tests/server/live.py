"""A whole server over tiny bundles, on a thread of its own, for tests that speak to it as any client would."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import uvloop
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc
from latentd_server.app import Serving, serving
from latentd_server.config import Config
from latentd_server.points import Points
from latentd_server.runtime import Device

Answer = TypeVar("Answer")


class Live:
    """Runs from construction to `stop`."""

    def __init__(self, root: Path, points: Points | None = None, **fields: Any) -> None:
        local = "127.0.0.1:0"
        fields.setdefault("cache", "off")
        self._points = points
        self._config = Config(models=root, listen=local, http=local, threads=1, **fields)
        self._loop = uvloop.new_event_loop()
        self._leave = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(60)
        self.channel = grpc.insecure_channel(self.serving.addresses["grpc"])
        self.stub = generation_service_pb2_grpc.GenerationServiceStub(self.channel)

    async def _serve(self) -> None:
        async with serving(self._config, Device("cpu"), self._points) as self.serving:
            while self.serving.health.why_not_serving:  # noqa: ASYNC110  # once, at start
                await asyncio.sleep(0.01)
            self._ready.set()
            await self._leave.wait()

    serving: Serving

    def stop(self) -> None:
        """Drain, and wait for the end."""
        self.channel.close()
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._loop.close()

    @property
    def unfinished(self) -> int:
        """Jobs the engine holds."""
        return self.serving.engine.queue_depth

    def turn(self) -> None:
        """Let the server's event loop do what it was asked to until now."""
        self.call(asyncio.sleep(0))

    def call(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Do something on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def settle(self) -> None:
        """Wait until the engine has been handed what it was asked for until now, and none of it waits for more."""

        async def hurry() -> None:
            self.serving.engine._hand_over.tell(lambda: None)
            await asyncio.sleep(0)

        self.turn()
        self.call(hurry())
        self.turn()

    def sample(self, request: pb.SampleRequest) -> bytes:
        """The samples of a request in order, as bytes, with their latents and labels."""
        return gathered(self.stub.Sample(request, timeout=60))

    def stream(self, *requests: pb.StreamRequest) -> dict[int, list[pb.StreamResponse]]:
        """Send requests on one Stream, all at once; what came back, by id."""
        answers: dict[int, list[pb.StreamResponse]] = {}
        for message in self.stub.Stream(iter(requests), timeout=60):
            packed = message.WhichOneof("response") == "batch"
            for response in message.batch.responses if packed else (message,):
                answers.setdefault(response.id, []).append(response)
        return answers

    def loop(self, request: pb.SampleRequest) -> np.ndarray[Any, Any]:
        """The last state of a client-driven loop that follows its schedule."""
        stepped = pb.StreamRequest(id=1, take_step=pb.TakeStep(state_requested=True))
        walk = request.diffusion
        count = len(walk.timesteps) or walk.step_count or 10
        answers = self.stream(pb.StreamRequest(id=1, open_denoise=request), *[stepped] * count)[1]
        assert answers[-1].loop.timestep == -1, answers[-1]
        return tensor.decode(answers[-1].loop.step.next_samples)


def gathered(responses: Any) -> bytes:
    """Samples (with latents and labels) by index, as bytes."""
    found: dict[int, bytes] = {}
    for response in responses:
        result = response.result
        samples = tensor.decode(result.samples) if result.HasField("samples") else ()
        latents = tensor.decode(result.latents) if result.HasField("latents") else None
        for row, index in enumerate(result.sample_indices):
            assert index not in found, "each sample is sent once"
            label = result.class_labels[row : row + 1]
            found[index] = samples[row].tobytes() + bytes(label) + (b"" if latents is None else latents[row].tobytes())
    assert sorted(found) == list(range(len(found)))
    return b"".join(found[index] for index in sorted(found))
