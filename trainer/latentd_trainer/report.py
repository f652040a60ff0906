"""The Markdown report of an evaluation, its picture, and the table on the console."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from latentd.card import likelihood_in_words
from latentd.v1 import model_pb2
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from latentd_trainer import card, plots
from latentd_trainer.bars import Bar
from latentd_trainer.checkpoint import write_whole
from latentd_trainer.data import Dataset, scale
from latentd_trainer.served import Samples

REPORT_FILE = "report.md"
PICTURE_FILE = "samples.png"

_COLUMNS = {
    "frechet-ratio": "Frechet ratio",
    "frechet-distance": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "label-agreement": "label agreement",
    "histogram-distance": "class histogram distance",
    "neighbour-ratio": "nearest-neighbour ratio",
}
_UNASKED = " of the real images, while samples, for which no class can be asked, come as they are drawn"
_OWN = " of the model's own; real images stand where its encoder puts them"
_SHOWN_CLASSES = 16
_SHOWN_EACH = 8
_WIDTH = 1400  # pixels
_SEPARATOR = -0.25  # the grey between the tiles of a grid

_METHOD = """\
Samples are drawn through the bundle's own ONNX graphs, their labels in the shares of the training data. Distances are
between features of a small classifier trained on the training images. The *Frechet ratio* is the Frechet distance of
the samples from the training images over that of as many real held-out images, so 1 is as good as real; the *Frechet
distance* beside it is of all samples, and falls with their number. *Precision* and *density* say whether samples look
real, *recall* and *coverage* whether all kinds of real images occur; they are means over subsets as large as the
held-out set. The *class histogram distance* is the total variation between the classes seen and those of the training
data. A *nearest-neighbour ratio*, in pixels, far below 1 would mean copied training images.
"""


def write(
    directory: Path,
    model: model_pb2.Model,
    dataset: Dataset,
    drawn: Sequence[Samples],
    asked: NDArray[np.int64],
    shown_as: NDArray[np.int64],
    real: Mapping[str, float],
    bars: Sequence[Bar],
) -> Path:
    """Write `report.md` and `samples.png` into `directory`; return the report's path.

    Args:
        directory: It is made if need be.
        model: With its figures in its card.
        dataset: What they were measured on.
        drawn: Samples, each kind with one for each of `asked`.
        asked: [n] i64, the model's classes.
        shown_as: [held-out images] i64, the class whose row an image is shown in.
        real: The figures of real images.
        bars: What the figures are held to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / PICTURE_FILE, picture(dataset, drawn, asked, shown_as))
    path = directory / REPORT_FILE
    write_whole(path, markdown(model, drawn, real, bars).encode())
    return path


def markdown(model: model_pb2.Model, drawn: Sequence[Samples], real: Mapping[str, float], bars: Sequence[Bar]) -> str:
    """The report's text."""
    metrics, compared = model.card.metrics, model.card.comparisons
    rows = [
        [samples.description, *(figure_text(metrics.get(name + samples.variant)) for name in _COLUMNS)]
        for samples in drawn
    ]
    for other in compared:
        rows += [
            [
                f"{other.model}, {samples.description}",
                *(figure_text(other.metrics.get(name + samples.variant)) for name in _COLUMNS),
            ]
            for samples in drawn
        ]
    rows.append(["*real images*", *(figure_text(real.get(name)) for name in _COLUMNS)])
    shown = {name + samples.variant for name in _COLUMNS for samples in drawn}
    others = [
        [name, figure_text(metrics[name]), *(figure_text(other.metrics.get(name)) for other in compared)]
        for name in sorted(metrics)
        if name not in shown
    ]
    rows_are = _UNASKED if not model.class_names else _OWN if "code-purity" in metrics else ""
    columns = ", ".join(["real images", *(samples.description for samples in drawn)])
    parts = [
        f"# {model.name}",
        f"{model.card.description} Trained on {model.card.dataset}; digest `{model.digest}`.",
        *(f"{other.relation.capitalize()} {other.model}, digest `{other.digest}`." for other in compared),
        f"Licence of the weights: {model.card.license}; of the training data: {model.card.dataset_license}.",
        table(["method", "what it answers"], _methods(model)),
        f"**Likelihood:** {likelihood_in_words(model.card.likelihood)}",
        f"![Samples]({PICTURE_FILE})",
        f"One row for each class{rows_are}; from left to right: {columns}.",
        "## Samples",
        _METHOD,
        table(["", *_COLUMNS.values()], rows),
        "## Other figures",
        "Bounds are in nats an image, of held-out images given their labels where the model takes them; the exact "
        "log-likelihood is over all classes; KL is in nats a latent dimension, mutual information in nats a pair of "
        "units. What samples tell of the codes they were drawn for, information, is a lower bound in nats.",
        table(["metric", "value", *(other.model for other in compared)], others),
    ]
    if bars:
        start = card.start_figures(model.card)
        outcome = [
            [str(bar), figure_text(bar.value(metrics, start)), "missed" if bar.missed(metrics, start) else "met"]
            for bar in bars
        ]
        parts += ["## Bars", table(["bar", "value", ""], outcome)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _methods(model: model_pb2.Model) -> list[list[str]]:
    """Each method with what it answers, or why it does not."""
    return [
        [
            model_pb2.Model.Method.Name(each.method).removeprefix("METHOD_").capitalize(),
            each.description if each.method in model.methods else f"- ({each.description})",
        ]
        for each in model.card.capabilities
    ]


def picture(dataset: Dataset, drawn: Sequence[Samples], asked: NDArray[np.int64], shown_as: NDArray[np.int64]) -> bytes:
    """A PNG with a row for each class: real images, then samples of each kind, first ones first; see `write`."""
    held_out = scale(dataset.test.pixels, dataset.info.levels)
    sources = [(held_out, shown_as), *((samples.images, asked) for samples in drawn)]
    gap = np.full((1, *dataset.info.shape), _SEPARATOR, np.float32)
    rows: list[NDArray[np.float32]] = []
    for label in range(min(1 + max(labels.max() for _, labels in sources), _SHOWN_CLASSES)):
        for images, labels in sources:
            chosen = images[labels == label][:_SHOWN_EACH]
            rows += [chosen, gap.repeat(_SHOWN_EACH - len(chosen), 0), gap]
        rows.pop()
    return plots.grid(np.concatenate(rows), len(sources) * (_SHOWN_EACH + 1) - 1, picture_width=_WIDTH)


def show(console: Console, model: model_pb2.Model, bars: Sequence[Bar]) -> None:
    """Print every metric, with its bar where there is one."""
    start = card.start_figures(model.card)
    table = Table("metric", "value", "bar", title=model.name)
    for name, value in sorted(model.card.metrics.items()):
        limits = [bar for bar in bars if bar.metric == name]
        colours = ["red" if bar.missed(model.card.metrics, start) else "green" for bar in limits]
        outcome = ", ".join(f"[{colour}]{bar}[/]" for colour, bar in zip(colours, limits, strict=True))
        table.add_row(name, figure_text(value), outcome)
    console.print(table)


def figure_text(value: float | None) -> str:
    """A number as reports print it; nothing for one that was not measured."""
    if value is None:
        return ""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.01 or not value else f"{value:.2g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
