"""Digits by diffusion: with few steps and many, and with the label asked for more and more strongly.

Guidance: Ho, Salimans, Classifier-free diffusion guidance, arXiv 2207.12598.
"""

from __future__ import annotations

import numpy as np

from latentd_trainer.report import figure_text, table
from latentd_trainer.served import walk
from latentd_trainer.study import digit_pictures
from latentd_trainer.study.digit_models import MEASURES, METHOD, Digits, Sampled
from latentd_trainer.study.section import Criterion, Picture, Section, Settings

CLOSE = 0.95
"""Of what real images score: from here on samples count as no worse."""
STEP_COUNTS = (50, 10)
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
_SWEPT_STEPS = 10
_SWEPT = "guidance"


def study(settings: Settings) -> Section:
    """Measure one network's samples by number of steps, and by guidance scale."""
    digits = Digits(settings)
    graphs = digits.graphs("diffusion")
    asked = digits.labels(graphs)
    drawn: dict[str, Sampled] = {}
    walks = [(f"{count}-steps", f"{count} steps", count, 1.0) for count in STEP_COUNTS]
    walks += [(f"{_SWEPT}-{scale:g}", f"guidance {scale:g}", _SWEPT_STEPS, scale) for scale in SCALES if scale != 1]
    for name, description, step_count, scale in walks:
        settings.tell(description)
        generator = np.random.default_rng([settings.seed, 0])  # the same noise for all, so that only the walk differs
        drawn[name] = Sampled(description, walk(graphs, asked, step_count, generator, guidance_scale=scale), asked)
    measured = {"real": digits.measure_real()} | {name: digits.measure(each) for name, each in drawn.items()}
    measured[f"{_SWEPT}-1"] = measured[f"{_SWEPT_STEPS}-steps"]
    for found in measured.values():
        found |= {f"relative-{name}": found[name] / measured["real"][name] for name in ("precision", "recall")}
    names = {"real": "*real images*"} | {name: each.description for name, each in drawn.items()}
    swept = {f"{_SWEPT}-{scale:g}": measured[f"{_SWEPT}-{scale:g}"] for scale in SCALES}

    def row(name: str, title: str) -> list[str]:
        return [title, *(figure_text(measured[name][each]) for each in MEASURES)]

    few, many = (f"{count}-steps" for count in (min(STEP_COUNTS), max(STEP_COUNTS)))
    return Section(
        title="Diffusion covers and is sharp; guidance trades the one for the other",
        claim="Diffusion models come close to the data in precision and in recall (Ho et al., arXiv 2006.11239); "
        "guidance buys precision with variety (arXiv 2207.12598).",
        measured=f"{METHOD} Guidance with scale w walks by (1 - w) m(x, t) + w m(x, t, y), so that 0 forgets the "
        "label, 1 asks for it and more than 1 insists; the paper's w is one less. The sweep takes "
        f"{_SWEPT_STEPS} steps. All walks start at the same noise.",
        figures={f"{name}/{measure}": value for name, found in measured.items() for measure, value in found.items()},
        criteria=(
            Criterion(
                "In 50 steps precision is that of real images (ratio)", f"{many}/relative-precision", ">=", CLOSE
            ),
            Criterion("and recall too (ratio)", f"{many}/relative-recall", ">=", CLOSE),
            Criterion("Ten steps lose no precision (ratio)", f"{few}/relative-precision", ">=", CLOSE),
            Criterion("nor recall (ratio)", f"{few}/relative-recall", ">=", CLOSE),
            Criterion("Guidance of 3 loses recall to 1", f"{_SWEPT}-3/recall", "<", f"{_SWEPT}-1/recall"),
            Criterion("and gains precision", f"{_SWEPT}-3/precision", ">", f"{_SWEPT}-1/precision"),
            Criterion("and density", f"{_SWEPT}-3/density", ">", f"{_SWEPT}-1/density"),
        ),
        body="\n\n".join(
            [
                *digits.taken(),
                table(
                    ["", *MEASURES],
                    [row(name, names[name]) for name in ("real", *(f"{count}-steps" for count in STEP_COUNTS))],
                ),
                f"By guidance scale, in {_SWEPT_STEPS} steps:",
                table(["guidance scale", *MEASURES], [row(name, name.removeprefix(f"{_SWEPT}-")) for name in swept]),
                "Precision cannot rise far above that of real images, whose own it is measured by; density can. A "
                "scale of 0 has to find its classes itself, with a network that was told them in most of its training.",
            ]
        ),
        pictures=(
            Picture(
                "diffusion-samples.png",
                "Held-out images and samples, a row a class; first ones first. A scale of 0 asks for no class.",
                digit_pictures.samples(digits.picture_rows(drawn.values())),
            ),
            Picture(
                "guidance.png",
                "Precision, recall and coverage by guidance scale; dashed: those of real images.",
                digit_pictures.sweep(
                    "guidance scale",
                    list(SCALES),
                    list(swept.values()),
                    measured["real"],
                    ("precision", "recall", "coverage"),
                ),
            ),
        ),
    )
