"""Requests that are about to be given up, and the ways in which a client gives up."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from bundles import SHAPE
from google.protobuf.duration_pb2 import Duration
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from wire import Wire

SEED = 4711
SERVICE = "/latentd.v1.GenerationService/"
_OPTIONS = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]

_CLIENT = """
import sys, threading
import grpc
target, path, shape = sys.argv[1:]
messages = []
while size := int.from_bytes(sys.stdin.buffer.read(4), "big"):
    messages.append(sys.stdin.buffer.read(size))
def endless():
    yield from messages
    threading.Event().wait()
channel = grpc.insecure_channel(target)
if shape == "unary":
    channel.unary_unary(path)(messages[0])
else:
    call = channel.unary_stream(path)(messages[0]) if shape == "stream" else channel.stream_stream(path)(endless())
    for _ in call:
        pass
"""
"""A client process: sends what it reads from its input, framed by lengths, and reads what comes."""


def _noisy() -> Any:
    return tensor.encode(np.random.default_rng(5).standard_normal((2, *SHAPE)).astype(np.float32))


def _walk(steps: int) -> pb.DiffusionOptions:
    return pb.DiffusionOptions(step_count=steps, guidance_scale=2.0)


D = "tiny-diffusion"
SAMPLE = pb.SampleRequest(model=D, seed=SEED, sample_count=2, diffusion=_walk(6))


@dataclass(frozen=True)
class Victim:
    """One request, of two guided lanes: four evaluations a step."""

    rpc: str
    counted_as: str
    messages: tuple[Any, ...]
    steps: int
    rows: int = 4

    @property
    def in_stream(self) -> bool:
        """Whether it is one id among others."""
        return self.rpc == "Stream"


VICTIMS = {
    "Decode": Victim(
        "Decode", "Decode", (pb.DecodeRequest(model=D, latents=_noisy(), seed=SEED, diffusion=_walk(6)),), 6
    ),
    "DenoiseStep": Victim(
        "DenoiseStep",
        "DenoiseStep",
        (
            pb.DenoiseStepRequest(
                model=D,
                noisy_samples=_noisy(),
                timesteps=[50],
                next_timesteps=[40],
                condition=pb.Condition(class_label=1),
                guidance_scale=2.0,
                seed=SEED,
            ),
        ),
        1,
    ),
    "Sample": Victim("Sample", "Sample", (SAMPLE,), 6),
    "Stream": Victim("Stream", "Sample", (pb.StreamRequest(id=1, sample=SAMPLE),), 6),
    "Loop": Victim(
        "Stream",
        "DenoiseLoop",
        (pb.StreamRequest(id=1, open_denoise=SAMPLE), pb.StreamRequest(id=1, take_step=pb.TakeStep())),
        1,
    ),
}

CALL_WAYS = ("cancel", "deadline", "reset", "kill")
STREAM_WAYS = ("cancel", "timeout", "hang-up", "deadline", "reset", "kill")


class Client:
    """Sends a victim's request and gives it up in one of the ways."""

    def __init__(self, target: str, victim: Victim, way: str, patience_s: float) -> None:
        """`patience_s` is the deadline, where the way is one."""
        self._way = way
        self._in_stream = victim.in_stream
        self._process: subprocess.Popen[bytes] | None = None
        self._wire = Wire(target) if way == "reset" else None
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel: grpc.Channel | None = None
        path = SERVICE + victim.rpc
        messages = [_timed(message, patience_s) if way == "timeout" else message for message in victim.messages]
        data = [message.SerializeToString() for message in messages]
        if way == "kill":
            shape = {"Sample": "stream", "Stream": "streams"}.get(victim.rpc, "unary")
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CLIENT, target, path, shape], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert self._process.stdin is not None
            for message in data:
                self._process.stdin.write(len(message).to_bytes(4, "big") + message)
            self._process.stdin.write(bytes(4))
            self._process.stdin.flush()
            return
        self._channel = grpc.insecure_channel(self._wire.address if self._wire else target, options=_OPTIONS)
        timeout = patience_s if way == "deadline" else None
        if timeout is not None:
            grpc.channel_ready_future(self._channel).result(60)  # time runs from the call on
        if victim.in_stream:
            for message in data:
                self._outgoing.put(message)
            self._call: Any = self._channel.stream_stream(path)(self._requests(), timeout=timeout)
        elif victim.rpc == "Sample":
            self._call = self._channel.unary_stream(path)(data[0], timeout=timeout)
        else:
            self._call = self._channel.unary_unary(path).future(data[0], timeout=timeout)

    @property
    def has_been_answered(self) -> bool:
        """Whether its call is over as it sees it, which the server may never have heard of."""
        return self._way == "deadline" and bool(self._call.done())

    def _requests(self) -> Iterator[bytes]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def give_up(self) -> None:
        """Go, unless it is time that does it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        elif self._wire is not None:
            self._wire.reset()
        elif self._way == "cancel" and self._in_stream:
            self._outgoing.put(pb.StreamRequest(id=1, cancel=pb.Cancel()).SerializeToString())
        elif self._way in ("cancel", "hang-up"):
            self._call.cancel()

    def close(self) -> None:
        """Leave nothing behind. A stream that outlived its request is ended in order."""
        self._outgoing.put(None)
        if self._way in ("cancel", "timeout") and self._in_stream:
            self.answers = list(self._call)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
        if self._channel is not None:
            self._channel.close()


def _timed(message: Any, seconds: float) -> pb.StreamRequest:
    timed = pb.StreamRequest()
    timed.CopyFrom(message)
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    timed.timeout.CopyFrom(duration)
    return timed
