"""The study as Markdown: what ran where, a table of verdicts, and a section for each claim."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentd_trainer import train
from latentd_trainer.report import figure_text, table
from latentd_trainer.study.section import Criterion, Section
from latentd_trainer.study.workers import Studied

_QUICK = (
    "**A quick run**: tiny networks and few steps, to see that everything runs. Its figures say nothing of the claims."
)


@dataclass(frozen=True)
class Header:
    """What a study was, beside what it found."""

    command: str
    seed: int
    quick: bool
    machine: str
    versions: Mapping[str, str]


def machine() -> str:
    """The processor and how many of its cores this process may use."""
    return f"{_processor()}, {core_count()} cores, {platform.system()}"


def core_count() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of everything that decides the figures."""
    return train.versions() | {"numpy": np.__version__}


def markdown(header: Header, done: Sequence[Studied], waiting: Sequence[str]) -> str:
    """The whole report.

    Args:
        header: What was run, and where.
        done: Every claim studied, in order.
        waiting: Names of those still to be studied.
    """
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    contents = [
        [f"[{each.section.title}](#{each.name})", f"**{each.section.verdict}**", f"{each.seconds:.1f}"] for each in done
    ]
    parts = [
        "# The lecture's claims, measured",
        f"`{header.command}`, seed {header.seed}, on {header.machine}; {versions}.",
        *([_QUICK] if header.quick else []),
        "A claim *holds* if its figures meet all criteria stated beside it, and *in part* if they meet some. All "
        "numbers are in `figures.json`, and the same on every run with this seed and these versions.",
        table(["claim", "verdict", "seconds"], contents),
        *([f"Not studied yet: {', '.join(waiting)}."] if waiting else []),
        *(_section(each.name, each.section) for each in done),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _section(name: str, section: Section) -> str:
    rows = [
        [each.text, _numbers(each, section.figures), "yes" if each.is_met(section.figures) else "**no**"]
        for each in section.criteria
    ]
    parts = [
        f'<a id="{name}"></a>\n\n## {section.title}',
        f"*Claim.* {section.claim}",
        f"*Measured.* {section.measured}",
        f"*Verdict: **{section.verdict}**.*",
        table(["criterion", "figures", "met"], rows),
        section.body,
        *(f"![{picture.caption}]({picture.file})\n\n{picture.caption}" for picture in section.pictures),
    ]
    return "\n\n".join(part.strip() for part in parts)


def _numbers(criterion: Criterion, figures: Mapping[str, float]) -> str:
    bound = figures[criterion.bound] if isinstance(criterion.bound, str) else criterion.bound
    left, right = (
        f"{value:g}" if value == int(value) else figure_text(value) for value in (figures[criterion.figure], bound)
    )
    return f"{left} {criterion.relation} {right}"


def _processor() -> str:
    """Its name as Linux tells it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
