"""A server process, started and stopped."""

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import books


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen[str]
    target: str
    http: str
    log: Path

    def stop(self) -> int:
        """SIGTERM once everything is at rest, and the exit status."""
        books.must_rest(lambda: books.scrape(self.http))
        self.process.terminate()
        return self.process.wait(timeout=60)


def start_server(python: Path, models: Path, log: Path, *flags: str) -> Running:
    """Start `latentd` on free loopback ports and wait until it is ready."""
    command = [python, "-m", "latentd_server", "--models", models, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command), "--log-format", "text", *flags], stdout=output, stderr=output, text=True
        )
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        text = log.read_text()
        ports = dict(re.findall(r"\b(grpc|http)=(127\.0\.0\.1:\d+)", text))
        if re.search(r"\bready$", text, re.MULTILINE) and len(ports) == 2:
            return Running(process, ports["grpc"], ports["http"], log)
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the server did not come up:\n{log.read_text()}")
