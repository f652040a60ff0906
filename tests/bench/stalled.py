"""What clients that stop reading cost an honest one: its latency with and without 64 of them, as a ratio in one run.

Run as `python -m tests.bench.stalled`; needs the bundles of `make demo`. Half of the stalled are Sample calls, half are
Streams with previews among their requests; each has more to come than the server keeps for it, and never reads on.
Two servers run side by side, one with the stalled and one without, and the honest client asks them in turns, so that
whatever else the machine does meets both alike.
"""

import argparse
import asyncio
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc

from tests.bench import bundles

DIFFUSION = "digits-diffusion"
SAMPLES = 100_000
"""What each of the stalled asks for: some 30 MiB."""
_NO_LIMIT = "1000000000"


def diffusion(index: int, **fields: Any) -> pb.SampleRequest:
    """Requests of 10, 25 and 50 steps take turns."""
    options = pb.DiffusionOptions(step_count=(10, 25, 50)[index % 3], **fields)
    return pb.SampleRequest(model=DIFFUSION, seed=index, diffusion=options)


async def stall(target: str, count: int) -> None:
    """Open so many calls, each on a connection of its own, and read no more than the first message of each."""
    endless = pb.SampleRequest(model=bundles.TINY_VAE, sample_count=SAMPLES)
    calls = []
    for index in range(count):
        channel = grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        stub: Any = generation_service_pb2_grpc.GenerationServiceStub(channel)
        if index % 2:
            call = stub.Stream()
            await call.write(pb.StreamRequest(id=1, sample=endless))
            await call.write(pb.StreamRequest(id=2, sample=diffusion(index, preview_interval_steps=1)))
        else:
            call = stub.Sample(endless)
        await call.read()
        calls.append((channel, call))
    print("stalled", flush=True)
    await asyncio.Event().wait()


async def ask(target: str, in_flight: int, seconds: float) -> None:
    """A closed loop of samples; prints their latencies in milliseconds as JSON."""
    latencies: list[float] = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = generation_service_pb2_grpc.GenerationServiceStub(channel)

        async def worker(first: int) -> None:
            began, index = time.perf_counter(), first
            while time.perf_counter() - began < seconds:
                asked = time.perf_counter()
                async for _ in stub.Sample(diffusion(index)):
                    pass
                latencies.append((time.perf_counter() - asked) * 1e3)
                index += 1

        await asyncio.gather(*(worker(first) for first in range(in_flight)))
    print(json.dumps(latencies))


@dataclass(frozen=True)
class Server:
    """A server at work, and where its gRPC and HTTP answer."""

    pid: int
    target: str
    http: str

    @property
    def cpu_s(self) -> float:
        """User and system time it has used, by its clock as clock_getcpuclockid(3) names it."""
        return time.clock_gettime(~self.pid << 3 | 2)


@contextmanager
def server(models: Path) -> Iterator[Server]:
    """A server that never refuses and never gives a reader up."""
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        target, http = (f"127.0.0.1:{each.getsockname()[1]}" for each in (first, second))
    command = [sys.executable, "-m", "latentd_server", "--models", str(models), "--listen", target, "--http", http]
    command += ["--device", "cpu", "--threads", "1", "--log-level", "error", "--reader-timeout", "0"]
    command += ["--max-samples", str(SAMPLES), "--drain-seconds", "0", "--self-check-interval", "0"]
    for bound in ("--max-backlog", "--max-model-backlog", "--max-caller-backlog"):
        command += [bound, _NO_LIMIT]
    process = subprocess.Popen(command)
    try:
        while _get(http, "healthz") == "":
            if process.poll() is not None:
                raise RuntimeError("the server did not come up")
            time.sleep(0.1)
        yield Server(process.pid, target, http)
    finally:
        process.terminate()
        process.wait(timeout=90)


def _get(http: str, path: str) -> str:
    try:
        with urllib.request.urlopen(f"http://{http}/{path}", timeout=10) as response:
            text: str = response.read().decode()
            return text
    except OSError:  # not up yet
        return ""


def total(http: str, name: str) -> float:
    """A series, summed over its labels."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", _get(http, "metrics"), re.MULTILINE))


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def stalled(target: str, http: str, count: int) -> Iterator[None]:
    """So many clients that have stopped reading, from when all of them wait and nothing is done for them any more."""
    command = [sys.executable, "-m", "tests.bench.stalled", "--stall", target, "--streams", str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "stalled\n":
                raise RuntimeError("the stalled clients did not start")
            before = -1.0
            while (now := total(http, "latentd_evaluations_total")) != before:
                before = now
                time.sleep(1.0)
            if (waiting := total(http, "latentd_queue_depth")) < count:
                raise RuntimeError(f"only {waiting:.0f} of {count} calls wait for their readers")
            yield
        finally:
            process.kill()


@dataclass
class Asked:
    """What came of asking one server, round by round."""

    server: Server
    p95_ms: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)  # of the server, a sample

    def ask(self, in_flight: int, seconds: float) -> None:
        """One round of an honest client."""
        command = [sys.executable, "-m", "tests.bench.stalled", "--ask", self.server.target]
        command += ["--in-flight", str(in_flight), "--seconds", str(seconds)]
        before = self.server.cpu_s
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        latencies = json.loads(done.stdout)
        self.cpu_us.append(1e6 * (self.server.cpu_s - before) / len(latencies))
        self.p95_ms.append(float(np.percentile(latencies, 95)))


def main() -> int:
    """Ask the two servers in turns; print each round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stalled", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="with digits-diffusion")
    parser.add_argument("--streams", type=int, default=64, help="how many stop reading")
    parser.add_argument("--in-flight", type=int, default=4, help="samples the honest client waits for")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=10, help="of each server")
    parser.add_argument("--stall", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--ask", metavar="TARGET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stall:
        asyncio.run(stall(options.stall, options.streams))
    if options.ask:
        asyncio.run(ask(options.ask, options.in_flight, options.seconds))
        return 0
    if not (options.models / DIFFUSION / "1").exists():
        print(f"no bundle in {options.models / DIFFUSION}; `make demo` trains it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        bundles.write(root, bundles.TINY_VAE)
        (root / DIFFUSION).symlink_to((options.models / DIFFUSION).resolve())
        with server(root) as one, server(root) as other:
            alone, beside, idle = Asked(one), Asked(other), resident_mib(other.pid)
            for asked in (alone, beside):  # everything is warm
                asked.ask(options.in_flight, 1.0)
                asked.p95_ms.clear()
                asked.cpu_us.clear()
            with stalled(other.target, other.http, options.streams):
                held = resident_mib(other.pid)
                rest = other.cpu_s
                time.sleep(3.0)
                rest = (other.cpu_s - rest) / 3.0
                for number in range(options.rounds):
                    for asked in (alone, beside)[:: 1 if number % 2 else -1]:
                        asked.ask(options.in_flight, options.seconds)
                    print(f"p95 {alone.p95_ms[-1]:.1f} ms alone, {beside.p95_ms[-1]:.1f} ms beside", flush=True)
    each = (held - idle) / options.streams
    print(f"{options.streams} stalled calls: {idle:.0f} MiB, then {held:.0f} MiB, {each:.1f} a call")
    print(f"the server's CPU time while they stall and nobody asks: {1e3 * rest:.1f} ms a second")
    for name, unit, pair in (
        ("p95", "ms", (alone.p95_ms, beside.p95_ms)),
        ("the server's CPU time a sample", "us", (alone.cpu_us, beside.cpu_us)),
    ):
        without, with_them = map(statistics.median, pair)
        print(f"medians of {name}: {without:.1f} {unit} alone, {with_them:.1f} beside: {with_them / without:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
