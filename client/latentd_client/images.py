"""Samples as pictures: 8-bit values, grids, animations. Pillow is imported only when a picture is made.

Small images are enlarged by whole factors without smoothing, so that every pixel the model drew can be seen.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

_GRID_WIDTH = 480  # pixels a grid aims at when no scale is given
_GAP = 2  # background pixels between the images of a grid, before enlarging by less than that is visible


def to_uint8(array: NDArray[Any], value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Pixels of images: `[n, C, H, W]` or `[n, H, W]` in `value_range` to `[n, H, W]` (grey) or `[n, H, W, 3]` uint8.

    Values outside the range are clipped; halves round to even, as the server does for UINT8 output.

    Raises:
        ValueError: the array does not hold images of 1 or 3 channels, or the range is empty.
    """
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must rise, got {value_range}")
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(f"need [n, C, H, W] with 1 or 3 channels or [n, H, W] to make pictures, got {array.shape}")
    if array.dtype == np.uint8 and value_range == (0, 255):
        pixels = array
    else:
        unit = (array.astype(np.float64) - low) / (high - low)
        pixels = np.rint(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels[:, 0] if pixels.shape[1] == 1 else np.ascontiguousarray(np.moveaxis(pixels, 1, -1))


def to_pil(pixels: NDArray[np.uint8], scale: int = 1) -> "list[Image]":
    """One picture for each row of `to_uint8`, every pixel enlarged to `scale` x `scale`."""
    pil_image = pillow()
    return [pil_image.fromarray(_enlarge(row[None], scale)[0]) for row in pixels]


def grid(pixels: NDArray[np.uint8], columns: int | None = None, scale: int | None = None) -> "Image":
    """All rows of `to_uint8` side by side, row after row.

    Args:
        pixels: `[n, H, W]` or `[n, H, W, 3]`, n at least 1.
        columns: images in a row; as square as possible if None.
        scale: factor every pixel is enlarged by; if None, one that makes the grid a few hundred pixels wide.
    """
    return pillow().fromarray(grid_pixels(pixels, columns, scale))  # type: ignore[no-any-return]  # lazily imported


def grid_pixels(pixels: NDArray[np.uint8], columns: int | None = None, scale: int | None = None) -> NDArray[np.uint8]:
    """`grid` as an array, `[H', W']` or `[H', W', 3]`."""
    count = len(pixels)
    if count == 0:
        raise ValueError("there are no images to lay out")
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    rows = math.ceil(count / columns)
    height, width = pixels.shape[1:3]
    if scale is None:
        scale = max(1, round(_GRID_WIDTH / (columns * width)))
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")

    cells = _enlarge(pixels, scale)
    cell_height, cell_width = height * scale + _GAP, width * scale + _GAP
    canvas = np.full((rows * cell_height - _GAP, columns * cell_width - _GAP, *pixels.shape[3:]), 128, np.uint8)
    for index, cell in enumerate(cells):
        top, left = index // columns * cell_height, index % columns * cell_width
        canvas[top : top + height * scale, left : left + width * scale] = cell
    return canvas


def save_gif(frames: "Sequence[Image]", path: str | Path, *, duration_s: float = 3.0, hold_s: float = 1.5) -> None:
    """Write pictures of one size as an animation that repeats.

    Args:
        frames: at least one.
        path: the file to write.
        duration_s: how long all but the last frame take together, in seconds.
        hold_s: how long the last one stays, in seconds.
    """
    each_ms = max(20, round(1000 * duration_s / max(1, len(frames) - 1)))  # viewers slow down below 20 ms
    durations_ms = [each_ms] * (len(frames) - 1) + [round(1000 * hold_s)]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations_ms, loop=0)


def png_bytes(picture: "Image", text: dict[str, str] | None = None) -> bytes:
    """A picture as a PNG file; `text` becomes its tEXt chunks, so that it can say how it was made."""
    pillow()
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_picture(path: str | Path, shape: Sequence[int], value_range: tuple[float, float]) -> NDArray[np.float32]:
    """A picture file as one sample, `[C, H, W]` f32 in `value_range`.

    Raises:
        ValueError: `shape` is not that of an image, or the picture has another size; nothing is resized silently.
    """
    pil_image = pillow()
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"samples of shape {list(shape)} are not images of 1 or 3 channels")
    channels, height, width = shape
    with pil_image.open(path) as picture:
        if picture.size != (width, height):
            raise ValueError(f"{path}: must be {width} x {height} pixels, is {picture.size[0]} x {picture.size[1]}")
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    planes = pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)
    low, high = value_range
    return (planes.astype(np.float64) / 255.0 * (high - low) + low).astype(np.float32)


def pillow() -> ModuleType:
    """`PIL.Image`.

    Raises:
        ModuleNotFoundError: Pillow is not installed; says how to get it.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need Pillow: pip install 'latentd[images]'", name="PIL") from error
    return Image


def _enlarge(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)
