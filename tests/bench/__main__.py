"""`make bench`: served samples/s as a ratio to a bare ONNX Runtime loop, in one run on the same cores.

Prints a table and writes `bench/serving.json`. Absolute figures of a shared machine mean little, ratios of one run do.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from latentd.v1 import bundle_pb2

from tests.bench import bare, bundles
from tests.bench.load import STEPS

VAE, DIFFUSION = "digits-vae", "digits-diffusion"
CELLS = (  # load, model, requests in flight
    ("decode", bundles.TINY_VAE, 32),
    ("stream-decode", bundles.TINY_VAE, 1),
    ("stream-decode", bundles.TINY_VAE, 32),
    ("sample-256", bundles.TINY_VAE, 1),
    ("decode-16", bundles.GENERATOR, 32),
    ("stream-decode-16", bundles.GENERATOR, 32),
    ("decode", VAE, 32),
    ("stream-decode", VAE, 32),
    ("sample-256", VAE, 1),
    ("stream-sample", DIFFUSION, 1),
    ("stream-sample", DIFFUSION, 8),
    ("stream-sample", DIFFUSION, 32),
    ("sample", DIFFUSION, 32),
)


def cpu_seconds(pid: int) -> float:
    """User and system time a process has used, to the nanosecond: its clock as clock_getcpuclockid(3) names it."""
    return time.clock_gettime(~pid << 3 | 2)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(models: Path, threads: int) -> Iterator[tuple[str, int]]:
    """A server on loopback; its address and process id."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "latentd_server", "--models", str(models), "--listen", address]
    command += ["--http", "127.0.0.1:0", "--device", "cpu", "--threads", str(threads), "--log-level", "warning"]
    process = subprocess.Popen(command)
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
            _wait_until_serving(channel)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(timeout=90)


def _wait_until_serving(channel: grpc.Channel) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(channel)
    for _ in range(600):
        if stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
            return
        time.sleep(0.1)
    raise TimeoutError("the server did not come up within a minute")


def drive(address: str, pid: int, kind: str, model: str, concurrency: int, seconds: float) -> dict[str, Any]:
    """One cell: load from a process of its own, and what the server spent on it."""
    command = [sys.executable, "-m", "tests.bench.load", address, kind, model, str(concurrency), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        if client.stdout.readline() != "ready\n":
            raise RuntimeError(f"the load process of {kind} did not start")
        before = cpu_seconds(pid)
        result: dict[str, Any] = json.loads(client.stdout.readline())
        spent = cpu_seconds(pid) - before
    cell = {"load": kind, "concurrency": concurrency, "server_cpu_us_per_request": spent / result["requests"] * 1e6}
    return cell | {"rows_per_server_cpu_second": result["rows"] / spent} | result


def main() -> int:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="with digits-vae and digits-diffusion")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each cell")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime, in the server and bare")
    parser.add_argument("--out", type=Path, default=Path("bench/serving.json"))
    known = {f"{kind}:{concurrency}": (kind, concurrency) for kind, concurrency in CELLS}
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=known,
        default=list(known),
        metavar="LOAD:IN_FLIGHT",
        help="which to run; all by default",
    )
    options = parser.parse_args()
    directories = {name: options.models / name / "1" for name in (VAE, DIFFUSION)}
    missing = [str(directory) for directory in directories.values() if not directory.exists()]
    if missing:
        print(f"no bundle in {', '.join(missing)}; `make demo` trains them", file=sys.stderr)
        return 2
    machine = {
        "cpu": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.processor(),
        ),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "grpcio": grpc.__version__,
        "numpy": np.__version__,
        "threads": options.threads,
    }
    decode = bare.best_call(directories[VAE], bundle_pb2.Network.ROLE_DECODER, options.threads, 2 * options.seconds)
    walk = bare.best_walk(directories[DIFFUSION], STEPS, options.threads, 3 * options.seconds)
    print(json.dumps(machine))
    print(f"bare VAE decode: {decode.per_second:,.0f} samples/s at batch {decode.batch_size}")
    print(f"bare diffusion (steps {STEPS}): {walk.per_second:,.1f} samples/s at batch {walk.batch_size}")
    print(
        f"{'load':<18}{'in flight':>10}{'samples/s':>12}{'of bare':>9}{'per CPU s':>11}{'CPU us/req':>12}{'p50 ms':>9}"
    )
    cells = []
    with server(options.models, options.threads) as (address, pid):
        for kind, concurrency in map(known.__getitem__, options.cells):
            cell = drive(address, pid, kind, concurrency, options.seconds)
            yardstick = walk if kind in ("stream-sample", "sample") else decode
            cell["ratio"] = cell["rows_per_second"] / yardstick.per_second
            cell["cpu_ratio"] = cell["rows_per_server_cpu_second"] / yardstick.per_cpu_second
            cells.append(cell)
            print(
                f"{kind:<18}{concurrency:>10}{cell['rows_per_second']:>12,.1f}{cell['ratio']:>9.2f}"
                f"{cell['cpu_ratio']:>11.2f}{cell['server_cpu_us_per_request']:>12,.0f}{cell['p50_ms']:>9.2f}",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "bare": {"decode": asdict(decode), "walk": asdict(walk)}, "cells": cells}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {options.out}; 'of bare' compares wall time, 'per CPU s' samples per second of the server's CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
