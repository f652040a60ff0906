"""`python -m tests.bench.overload`: what a server makes of three times the load it can serve.

First a closed loop measures the peak; then an open loop, from a process of its own, offers a multiple of it: once with
deadlines, which the door keeps, and once with none, where the backlog's bound refuses. Prints, for each, evaluations of
requests done in time as a share of the peak, how long refusals took as the client sees it, and what they said.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop
from google.rpc import error_details_pb2, status_pb2
from latentd.names import CALLER_KEY
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc

from tests.bench.load import SAMPLERS, STEPS
from tests.bench.served import server

MODEL = "digits-diffusion"
IN_FLIGHT = 64
CONNECTIONS = 16
"""On one alone, calls beyond `max_streams` would wait at the client, and the door would not see them."""
BACKLOG_S = 2.0
"""Seconds of work that the backlog holds where it is bounded."""


def request(index: int, rng: random.Random, samples: int) -> pb.SampleRequest:
    """So many samples; step counts are drawn, samplers take turns."""
    options = pb.DiffusionOptions(step_count=rng.choice(STEPS), sampler=SAMPLERS[index % len(SAMPLERS)])
    return pb.SampleRequest(model=MODEL, seed=index, sample_count=samples, diffusion=options)


class Client:
    """Asks, and keeps what came of it."""

    def __init__(self, channels: list[grpc.aio.Channel]) -> None:
        self._stubs = [generation_service_pb2_grpc.GenerationServiceStub(channel) for channel in channels]
        self.done: list[tuple[float, int]] = []  # when, and its evaluations
        self.refused_ms: list[float] = []
        self.hints_s: list[float] = []
        self.ends: Counter[str] = Counter()

    async def ask(self, index: int, sample: pb.SampleRequest, timeout_s: float | None) -> None:
        """One request to its end."""
        asked = time.perf_counter()
        metadata = ((CALLER_KEY, f"caller-{index % 8}"),)
        try:
            async for _ in self._stubs[index % CONNECTIONS].Sample(sample, timeout=timeout_s, metadata=metadata):
                pass
        except grpc.aio.AioRpcError as error:
            reason, hint_s = _read(error)
            self.ends[reason] += 1
            if reason in ("OVERLOADED", "DEADLINE_UNREACHABLE", "QUOTA_EXCEEDED"):
                self.refused_ms.append(1e3 * (time.perf_counter() - asked))
                self.hints_s += [] if hint_s is None else [hint_s]
            return
        self.ends["OK"] += 1
        self.done.append((time.perf_counter(), sample.diffusion.step_count * sample.sample_count))


def _read(error: grpc.aio.AioRpcError) -> tuple[str, float | None]:
    """The reason and the hint of a refusal; the code's name where there is none."""
    reason, hint_s = error.code().name, None
    for detail in status_pb2.Status.FromString(
        dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    ).details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            hint_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return reason, hint_s


async def drive(target: str, per_s: float, seconds: float, timeout_s: float | None, samples: int) -> dict[str, Any]:
    """A closed loop if `per_s` is 0, else an open one with Poisson arrivals. Its first quarter is not counted."""
    async with contextlib.AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]  # or all channels would share a connection
        client = Client(
            [
                await stack.enter_async_context(grpc.aio.insecure_channel(target, options=options))
                for _ in range(CONNECTIONS)
            ]
        )
        rng, numbers = random.Random(0), itertools.count()
        for index in range(CONNECTIONS):
            await client.ask(index, request(index, rng, samples), None)  # the connection is up and everything is warm
        client.ends.clear()
        began = time.perf_counter()
        count_from, count_to = began + seconds / 4, began + seconds
        tasks: set[asyncio.Task[None]] = set()

        async def one() -> None:
            index = next(numbers)
            await client.ask(index, request(index, rng, samples), timeout_s)

        async def worker() -> None:
            while time.perf_counter() < count_to:
                await one()

        if per_s:
            due = began
            while due < count_to:
                due += rng.expovariate(per_s)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                task = asyncio.create_task(one())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
        else:
            await asyncio.gather(*(worker() for _ in range(max(2, IN_FLIGHT // samples))))
    return {
        "evaluations_per_s": sum(count for at, count in client.done if count_from <= at <= count_to)
        / (count_to - count_from),
        "ends": dict(client.ends),
        "refusal_ms": _quantiles(client.refused_ms, 0.5, 0.99, 1.0),
        "retry_after_s": _quantiles(client.hints_s, 0.05, 0.5, 0.95),
    }


def _quantiles(values: list[float], *at: float) -> dict[str, float]:
    return {f"p{100 * q:g}": float(np.quantile(values, q)) for q in at} if values else {}


def cell(address: str, per_s: float, seconds: float, timeout_s: float | None, samples: int) -> dict[str, Any]:
    """One load, from a process of its own, which yields to the server: elsewhere they would not share cores."""
    command = [
        "nice",
        "-n",
        "19",
        sys.executable,
        "-m",
        "tests.bench.overload",
        "--client",
        address,
        str(per_s),
        str(seconds),
    ]
    command += [str(timeout_s or 0), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 120)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> int:
    """Measure the peak, then overload."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overload", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help=f"with {MODEL}")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each cell")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds, of every request with a deadline")
    parser.add_argument("--samples", type=int, default=8, help="of each request")
    parser.add_argument("--factor", type=float, default=3.0, help="load offered, by the peak")
    parser.add_argument("--client", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        target, *numbers = options.client
        per_s, seconds, timeout_s, samples = map(float, numbers)
        print(json.dumps(uvloop.run(drive(target, per_s, seconds, timeout_s or None, int(samples)))))
        return 0
    if not (options.models / MODEL).exists():
        print(f"no {MODEL} in {options.models}; `make demo` trains it", file=sys.stderr)
        return 2
    with server(options.models, 1) as running:
        peak = cell(running.address, 0.0, options.seconds, None, options.samples)["evaluations_per_s"]
        per_s = options.factor * peak / (options.samples * sum(STEPS) / len(STEPS))
        print(f"peak {peak:,.0f} evaluations/s, closed loop of {IN_FLIGHT} samples; offered {per_s:,.0f} requests/s")
        found = cell(running.address, per_s, options.seconds, options.timeout, options.samples)
        _print(f"{options.timeout:g} s each", found, peak)
    with server(options.models, 1, "--max-backlog", str(round(BACKLOG_S * peak))) as running:
        found = cell(running.address, per_s, options.seconds, None, options.samples)
        _print(f"no deadline, a backlog of {BACKLOG_S:g} s", found, peak)
    return 0


def _print(name: str, result: dict[str, Any], peak: float) -> None:
    def listed(values: dict[str, float], unit: str) -> str:
        return ", ".join(f"{key} {value:.3g} {unit}" for key, value in values.items()) or "none"

    print(f"{name}:")
    print(f"  goodput {result['evaluations_per_s'] / peak:.2f} of the peak; ends {result['ends']}")
    print(f"  refused within {listed(result['refusal_ms'], 'ms')}")
    print(f"  told to come back in {listed(result['retry_after_s'], 's')}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
