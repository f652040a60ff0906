"""The losses of a run as JSON lines: `{"step": 20, "rate": 31.2, "losses": {"loss": 0.31}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from latentd_trainer.checkpoint import write_whole

LOG_FILE = "log.jsonl"


class TrainingLog:
    """The log of one run, open for writing; closes as a context manager.

    Args:
        directory: of the run.
        start: steps done so far; lines of later steps, which a stopped run left behind, are dropped.
        enabled: whether this process writes; else nothing is read or written.

    Raises:
        OSError: the file cannot be opened; `write`, `flush` and leaving the context raise it on a full disk.
    """

    def __init__(self, directory: Path, start: int, *, enabled: bool) -> None:
        self.path = directory / LOG_FILE
        if enabled:
            kept = [entry for entry in self.read() if entry["step"] <= start] if start else []
            write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self._file = open(self.path, "a", encoding="utf-8") if enabled else None  # noqa: SIM115 (closed in __exit__)

    def write(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        """Append a line: losses after `step` steps, and steps per second so far."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "rate": round(rate, 3), "losses": losses}) + "\n")

    def flush(self) -> None:
        """Hand all lines to the system."""
        if self._file is not None:
            self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """All lines on disk, without one that was cut short at the end; none if there is no file."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
