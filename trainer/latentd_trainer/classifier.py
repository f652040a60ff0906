"""A small classifier of the data's own images: its features are what evaluation measures distances in.

Networks trained on photographs know nothing of 8 x 8 digits, so the yardstick is trained on the training split
itself. Distances depend on its weights; their ratio to the distance between real and real, which is what is judged,
hardly does.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from latentd_trainer.checkpoint import write_whole
from latentd_trainer.data import Dataset, batch_indices, scale

FEATURES = 64
STEPS = 1200
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.05
"""Keeps the classifier's confidence, and with it the scale of its features, from growing with training."""
SHIFTED_SHARE = 0.5
LARGEST_SHIFT = 1  # pixels

SMALLEST_ACCURACY = 0.985
"""On the held-out digits. Below this the classifier is no yardstick for the bars on them."""

_WIDTH = 32
_SMALLEST_SIDE = 4
_EVALUATION_BATCH = 256


class Classifier(nn.Module):
    """Images [n, C, H, W] f32 to logits [n, classes]; `features` are what the last layer sees, [n, 64]."""

    def __init__(self, shape: tuple[int, int, int], class_count: int) -> None:
        super().__init__()
        channels, *sides = shape
        layers: list[nn.Module] = [nn.Conv2d(channels, _WIDTH, 3, padding=1), nn.ReLU()]
        width = _WIDTH
        while max(sides) > _SMALLEST_SIDE:
            layers += [nn.Conv2d(width, 2 * _WIDTH, 3, stride=2, padding=1), nn.ReLU()]
            width, sides = 2 * _WIDTH, [-(-side // 2) for side in sides]
        layers += [nn.Conv2d(width, 2 * _WIDTH, 3, padding=1), nn.ReLU(), nn.Flatten()]
        self.features = nn.Sequential(*layers, nn.Linear(2 * _WIDTH * sides[0] * sides[1], FEATURES), nn.ReLU())
        self.logits = nn.Linear(FEATURES, class_count)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        logits: torch.Tensor = self.logits(self.features(images))
        return logits


@dataclass(frozen=True)
class Reading:
    """What a classifier makes of images."""

    features: NDArray[np.float32]  # [n, 64]
    labels: NDArray[np.int64]  # [n], the likeliest class


@dataclass(frozen=True)
class Yardstick:
    """A trained classifier."""

    network: Classifier
    accuracy: float  # on the held-out split

    def read(self, images: NDArray[np.float32]) -> Reading:
        """Features and classes of images [n, C, H, W] f32 in [-1, 1]."""
        with torch.no_grad():
            features = torch.cat([self.network.features(batch) for batch in _batches(images)])
            return Reading(features.numpy(), self.network.logits(features).argmax(1).numpy())


def default_cache() -> Path:
    """Where classifiers are kept unless told otherwise: `latentd/classifiers` in the user's cache directory.

    That is `$XDG_CACHE_HOME`, or `~/.cache` where it is not set to an absolute path (XDG Base Directory
    Specification 0.8).
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "latentd" / "classifiers"


def load_or_train(dataset: Dataset, cache: Path, seed: int = 0, steps: int | None = None) -> Yardstick:
    """The classifier for these data and this seed: from `cache` if it is there, else trained and put there.

    Training takes about 20 s of one core on the embedded digits, in the `STEPS` that are taken if none are given. A
    damaged file in the cache is replaced.

    Raises:
        OSError: the cache cannot be read or written.
    """
    steps = STEPS if steps is None else steps
    path = cache / f"classifier-{_key(dataset, seed, steps)}.safetensors"
    network = _build(dataset, seed)
    try:
        network.load_state_dict(safetensors.torch.load(path.read_bytes()))
    except (FileNotFoundError, SafetensorError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        train(network, dataset, seed, steps)
        write_whole(path, safetensors.torch.save(network.state_dict()))
    network.eval()
    return Yardstick(network, accuracy(network, dataset))


def train(network: Classifier, dataset: Dataset, seed: int, steps: int) -> None:
    """Minimise smoothed cross-entropy on randomly shifted training images; the same on every run with one seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(scale(dataset.train.pixels, dataset.info.levels))
    labels = torch.from_numpy(dataset.train.labels)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size more threads only wait for one another, and sums come out differently
    network.train()
    for step in range(steps):
        chosen = torch.from_numpy(batch_indices(step, BATCH_SIZE, len(images), seed))
        loss = loss_of(network(_shift(images[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)


def accuracy(network: Classifier, dataset: Dataset) -> float:
    """Share of the held-out images that are put into their class."""
    images = scale(dataset.test.pixels, dataset.info.levels)
    with torch.no_grad():
        predicted = torch.cat([network(batch).argmax(1) for batch in _batches(images)])
    return float(np.mean(predicted.numpy() == dataset.test.labels))


def _build(dataset: Dataset, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(dataset.info.shape, len(dataset.info.class_names))


def _shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images, chosen at random, each moved by up to one pixel either way; what comes in is black."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (LARGEST_SHIFT,) * 4, value=-1.0)
    shifts = torch.randint(0, 2 * LARGEST_SHIFT + 1, (2, count), generator=generator)
    shifts[:, torch.rand(count, generator=generator) >= SHIFTED_SHARE] = LARGEST_SHIFT  # in the middle: not moved
    rows = shifts[0, :, None] + torch.arange(height)
    columns = shifts[1, :, None] + torch.arange(width)
    each = torch.arange(count)[:, None, None]
    return padded.movedim(1, 3)[each, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def _batches(images: NDArray[np.float32]) -> Iterator[torch.Tensor]:
    for start in range(0, len(images), _EVALUATION_BATCH):
        yield torch.from_numpy(images[start : start + _EVALUATION_BATCH])


def _key(dataset: Dataset, seed: int, steps: int) -> str:
    """Everything that decides the weights, but the hardware."""
    recipe = [
        FEATURES,
        _WIDTH,
        steps,
        BATCH_SIZE,
        LEARNING_RATE,
        LABEL_SMOOTHING,
        SHIFTED_SHARE,
        LARGEST_SHIFT,
        torch.__version__,
    ]
    text = json.dumps([dataset.info.sha256, seed, recipe])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
