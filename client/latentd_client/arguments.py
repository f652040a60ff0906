"""What the arguments of `latentctl` mean: classes by number or name, arrays and pictures from files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from latentd_client import images
from latentd_client.messages import Array
from latentd_client.model import Model

DEFAULT_COUNT = 16


def labels_and_count(text: str | None, model: Model, count: int | None = None) -> tuple[int | list[int] | None, int]:
    """The label of all samples, or of each, and how many samples there are.

    Args:
        text: numbers or names with commas between, used over and over; `each` for every class; None for no labels.
        model: whose classes they are.
        count: how many samples; if None, one for each class, or 16.

    Raises:
        ValueError: a class the model does not have, or more classes than samples.
    """
    labels = _labels(text, model)
    if len(labels) < 2:
        return (labels[0] if labels else None), DEFAULT_COUNT if count is None else count
    if count is None:
        count = len(labels)
    if text != "each" and len(labels) > count:
        raise ValueError(f"--label: {len(labels)} classes for {count} samples")
    return [labels[i % len(labels)] for i in range(count)], count


def grid_columns(text: str | None, columns: int | None, model: Model) -> int | None:
    """Images in a row of the grid: what was asked for, or one column for each class if each class is drawn."""
    return columns or (len(model.class_names) if text == "each" else None)


def check_outputs(paths: Sequence[Path], endings: Sequence[str] = ()) -> None:
    """Make sure that results can be written, before anything is computed.

    Args:
        paths: where they will be written.
        endings: what is allowed; if empty, arrays and every picture format.

    Raises:
        ValueError: an ending stands for no format, or a folder does not exist.
    """
    allowed = endings or (".npz", ".npy", *images.pillow().registered_extensions())
    for path in paths:
        if path.suffix.lower() not in allowed:
            raise ValueError(
                f"{path}: the ending must be {', '.join(endings) or '.png, .gif, .npz, .npy or another picture format'}"
            )
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")


def end_of_walk(text: str, model: Model) -> tuple[int | Array, Literal["latent", "sample"] | None]:
    """An end of a walk and what kind of array it is: a seed (no array), a latent, or a sample.

    Raises:
        ValueError: a file does not hold what the model takes.
        OSError: a file cannot be read.
    """
    if text.isdecimal():
        return int(text), None
    path = Path(text)
    if path.suffix in (".npz", ".npy"):
        return read_latents(path, model)[:1], "latent"
    return read_samples([path], model), "sample"


def size(text: str | None) -> tuple[int, int] | None:
    """`16x24` as a height and a width.

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size: must be HEIGHTxWIDTH, as 16x24; got {text!r}")
    return int(height), int(width)


def read_samples(paths: Sequence[Path], model: Model, size: tuple[int, int] | None = None) -> Array:
    """Samples of the model's own size, or of another one, from `.npz` (array `samples`), `.npy` and picture files,
    joined. Shape [n, *sample].

    Raises:
        ValueError: a file does not hold samples of this model; names the file.
        OSError: a file cannot be read.
    """
    shape = model.shape_at(size)
    batches = [
        read_array(path, "samples", shape)
        if path.suffix in (".npz", ".npy")
        else images.read_picture(path, shape, model.value_range)[None]
        for path in paths
    ]
    return np.concatenate([_in_range(batch, model) for batch in batches])


def read_mask(path: Path, model: Model, size: tuple[int, int] | None = None) -> Array:
    """Where pixels are known, from a picture, where they are white, or from an array of zeros and ones.
    Shape [n, *sample], or with one channel.

    Raises:
        ValueError: the file holds nothing of the shape of this model's samples; names the file.
        OSError: the file cannot be read.
    """
    shape = model.shape_at(size)
    one_channel = (1, *shape[1:])
    if path.suffix not in (".npz", ".npy"):
        return (images.read_picture(path, one_channel, (0.0, 1.0))[None] >= 0.5).astype(np.uint8)
    array = read_array(path, "mask", None)
    if array.shape in (shape, one_channel):
        array = array[None]
    if array.shape[1:] not in (shape, one_channel):
        extents = ", ".join(map(str, shape[1:]))
        channels = " or ".join(dict.fromkeys(("1", str(shape[0]))))
        raise ValueError(f"{path}: mask must have shape [{channels}, {extents}], has {list(array.shape)}")
    return array


def read_latents(path: Path, model: Model) -> Array:
    """What Decode of this model takes, from an `.npz` (array `latents`) or `.npy` file. Shape [n, *latent].

    Raises:
        ValueError: the file holds no such array, or one that its samples were decoded from by another model.
        OSError: the file cannot be read.
    """
    array = read_array(path, "latents", model.latent_shape)
    if model.walks_over_latents and path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as held:
            facts = json.loads(str(held["facts"])) if "facts" in held.files else {}
        if "request" in facts:  # samples were drawn, and these are the codes that they were decoded from
            decoder = model.proto.latent_space.decoder
            raise ValueError(
                f"{path}: holds codes for {decoder} to decode; {model.name} decodes noise, as encode gives it"
            )
    return array


def read_array(path: Path, name: str, shape: tuple[int, ...] | None) -> Array:
    """A batch from an `.npz` (the array called `name`, or the only one) or `.npy` file. Shape [n, *shape].

    Raises:
        ValueError: the file holds no such array, or one of another shape.
        OSError: the file cannot be read.
    """
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        array = loaded
    else:
        with loaded:
            names = [key for key in loaded.files if key != "facts"]
            chosen = name if name in names else names[0] if len(names) == 1 else None
            if chosen is None:
                raise ValueError(f"{path}: needs an array called {name}, has {', '.join(names) or 'none'}")
            array = loaded[chosen]
    if array.shape == shape:
        array = array[None]
    if shape is not None and array.shape[1:] != shape:
        raise ValueError(f"{path}: {name} must have shape [n, {', '.join(map(str, shape))}], has {list(array.shape)}")
    return array


def _in_range(batch: Array, model: Model) -> Array:
    """Samples kept as bytes, brought to the model's own range."""
    if batch.dtype != np.uint8:
        return batch
    low, high = model.value_range
    return (batch.astype(np.float64) / 255.0 * (high - low) + low).astype(np.float32)


def _labels(text: str | None, model: Model) -> list[int]:
    if text is None:
        return []
    if text == "each":
        if not model.class_names:
            raise ValueError(f"--label each: {model.name} has no classes")
        return list(range(len(model.class_names)))
    labels = []
    for word in (word.strip() for word in text.split(",")):
        if word in model.class_names:
            labels.append(model.class_names.index(word))
        elif word.isdecimal():
            labels.append(int(word))
        else:
            known = ", ".join(model.class_names) or "none"
            raise ValueError(f"--label: {model.name} has no class {word!r}; it has {known}")
    return labels
