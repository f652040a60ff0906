"""Runs that go on from what another run has trained: which family's, with which settings, and how to know it again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from latentd_trainer.bundle import BundleError
from latentd_trainer.checkpoint import CHECKPOINT_FILE, Run, load_run
from latentd_trainer.export import weights
from latentd_trainer.families import Family


@dataclass(frozen=True)
class Start:
    """A trained run, for another to go on from."""

    directory: Path
    run: Run

    @property
    def record(self) -> dict[str, Any]:
        """What the new run's record says of it, as JSON; `weights` is the digest of what it would serve."""
        return {
            "family": self.run.record.family,
            "seed": self.run.record.seed,
            "trained_steps": self.run.step,
            "weights": weights_digest(weights(self.run.family.serving_spec())),
        }

    def settings(self, family: type[Family], wanted: Mapping[str, str]) -> dict[str, str]:
        """All settings of the new run as texts: those wanted, and those that the family inherits.

        Raises:
            ValueError: what is wanted is another value than what is inherited; the message lists all.
        """
        inherited = {name: str(self.run.record.settings[name]) for name in family.inherited}
        problems = [
            f"{name} is {inherited[name]} in {self.directory}, not {value}"
            for name, value in wanted.items()
            if inherited.get(name, value) != value
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return {**wanted, **inherited}


def of_run(directory: Path | None, name: str, family: type[Family]) -> Start | None:
    """The run that a new one of this family goes on from; None where it needs none.

    Args:
        directory: The run.
        name: What the new run's family is called.
        family: The new run's family.

    Raises:
        ValueError: the family needs one and none is given, or the other way about, or it is another family's.
        CheckpointError: the run cannot be read.
    """
    if directory is None:
        if family.starts_from:
            raise ValueError(f"{name} goes on from a trained {family.starts_from}: give its run with --from")
        return None
    if not family.starts_from:
        raise ValueError(f"{name} starts with fresh weights; --from is for families that go on from another")
    run = load_run(directory)
    if run.record.family != family.starts_from:
        raise ValueError(f"{name} goes on from a trained {family.starts_from}; {directory} is {run.record.family}")
    return Start(directory, run)


def is_served_by(record: Mapping[str, Any], bundle: Path) -> bool:
    """Whether a bundle's networks are those that `Start.record` tells of.

    Raises:
        BundleError: the bundle has no readable checkpoint.
    """
    path = bundle / CHECKPOINT_FILE
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: cannot be read: {error}") from error
    return bool(weights_digest(tensors) == record["weights"])


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """`sha256:` and 64 hex digits over names, types, shapes and values, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
