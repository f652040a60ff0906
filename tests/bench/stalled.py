"""What clients that stop reading cost an honest one: its latency with and without 64 of them, as a ratio in one run.

Run as `python -m tests.bench.stalled`; needs the bundles of `make demo`. Half of the stalled are Sample calls, half are
Streams with previews among their requests; each has more to come than the server keeps for it, and never reads on.
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


@contextmanager
def server(models: Path) -> Iterator[tuple[int, str, str]]:
    """A server that never refuses and never gives a reader up: its process id, and where gRPC and HTTP answer."""
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
        yield process.pid, target, http
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
    """So many clients that have stopped reading, from when nothing is done for them any more."""
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
            yield
        finally:
            process.kill()
    while total(http, "latentd_queue_depth"):
        time.sleep(0.1)


def p95_ms(target: str, in_flight: int, seconds: float) -> float:
    """Of an honest client's samples."""
    command = [sys.executable, "-m", "tests.bench.stalled", "--ask", target]
    command += ["--in-flight", str(in_flight), "--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(np.percentile(json.loads(done.stdout), 95))


def main() -> int:
    """Alternate between the two and print the ratio of each pair, and what the server holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stalled", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="with digits-diffusion")
    parser.add_argument("--streams", type=int, default=64, help="how many stop reading")
    parser.add_argument("--in-flight", type=int, default=4, help="samples the honest client waits for")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--pairs", type=int, default=3)
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
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        bundles.write(root, bundles.TINY_VAE)
        (root / DIFFUSION).symlink_to((options.models / DIFFUSION).resolve())
        with server(root) as (pid, target, http):
            for _ in range(options.pairs):
                without, idle = p95_ms(target, options.in_flight, options.seconds), resident_mib(pid)
                with stalled(target, http, options.streams):
                    held = resident_mib(pid)
                    beside = p95_ms(target, options.in_flight, options.seconds)
                ratios.append(beside / without)
                each = (held - idle) / options.streams
                print(
                    f"p95 {without:.1f} ms alone, {beside:.1f} ms beside {options.streams} stalled streams: "
                    f"{ratios[-1]:.2f}; {idle:.0f} MiB, then {held:.0f} MiB, {each:.1f} a stream",
                    flush=True,
                )
    print(f"median ratio of p95: {statistics.median(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
