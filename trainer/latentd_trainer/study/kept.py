"""What a study trained, kept under names that hold a digest of everything that decides it, to be found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from latentd_trainer.checkpoint import write_whole
from latentd_trainer.train import versions


def digest(recipe: Mapping[str, Any]) -> str:
    """Of a recipe and the versions of the programs that follow it; 12 hexadecimal digits."""
    text = json.dumps([recipe, versions()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_or_train(
    directory: Path, name: str, recipe: Mapping[str, Any], module: nn.Module, train: Callable[[], None]
) -> None:
    """Fill `module` with the weights that `train` gave it before under this name and recipe; else train and keep it.

    A damaged file is replaced.

    Raises:
        OSError: the directory cannot be read or written.
    """
    path = directory / f"{name}-{digest(recipe)}.safetensors"
    try:
        module.load_state_dict(safetensors.torch.load(path.read_bytes()))
    except (FileNotFoundError, SafetensorError, RuntimeError):
        train()
        write_whole(path, safetensors.torch.save(module.state_dict()))
