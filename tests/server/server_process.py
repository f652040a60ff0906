"""The command `latentd` as a process of its own, over tiny bundles."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc


class Process:
    """A server process; its log is read as it comes."""

    def __init__(self, root: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "latentd_server", "--models", str(root), "--threads", "1"]
        command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--device", "cpu", *arguments]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LATENTD_")}
        environment["LATENTD_CACHE"] = "off"
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[dict[str, Any]] = []
        self._heard = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._heard:
                if line.startswith("{"):
                    self.lines.append(json.loads(line))
                self._heard.notify_all()

    def line(self, message: str) -> dict[str, Any]:
        """Wait for a line of the log."""

        def found() -> dict[str, Any] | None:
            return next((line for line in self.lines if line["message"] == message), None)

        with self._heard:
            assert self._heard.wait_for(found, timeout=60), self.lines
            line = found()
        assert line is not None
        return line

    def channel(self) -> grpc.Channel:
        """A channel to it."""
        return grpc.insecure_channel(self.line("listening")["grpc"])

    def end(self) -> int:
        """Its exit status, once it has ended by itself."""
        status = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        return status

    def kill(self) -> None:
        """Make sure it is gone."""
        self.process.kill()
        self.process.wait()
        self._reader.join(timeout=10)
        assert self.process.stderr is not None
        self.process.stderr.close()
