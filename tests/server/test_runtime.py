"""Devices, batch sizes and the certificate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentd_server import runtime
from latentd_server.runtime import Buckets, CompiledGraph, Device, DeviceError, bucket_sizes, certify, choose_device
from onnx import TensorProto, helper

CPU = Device("cpu")


def _graph(*nodes: Any) -> CompiledGraph:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("batch_axis", TensorProto.INT64, [1], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return CompiledGraph(model.SerializeToString(), CPU, 1)


def _rows(count: int, rng: np.random.Generator) -> runtime.Feeds:
    return {"x": rng.standard_normal((count, 7), np.float32)}


def test_buckets_are_fine_at_the_top() -> None:
    """1, 2, 4, then multiples of 4, and always the limit itself."""
    assert bucket_sizes(16) == (1, 2, 4, 8, 12, 16)
    assert bucket_sizes(10) == (1, 2, 4, 8, 10)
    assert bucket_sizes(2) == (1, 2)
    assert Buckets((1, 2, 4, 8), certified=True).fit(5) == 8


def test_a_graph_of_independent_rows_is_certified() -> None:
    """An elementwise graph gives equal bytes in every bucket, so all of them may be used."""
    graph = _graph(helper.make_node("Tanh", ["x"], ["y"]))
    assert certify(graph, _rows, 8) == Buckets((1, 2, 4, 8), certified=True)


def test_a_graph_whose_rows_see_each_other_is_not_certified() -> None:
    """A mean over the batch is found out."""
    graph = _graph(
        helper.make_node("ReduceMean", ["x", "batch_axis"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    )
    assert not certify(graph, _rows, 8).certified


def test_a_size_with_other_bytes_is_left_out() -> None:
    """A bucket whose bytes differ from the largest one's is not used; the others stay."""

    class Odd:
        outputs = ("y",)

        def run(self, outputs: Any, feeds: runtime.Feeds) -> list[Any]:
            x = feeds["x"]
            return [x / 2 if len(x) > 1 else x / 2 + np.float32(1e-3)]

    assert certify(Odd(), _rows, 8) == Buckets((2, 4, 8), certified=True)  # type: ignore[arg-type]


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


def test_the_determinism_class_covers_what_can_change_bytes() -> None:
    """Weights, threads and bucket classes each change it; equal conditions give equal strings."""
    sizes = {1: Buckets((1, 2), certified=True)}
    base = runtime.determinism_class("sha256:a", CPU, 2, sizes)
    assert base == runtime.determinism_class("sha256:a", CPU, 2, sizes)
    assert base != runtime.determinism_class("sha256:b", CPU, 2, sizes)
    assert base != runtime.determinism_class("sha256:a", CPU, 1, sizes)
    assert base != runtime.determinism_class("sha256:a", CPU, 2, {1: Buckets((2,), certified=True)})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "model name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 fma",
            "model name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 fma avx512f",
        ),
        ("CPU part\t: 0xd0c\nFeatures\t: fp asimd", "CPU part\t: 0xd40\nFeatures\t: fp asimd"),
        ("CPU part\t: 0xd40\nFeatures\t: fp asimd", "CPU part\t: 0xd40\nFeatures\t: fp asimd sve i8mm"),
    ],
    ids=["one name, two generations", "two Arm cores", "one Arm core, two sets of instructions"],
)
def test_processors_that_compute_differently_are_told_apart(one: str, other: str, tmp_path: Path) -> None:
    """Cores with other vector instructions get another class; flags that say nothing of arithmetic do not count."""
    texts = {"one": one, "other": other, "patched": one.replace("fp", "fp ibrs smep", 1)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    first, second, patched = (runtime._processor(tmp_path / name) for name in texts)
    assert first != second
    assert first == patched


def test_without_a_certificate_nothing_is_promised() -> None:
    """An uncertified graph gives a class that is never equal to another."""
    sizes = {1: Buckets((1, 2), certified=False)}
    classes = {runtime.determinism_class("sha256:a", CPU, 2, sizes) for _ in range(3)}
    assert len(classes) == 3
    assert all(name.startswith("uncertified-") for name in classes)
