"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_PLAIN_LINES = 20


class Display:
    """Progress with losses, rate and time left. Only `running` shows anything."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TextColumn("{task.fields[rate]} steps/s,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    @contextmanager
    def running(self, description: str, start: int, step_count: int) -> Iterator[None]:
        """Show progress from step `start` on, until left."""
        self._task = self._progress.add_task(description, total=step_count, completed=start, losses="", rate="-")
        with self._progress:
            yield

    def advance(self, step: int, losses: Mapping[str, float]) -> None:
        """Show that `step` steps are done, with the last one's losses."""
        if self._task is None:
            raise RuntimeError("advance outside of running")
        task = self._progress.tasks[0]
        shown = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        rate = f"{task.speed:.1f}" if task.speed else "-"
        self._progress.update(self._task, completed=step, losses=shown, rate=rate)
        total = int(task.total or 0)
        if not self.console.is_terminal and (step % max(1, total // _PLAIN_LINES) == 0 or step == total):
            left = f"{task.time_remaining:.0f} s left" if task.time_remaining is not None else "- s left"
            self.console.print(f"{task.description}  {step}/{total}  {shown}  {rate} steps/s  {left}", soft_wrap=True)
