"""Bundles of the embedded digits, found or trained, and what their samples measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from latentd_trainer import bundle as bundles
from latentd_trainer import checkpoint, classifier, evaluate, export, metrics, start, train
from latentd_trainer.classifier import Yardstick
from latentd_trainer.data import Dataset, load, scale
from latentd_trainer.evaluate import Real
from latentd_trainer.families import load_family, parse_settings
from latentd_trainer.progress import Display
from latentd_trainer.served import Floats, Graphs
from latentd_trainer.study.kept import digest
from latentd_trainer.study.section import Settings

MEASURES = ("precision", "recall", "density", "coverage", "sharpness")
METHOD = (
    "Samples are drawn through the ONNX graphs that are served, labels in the shares of the training data, and "
    "compared with the held-out images in the features of a classifier of digits: precision and density say whether "
    "samples lie among real images, recall and coverage whether real images lie among samples. Sharpness is the power "
    "of the samples' Laplacian over that of the held-out images; noise counts as sharp. The first row is real training "
    "images."
)
_CHECKPOINT_INTERVAL = 500
_QUICK = {"steps": "3", "batch_size": "8", "width": "8", "hidden": "16"}
_QUICK_CLASSIFIER_STEPS = 10
_QUICK_SAMPLES = 60
_SHOWN_EACH = 8
_PAIR = ("vae", "vae_gan")


@dataclass(frozen=True)
class Sampled:
    """One way to draw images."""

    description: str
    images: Floats  # [n, 1, 8, 8], in order of class
    asked: NDArray[np.int64]  # [n], their classes


class Digits:
    """The digits, the classifier that images are measured with, and the models trained on them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.given: list[str] = []  # bundles that were measured in place of trained ones, by name and digest
        self.dataset: Dataset = load("digits")
        settings.tell("classifier")
        steps = _QUICK_CLASSIFIER_STEPS if settings.quick else None
        self.yardstick: Yardstick = classifier.load_or_train(self.dataset, settings.trained, settings.seed, steps)
        self.real: Real = Real.of(self.dataset, self.yardstick)
        self.held_out: Floats = scale(self.dataset.test.pixels, self.dataset.info.levels)

    def graphs(self, family: str) -> Graphs:
        """The networks of this family's bundle: that in `settings.models` where there is one, else one trained here."""
        given = self._given(family)
        directory = given or self._exported(family)
        bundle = bundles.read(directory)
        if given is not None:
            self.given.append(f"`{bundle.model.name}` ({bundle.model.digest})")
        return Graphs(directory, bundle, threads=1)

    def taken(self) -> list[str]:
        """A sentence that names the bundles that were measured in place of trained ones; none if all were trained."""
        return [f"Not trained for this study, but found: {', '.join(self.given)}."] if self.given else []

    def labels(self, graphs: Graphs) -> NDArray[np.int64]:
        """What to ask a model for: labels in the shares of the training data, in order of class."""
        count = _QUICK_SAMPLES if self.settings.quick else evaluate.SAMPLE_COUNT
        return evaluate.allotted_labels(graphs.bundle.model, self.dataset, count)

    def measure(self, sampled: Sampled) -> dict[str, float]:
        """`MEASURES` of samples, by name.

        Raises:
            TrainingError: samples are not finite.
        """
        images = sampled.images
        if not np.isfinite(images).all():
            raise train.TrainingError(f"{sampled.description}: samples are not finite")
        found = evaluate.compare(images, self.yardstick.read(images), self.real, self.settings.seed)
        found["sharpness"] = metrics.laplacian_power(images) / metrics.laplacian_power(self.held_out)
        return {name: found[name] for name in MEASURES}

    def measure_real(self) -> dict[str, float]:
        """The same of training images: what a model could at best be expected to reach."""
        found = evaluate.real_row(self.real, self.settings.seed)
        train_images = scale(self.dataset.train.pixels, self.dataset.info.levels)
        found["sharpness"] = metrics.laplacian_power(train_images) / metrics.laplacian_power(self.held_out)
        return {name: found[name] for name in MEASURES}

    def picture_rows(self, each: Iterable[Sampled]) -> dict[str, Floats]:
        """Real images and samples of every class, `_SHOWN_EACH` a class, by description."""
        shown = {"real": self._first(self.held_out, self.dataset.test.labels)}
        shown |= {sampled.description: self._first(sampled.images, sampled.asked) for sampled in each}
        return shown

    def _first(self, images: Floats, labels: NDArray[np.int64]) -> Floats:
        classes = range(len(self.dataset.info.class_names))
        return np.concatenate([images[labels == label][:_SHOWN_EACH] for label in classes])

    def _given(self, family: str) -> Path | None:
        """The newest version of `digits-FAMILY` in `settings.models`.

        Of a VAE and one tuned from it, which are compared, there are both or neither, and the one from the other.
        """
        directory = self._newest(family)
        if family not in _PAIR:
            return directory
        first, tuned = (self._newest(each) for each in _PAIR)
        if first is None or tuned is None:
            return None
        origin = bundles.read_record(tuned).get("start")
        return directory if origin is not None and start.is_served_by(origin, first) else None

    def _newest(self, family: str) -> Path | None:
        if self.settings.models is None:
            return None
        directory = self.settings.models / _bundle_name(family)
        latest = bundles.next_version(self.settings.models, _bundle_name(family)) - 1
        return directory / str(latest) if latest else None

    def _exported(self, family: str) -> Path:
        run = self._trained(family)
        name = f"{_bundle_name(family)}-{run.name.rpartition('-')[2]}"
        models = self.settings.trained / "models"
        if bundles.next_version(models, name) == 1:
            self.settings.tell(f"{family}, export")
            export.run(run, models=models, name=name)
        return models / name / "1"

    def _trained(self, family: str) -> Path:
        """The run of this family with its default settings and the study's seed, trained to its end."""
        kind = load_family(family)
        origin = self._trained(kind.starts_from) if kind.starts_from else None
        begin = start.of_run(origin, family, kind)
        names = {entry.name for entry in dataclasses.fields(kind.config_type)}
        wanted = {name: value for name, value in _QUICK.items() if self.settings.quick and name in names}
        config = parse_settings(kind.config_type, wanted if begin is None else begin.settings(kind, wanted))
        record = checkpoint.RunRecord(
            family=family,
            settings=dataclasses.asdict(config),
            data="digits",
            info=self.dataset.info,
            seed=self.settings.seed,
            precision="fp32",
            threads=1,
            processes=1,
            versions=train.versions(),
            start=None if begin is None else begin.record,
        )
        directory = self.settings.trained / f"{family}-{digest(dataclasses.asdict(record))}"
        begun = (directory / checkpoint.RECORD_FILE).exists()
        if not begun or checkpoint.load_run(directory).step < config.steps:
            train.fit(
                directory,
                record,
                self.dataset,
                device=torch.device("cpu"),
                interval=_CHECKPOINT_INTERVAL,
                resume=begun,
                display=_Told(self.settings, family, config.steps),
                start=None if begin is None else begin.run.family,
            )
        return directory


class _Told(Display):
    """Progress in a word to the study, which has the terminal."""

    def __init__(self, settings: Settings, family: str, step_count: int) -> None:
        super().__init__(Console(quiet=True))
        self._settings, self._family, self._step_count = settings, family, step_count

    @contextmanager
    def running(self, description: str, start: int, step_count: int) -> Iterator[None]:
        """See `Display`."""
        yield

    def advance(self, step: int, losses: Mapping[str, float]) -> None:
        """See `Display`."""
        self._settings.tell(f"{self._family}, step {step} of {self._step_count}")


def _bundle_name(family: str) -> str:
    return f"digits-{family.replace('_', '-')}"
