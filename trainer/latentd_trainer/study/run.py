"""Studies claims, and writes the report anew after each."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from latentd_trainer.checkpoint import write_whole
from latentd_trainer.study import report, workers
from latentd_trainer.study.section import Settings
from latentd_trainer.study.workers import Studied

REPORT_FILE, FIGURES_FILE, TRAINED = "report.md", "figures.json", "trained"


def run(
    out: Path,
    names: Sequence[str],
    *,
    seed: int,
    quick: bool,
    models: Path | None,
    jobs: int,
    command: str,
    console: Console,
) -> None:
    """Study claims; write `report.md`, `figures.json` and the pictures into `out`.

    They are written after each claim, whole, so that an interrupted study leaves a report of what it found so far. What
    was trained stays in `out/trained`, and is not trained again.

    Args:
        out: Where the report goes; made if need be.
        names: Of the claims to study (`study.chosen`).
        seed: Of all weights, batches and draws.
        quick: Few steps with tiny networks, to see that everything runs.
        models: A directory of bundles to use in place of training.
        jobs: How many claims are studied at once; the figures do not depend on it.
        command: What was called, for the report.
        console: Where progress goes.

    Raises:
        OSError: something cannot be written.
        SystemExit: SIGTERM came; what studied is ended first.
        Exception: what studying a claim raised.
    """
    trained = out / TRAINED
    trained.mkdir(parents=True, exist_ok=True)
    header = report.Header(command, seed, quick, report.machine(), report.versions())
    done: dict[str, Studied] = {}
    doing: dict[str, str] = {}
    with console.status("") as status:

        def tell(name: str, text: str) -> None:
            doing[name] = text
            now = "; ".join(f"{each}: {what}" for each, what in doing.items())
            status.update(escape(f"{len(done)} of {len(names)} done; {now}"))

        studying = workers.study_all(names, Settings(seed, quick, trained, models), jobs, tell)
        with _stopped_by_sigterm(), contextlib.closing(studying) as studies:
            for each in studies:
                done[each.name] = each
                doing.pop(each.name, None)
                _write(out, header, names, done, each)
                line = f"{each.name}: {each.section.verdict}, {each.seconds:.1f} s"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    says = ", of a quick run, whose verdicts say nothing" if quick else ""
    console.print(f"report: {out / REPORT_FILE}{says}", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM as an exception, as Ctrl-C is one, lest it leave the processes that study without anyone to end them.

    Signals reach Python's main thread alone; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _write(out: Path, header: report.Header, names: Sequence[str], done: dict[str, Studied], latest: Studied) -> None:
    for picture in latest.section.pictures:
        write_whole(out / picture.file, picture.png)
    ordered = [done[name] for name in names if name in done]
    content = {
        "command": header.command,
        "seed": header.seed,
        "quick": header.quick,
        "machine": header.machine,
        "versions": dict(header.versions),
        "claims": {
            each.name: {"verdict": each.section.verdict, "figures": dict(each.section.figures)} for each in ordered
        },
        "seconds": {each.name: round(each.seconds, 1) for each in ordered},
    }
    write_whole(out / FIGURES_FILE, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    text = report.markdown(header, ordered, [name for name in names if name not in done])
    write_whole(out / REPORT_FILE, text.encode())
