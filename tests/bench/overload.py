"""`python -m tests.bench.overload`: what a server makes of three times the load it can serve.

In turns a closed loop measures the peak and an open loop, from a process of its own, offers a multiple of it: on one
server with deadlines, which the door keeps, and on another with none, where the backlog's bound refuses. Prints, for
each, evaluations of requests done in time as a share of the peak measured just before (the median of the rounds, since
the machine's speed changes), how long refusals took as the client sees it, and what they said. Last, a server whose
backlog is full of work that sits out does nothing but refuse, which tells what a refusal costs it.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop
from latentd.names import CALLER_KEY
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc

from tests.bench import bundles, http2
from tests.bench.load import SAMPLERS, STEPS
from tests.bench.served import server

MODEL = "digits-diffusion"
IN_FLIGHT = 64
CALLERS = 8
CONNECTIONS = 16
"""On one alone, calls beyond `max_streams` would wait at the client, and the door would not see them."""
BACKLOG_S = 2.0
"""Seconds of work that the backlog holds where it is bounded."""
MOST_REFUSALS_PER_S = 500.0
HELD = 100_000
"""Samples of the request that fills a backlog and sits out, since nobody reads: some 30 MiB."""


def request(index: int, rng: random.Random, samples: int, model: str = MODEL) -> pb.SampleRequest:
    """So many samples; where they take steps their counts are drawn, and samplers take turns."""
    asked = pb.SampleRequest(model=model, seed=index, sample_count=samples)
    if model == MODEL:
        asked.diffusion.step_count, asked.diffusion.sampler = rng.choice(STEPS), SAMPLERS[index % len(SAMPLERS)]
    return asked


class Client:
    """Asks, and keeps what came of it."""

    def __init__(self, connections: list[http2.Connection], target: str, timeout_s: float | None) -> None:
        self._connections = connections
        path = "/latentd.v1.GenerationService/Sample"
        deadline = [("grpc-timeout", f"{1e3 * timeout_s:.0f}m")] if timeout_s else []
        self._headers = [
            http2.header_block(path, target, [*deadline, (CALLER_KEY, f"caller-{number}")]) for number in range(CALLERS)
        ]
        self.done: list[tuple[float, int]] = []  # when, and its evaluations
        self.refused_ms: list[float] = []
        self.hints_s: list[float] = []
        self.ends: Counter[str] = Counter()

    async def ask(self, index: int, sample: pb.SampleRequest) -> None:
        """One request to its end."""
        body = http2.message(sample.SerializeToString())
        asked = time.perf_counter()
        end = await self._connections[index % CONNECTIONS].call(self._headers[index % CALLERS], body)
        took_ms = 1e3 * (time.perf_counter() - asked)
        kind = _kind(end)
        self.ends[kind] += 1
        if kind in _REFUSALS:
            self.refused_ms.append(took_ms)
            self.hints_s += [] if end.pushback_s is None else [end.pushback_s]
        elif kind == "OK":
            self.done.append((time.perf_counter(), sample.diffusion.step_count * sample.sample_count))


_REFUSALS = ("OVERLOADED", "DEADLINE_UNREACHABLE", "QUOTA_EXCEEDED")


def _kind(end: http2.End) -> str:
    """The reason of a refusal, as its status and its text tell it; the status of any other end."""
    code = next(code for code in grpc.StatusCode if code.value[0] == end.status)
    if code is grpc.StatusCode.UNAVAILABLE and "backlog" in end.message:
        return "OVERLOADED"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and "left" in end.message:
        return "DEADLINE_UNREACHABLE"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return "QUOTA_EXCEEDED"
    return code.name


@dataclass(frozen=True)
class Load:
    """What is asked of a server, from when on it is counted, and for how long. A closed loop if `per_s` is 0."""

    per_s: float
    ramp_s: float  # until the backlog is what it stays at
    seconds: float
    samples: int
    timeout_s: float | None = None
    model: str = MODEL


async def drive(target: str, load: Load) -> dict[str, Any]:
    """A closed loop, or an open one with Poisson arrivals."""
    samples, model = load.samples, load.model
    connections = [await http2.Connection.open(target) for _ in range(CONNECTIONS)]
    client = Client(connections, target, load.timeout_s)
    rng, numbers = random.Random(0), itertools.count()
    for index in range(CONNECTIONS):
        await client.ask(index, request(index, rng, 1, model))  # the connection is up and everything is warm
    client.ends.clear()
    client.refused_ms.clear()
    began, before = time.perf_counter(), time.process_time()
    count_from = began + load.ramp_s
    count_to = count_from + load.seconds
    tasks: set[asyncio.Task[None]] = set()

    async def one() -> None:
        index = next(numbers)
        await client.ask(index, request(index, rng, samples, model))

    async def worker() -> None:
        while time.perf_counter() < count_to:
            await one()

    if load.per_s:
        due = began
        while due < count_to:
            due += rng.expovariate(load.per_s)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    else:
        await asyncio.gather(*(worker() for _ in range(max(2, IN_FLIGHT // samples))))
    spent = time.process_time() - before
    for connection in connections:
        connection.close()
    return {
        "evaluations_per_s": sum(count for at, count in client.done if count_from <= at <= count_to)
        / (count_to - count_from),
        "ends": dict(client.ends),
        "refusal_ms": _quantiles(client.refused_ms, 0.5, 0.99, 1.0),
        "retry_after_s": _quantiles(client.hints_s, 0.05, 0.5, 0.95),
        "client_cpu_us": 1e6 * spent / max(1, client.ends.total()),
    }


def _quantiles(values: list[float], *at: float) -> dict[str, float]:
    return {f"p{100 * q:g}": float(np.quantile(values, q)) for q in at} if values else {}


def cell(address: str, load: Load) -> dict[str, Any]:
    """One load, from a process of its own, which yields to the server: elsewhere they would not share cores."""
    command = ["nice", "-n", "19", sys.executable, "-m", "tests.bench.overload", "--client", address]
    command.append(json.dumps(asdict(load)))
    allowed_s = load.ramp_s + load.seconds + 120
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=allowed_s)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def refusals(seconds: float, per_s: float) -> dict[str, Any]:
    """So many refusals a second by a server that does nothing else, and its CPU time for each of them."""
    flags = ["--max-samples", str(HELD), "--max-model-backlog", "1", "--reader-timeout", "0", "--drain-seconds", "0"]
    with tempfile.TemporaryDirectory() as scratch:
        bundles.write(Path(scratch), bundles.TINY_VAE)
        with (
            server(Path(scratch), 1, "--self-check-interval", "0", *flags) as running,
            grpc.insecure_channel(running.address) as channel,
        ):
            stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
            call = stub.Sample(pb.SampleRequest(model=bundles.TINY_VAE, sample_count=HELD))
            next(call)  # and read no more
            before = -1.0
            while (now := running.counted(bundles.TINY_VAE)["latentd_evaluations_total"]) != before:
                before = now
                time.sleep(1.0)
            spent = running.cpu_s
            found = cell(running.address, Load(per_s, 0.0, seconds, 1, model=bundles.TINY_VAE))
            spent = running.cpu_s - spent
            call.cancel()
    count = sum(found["ends"].values())
    return found | {"count": count, "server_cpu_us": 1e6 * spent / (count + CONNECTIONS)}


def main() -> int:
    """Measure the peak, then overload."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overload", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help=f"with {MODEL}")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each cell")
    parser.add_argument("--ramp", type=float, default=2 * BACKLOG_S, help="seconds before that, not counted")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds, of every request with a deadline")
    parser.add_argument("--samples", type=int, default=8, help="of each request")
    parser.add_argument("--factor", type=float, default=3.0, help="load offered, by the peak")
    parser.add_argument("--rounds", type=int, default=3, help="of peak and overload, for each of the two")
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        target, load = options.client
        print(json.dumps(uvloop.run(drive(target, Load(**json.loads(load))))))
        return 0
    if not (options.models / MODEL).exists():
        print(f"no {MODEL} in {options.models}; `make demo` trains it", file=sys.stderr)
        return 2
    closed = Load(0.0, min(options.ramp, options.seconds / 4), options.seconds, options.samples)
    with server(options.models, 1) as running:
        peak = cell(running.address, closed)["evaluations_per_s"]
        print(f"peak {peak:,.0f} evaluations/s, closed loop of {IN_FLIGHT} samples")
        requests = options.factor / (options.samples * sum(STEPS) / len(STEPS))  # for each evaluation of the peak
        load = Load(requests, options.ramp, options.seconds, options.samples)
        _compare(
            f"{options.timeout:g} s each",
            running.address,
            closed,
            replace(load, timeout_s=options.timeout),
            options.rounds,
        )
    with server(options.models, 1, "--max-backlog", str(round(BACKLOG_S * peak))) as running:
        _compare(f"no deadline, a backlog of {BACKLOG_S:g} s", running.address, closed, load, options.rounds)
    found = refusals(options.seconds, min(requests * peak, MOST_REFUSALS_PER_S))
    print(f"nothing but refusals: {found['count']}, {found['ends']}")
    print(f"  the server's CPU time {found['server_cpu_us']:.0f} us each, the client's {found['client_cpu_us']:.0f}")
    return 0


def _compare(name: str, address: str, closed: Load, load: Load, rounds: int) -> None:
    """Peak and overload in turns; `load.per_s` is in requests for each evaluation of the peak."""
    goodputs = []
    print(f"{name}:")
    for _ in range(rounds):
        peak = cell(address, closed)["evaluations_per_s"]
        found = cell(address, replace(load, per_s=load.per_s * peak))
        goodputs.append(found["evaluations_per_s"] / peak)
        _print(goodputs[-1], peak, load.per_s * peak, found)
    print(f"  goodput, median: {statistics.median(goodputs):.2f} of the peak", flush=True)


def _print(goodput: float, peak: float, per_s: float, result: dict[str, Any]) -> None:
    def listed(values: dict[str, float], unit: str) -> str:
        return ", ".join(f"{key} {value:.3g} {unit}" for key, value in values.items()) or "none"

    print(f"  goodput {goodput:.2f} of the peak of {peak:,.0f}, {per_s:,.0f} requests/s offered; ends {result['ends']}")
    print(f"    refused within {listed(result['refusal_ms'], 'ms')}")
    print(f"    told to come back in {listed(result['retry_after_s'], 's')}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
