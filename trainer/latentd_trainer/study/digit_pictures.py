"""Pictures of what digits measure: blocks of samples, and points in planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from latentd_trainer import plots
from latentd_trainer.served import Floats

_EACH_ROW = 4  # blocks
_COLORS = ("black", "tab:blue", "tab:cyan", "tab:red", "tab:purple", "tab:pink", "tab:green", "tab:olive")


def samples(blocks: Mapping[str, Floats], classes: int = 10) -> bytes:
    """A block for each entry, its images [n, 1, H, W] in `classes` rows, under its name."""
    from matplotlib.figure import Figure

    rows = -(-len(blocks) // _EACH_ROW)
    columns = min(len(blocks), _EACH_ROW)
    figure = Figure(figsize=(2.3 * columns, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, (name, images) in zip(panels, blocks.items(), strict=False):
        each = len(images) // classes
        _, _, height, width = images.shape
        tiles = np.full((classes, height + 1, each, width + 1), np.nan, np.float32)
        tiles[:, :height, :, :width] = images.reshape(classes, each, height, width).transpose(0, 2, 1, 3)
        panel.imshow(tiles.reshape(classes * (height + 1), -1), cmap="gray", vmin=-1, vmax=1)
        panel.set_title(name, fontsize=9)
    return plots.png(figure)


def scatter(measured: Mapping[str, Mapping[str, float]], names: Mapping[str, str]) -> bytes:
    """Every entry as a point by its precision and recall, and as a bar by its sharpness."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    titles = [names[name].strip("*") for name in measured]
    for position, (title, found) in enumerate(zip(titles, measured.values(), strict=True)):
        color = _COLORS[position % len(_COLORS)]
        left.scatter(found["recall"], found["precision"], color=color, label=title, zorder=2)
        right.barh(position, found["sharpness"], color=color)
    left.set(xlabel="recall", ylabel="precision")
    left.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    right.axvline(1, color="grey", linestyle="--", linewidth=1)
    right.set(xlabel="sharpness", yticks=range(len(titles)), yticklabels=titles)
    right.invert_yaxis()
    return plots.png(figure)


def sweep(
    label: str,
    positions: Sequence[float],
    found: Sequence[Mapping[str, float]],
    real: Mapping[str, float],
    measures: Sequence[str],
) -> bytes:
    """A line for each measure over `positions`, and a dashed one for what real images have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for measure, color in zip(measures, _COLORS[1::2], strict=False):
        axes.plot(positions, [each[measure] for each in found], "o-", color=color, label=measure)
        axes.axhline(real[measure], color=color, linestyle="--", linewidth=0.8)
    axes.set(xlabel=label, ylabel="share")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return plots.png(figure)
