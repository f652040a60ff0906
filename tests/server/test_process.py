"""The command `latentd` as a process: what it says when it starts, and how it ends."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc
from latentd_server.runtime import gpu_count
from server_process import Process

SLOW = ("--max-batch-rows", "2")
"""Makes LONG take tens of seconds."""
LONG = pb.SampleRequest(
    model="tiny-diffusion", sample_count=1000, diffusion=pb.DiffusionOptions(sampler="heun", step_count=100)
)


@pytest.fixture
def start(models_root: Path) -> Iterator[Any]:
    """Starts server processes and sees them off."""
    started: list[Process] = []

    def begin(*arguments: str) -> Process:
        started.append(Process(models_root, *arguments))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def test_one_line_says_where_it_listens_and_what_it_runs_on(start: Any) -> None:
    """The ports as bound, the device, the provider, and why it was chosen."""
    process = start()
    line = process.line("listening")
    assert line["device"] == "cpu"
    assert line["provider"] == "CPUExecutionProvider"
    assert line["device_reason"] == "asked for"
    assert all(int(line[name].rpartition(":")[2]) > 0 for name in ("grpc", "http"))
    process.line("ready")
    with process.channel() as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
    assert status == health_pb2.HealthCheckResponse.SERVING
    process.process.send_signal(signal.SIGINT)
    assert process.end() == 0
    assert process.lines[-1]["message"] == "stopped"


def test_sigterm_finishes_what_was_accepted_and_exits_0(start: Any) -> None:
    """A call under way gets all its samples; its log line and the end follow."""
    process = start()
    process.line("ready")
    with process.channel() as channel:
        call = generation_service_pb2_grpc.GenerationServiceStub(channel).Sample(LONG)
        assert next(call).HasField("accepted")
        process.process.send_signal(signal.SIGTERM)
        seen = [index for response in call for index in response.result.sample_indices]
    assert sorted(seen) == list(range(1000))
    assert process.end() == 0
    finished = process.line("call")
    assert (finished["method"], finished["code"], finished["samples"]) == ("Sample", "OK", 1000)


def test_what_is_not_done_in_time_is_given_up(start: Any) -> None:
    """The drain is bounded: the server ends, and says what it gave up."""
    process = start("--drain-seconds", "0", *SLOW)
    process.line("ready")
    with process.channel() as channel:
        call = generation_service_pb2_grpc.GenerationServiceStub(channel).Sample(LONG)
        assert next(call).HasField("accepted")
        process.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError):
            list(call)
    assert process.end() == 0
    assert process.line("1 jobs are given up after 0 s")["level"] == "WARNING"


def test_a_second_signal_stops_at_once(start: Any) -> None:
    """Whoever asks twice does not want to wait."""
    process = start(*SLOW)
    process.line("ready")
    with process.channel() as channel:
        call = generation_service_pb2_grpc.GenerationServiceStub(channel).Sample(LONG)
        assert next(call).HasField("accepted")
        process.process.send_signal(signal.SIGTERM)
        process.line("SIGTERM: draining")
        process.process.send_signal(signal.SIGTERM)
        assert process.end() == 128 + signal.SIGTERM


def test_a_port_in_use_exits_1_with_one_clear_line(models_root: Path) -> None:
    """No stack: the address, and what is likely wrong."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "latentd_server", "--models", str(models_root), "--http", "127.0.0.1:0"]
        done = subprocess.run([*command, "--listen", address], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"latentd: cannot listen on {address} (grpc): Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(gpu_count() > 0, reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_exits_1_with_one_clear_line(models_root: Path) -> None:
    """Forcing CUDA never falls back in silence."""
    command = [sys.executable, "-m", "latentd_server", "--models", str(models_root), "--device", "cuda:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("latentd: device cuda:0 was asked for")
    assert "Traceback" not in done.stderr


def test_sigterm_while_models_load_ends_in_order(start: Any) -> None:
    """The handlers are there before the first model is."""
    process = start()
    process.line("listening")
    process.process.send_signal(signal.SIGTERM)
    assert process.end() == 0
    assert process.lines[-1]["message"] == "stopped"


def test_a_broken_engine_exits_1_with_one_clear_line(models_root: Path) -> None:
    """A server that can answer nothing any more ends by itself, so that it is started anew."""
    program = (
        "from latentd_server.__main__ import main; from latentd_server.scheduler import Scheduler\n"
        "Scheduler.plan = lambda self, now_s: 1 / 0\n"
        "main()"
    )
    local = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--device", "cpu", "--threads", "1")
    command = [sys.executable, "-c", program, "--models", str(models_root), *local]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("latentd: the device thread failed")
    assert "ZeroDivisionError" in ended.stderr
