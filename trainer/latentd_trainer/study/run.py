"""Studies claims one after the other, and writes the report anew after each."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from latentd_trainer.checkpoint import write_whole
from latentd_trainer.study import report
from latentd_trainer.study.section import Section, Settings

REPORT_FILE, FIGURES_FILE, TRAINED = "report.md", "figures.json", "trained"


@dataclass(frozen=True)
class Studied:
    """A section, and what it took."""

    name: str
    section: Section
    seconds: float


def run(
    out: Path, names: Sequence[str], *, seed: int, quick: bool, models: Path | None, command: str, console: Console
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
        command: What was called, for the report.
        console: Where progress goes.

    Raises:
        OSError: something cannot be written.
    """
    trained = out / TRAINED
    trained.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # best for networks this small, and sums come out differently with another number
    header = report.Header(command, seed, quick, report.machine(), report.versions())
    done: list[Studied] = []
    with console.status("") as status:
        for position, name in enumerate(names, 1):

            def tell(text: str, prefix: str = f"[{position}/{len(names)}] {name}") -> None:
                status.update(f"{prefix}: {text}".replace("[", r"\["))

            tell("begins")
            section, seconds = _timed(name, Settings(seed, quick, trained, models, tell))
            done.append(Studied(name, section, seconds))
            _write(out, header, names, done)
            console.print(f"{name}: {section.verdict}, {seconds:.1f} s", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {out / REPORT_FILE}", markup=False, highlight=False, soft_wrap=True)


def _timed(name: str, settings: Settings) -> tuple[Section, float]:
    study: Callable[[Settings], Section] = importlib.import_module(f"latentd_trainer.study.{name}").study
    began = time.monotonic()
    section = study(settings)
    return section, time.monotonic() - began


def _write(out: Path, header: report.Header, names: Sequence[str], done: Sequence[Studied]) -> None:
    for picture in done[-1].section.pictures:
        write_whole(out / picture.file, picture.png)
    content = {
        "command": header.command,
        "seed": header.seed,
        "quick": header.quick,
        "machine": header.machine,
        "versions": dict(header.versions),
        "claims": {
            each.name: {"verdict": each.section.verdict, "figures": dict(each.section.figures)} for each in done
        },
        "seconds": {each.name: round(each.seconds, 1) for each in done},
    }
    write_whole(out / FIGURES_FILE, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    waiting = names[len(done) :]
    text = report.markdown(header, [(each.name, each.section, each.seconds) for each in done], waiting)
    write_whole(out / REPORT_FILE, text.encode())
