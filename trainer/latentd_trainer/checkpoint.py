"""What a run leaves on disk: its record, and one checkpoint that is replaced in one piece.

    RUN/config.json              what was asked for: family, settings, data, seed
    RUN/checkpoint.safetensors   weights, averages and optimiser state; the step and other scalars as JSON in the header
    RUN/log.jsonl, loss.png, samples.png
    RUN/.lock                    held while a process trains here; alone it means nothing

Nothing is pickled. A step's randomness and data follow from (seed, step), so a checkpoint holds no generator.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from latentd_trainer.data import DataInfo
from latentd_trainer.families import Family, load_family

FORMAT_VERSION = 1
RECORD_FILE = "config.json"
CHECKPOINT_FILE = "checkpoint.safetensors"
_LOCK_FILE = ".lock"
_ASIDE_SUFFIX = ".partial"


class CheckpointError(Exception):
    """A run or its checkpoint cannot be read, or must not be written. The message names the file."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that decides a run's outcome, but the hardware and the versions of libraries."""

    family: str
    settings: Mapping[str, Any]  # of the family's `config_type`
    data: str  # what `data.load` takes
    info: DataInfo
    seed: int
    precision: str
    threads: int  # of every process; sums come out differently with another number
    processes: int
    versions: Mapping[str, str]
    start: Mapping[str, Any] | None = None  # the run that it went on from, see `start.of_run`
    latents_of: str | None = None  # the bundle whose latents are trained on, as `encoded.load_data` takes it


@dataclass(frozen=True)
class Run:
    """A trained model, restored."""

    record: RunRecord
    family: Family  # on the CPU
    step: int  # how many steps it was trained for


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at every moment `path` holds the old content or the new.

    Raises:
        OSError: it could not be written, as on a full disk; the old content is intact.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{_ASIDE_SUFFIX}")
    try:
        try:
            with open(aside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Keep other processes from training in a directory, which is made if need be.

    The lock is the operating system's (flock(2)) and goes with the process, however it ends, so the file that it is on
    stays and may be there without a lock. Between machines that share a directory it holds as far as their file system
    carries locks: NFS does on Linux, unless it is mounted with `nolock` or `local_lock`.

    Raises:
        CheckpointError: another process trains here.
        OSError: the directory cannot be made or written, or its file system has no locks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / _LOCK_FILE, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{directory}: another process is training here; wait until it ends, or choose another directory"
            ) from error
        yield


def require_no_run(directory: Path) -> None:
    """Refuse to begin a run where there is one.

    Raises:
        ValueError: says what would do.
    """
    if (directory / RECORD_FILE).exists():
        raise ValueError(f"{directory} already holds a run; continue it with --resume or choose another --out")


def remove_leftovers(directory: Path) -> None:
    """Remove what a process that was killed while writing left in a run that nobody else writes to now."""
    for path in directory.glob(f".*{_ASIDE_SUFFIX}"):
        path.unlink(missing_ok=True)


def build_family(name: str, settings: Mapping[str, Any], info: DataInfo, seed: int) -> Family:
    """A family's model with fresh weights from `seed`, on the CPU, leaving torch's global generator as it was.

    Raises:
        ValueError: unknown family, settings that are not allowed, or images that its network does not take.
    """
    family = load_family(name)
    known = {entry.name for entry in dataclasses.fields(family.config_type)}
    if unknown := settings.keys() - known:
        raise ValueError(f"{name} has no settings {', '.join(sorted(unknown))}; another version may have had them")
    config = family.config_type(**settings)
    if info.latents is not None and not family.takes_latents:
        raise ValueError(f"{name} is trained on images; --latents-of is for diffusion")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family(config, info)


def write_record(directory: Path, record: RunRecord) -> None:
    """Write a run's record; see `write_whole`."""
    text = json.dumps(dataclasses.asdict(record), indent=2) + "\n"
    write_whole(directory / RECORD_FILE, text.encode())


def read_record(directory: Path) -> RunRecord:
    """Read a run's record.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = directory / RECORD_FILE
    try:
        fields = json.loads(path.read_bytes())
        return RunRecord(info=DataInfo.of(fields.pop("info")), **fields)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); is {directory} a run?") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a run's record: {error!r}") from error


def save(directory: Path, family: Family, step: int) -> None:
    """Replace the run's checkpoint by the state after `step` steps.

    Raises:
        CheckpointError: weights are not finite; the old checkpoint is intact.
        OSError: the file could not be written; the old checkpoint is intact.
    """
    tensors = _module_tensors(family)
    for name, updater in family.updaters.items():
        for index, state in updater.optimizer.state_dict()["state"].items():
            tensors |= {f"updaters/{name}/{index}/{key}": value for key, value in state.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds NaN or infinity after step {step}; the checkpoint before is intact")
    scalars = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "scalers": {name: updater.scaler.state_dict() for name, updater in family.updaters.items()},
    }
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(directory / CHECKPOINT_FILE, to_bytes(content, {"latentd": json.dumps(scalars)}))


def restore(directory: Path, family: Family) -> int:
    """Fill `family`, built from the run's record, with the run's checkpoint; return the steps trained so far.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it is another network's.
    """
    path = directory / CHECKPOINT_FILE
    try:
        with safe_open(path, "pt") as file:
            scalars = json.loads((file.metadata() or {})["latentd"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if scalars["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {scalars['format_version']}; this program knows {FORMAT_VERSION}")
        for name, module in _modules(family).items():
            module.load_state_dict(_below(tensors, f"{name}/"))
        for name, updater in family.updaters.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, tensor in _below(tensors, f"updaters/{name}/").items():
                index, _, entry = key.partition("/")
                state.setdefault(int(index), {})[entry] = tensor
            groups = updater.optimizer.state_dict()["param_groups"]
            updater.optimizer.load_state_dict({"state": state, "param_groups": groups})
            updater.scaler.load_state_dict(scalars["scalers"][name])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this run: {error}") from error
    return int(scalars["step"])


def load_run(directory: Path) -> Run:
    """The model of a run as it was last saved.

    Raises:
        CheckpointError: the run cannot be read.
    """
    record = read_record(directory)
    try:
        family = build_family(record.family, record.settings, record.info, record.seed)
    except ValueError as error:
        raise CheckpointError(f"{directory / RECORD_FILE}: this version cannot build its network: {error}") from error
    return Run(record, family, restore(directory, family))


def _modules(family: Family) -> dict[str, nn.Module]:
    whole = {f"modules/{name}": module for name, module in family.modules.items()}
    whole |= {f"frozen/{name}": module for name, module in family.frozen.items()}
    return whole | {f"averages/{name}": average.module for name, average in family.averages.items()}


def _module_tensors(family: Family) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, module in _modules(family).items()
        for key, tensor in module.state_dict().items()
    }


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
