"""The GPU benchmark, on whatever machine this is."""

import json
from pathlib import Path

import pytest

from tests.bench import gpu


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both precisions are certified, served and held against eager PyTorch; every figure is there and makes sense."""
    out = tmp_path / "gpu.json"
    few = ["--rows", "4", "--steps", "3", "--batches", "2"]
    gpu.main(["--device", "cpu", "--tiny", "--no-compile", *few, "--out", str(out)])
    report = json.loads(out.read_text())
    assert [each["precision"] for each in report["served"]] == ["fp32", "fp16"]
    for served in report["served"]:
        assert 4 in served["classes"][0], "full calls are served"
        assert served["images_per_s"] > 0
        assert 1 <= served["rows_a_call"] <= 4
        assert 0 <= served["gap"] < 1
        assert not served["recorded"]
    for rate in report["torch"]:
        assert rate["images_per_s"] > 0, rate["why_not"]
    assert report["parameters"] > 10_000
    assert "images_per_s" in capsys.readouterr().out


def test_the_network_has_the_size_of_cifars() -> None:
    """The network that a GPU is measured with has 35 to 36 million parameters and 3x32x32 images."""
    spec = gpu.network(tiny=False)
    assert spec.sample_shape == (3, 32, 32)
    assert 35e6 < sum(each.numel() for each in spec.graphs[0].module.parameters()) < 36e6
