"""What calls leave to the garbage collector: nothing of ours, so that its pauses stay short under load."""

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import numpy as np
import pytest
from bundles import SHAPE
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd_server.failures import RuntimeFailureError
from live import Live

D, V = "tiny-diffusion", "tiny-vae"
CALLS = 20


@pytest.fixture(scope="module")
def live(models_root: Path) -> Iterator[Live]:
    running = Live(models_root, max_batch_rows=8, max_samples=4, max_backlog=2_000, self_check_interval=0)
    yield running
    running.stop()


def sample(**fields: Any) -> pb.SampleRequest:
    return pb.SampleRequest(model=D, seed=1, diffusion=pb.DiffusionOptions(sampler="ddim", step_count=4, **fields))


def refused(ask: Callable[[], Any]) -> None:
    with pytest.raises(grpc.RpcError):
        ask()


def cancelled(live: Live) -> None:
    call = live.stub.Sample(sample(preview_interval_steps=1), timeout=60)
    next(call)
    call.cancel()
    with contextlib.suppress(grpc.RpcError):
        list(call)


def hurried(live: Live) -> None:
    """Some are refused, some run out of time, some are done."""
    with contextlib.suppress(grpc.RpcError):
        list(live.stub.Sample(sample(), timeout=2e-3))


def failed(live: Live, ask: Callable[[], Any]) -> None:
    """An accepted call that the engine gives up."""

    async def give_up() -> None:
        live.serving.engine.give_up(f"{D}@1", RuntimeFailureError(D))

    call = ask()
    next(call)
    live.call(give_up())
    with contextlib.suppress(grpc.RpcError):
        list(call)


def failed_unary(live: Live) -> None:
    """Samples to encode that fail while they walk."""

    async def give_up() -> None:
        live.serving.engine.give_up(f"{D}@1", RuntimeFailureError(D))

    call = live.stub.Encode.future(INVERSION, timeout=60)
    while not live.unfinished and not call.done():
        live.turn()
    live.call(give_up())
    with contextlib.suppress(grpc.RpcError):
        call.result()


def junk(live: Live) -> None:
    send = live.channel.stream_stream("/latentd.v1.GenerationService/Stream")
    refused(lambda: list(send(iter([JUNK]), timeout=60)))


def loop(live: Live) -> None:
    live.loop(pb.SampleRequest(model=D, seed=3, diffusion=pb.DiffusionOptions(sampler="ddim", step_count=3)))


JUNK = b"\xff\xff\xff"
LONG = pb.SampleRequest(
    model=D, seed=1, sample_count=4, diffusion=pb.DiffusionOptions(step_count=100, preview_interval_steps=1)
)
INVERSION = pb.EncodeRequest(
    model=D, samples=tensor.encode(np.zeros((4, *SHAPE), np.float32)), diffusion=pb.DiffusionOptions(step_count=100)
)
UNKNOWN = pb.SampleRequest(model="nobody")
MANY = pb.SampleRequest(model=D, sample_count=5)
DECODE = pb.DecodeRequest(model=V, latents=tensor.encode(np.zeros((2, 3), np.float32)))
DECODE.condition.class_label = 1
NOTHING = pb.DecodeRequest(model=V)
CASES: dict[str, Callable[[Live], Any]] = {
    "decode": lambda live: live.stub.Decode(DECODE, timeout=60),
    "sample": lambda live: live.sample(sample()),
    "previews": lambda live: live.sample(sample(preview_interval_steps=1)),
    "refused decode": lambda live: refused(lambda: live.stub.Decode(NOTHING, timeout=60)),
    "refused sample": lambda live: refused(lambda: live.sample(MANY)),
    "unknown model": lambda live: refused(lambda: live.sample(UNKNOWN)),
    "past its deadline": hurried,
    "cancelled": cancelled,
    "stream": lambda live: live.stream(*(pb.StreamRequest(id=i, sample=sample()) for i in range(3))),
    "refused on a stream": lambda live: live.stream(pb.StreamRequest(id=1, sample=UNKNOWN)),
    "junk on a stream": junk,
    "failed": lambda live: failed(live, lambda: live.stub.Sample(LONG, timeout=60)),
    "failed unary": failed_unary,
    "failed on a stream": lambda live: failed(
        live, lambda: live.stub.Stream(iter([pb.StreamRequest(id=1, sample=LONG)]), timeout=60)
    ),
    "loop": loop,
}


def is_ours(each: object) -> bool:
    """An object of the server's, a message, or the frame of a function of the server's."""
    if isinstance(each, FrameType):
        return "latentd_server" in each.f_code.co_filename
    return type(each).__module__.startswith(("latentd_server", "latentd.v1"))


@pytest.mark.parametrize("case", CASES)
def test_calls_leave_no_circles(case: str, live: Live) -> None:
    """However a call ends, what the server made for it goes when it ends, without the collector."""
    ask = CASES[case]
    ask(live)  # whatever is made once is there
    live.settle()
    gc.collect()
    gc.disable()
    try:
        for _ in range(CALLS):
            ask(live)
        live.settle()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = Counter(type(each).__qualname__ for each in gc.garbage if is_ours(each))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    # One call may still be on its way out, and a request of the client's.
    assert max(left.values(), default=0) < CALLS / 4, left
