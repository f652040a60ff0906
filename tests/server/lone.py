"""A server in a process of its own, watched from outside."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import books
from prometheus_client.parser import text_string_to_metric_families

_PROGRAM = """
from latentd_server import rpc, stream
from latentd_server.__main__ import main
rpc.OUTBOX_BYTES = stream.OUTBOX_BYTES = {outbox_bytes}
main()
"""
_NO_BOUND = "100000000"


@dataclass(frozen=True)
class Lone:
    """A server process."""

    pid: int
    grpc: str
    http: str

    @property
    def resident_bytes(self) -> int:
        """Memory it holds."""
        return int(Path(f"/proc/{self.pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

    @property
    def open_files(self) -> int:
        """File descriptors it holds."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @property
    def evaluations(self) -> float:
        """How many it has run."""
        families = text_string_to_metric_families(books.scrape(self.http))
        return sum(s.value for family in families for s in family.samples if s.name == "latentd_evaluations_total")


def _told(log: Path) -> str:
    """Where it first went wrong, and the last it said."""
    lines = log.read_text().splitlines()
    first = next((number for number, line in enumerate(lines) if "Traceback" in line), len(lines))
    return "\n".join([*lines[max(0, first - 5) : first + 40], "...", *lines[max(first + 40, len(lines) - 60) :]])


@contextlib.contextmanager
def lone_server(models: Path, log: Path, outbox_bytes: int, *flags: str) -> Iterator[Lone]:
    """Start one that keeps so much for each reader and refuses nothing; at the end it must rest, and exit with 0."""
    command = [sys.executable, "-c", _PROGRAM.format(outbox_bytes=outbox_bytes), "--models", str(models)]
    command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--device", "cpu", "--threads", "1"]
    command += ["--log-format", "text", "--cache", "off", "--drain-seconds", "10", *flags]
    for bound in ("--max-backlog", "--max-model-backlog", "--max-caller-backlog"):
        command += [bound, _NO_BOUND]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while not any(line.endswith("ready") for line in log.read_text().splitlines()):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        line = next(line for line in log.read_text().splitlines() if "listening" in line)
        ports = dict(word.split("=", 1) for word in line.split() if "=" in word)
        yield Lone(process.pid, ports["grpc"], ports["http"])
        books.must_rest(lambda: books.scrape(ports["http"]))
        process.terminate()
        assert process.wait(60) == 0
        assert "Traceback" not in log.read_text()
    except BaseException as error:
        error.add_note(f"the server's log:\n{_told(log)}")
        raise
    finally:
        process.kill()
        process.wait()
