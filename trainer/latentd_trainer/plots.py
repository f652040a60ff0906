"""Pictures as PNG bytes: a grid of samples, losses by step, and any figure of matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAP = 96
_WINDOW_SHARE = 0.02


def grid(images: NDArray[np.float32], columns: int, picture_width: int = 640) -> bytes:
    """Images ([n, C, H, W] f32 in [-1, 1], C of 1, 3 or more) in rows of `columns`, enlarged to about `picture_width`.

    Of two channels or more than three only the first is shown, in grey.
    """
    from PIL import Image

    count, channels, height, width = images.shape
    shown = images if channels == 3 else images[:, :1]
    rows = -(-count // columns)
    pixels = np.full((rows * columns, shown.shape[1], height + 1, width + 1), _GAP, np.uint8)
    pixels[:count, :, :height, :width] = np.rint((np.clip(shown, -1, 1) + 1) * 127.5)
    tiled = pixels.reshape(rows, columns, -1, height + 1, width + 1).transpose(0, 3, 1, 4, 2)
    tiled = tiled.reshape(rows * (height + 1), columns * (width + 1), -1)
    factor = max(1, picture_width // tiled.shape[1])
    enlarged = tiled.repeat(factor, axis=0).repeat(factor, axis=1)
    file = io.BytesIO()
    Image.fromarray(enlarged if channels == 3 else enlarged[:, :, 0]).save(file, "png")
    return file.getvalue()


def curves(log: Sequence[Mapping[str, Any]]) -> bytes:
    """One panel for each loss in the log (entries with `step` and `losses`): every value, and a running mean."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for entry in log for name in entry["losses"]))
    figure = Figure(figsize=(7, 2.4 * max(1, len(names))), layout="constrained")
    panels = figure.subplots(max(1, len(names)), 1, squeeze=False)[:, 0]
    for name, panel in zip(names, panels, strict=False):
        entries = [entry for entry in log if name in entry["losses"]]
        steps = np.array([entry["step"] for entry in entries])
        values = np.array([entry["losses"][name] for entry in entries])
        window = max(1, round(len(values) * _WINDOW_SHARE))
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        panel.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        panel.plot(steps[window - 1 :], mean, color="tab:blue")
        # The first steps fall from far above what matters later.
        settled = values[len(values) // 20 :]
        low, high = settled.min(), settled.max()
        margin = 0.05 * (high - low) or 1.0
        panel.set(ylabel=name, ylim=(low - margin, high + margin))
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    return png(figure)


def png(figure: Figure) -> bytes:
    """A drawn figure as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
