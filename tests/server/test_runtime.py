"""Devices: which one is taken, and how much of it."""

from pathlib import Path

import pytest
from latentd_server import runtime
from latentd_server.runtime import Device, DeviceError, choose_device


def test_cpu_is_taken_when_asked_for() -> None:
    """`cpu` is the CPU, GPU or not."""
    assert choose_device("cpu").provider == "CPUExecutionProvider"


@pytest.mark.parametrize(("text", "most"), [("100000 100000", 1), ("150000 100000", 1), ("50000 100000", 1)])
def test_a_container_gets_the_threads_of_its_quota(tmp_path: Path, text: str, most: int) -> None:
    """A cgroup's CPU quota bounds the threads, however many cores the node has."""
    (tmp_path / "cpu.max").write_text(text)
    assert runtime.default_threads(tmp_path / "cpu.max") == most


def test_without_a_quota_all_cores_are_used(tmp_path: Path) -> None:
    """No limit, or no cgroup at all, leaves the cores the process may run on."""
    (tmp_path / "cpu.max").write_text("max 100000")
    cores = runtime.default_threads(tmp_path / "missing")
    assert cores >= 1
    assert runtime.default_threads(tmp_path / "cpu.max") == cores


def test_forcing_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda:N` never falls back to the CPU, it says what is missing."""
    monkeypatch.setattr(runtime, "gpu_count", lambda: 0)
    with pytest.raises(DeviceError, match="no CUDA device"):
        choose_device("cuda:0")
    monkeypatch.setattr(runtime, "gpu_count", lambda: 1)
    with pytest.raises(DeviceError, match="cuda:1"):
        choose_device("cuda:1")
    monkeypatch.setattr(runtime.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"latentd\[gpu\]"):
        choose_device("cuda:0")


def test_auto_says_why_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes a GPU only where the driver and the runtime both have one, and gives the reason."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(runtime.onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(runtime, "gpu_count", lambda: 0)
    assert choose_device("auto") == Device("cpu", 0, "no CUDA device is visible")
    monkeypatch.setattr(runtime, "gpu_count", lambda: 2)
    assert str(choose_device("auto")) == "cuda:0"
    providers.remove("CUDAExecutionProvider")
    assert "no CUDA provider" in choose_device("auto").reason
