"""Sizes beside the default: how they are written, which bundles may list them, and imported graphs that take them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import yaml
from latentd.v1 import bundle_pb2, model_pb2
from latentd_server import bundle as server_bundle
from latentd_trainer import cli, dimensions, verify
from latentd_trainer.importers import ImportingError
from latentd_trainer.importers.described import import_onnx, import_torch
from latentd_trainer.onnx_graph import GraphError
from typer.testing import CliRunner

DENOISER = """
<ir_version: 9, opset_import: ["": 18]>
denoiser (float[N, 1, H, W] x, int64[N] t) => (float[N, 1, H, W] eps)
<float[10] table = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0}, int64[3] axes = {1, 2, 3}>
{
  e = Gather(table, t)
  all = Unsqueeze(e, axes)
  eps = Mul(x, all)
}"""
BAKED = """
<ir_version: 9, opset_import: ["": 18]>
denoiser (float[N, 1, H, W] x, int64[N] t) => (float[N, 1, H, W] eps)
<int64[4] shape = {-1, 1, 4, 4}>
{
  eps = Reshape(x, shape)
}"""
CODE = """
from torch import nn

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.times = nn.Embedding(10, 4)
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, t):
        return self.last((self.first(x) + self.times(t)[:, :, None, None]).tanh())
"""
FILE: dict[str, Any] = {
    "name": "sized",
    "family": "diffusion",
    "sample": {"shape": [1, 4, 4], "sizes": [[6, 8]]},
    "graphs": {
        "denoiser": {
            "file": "denoiser.onnx",
            "inputs": {"x": {"source": "sample", "shape": [1, 4, 4]}, "t": "timestep"},
            "outputs": {"eps": "prediction"},
        }
    },
    "diffusion": {
        "prediction": "eps",
        "schedule": {"kind": "linear", "timesteps": 10, "beta_start": 0.001, "beta_end": 0.5},
        "samplers": ["ddpm", "ddim"],
        "clip": True,
    },
}


def write(folder: Path, content: dict[str, Any], graph: str = DENOISER) -> Path:
    (folder / "denoiser.onnx").write_bytes(onnx.parser.parse_model(graph).SerializeToString())
    (folder / "own_plain.py").write_text(CODE)
    (folder / "model.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "model.yaml"


def test_sizes_are_written_height_first() -> None:
    """With commas between; anything else is refused with an example, by the command too."""
    assert dimensions.parse("12x12, 16x24") == ((12, 12), (16, 24))
    for wrong in ("12", "12x", "axb", "12x12,,8x8", "-4x4"):
        with pytest.raises(ValueError, match="is no size; sizes are HEIGHTxWIDTH"):
            dimensions.parse(wrong)
    result = CliRunner().invoke(
        cli.app, ["export", "runs/none", "--name", "a", "--sizes", "big"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 2
    assert "is no size" in result.output


def test_only_diffusion_models_list_sizes() -> None:
    """Sizes must be positive, differ, and belong to a denoiser that stands alone; everything wrong is said at once."""
    bundle = bundle_pb2.Bundle(networks=[bundle_pb2.Network(role=bundle_pb2.Network.ROLE_DECODER)])
    bundle.model.sample_spec.shape.extend([1, 8, 8])
    assert dimensions.violations(bundle) == []
    for height, width in ((8, 8), (12, 12), (12, 12), (0, 4)):
        bundle.model.sample_sizes.append(model_pb2.Size(height=height, width=width))
    assert dimensions.violations(bundle) == [
        "model.sample_sizes: only a diffusion model over samples can have other sizes",
        "model.sample_sizes: a model of several sizes can have no graph beside its denoiser",
        "model.sample_sizes: 8x8 is given twice, or is that of sample_spec",
        "model.sample_sizes: 12x12 is given twice, or is that of sample_spec",
        "model.sample_sizes: 0x4 must have a positive height and width",
    ]


def test_an_imported_onnx_graph_keeps_its_open_axes(tmp_path: Path) -> None:
    """`sample.sizes` of a model file: `verify` and the server pass the bundle, whose graph runs at both sizes."""
    written = import_onnx(write(tmp_path, FILE), models=tmp_path / "models")
    assert [each for each in verify.check(written) if each.failures] == []
    stored = server_bundle.read(written)
    assert dimensions.listed(stored.message.model) == [(6, 8)]
    session = ort.InferenceSession(written / "denoiser.onnx", providers=["CPUExecutionProvider"])
    for size in ((4, 4), (6, 8)):
        x = np.ones((3, 1, *size), np.float32)
        (eps,) = session.run(None, {"x": x, "t": np.array([0, 4, 9])})
        np.testing.assert_allclose(eps, x * np.array([0.1, 0.5, 1.0], np.float32).reshape(3, 1, 1, 1))


def test_a_graph_made_for_one_size_is_refused(tmp_path: Path) -> None:
    """A reshape to 4x4 inside keeps other sizes out, and the refusal says which."""
    with pytest.raises((ImportingError, GraphError), match="takes no samples of 6x8"):
        import_onnx(write(tmp_path, FILE, BAKED), models=tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_an_imported_torch_module_is_proved_at_every_size(tmp_path: Path) -> None:
    """The graph that comes of it is measured against torch at each size."""
    entry = FILE["graphs"]["denoiser"] | {"module": "own_plain:Plain"}
    del entry["file"]
    content = FILE | {"graphs": {"denoiser": entry}}
    written = import_torch(write(tmp_path, content), models=tmp_path / "models")
    record = yaml.safe_load((written / "record.json").read_text())
    assert record["export"]["parity"]["denoiser"]["sizes"]["6x8"]["deviation"]["eps"] <= 1e-5
    assert [each for each in verify.check(written) if each.failures] == []
