"""The Markdown report of an evaluation, its picture, and the table on the console."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from latentd.card import likelihood_in_words
from latentd.v1 import model_pb2
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from latentd_trainer import plots
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
    real: Mapping[str, float],
    bars: Sequence[Bar],
) -> Path:
    """Write `report.md` and `samples.png` into `directory`; return the report's path."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / PICTURE_FILE, picture(dataset, drawn, asked))
    path = directory / REPORT_FILE
    write_whole(path, markdown(model, drawn, real, bars).encode())
    return path


def markdown(model: model_pb2.Model, drawn: Sequence[Samples], real: Mapping[str, float], bars: Sequence[Bar]) -> str:
    """The report's text."""
    metrics = model.card.metrics
    rows = [
        [samples.description, *(figure_text(metrics.get(name + samples.variant)) for name in _COLUMNS)]
        for samples in drawn
    ]
    rows.append(["*real images*", *(figure_text(real.get(name)) for name in _COLUMNS)])
    shown = {name + samples.variant for name in _COLUMNS for samples in drawn}
    others = [[name, figure_text(metrics[name])] for name in sorted(metrics) if name not in shown]
    columns = ", ".join(["real images", *(samples.description for samples in drawn)])
    parts = [
        f"# {model.name}",
        f"{model.card.description} Trained on {model.card.dataset}; digest `{model.digest}`.",
        f"Licence of the weights: {model.card.license}; of the training data: {model.card.dataset_license}.",
        table(["method", "what it answers"], _methods(model)),
        f"**Likelihood:** {likelihood_in_words(model.card.likelihood)}",
        f"![Samples]({PICTURE_FILE})",
        f"One row for each class{_UNASKED * (not model.class_names)}; from left to right: {columns}.",
        "## Samples",
        _METHOD,
        table(["", *_COLUMNS.values()], rows),
        "## Other figures",
        "Bounds are in nats an image, of held-out images given their labels where the model takes them; the exact "
        "log-likelihood is over all classes; KL is in nats a latent dimension, mutual information in nats a pair of "
        "units.",
        table(["metric", "value"], others),
    ]
    if bars:
        outcome = [
            [str(bar), figure_text(metrics.get(bar.metric)), "missed" if bar.missed(metrics) else "met"] for bar in bars
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


def picture(dataset: Dataset, drawn: Sequence[Samples], asked: NDArray[np.int64]) -> bytes:
    """A PNG with a row for each class: real images, then samples of each kind, first ones first."""
    held_out = scale(dataset.test.pixels, dataset.info.levels)
    sources = [(held_out, dataset.test.labels), *((samples.images, asked) for samples in drawn)]
    gap = np.full((1, *dataset.info.shape), _SEPARATOR, np.float32)
    rows: list[NDArray[np.float32]] = []
    for label in range(min(len(dataset.info.class_names), _SHOWN_CLASSES)):
        for images, labels in sources:
            chosen = images[labels == label][:_SHOWN_EACH]
            rows += [chosen, gap.repeat(_SHOWN_EACH - len(chosen), 0), gap]
        rows.pop()
    return plots.grid(np.concatenate(rows), len(sources) * (_SHOWN_EACH + 1) - 1, picture_width=_WIDTH)


def show(console: Console, model: model_pb2.Model, bars: Sequence[Bar]) -> None:
    """Print every metric, with its bar where there is one."""
    limits = {bar.metric: bar for bar in bars}
    table = Table("metric", "value", "bar", title=model.name)
    for name, value in sorted(model.card.metrics.items()):
        bar = limits.get(name)
        outcome = "" if bar is None else f"[red]{bar}[/]" if bar.missed(model.card.metrics) else f"[green]{bar}[/]"
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
