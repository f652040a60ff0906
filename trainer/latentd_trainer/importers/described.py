"""Models that a model file describes: read it, make its graphs, say all that is wrong at once, write a bundle."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentd_trainer import bundle
from latentd_trainer.contract import role_name
from latentd_trainer.importers import ImportingError, assembly, model_file, onnx_files, torch_modules
from latentd_trainer.importers.model_file import ModelFile, OnnxEntry, TorchEntry
from latentd_trainer.spec import Graph


def import_onnx(path: Path, *, models: Path, version: int | None = None, replace: bool = False) -> Path:
    """Import the ONNX graphs that the model file at `path` names; see `assembly.write`.

    Raises:
        ImportingError: the file or the graphs are not what they must be; the message lists everything.
        GraphError: see `export.package`.
        BundleError: see `export.package`.
    """
    described = model_file.read(path, ModelFile[OnnxEntry])
    graphs = _each(described, lambda role, entry: onnx_files.graph(path.parent / entry.file, role, entry))
    record = {
        "imported": "onnx",
        "files": {
            role_name(role): {"file": entry.file.name, "sha256": bundle.sha256((path.parent / entry.file).read_bytes())}
            for role, entry in described.graphs.items()
        },
    }
    return assembly.write(described, graphs, record, models=models, version=version, replace=replace)


def import_torch(path: Path, *, models: Path, version: int | None = None, replace: bool = False) -> Path:
    """Import the torch modules that the model file at `path` names, whose code is run; see `assembly.write`.

    Raises:
        ImportingError: the file or the modules are not what they must be; the message lists everything.
        GraphError: see `export.package`.
        BundleError: see `export.package`.
    """
    described = model_file.read(path, ModelFile[TorchEntry])
    sample = described.sample
    graphs = _each(described, lambda role, entry: torch_modules.graph(path.parent, role, entry, sample))
    record: Mapping[str, Any] = {
        "imported": "torch",
        "modules": {
            role_name(role): {"module": entry.module, "arguments": entry.arguments}
            for role, entry in described.graphs.items()
        },
    }
    return assembly.write(described, graphs, record, models=models, version=version, replace=replace)


def _each(described: ModelFile[Any], make: Callable[[Any, Any], Graph]) -> list[Graph]:
    graphs, problems = [], []
    for role, entry in described.graphs.items():
        try:
            graphs.append(make(role, entry))
        except ImportingError as error:
            problems += [f"- {role_name(role)}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ImportingError("\n".join(problems))
    return graphs
