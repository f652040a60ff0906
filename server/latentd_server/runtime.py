"""ONNX Runtime: which device, and compiled graphs.

The only file that imports onnxruntime. A compiled graph is run by one thread at a time.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]
Feeds = dict[str, Array]

VERSION: str = onnxruntime.__version__
"""Of ONNX Runtime."""


class DeviceError(Exception):
    """The device that was asked for cannot be used; says why and what can."""


@dataclass(frozen=True)
class Device:
    """Where graphs run."""

    kind: str  # "cpu" or "cuda"
    index: int = 0
    reason: str = ""  # why it was chosen, for the log

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def provider(self) -> str:
        """ONNX Runtime's name for it."""
        return "CPUExecutionProvider" if self.kind == "cpu" else "CUDAExecutionProvider"


def gpu_count() -> int:
    """CUDA devices that the driver shows, 0 without a driver. Asks the driver itself: ONNX Runtime would log errors."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def choose_device(asked: str) -> Device:
    """Turn `auto`, `cpu` or `cuda:N` into a device; `auto` takes a GPU where there is one that can be used.

    Raises:
        DeviceError: `cuda:N` was asked for and there is no such device, or no provider for it.
    """
    if asked == "cpu":
        return Device("cpu", reason="asked for")
    gpus, has_provider = gpu_count(), "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if asked == "auto":
        if not gpus:
            return Device("cpu", reason="no CUDA device is visible")
        if not has_provider:
            return Device("cpu", reason=f"{gpus} CUDA device(s) visible, but this onnxruntime has no CUDA provider")
        return Device("cuda", 0, reason=f"{gpus} CUDA device(s) visible")
    index = int(asked.removeprefix("cuda:"))
    if index >= gpus:
        raise DeviceError(
            f"device {asked} was asked for, but {gpus or 'no'} CUDA device(s) are visible; use auto or cpu"
        )
    if not has_provider:
        raise DeviceError(
            f"device {asked} was asked for, but this onnxruntime has no CUDA provider; install latentd[gpu]"
        )
    return Device("cuda", index, reason="asked for")


@cache
def _preload_cuda() -> None:
    onnxruntime.preload_dlls()


def default_threads(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may use: those it may run on, and no more than its container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
    except (OSError, ValueError):
        return cores  # no cgroup v2, hence no quota that could be read
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


class CompiledGraph:
    """One ONNX graph, ready to run on one device."""

    def __init__(self, data: bytes, device: Device, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Idle worker threads sleep: a server that waits must not burn its node's cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = [device.provider]
        if device.kind == "cuda":
            _preload_cuda()
            cuda = {
                "device_id": str(device.index),
                "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE times kernels: results change between runs
                "use_tf32": "0",
                "arena_extend_strategy": "kSameAsRequested",
            }
            providers = [(device.provider, cuda), "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(data, options, providers=providers)
        session.disable_fallback()
        if session.get_providers()[0] != device.provider:
            raise DeviceError(f"{device.provider} did not start; {session.get_providers()[0]} would run instead")
        self._session = session
        self.outputs = tuple(output.name for output in session.get_outputs())

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Evaluate once; blocks, releasing the interpreter lock."""
        return self._session.run(list(outputs), feeds)  # type: ignore[no-any-return]
