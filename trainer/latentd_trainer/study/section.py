"""A section of the study: a claim, the figures that speak for or against it, and the verdict that follows from them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RELATIONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def silent(_: str) -> None:
    """Keep to oneself what is told."""


@dataclass(frozen=True)
class Settings:
    """What every claim is studied with."""

    seed: int  # of all weights, batches and draws
    quick: bool  # a few steps with tiny networks: shows that everything runs, and says nothing of the claims
    trained: Path  # where a claim keeps what it trained, under names that hold a digest of the settings
    models: Path | None = None  # a directory of bundles to use in place of training
    tell: Callable[[str], None] = silent  # told what is being done, for the terminal


@dataclass(frozen=True)
class Criterion:
    """What must be true of a figure: `text` in words, `figure relation bound` in numbers."""

    text: str
    figure: str  # its name among the section's figures
    relation: str  # one of RELATIONS
    bound: float | str  # a number, or the name of another figure

    def is_met(self, figures: Mapping[str, float]) -> bool:
        """Whether the figures satisfy it.

        Raises:
            KeyError: it names a figure or a relation that there is not.
        """
        bound = figures[self.bound] if isinstance(self.bound, str) else self.bound
        return RELATIONS[self.relation](figures[self.figure], bound)


@dataclass(frozen=True)
class Picture:
    """A picture of a section."""

    file: str  # its name in the report's directory, ending in .png
    caption: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """What the study found of one claim. All texts are Markdown.

    Raises:
        ValueError: figures that are not finite, no criterion, or a criterion about figures that there are not.
    """

    title: str
    claim: str  # what the lecture says, and whose result it is
    measured: str  # what was measured, and how
    figures: Mapping[str, float]  # every number, named like `gan/recall`; nothing that differs from run to run
    criteria: Sequence[Criterion]  # what the figures must satisfy for the claim to hold
    body: str  # what was found: tables, and what they do not show
    pictures: Sequence[Picture] = ()

    def __post_init__(self) -> None:
        problems = [f"{name} is {value}" for name, value in self.figures.items() if not math.isfinite(value)]
        problems += [] if self.criteria else ["there is no criterion"]
        for criterion in self.criteria:
            named = [criterion.figure, *([criterion.bound] if isinstance(criterion.bound, str) else [])]
            problems += [f"there is no figure {name!r}" for name in named if name not in self.figures]
            problems += [] if criterion.relation in RELATIONS else [f"{criterion.relation!r} is no relation"]
        if problems:
            raise ValueError(f"{self.title}: {'; '.join(problems)}")

    @property
    def verdict(self) -> str:
        """`holds`, `holds in part` or `does not hold`, as all, some or none of the criteria are met."""
        met = [criterion.is_met(self.figures) for criterion in self.criteria]
        return "holds" if all(met) else "holds in part" if any(met) else "does not hold"
