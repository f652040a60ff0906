"""Devices: which one is taken, and how much of it."""

import ctypes
import platform
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from latentd_server import runtime
from latentd_server.runtime import (
    CompiledGraph,
    CudaSettings,
    Device,
    DeviceError,
    Memory,
    choose_device,
    compiling,
    recording,
)
from onnx import helper


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


def test_cuda_settings_become_the_providers_options() -> None:
    """Bytes do not depend on timing or TF32 unless asked for, and a memory limit is a number of bytes."""
    plain = CudaSettings().provider_options(1)
    assert plain == {
        "device_id": "1",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    chosen = CudaSettings(tf32=True, memory_mib=512, arena="double").provider_options(0)
    assert (chosen["use_tf32"], chosen["gpu_mem_limit"]) == ("1", str(512 * 2**20))
    assert chosen["arena_extend_strategy"] == "kNextPowerOfTwo"


def test_settings_reach_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is opened as it was asked for, whether it was named or found."""
    monkeypatch.setattr(runtime, "gpu_count", lambda: 1)
    monkeypatch.setattr(runtime.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    asked = CudaSettings(tf32=True, graphs=False)
    assert choose_device("auto", asked).cuda == choose_device("cuda:0", asked).cuda == asked


def _twice() -> CompiledGraph:
    """Y = x + x."""
    rows = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", rows[:1], rows[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return CompiledGraph(model.SerializeToString(), Device("cpu"), 1)


def test_a_bound_graph_reads_and_writes_where_it_was_told() -> None:
    """The first rows of an array are a call's; the others stay as they are, and later values need no new binding."""
    image = ((4, 3), np.dtype(np.float32))
    memory = Memory(Device("cpu"), {"other": ((5,), np.dtype(np.int64)), "x": image, "y": image})
    bound = _twice().bind()
    bound.read(memory, {"x": "x"}, first=2)
    bound.write(memory, {"y": "y"}, first=2)
    for value in (1, 2):
        memory.arrays["x"][:] = value
        bound.run()
        assert memory.arrays["y"].tolist() == [[2 * value] * 3] * 2 + [[0] * 3] * 2
    assert not np.any(memory.arrays["other"])


def test_memory_is_aligned_and_its_arrays_apart() -> None:
    """Every array begins at an address that suits any device, whatever the sizes before it."""
    memory = Memory(
        Device("cpu"), {name: ((size,), np.dtype(np.uint8)) for name, size in (("a", 1), ("b", 300), ("c", 7))}
    )
    assert all(memory.address(name) % 256 == 0 for name in "abc")
    for value, array in enumerate(memory.arrays.values(), start=1):
        array[:] = value
    assert [set(array.tolist()) for array in memory.arrays.values()] == [{1}, {2}, {3}]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to return what it does not use")
def test_a_graph_gives_back_what_larger_calls_took() -> None:
    """What a call of 64 MiB of intermediate values took is gone after a small one that gives back; bytes stay."""
    nodes = [
        helper.make_node("Exp", ["x"], ["wide"]),
        helper.make_node("ReduceSum", ["wide"], ["y"], keepdims=1),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    model = helper.make_model(
        helper.make_graph(nodes, "wide", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    graph = CompiledGraph(model.SerializeToString(), Device("cpu"), 1)
    large, small = np.zeros(2**24, np.float32), np.zeros(4, np.float32)

    def resident_mib() -> float:
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024

    (before,) = graph.run(["y"], {"x": small})  # ONNX Runtime never lets go of what it took first
    graph.run(["y"], {"x": large})
    held = resident_mib()
    with graph.giving_back():
        (meanwhile,) = graph.run(["y"], {"x": small})
    assert resident_mib() < held - 48
    (after,) = graph.run(["y"], {"x": small})
    assert before.tobytes() == meanwhile.tobytes() == after.tobytes()


def test_nothing_is_recorded_while_something_is_compiled() -> None:
    """Another thread's compiling makes a recording stand back at once; afterwards it may go on."""
    held, release, seen = threading.Event(), threading.Event(), []

    def compile_slowly() -> None:
        with compiling():
            held.set()
            release.wait(30)

    thread = threading.Thread(target=compile_slowly)
    thread.start()
    held.wait(30)
    with recording() as alone:
        seen.append(alone)
    release.set()
    thread.join()
    with recording() as alone:
        seen.append(alone)
    assert seen == [False, True]
