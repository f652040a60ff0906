"""The real server as a process of its own: started, driven, and asked what it spent."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latentd.v1 import model_service_pb2, model_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Server:
    """A server on loopback."""

    address: str
    http: str  # of its metrics; empty for a server that has none
    pid: int
    start_up_s: float  # from the start of the process to SERVING

    @property
    def cpu_s(self) -> float:
        """User and system time it has used, to the nanosecond: its clock as clock_getcpuclockid(3) names it."""
        return time.clock_gettime(~self.pid << 3 | 2)

    @property
    def resident_mib(self) -> float:
        """Memory it holds (VmRSS)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024

    def largest_batch(self, model: str) -> int:
        """Rows of the largest call of any of a model's graphs."""
        with grpc.insecure_channel(self.address) as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            found = stub.GetModel(model_service_pb2.GetModelRequest(name=model)).model
        return max(max(graph.batch_sizes) for graph in found.determinism.graphs)

    def counted(self, model: str) -> dict[str, float]:
        """Totals of the batches of a model, over its graphs, by the name of the sample; zeros if it keeps none."""
        wanted = ("latentd_evaluations_total", "latentd_batch_rows_sum", "latentd_batch_rows_count")
        totals = dict.fromkeys(wanted, 0.0)
        if not self.http:
            return totals
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=30) as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in totals and sample.labels["model"].partition("@")[0] == model:
                    totals[sample.name] += sample.value
        return totals


def free_addresses() -> tuple[str, str]:
    """Two of which nobody listens on either."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        first, second = (f"127.0.0.1:{probe.getsockname()[1]}" for probe in (one, two))
    return first, second


@contextmanager
def server(models: Path, threads: int, *arguments: str) -> Iterator[Server]:
    """Run a server until it is no longer needed."""
    address, http = free_addresses()
    command = [sys.executable, "-m", "latentd_server", "--models", str(models), "--listen", address, "--http", http]
    command += ["--device", "cpu", "--threads", str(threads), "--log-level", "warning", *arguments]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
            _wait_until_serving(channel)
        yield Server(address, http, process.pid, time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait(timeout=90)


def _wait_until_serving(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for _ in range(3000):
        if stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
            return
        time.sleep(0.02)
    raise TimeoutError("the server did not come up within a minute")


def drive(to: Server, kind: str, model: str, concurrency: int, seconds: float) -> dict[str, Any]:
    """One load from a process of its own, and what the server spent on it."""
    command = [sys.executable, "-m", "tests.bench.load", to.address, kind, model, str(concurrency), str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdin is not None
        if client.stdout.readline() != "ready\n":
            raise RuntimeError(f"the load process of {kind} did not start")
        counted, before = to.counted(model), to.cpu_s
        print("begin", file=client.stdin, flush=True)
        result: dict[str, Any] = json.loads(client.stdout.readline())
        spent = to.cpu_s - before
        after = to.counted(model)
    ran = {name: after[name] - counted[name] for name in after}
    batches = max(1.0, ran["latentd_batch_rows_count"])
    return result | {
        "server_cpu_us_per_request": spent / result["requests"] * 1e6,
        "rows_per_server_cpu_second": result["rows"] / spent,
        "evaluations_per_server_cpu_second": ran["latentd_evaluations_total"] / spent,
        "evaluations_per_second": ran["latentd_evaluations_total"] / result["seconds"],
        "mean_batch_rows": ran["latentd_batch_rows_sum"] / batches,
    }
