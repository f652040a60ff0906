"""Torch modules of other people's, imported from a module file beside a model file."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from latentd_trainer import bundle as bundles
from latentd_trainer import cli, parity
from latentd_trainer.bundle import BundleError
from latentd_trainer.importers import ImportingError
from latentd_trainer.importers.described import import_torch
from latentd_trainer.onnx_graph import GraphError
from safetensors.torch import save_file
from typer.testing import CliRunner

CODE = """
import torch
from torch import nn

class Generator(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.labels = nn.Embedding(3, 4)
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 4))

    def forward(self, z, label):
        return self.layers(z + self.labels(label)).reshape(-1, 1, 2, 2)

class Normed(Generator):
    def forward(self, z, label):
        return torch.nn.functional.batch_norm(super().forward(z, label), None, None, training=True)

class Noisy(Generator):
    def forward(self, z, label):
        return super().forward(z, label) + torch.randn(len(z), 1, 2, 2)

class Double(Generator):
    def forward(self, z, label):
        return super().forward(z, label).double()

class Two(Generator):
    def forward(self, z, label):
        return super().forward(z, label), z

class Branching(Generator):
    def forward(self, z, label):
        image = super().forward(z, label)
        return -image if bool(image.max() > 1000) else image

def nothing():
    return None
"""
SPEC: dict[str, Any] = {
    "name": "my-gan",
    "family": "gan",
    "classes": ["a", "b", "c"],
    "graphs": {
        "decoder": {
            "module": "own_nets:Generator",
            "arguments": {"width": 16},
            "weights": "own.safetensors",
            "inputs": {"z": {"source": "latent", "shape": [4]}, "label": "class_label"},
            "outputs": {"image": "sample"},
        }
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Code, weights, and nothing of them left imported afterwards."""
    (tmp_path / "own_nets.py").write_text(CODE)
    torch.manual_seed(1)
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    save_file(scope["Generator"](16).state_dict(), tmp_path / "own.safetensors")
    torch.save(scope["Generator"](16).state_dict(), tmp_path / "own.pt")
    yield tmp_path
    sys.modules.pop("own_nets", None)


def run(folder: Path, content: dict[str, Any] | None = None, **entry: Any) -> Path:
    """Import what the model file says, its decoder changed by `entry`."""
    content = content or SPEC
    decoder = {key: value for key, value in (content["graphs"]["decoder"] | entry).items() if value is not None}
    (folder / "model.yaml").write_text(yaml.safe_dump(content | {"graphs": {"decoder": decoder}}, sort_keys=False))
    return import_torch(folder / "model.yaml", models=folder / "models")


@pytest.mark.parametrize("weights", ["own.safetensors", "own.pt"])
def test_a_module_becomes_a_bundle_with_its_weights(folder: Path, weights: str) -> None:
    """The bundle's graph answers as the module with the weights of the file does, at any batch size."""
    written = run(folder, weights=weights)
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    module = scope["Generator"](16)
    module.load_state_dict(torch.load(folder / "own.pt") if weights.endswith("pt") else load(folder / weights))
    session = parity.open_session((written / "decoder.onnx").read_bytes())
    for count in (1, 5):
        z, label = np.random.default_rng(0).standard_normal((count, 4), np.float32), np.arange(count) % 3
        (image,) = session.run(None, {"z": z, "label": label})
        with torch.no_grad():
            expected = module(torch.from_numpy(z), torch.from_numpy(label)).numpy()
        assert image == pytest.approx(expected, abs=1e-6)
    record = bundles.read_record(written)
    assert record["modules"]["decoder"] == {"module": "own_nets:Generator", "arguments": {"width": 16}}
    assert record["export"]["parity"]["decoder"]["deviation"]["image"] <= 1e-5
    assert str(folder) not in (written / "record.json").read_text()


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_weights_and_arguments_are_optional(folder: Path) -> None:
    """Without them the module is what its factory makes of nothing."""
    assert run(folder, weights=None, arguments=None).is_dir()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such module": ({"module": "nowhere:Net"}, "module nowhere:Net: ModuleNotFoundError: No module named 'nowhere'"),
    "no such factory": ({"module": "own_nets:Net"}, "module own_nets:Net: AttributeError"),
    "no path": ({"module": "own_nets"}, "graphs.decoder.module: String should match pattern"),
    "wrong arguments": ({"arguments": {"depth": 3}}, "module own_nets:Generator: TypeError"),
    "no module made": ({"module": "own_nets:nothing", "arguments": {}}, "must make a torch.nn.Module, made NoneType"),
    "weights of another size": ({"arguments": {"width": 8}}, "weights own.safetensors: Error(s) in loading state_dict"),
    "no weights": ({"weights": "none.pt"}, "weights none.pt: cannot be read: No such file or directory"),
    "no shape": ({"inputs": {"z": "latent", "label": "class_label"}}, "inputs.z: say `shape`"),
    "an input too few": (
        {"inputs": {"z": {"source": "latent", "shape": [4]}}},
        "does not run with 1 rows: TypeError:",
    ),
    "an output too many": (
        {"module": "own_nets:Two"},
        "must return 1 tensors, as its outputs say; returns Tensor, Tensor",
    ),
    "float64": ({"module": "own_nets:Double"}, "output 'image' holds float64; must hold float32"),
    "statistics of the batch": ({"module": "own_nets:Normed"}, "of a row differs by"),
    "noise of its own": (
        {"module": "own_nets:Noisy"},
        "output 'image' is another at each run; noise must come in by inputs",
    ),
    "what cannot be exported": (
        {"module": "own_nets:Branching"},
        "decoder: cannot be exported with inputs z float32[2, 4]",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_module_that_cannot_be_served_is_refused_in_words(folder: Path, kind: str) -> None:
    """Each kind of bad module is refused with the graph and what was wrong, and nothing is written."""
    entry, expected = BAD[kind]
    with pytest.raises((ImportingError, GraphError, BundleError)) as caught:
        run(folder, **entry)
    assert expected in str(caught.value)
    assert not (folder / "models").exists()


def test_weights_that_would_run_code_are_refused(folder: Path) -> None:
    """A pickle that calls something is not called, and refused."""

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (folder / "sprung",)

    torch.save({"weight": Trap()}, folder / "trap.pt")
    with pytest.raises(ImportingError, match=r"weights trap\.pt: must be safetensors, or a \.pt file that"):
        run(folder, weights="trap.pt")
    assert not (folder / "sprung").exists()


def test_what_is_no_state_dict_is_refused(folder: Path) -> None:
    """A file with tensors, but not by name, is refused."""
    torch.save([torch.zeros(1)], folder / "list.pt")
    with pytest.raises(ImportingError, match=r"weights list\.pt: must be a state dict, tensors by name"):
        run(folder, weights="list.pt")


def test_the_import_path_is_as_it_was(folder: Path) -> None:
    """Modules beside the model file are found while it is imported, and not afterwards."""
    before = list(sys.path)
    run(folder)
    assert sys.path == before


def test_the_command_prints_the_bundle(folder: Path) -> None:
    """`import torch` prints the directory and exits with 0, and with 1 where the exporter cannot express the module."""
    (folder / "model.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    arguments = ["import", "torch", str(folder / "model.yaml"), "--models", str(folder / "models")]
    done = CliRunner().invoke(cli.app, arguments)
    assert (done.exit_code, done.output.strip()) == (0, str(folder / "models" / "my-gan" / "1"))
    text = (folder / "model.yaml").read_text().replace("own_nets:Generator", "own_nets:Branching")
    (folder / "model.yaml").write_text(text)
    assert CliRunner().invoke(cli.app, arguments).exit_code == 1
