"""Torch modules of somebody else's as graphs to serve. Importing one runs its code: it must be trusted as code is."""

import contextlib
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from latentd_trainer.importers import ImportingError
from latentd_trainer.importers.model_file import Input, SampleSpec, TorchEntry
from latentd_trainer.importers.words import Role
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Source


def graph(folder: Path, role: Role, entry: TorchEntry, sample: SampleSpec) -> Graph:
    """The graph that an entry makes, in evaluation mode, its outputs' shapes left open (`()`).

    Args:
        folder: Where the model file lies: modules are looked for there first, and weights are named from there.
        role: What the graph is for.
        entry: What the model file says of it.
        sample: What it says of samples.

    Raises:
        ImportingError: there is no such module, it cannot be made, or its weights do not fit; one line each.
    """
    problems = []
    inputs = []
    for name, said in entry.inputs.items():
        shape = _shape(said, sample)
        if shape is None:
            problems.append(f"inputs.{name}: say `shape`, the extents after the batch axis")
        inputs.append(GraphInput(name, said.source, shape or (), said.data_type))
    try:
        module = _made(folder, entry)
        if entry.weights is not None:
            _load(module, folder / entry.weights)
    except ImportingError as error:
        problems += str(error).splitlines()
    if problems:
        raise ImportingError("\n".join(problems))
    outputs = [GraphOutput(name, meaning, ()) for name, meaning in entry.outputs.items()]
    return Graph(role, module.cpu().eval(), inputs, outputs)


def _shape(said: Input, sample: SampleSpec) -> tuple[int, ...] | None:
    if said.shape is not None:
        return said.shape
    if said.is_integer:
        return ()
    return sample.shape if said.source == Source.SOURCE_SAMPLE else None


def _made(folder: Path, entry: TorchEntry) -> nn.Module:
    path, _, name = entry.module.partition(":")
    try:
        with _importable(folder):
            factory = getattr(importlib.import_module(path), name)
            made = factory(**entry.arguments)
    except Exception as error:  # anything may go wrong in somebody else's code
        raise ImportingError(
            f"module {entry.module}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ImportingError(f"module {entry.module}: must make a torch.nn.Module, made {type(made).__name__}")
    return made


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules in `folder` can be imported, before any others of their names."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        importlib.invalidate_caches()
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def _load(module: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ImportingError(f"weights {path.name}: cannot be read: {error.strerror}") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ImportingError(
            f"weights {path.name}: must be safetensors, or a .pt file that holds nothing but tensors: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ImportingError(f"weights {path.name}: must be a state dict, tensors by name")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ImportingError(f"weights {path.name}: {' '.join(str(error).split())}") from error
