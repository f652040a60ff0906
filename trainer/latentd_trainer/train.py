"""The training loop, one for all families."""

from __future__ import annotations

import math
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import latentd
import numpy as np
import torch

from latentd_trainer import checkpoint, plots
from latentd_trainer.data import Dataset, batch_indices
from latentd_trainer.families import Batch, Family, Moment
from latentd_trainer.log import TrainingLog
from latentd_trainer.optimization import PRECISIONS, autocast
from latentd_trainer.progress import Display
from latentd_trainer.shard import Shard, join_group, process_count, rank

LOSS_PICTURE, SAMPLES_PICTURE = "loss.png", "samples.png"
_LOG_LINES = 2000
_GRID_ROWS, _GRID_COLUMNS, _GRID_SEED = 8, 10, 0


class TrainingError(Exception):
    """Training had to stop. The message says why, and what is left."""


class InterruptedTraining(Exception):
    """SIGINT or SIGTERM came; the state was saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; continue with --resume")
        self.exit_status = 128 + number


def versions() -> dict[str, str]:
    """What, besides its record, decides the bits of a run."""
    return {"latentd": latentd.__version__, "torch": torch.__version__, "python": platform.python_version()}


def step_seed(seed: int, step: int) -> int:
    """What seeds the generator of a step (`Moment`) in a run with this seed."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


def global_batch(dataset: Dataset, size: int, step: int, seed: int) -> Batch:
    """What all processes together train on in a step; a size of 0 is all images."""
    labels = dataset.trained_labels
    chosen = batch_indices(step, size or len(labels), len(labels), seed)
    return Batch(torch.from_numpy(dataset.trained_rows(chosen)), torch.from_numpy(labels[chosen]))


def choose_device(name: str, precision: str, rank: int = 0) -> torch.device:
    """The device to train on.

    Args:
        name: `auto` (CUDA where there is a device, else the CPU), `cpu`, `cuda` or `cuda:N`.
        precision: one of `PRECISIONS`.
        rank: among the processes on this machine; `auto` and `cuda` give each its own device.

    Raises:
        ValueError: there is no such device, or it cannot do this precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: must be one of {', '.join(PRECISIONS)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise ValueError(f"device {name!r}: must be auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or rank) >= count:
        raise ValueError(f"device {name!r}: torch {torch.__version__} sees {count} CUDA devices here")
    if precision != "fp32" and kind == "cpu":
        raise ValueError(f"precision {precision} needs a CUDA device; the CPU trains in fp32")
    return torch.device(kind if kind == "cpu" else f"cuda:{int(index or rank)}")


def fit(
    directory: Path,
    record: checkpoint.RunRecord,
    dataset: Dataset,
    *,
    device: torch.device,
    interval: int,
    resume: bool,
    display: Display,
    start: Family | None = None,
) -> None:
    """Train a run to its end: a new one, or with `resume` the one that is there, from its last checkpoint.

    A new run of a family that goes on from another one begins with what `start` has trained, and has a checkpoint
    from then on, so that it needs `start` no more.

    Every `interval` steps, and at the end, the checkpoint is replaced and the pictures are drawn anew.
    Processes that `torchrun` started share each batch and come to the same weights, which the first one writes.

    Raises:
        ValueError: the network does not take these images, the processes do not divide the batch, or the directory
            holds a run that is not to be resumed.
        CheckpointError: the checkpoint to resume from cannot be read, weights are not finite, or another process
            trains here.
        TrainingError: a loss is not finite, or files cannot be written; the last checkpoint is intact.
        InterruptedTraining: SIGINT or SIGTERM; the state is saved.
    """
    torch.set_num_threads(record.threads)
    batch_size = record.settings["batch_size"]
    if batch_size % process_count():
        raise ValueError(f"batch_size={batch_size}: must be a multiple of the {process_count()} processes")
    family = checkpoint.build_family(record.family, record.settings, record.info, record.seed)
    try:
        with ExitStack() as stack:
            if rank() == 0:  # before it joins, so that all processes find the files as they are from then on
                stack.enter_context(checkpoint.hold(directory))
                if not resume:
                    checkpoint.require_no_run(directory)
            shard = stack.enter_context(join_group(device))
            if start is not None and not resume:
                family.start_from(start)
            _move(family, device, record.precision)
            has_checkpoint = (directory / checkpoint.CHECKPOINT_FILE).exists()
            first = checkpoint.restore(directory, family) if resume and has_checkpoint else 0
            if shard.is_first:
                checkpoint.remove_leftovers(directory)
                if not resume:
                    if start is not None:
                        checkpoint.save(directory, family, 0)
                    checkpoint.write_record(directory, record)
            log = stack.enter_context(TrainingLog(directory, first, enabled=shard.is_first))
            loop = _Loop(directory, record, dataset, family, device, shard, log)
            received = stack.enter_context(_caught_signals(shard.count))
            if shard.is_first:
                stack.enter_context(display.running(record.family, first, loop.step_count))
            loop.run(first, interval, received, display)
    except OSError as error:
        raise TrainingError(f"{error}; stopped, {_what_is_left(directory)}") from error


@dataclass
class _Loop:
    directory: Path
    record: checkpoint.RunRecord
    dataset: Dataset
    family: Family
    device: torch.device
    shard: Shard
    log: TrainingLog

    @property
    def step_count(self) -> int:
        return int(self.record.settings["steps"])

    def run(self, start: int, interval: int, received: list[int], display: Display) -> None:
        began = time.monotonic()
        for step in range(start, self.step_count):
            losses, stop = self._agree(self.family.step(self._batch(step), self._moment(step)), bool(received))
            done = step + 1
            if not all(math.isfinite(value) for value in losses.values()):
                found = ", ".join(f"{name} {value}" for name, value in losses.items())
                raise TrainingError(
                    f"step {done}: a loss is not finite ({found}); {_what_is_left(self.directory)}. "
                    "Try a lower learning_rate."
                )
            if done % max(1, self.step_count // _LOG_LINES) == 0 or done == self.step_count:
                rate = (done - start) / max(time.monotonic() - began, 1e-9)
                self.log.write(done, losses, rate)
            if self.shard.is_first:
                display.advance(done, losses)
            if done % interval == 0 or done == self.step_count or stop:
                self._save(done, draw=not stop)
            if stop and done < self.step_count:
                raise InterruptedTraining(received[0] if received else signal.SIGTERM, done)

    def _batch(self, step: int) -> Batch:
        whole = global_batch(self.dataset, self.record.settings["batch_size"], step, self.record.seed)
        images, labels = (self.shard.rows(part).to(self.device) for part in (whole.images, whole.labels))
        return Batch(images, labels)

    def _moment(self, step: int) -> Moment:
        generator = torch.Generator().manual_seed(step_seed(self.record.seed, step))
        arithmetic = partial(autocast, self.device, self.record.precision)
        return Moment(step, self.step_count, generator, self.shard, arithmetic)

    def _agree(self, losses: dict[str, torch.Tensor], stop: bool) -> tuple[dict[str, float], bool]:
        """Losses over the global batch, and whether any process wants to stop: the same answer in every process."""
        parts = [value.float() for value in losses.values()]
        together = self.shard.mean(torch.stack([*parts, parts[0].new_tensor(float(stop))])).tolist()
        return dict(zip(losses, together[:-1], strict=True)), together[-1] > 0

    def _save(self, step: int, *, draw: bool) -> None:
        if not self.shard.is_first:
            return
        self.log.flush()
        checkpoint.save(self.directory, self.family, step)
        if draw:
            class_count = len(self.dataset.info.class_names)
            labels = torch.arange(_GRID_COLUMNS).repeat(_GRID_ROWS) % class_count
            if self.dataset.info.latents is None:  # latents are nothing to look at
                samples = self.family.sample(labels, _GRID_SEED).numpy()
                checkpoint.write_whole(self.directory / SAMPLES_PICTURE, plots.grid(samples, _GRID_COLUMNS))
            checkpoint.write_whole(self.directory / LOSS_PICTURE, plots.curves(self.log.read()))


def _what_is_left(directory: Path) -> str:
    path = directory / checkpoint.CHECKPOINT_FILE
    return f"the last checkpoint, {path}, is intact" if path.exists() else "there is no checkpoint yet"


def _move(family: Family, device: torch.device, precision: str) -> None:
    """Move a family without optimiser state to a device, and scale losses where small gradients would be lost."""
    for module in (*family.modules.values(), *family.frozen.values()):
        module.to(device)
    for average in family.averages.values():
        average.module.to(device)
    if precision == "fp16":
        for updater in family.updaters.values():
            updater.scale_losses(device)


@contextmanager
def _caught_signals(process_count: int) -> Iterator[list[int]]:
    """SIGINT and SIGTERM as numbers in a list. The first restores the old handlers, so that a second one ends at once.

    Not so among several processes: `torchrun` sends on to them what reached them already by their process group,
    as Ctrl-C does, and ends those by force that take too long.

    Signals reach Python's main thread alone; elsewhere the list stays empty.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        if process_count == 1:
            restore()

    in_main_thread = threading.current_thread() is threading.main_thread()
    for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread else ():
        previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()
