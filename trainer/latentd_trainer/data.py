"""Training data: 8-bit images with class labels, split into training and test parts.

The embedded default is `digits`: the 1797 handwritten digits of 8 x 8 pixels and 17 grey levels that come with
scikit-learn (test part of the UCI "Optical Recognition of Handwritten Digits" set). Anything else is a path:
an `.npz` file, IDX files (the MNIST format) or a folder of images.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EMBEDDED = "digits"
"""What `load` takes for the embedded set."""
EMBEDDED_LICENSE = "CC-BY-4.0"
"""Of the set at its source, the UCI repository (doi 10.24432/C50P49). scikit-learn, which is under BSD-3-Clause as a
whole, says nothing of the licence of its copy and refers to that source."""
SPLIT_SEED = 0
TEST_SHARE = 0.2
UNLABELLED = "unlabelled"
"""Name of the one class of data without labels."""

_NPZ_KEYS = (("x_train", "y_train"), ("x", "y"), ("images", "labels"))
_IDX_UNSIGNED_BYTE = 0x08
_SHOWN_PROBLEMS = 10


class DataError(ValueError):
    """The data cannot be trained on. The message names the file and says what is allowed."""


@dataclass(frozen=True)
class LatentsInfo:
    """What must be known of latents that are trained on in place of images. They have mean 0 and deviation 1."""

    model: str  # NAME@VERSION of whose they are
    digest: str  # of its bundle
    shape: tuple[int, ...]  # the first axis is that of channels
    means: tuple[float, ...]  # of each channel before
    deviations: tuple[float, ...]
    bound: float  # no element is further from 0


@dataclass(frozen=True)
class DataInfo:
    """What a network must know of the data it is built for, and what a card says of them."""

    name: str
    shape: tuple[int, int, int]  # [C, H, W]
    levels: int  # pixels are integers from 0 to levels - 1
    class_names: tuple[str, ...]
    class_probabilities: tuple[float, ...]  # p(label) in the training split
    sha256: str  # over the pixels and labels of both splits
    latents: LatentsInfo | None = None  # of the images, where these are trained on

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> DataInfo:
        """What JSON holds of it, where tuples are lists.

        Raises:
            TypeError: fields are missing, or there are too many.
        """
        latents = fields.get("latents")
        return cls(**{**_tuples(fields), "latents": None if latents is None else LatentsInfo(**_tuples(latents))})

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """Of what is trained on, latents or images."""
        return self.shape if self.latents is None else self.latents.shape


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


@dataclass(frozen=True)
class Split:
    """Part of a data set."""

    pixels: NDArray[np.uint8]  # [n, C, H, W], from 0 to levels - 1
    labels: NDArray[np.int64]  # [n]


@dataclass(frozen=True)
class EncodedSplit:
    """Latents of the images to train on, standardised."""

    values: NDArray[np.float32]  # [n, *latent]
    labels: NDArray[np.int64]  # [n]


@dataclass(frozen=True)
class Dataset:
    """Images to train on, and images held out."""

    info: DataInfo
    train: Split
    test: Split
    encoded: EncodedSplit | None = None  # what is trained on in place of `train`

    @property
    def trained_labels(self) -> NDArray[np.int64]:
        """The label of each row that is trained on, [n] i64."""
        return self.train.labels if self.encoded is None else self.encoded.labels

    def trained_rows(self, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows that are trained on: images on the scale of every network, -1 .. 1, or latents."""
        if self.encoded is not None:
            return self.encoded.values[chosen]
        return scale(self.train.pixels[chosen], self.info.levels)


def scale(pixels: NDArray[np.uint8], levels: int) -> NDArray[np.float32]:
    """Pixels 0 .. levels - 1 on the scale of every network, -1 .. 1 (f32, same shape)."""
    return pixels.astype(np.float32) * np.float32(2 / (levels - 1)) - np.float32(1)


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` images step `step` trains on: a new order of all of them in every epoch, from (seed, epoch).

    Depends on its arguments alone, so that training resumes with the very batches it would have had.

    Returns:
        [batch_size] i64.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // count, (last - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    return order[first - epochs.start * count : last - epochs.start * count]


def load(source: str) -> Dataset:
    """Load `digits`, or the data at a path.

    Args:
        source: `digits`; an `.npz` file with arrays `x` and `y`, or `images` and `labels`, or `x_train`, `y_train`,
            `x_test` and `y_test` (uint8 images [n, H, W], [n, C, H, W] or [n, H, W, C]; labels are optional; a scalar
            `levels` may say that pixels are below it); an IDX file of images, or a folder with such files, gzip too,
            with the labels in the file of the same name but `labels` for `images`; a folder of images, where
            subfolders are classes.

    Raises:
        DataError: nothing is there, or it cannot be trained on.
    """
    if source == EMBEDDED:
        return _digits()
    try:
        return _load_path(source)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error


def _load_path(source: str) -> Dataset:
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source}: no such file or folder (and not the embedded set `digits`)")
    if path.is_dir():
        if images := _idx_image_files(path):
            return _from_idx(path, images)
        return _from_image_folder(path)
    if path.suffix == ".npz":
        return _from_npz(path)
    return _from_idx(path, [path])


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = digits.images.astype(np.uint8)[:, None]
    return _assemble(EMBEDDED, pixels, digits.target, 17, [str(label) for label in range(10)])


def _assemble(
    name: str,
    pixels: NDArray[np.uint8],
    labels: NDArray[Any],
    levels: int,
    class_names: Sequence[str],
    test: tuple[NDArray[np.uint8], NDArray[Any]] | None = None,
) -> Dataset:
    """Check the parts against each other, split where no test part is given, and describe the whole."""
    labels = labels.astype(np.int64)
    if test is None:
        from sklearn.model_selection import train_test_split

        counts = np.bincount(labels, minlength=len(class_names))
        if counts.min() < 2:
            few = [class_names[label] for label in np.flatnonzero(counts < 2).tolist()]
            more = f" and {len(few) - _SHOWN_PROBLEMS} more" if len(few) > _SHOWN_PROBLEMS else ""
            shown = ", ".join(few[:_SHOWN_PROBLEMS])
            raise DataError(f"{name}: every class needs at least 2 images; too few in: {shown}{more}")
        test_count = max(len(class_names), math.ceil(len(labels) * TEST_SHARE))
        kept, held_out = train_test_split(
            np.arange(len(labels)), test_size=test_count, stratify=labels, random_state=SPLIT_SEED
        )
        train_split = Split(pixels[kept], labels[kept])
        test_split = Split(pixels[held_out], labels[held_out])
    else:
        train_split, test_split = Split(pixels, labels), Split(test[0], test[1].astype(np.int64))
        if pixels.shape[1:] != test[0].shape[1:]:
            raise DataError(f"{name}: training images are {pixels.shape[1:]}, test images are {test[0].shape[1:]}")
    digest = hashlib.sha256()
    for array in (train_split.pixels, train_split.labels, test_split.pixels, test_split.labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    counts = np.bincount(train_split.labels, minlength=len(class_names))
    channels, height, width = pixels.shape[1:]
    info = DataInfo(
        name=name,
        shape=(channels, height, width),
        levels=levels,
        class_names=tuple(class_names),
        class_probabilities=tuple(float(count) for count in counts / counts.sum()),
        sha256=digest.hexdigest(),
    )
    return Dataset(info, train_split, test_split)


def _class_indices(
    path: Path, labels: NDArray[Any] | None, count: int, known: Sequence[Any] | None = None
) -> tuple[NDArray[np.int64], list[Any]]:
    """Labels as indices into the list of the values that occur, or into `known`."""
    if labels is None:
        return np.zeros(count, np.int64), [UNLABELLED] if known is None else list(known)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels must be integers of shape [n], found {labels.dtype} {list(labels.shape)}")
    if len(labels) != count:
        raise DataError(f"{path}: {count} images but {len(labels)} labels; there must be one label for each image")
    values = np.unique(labels) if known is None else np.asarray(known)
    unknown = np.setdiff1d(labels, values)
    if unknown.size:
        raise DataError(f"{path}: test labels {unknown.tolist()} do not occur among the training labels")
    return np.searchsorted(values, labels).astype(np.int64), values.tolist()


def _checked_pixels(path: Path, images: NDArray[Any], levels: int) -> NDArray[np.uint8]:
    """Images of any allowed layout as uint8 [n, C, H, W]."""
    if not np.issubdtype(images.dtype, np.integer):
        raise DataError(f"{path}: pixels must be integers from 0 to {levels - 1} (uint8), found {images.dtype}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] > 4 and images.shape[3] <= 4:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or not 1 <= images.shape[1] <= 4:
        raise DataError(
            f"{path}: images must have shape [n, H, W], [n, C, H, W] or [n, H, W, C] with 1 to 4 channels, "
            f"found {list(images.shape)}"
        )
    if not images.size:
        raise DataError(f"{path}: there are no images")
    if images.min() < 0 or images.max() >= levels:
        raise DataError(f"{path}: pixels must be from 0 to {levels - 1}, found {images.min()} to {images.max()}")
    return np.ascontiguousarray(images.astype(np.uint8))


def _from_npz(path: Path) -> Dataset:
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DataError(f"{path}: holds one bare array; save named arrays with numpy.savez")
            arrays = {key: archive[key] for key in archive.files}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz without pickled objects, or is cut short: {error}") from error
    given = arrays.get("levels", np.array(256))
    if given.ndim or not np.issubdtype(given.dtype, np.integer) or not 2 <= given <= 256:
        raise DataError(f"{path}: `levels` must be one integer from 2 to 256, found {given.dtype} {given.tolist()}")
    levels = int(given)
    keys = next((pair for pair in _NPZ_KEYS if pair[0] in arrays), None)
    if keys is None:
        raise DataError(
            f"{path}: must hold arrays named x and y, images and labels, or x_train, y_train, x_test and y_test; "
            f"found {', '.join(arrays) or 'none'}"
        )
    image_key, label_key = keys
    pixels = _checked_pixels(path, arrays[image_key], levels)
    labels, values = _class_indices(path, arrays.get(label_key), len(pixels))
    test = None
    if image_key == "x_train" and "x_test" in arrays:
        test_pixels = _checked_pixels(path, arrays["x_test"], levels)
        test_labels = arrays.get("y_test") if label_key in arrays else None
        if label_key in arrays and test_labels is None:
            raise DataError(f"{path}: has y_train and x_test but no y_test")
        test = test_pixels, _class_indices(path, test_labels, len(test_pixels), values)[0]
    return _assemble(path.stem, pixels, labels, levels, [str(value) for value in values], test)


def _idx_image_files(folder: Path) -> list[Path]:
    """Both spellings in circulation, train-images-idx3-ubyte and train-images.idx3-ubyte, gzip too."""
    found = (file for file in folder.glob("*images*idx*") if file.is_file())
    # Other suffixes are pictures whose names happen to hold both words.
    return sorted(file for file in found if re.fullmatch(r"[^.]*(\.idx[^.]*)?(\.gz)?", file.name))


def _read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes: two zero bytes, the type, the number of axes, big-endian extents, the data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, or is cut short: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise DataError(f"{path}: neither .npz, nor an IDX file, nor a folder of images")
    if data[2] != _IDX_UNSIGNED_BYTE:
        raise DataError(f"{path}: IDX data must be unsigned bytes (type 0x08), found type 0x{data[2]:02x}")
    if data[3] != axes:
        raise DataError(f"{path}: expected {axes} axes, found {data[3]}")
    extents = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    start = 4 + 4 * axes
    body = np.frombuffer(data[start:], np.uint8)
    if len(data) < start or len(body) != math.prod(extents):
        raise DataError(
            f"{path}: the header says {extents}, {math.prod(extents)} bytes, but {len(body)} follow; the file is cut "
            "short or damaged"
        )
    return body.reshape(extents)


def _idx_labels_beside(images: Path) -> Path | None:
    name = images.name.replace("images", "labels").replace("idx3", "idx1")
    candidates = [images.with_name(name), images.with_name(f"{name}.gz"), images.with_name(name.removesuffix(".gz"))]
    return next((path for path in candidates if path != images and path.is_file()), None)


def _from_idx(path: Path, image_files: Sequence[Path]) -> Dataset:
    """One file of images with its labels, or a training part and a part named `t10k` or `test`."""
    held_out = [file for file in image_files if file.name.startswith(("t10k", "test"))]
    train = [file for file in image_files if file not in held_out]
    if not train:
        train, held_out = held_out, []
    if len(train) > 1 or len(held_out) > 1:
        names = ", ".join(file.name for file in image_files)
        raise DataError(f"{path}: must hold one file of training images and at most one of test images, found {names}")

    def read(file: Path, known: Sequence[Any] | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[Any]]:
        pixels = _checked_pixels(file, _read_idx(file, 3), 256)
        labels_file = _idx_labels_beside(file)
        if labels_file is None and known is not None and known != [UNLABELLED]:
            raise DataError(f"{file}: training images have labels, these have none beside them")
        labels = None if labels_file is None or known == [UNLABELLED] else _read_idx(labels_file, 1)
        return pixels, *_class_indices(labels_file or file, labels, len(pixels), known)

    pixels, labels, values = read(train[0])
    test = read(held_out[0], values)[:2] if held_out else None
    name = path.name if path.is_dir() else path.name.split(".")[0]
    return _assemble(name, pixels, labels, 256, [str(value) for value in values], test)


def _visible(entries: Iterable[Path]) -> list[Path]:
    return sorted(entry for entry in entries if not entry.name.startswith("."))


def _read_image(path: Path) -> NDArray[np.uint8]:
    """[C, H, W] u8, with one channel for grey images and three for colour.

    Raises:
        DataError: not an image, damaged, or of another kind.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode in ("1", "L"):
                return np.asarray(image.convert("L"), np.uint8)[None]
            if image.mode in ("P", "RGB"):
                return np.asarray(image.convert("RGB"), np.uint8).transpose(2, 0, 1)
            raise DataError(f"{path}: image mode {image.mode}; must be 8-bit grey (L) or RGB, without alpha")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: unreadable image: {error}") from error


def _from_image_folder(folder: Path) -> Dataset:
    entries = _visible(folder.iterdir())
    classes = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if entry.is_file()]
    problems: list[str] = []
    if classes and loose:
        problems.append(f"{loose[0]}: lies beside class subfolders; images must be either all in them or none")
    files = [(file, 0) for file in loose]
    for label, class_folder in enumerate(classes):
        members = _visible(class_folder.iterdir())
        if not members:
            problems.append(f"{class_folder}: empty; every class needs images")
        problems += [f"{member}: a folder inside a class folder" for member in members if member.is_dir()]
        files += [(member, label) for member in members if member.is_file()]
    if not files and not problems:
        raise DataError(f"{folder}: no images in this folder or its subfolders")
    images: list[NDArray[np.uint8]] = []
    for file, _ in files:
        try:
            image = _read_image(file)
        except DataError as error:
            problems.append(str(error))
            continue
        if images and image.shape != images[0].shape:
            problems.append(
                f"{file}: shape {list(image.shape)} (C, H, W), but {files[0][0].name} has {list(images[0].shape)}; "
                "all images must have the same size and kind"
            )
            continue
        images.append(image)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        raise DataError("\n".join(problems[:_SHOWN_PROBLEMS]) + (f"\nand {more} more" if more > 0 else ""))
    labels = np.array([label for _, label in files], np.int64)
    return _assemble(folder.name, np.stack(images), labels, 256, [entry.name for entry in classes] or [UNLABELLED])
