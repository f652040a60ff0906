"""ONNX Runtime: which device, and compiled graphs.

The only file that imports onnxruntime. A compiled graph is run by one thread at a time.
"""

import contextlib
import ctypes
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]
Feeds = dict[str, Array]

VERSION: str = onnxruntime.__version__
"""Of ONNX Runtime."""

NO_CAPTURE = -1
"""What ONNX Runtime takes as the number of no CUDA graph."""

log = logging.getLogger(__name__)


Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shapes and types of arrays by name."""

_ALIGNMENT = 256  # bytes; what CUDA's own allocator gives


class DeviceError(Exception):
    """The device that was asked for cannot be used; says why and what can."""


@dataclass(frozen=True)
class CudaSettings:
    """What may be chosen of ONNX Runtime's CUDA provider."""

    tf32: bool = False  # matrix products and convolutions with 10 bits of mantissa
    graphs: bool = True  # record the calls of every bucket as CUDA graphs
    memory_mib: int = 0  # that one network's arena may grow to; 0 is no limit
    arena: Literal["exact", "double"] = "exact"  # how it grows: by what is asked for, or by powers of two

    def provider_options(self, index: int) -> dict[str, str]:
        """As ONNX Runtime names them."""
        options = {
            "device_id": str(index),
            "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE times kernels: results change between runs
            "use_tf32": str(int(self.tf32)),
            "arena_extend_strategy": {"exact": "kSameAsRequested", "double": "kNextPowerOfTwo"}[self.arena],
        }
        if self.memory_mib:
            options["gpu_mem_limit"] = str(self.memory_mib * 2**20)
        return options


@dataclass(frozen=True)
class Device:
    """Where graphs run."""

    kind: str  # "cpu" or "cuda"
    index: int = 0
    reason: str = ""  # why it was chosen, for the log
    cuda: CudaSettings = CudaSettings()

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def has_memory(self) -> bool:
        """Whether its memory is another than the host's."""
        return self.kind != "cpu"

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


def choose_device(asked: str, cuda: CudaSettings = CudaSettings()) -> Device:
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
        return Device("cuda", 0, reason=f"{gpus} CUDA device(s) visible", cuda=cuda)
    index = int(asked.removeprefix("cuda:"))
    if index >= gpus:
        raise DeviceError(
            f"device {asked} was asked for, but {gpus or 'no'} CUDA device(s) are visible; use auto or cpu"
        )
    if not has_provider:
        raise DeviceError(
            f"device {asked} was asked for, but this onnxruntime has no CUDA provider; install latentd[gpu]"
        )
    return Device("cuda", index, reason="asked for", cuda=cuda)


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


_undisturbed = threading.RLock()


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """To be held while graphs are compiled and tried on another thread than the device's."""
    with _undisturbed:
        yield


@contextlib.contextmanager
def recording() -> Iterator[bool]:
    """To be held while a CUDA graph is recorded, which what other threads ask of the device meanwhile can spoil.

    While something is being compiled it gives False at once: the device's thread does not wait, it records later.
    """
    alone = _undisturbed.acquire(blocking=False)
    try:
        yield alone
    finally:
        if alone:
            _undisturbed.release()


class Memory:
    """Named arrays side by side in one stretch of memory, at addresses that do not change.

    On the CPU the device reads and writes `arrays` themselves. On a GPU `arrays` are the host's copy: `up` and `down`
    move all of them in one transfer. A twin has arrays of its own and, on a GPU, shares the device's side, so that
    the host can fill one while the device's side is still being computed with.
    """

    def __init__(self, device: Device, layout: Layout, twin: "Memory | None" = None) -> None:
        """Every array begins as zeros on the host; what a GPU holds is undefined until `up`."""
        self._device = device
        self.layout = dict(layout)
        self._offsets: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in layout.items():
            self._offsets[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._bytes = np.zeros(size + _ALIGNMENT, np.uint8)
        first = -self._bytes.ctypes.data % _ALIGNMENT
        self._bytes = self._bytes[first : first + size]
        self.arrays: Feeds = {}
        for name, (shape, dtype) in layout.items():
            start = self._offsets[name]
            self.arrays[name] = (
                self._bytes[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            )
        self._value = None
        if device.has_memory:
            self._value = twin._value if twin else _room(max(1, size), device)

    def address(self, name: str) -> int:
        """Where the device finds an array."""
        base = self._bytes.ctypes.data if self._value is None else self._value.data_ptr()
        return int(base) + self._offsets[name]

    def up(self) -> None:
        """Copy the host's arrays to the device, if it has memory of its own."""
        if self._value is not None:
            self._value.update_inplace(self._bytes)

    def down(self) -> None:
        """Copy the device's arrays to the host, if it has memory of its own."""
        if self._value is not None:
            self._bytes[:] = self._value.numpy()


def _room(size: int, device: Device) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type([size], np.uint8, device.kind, device.index)


class BoundGraph:
    """A graph whose inputs and outputs lie at fixed addresses, so that a run hands nothing over."""

    def __init__(self, session: Any, device: Device, options: Callable[[int], Any]) -> None:
        self._session = session
        self._device = device
        self._options = options
        self._binding = session.io_binding()
        self._kept: dict[str, Memory] = {}  # what is bound must outlive the binding

    def read(self, memory: Memory, names: Mapping[str, str] | None = None, *, first: int | None = None) -> None:
        """Take inputs from memory.

        Args:
            memory: Where the arrays are; it is kept alive.
            names: Which array is which input; by default every array is the input of its name.
            first: How many rows of each array, from the first on; all by default.
        """
        self._bind(self._binding.bind_input, memory, names, first)

    def write(self, memory: Memory, names: Mapping[str, str] | None = None, *, first: int | None = None) -> None:
        """Put outputs into memory. Arguments are those of `read`."""
        self._bind(self._binding.bind_output, memory, names, first)

    def _bind(
        self, bind: Callable[..., None], memory: Memory, names: Mapping[str, str] | None, first: int | None
    ) -> None:
        for array, value in (names or {name: name for name in memory.layout}).items():
            shape, dtype = memory.layout[array]
            if first is not None:
                shape = (first, *shape[1:])
            bind(value, self._device.kind, self._device.index, dtype.type, shape, memory.address(array))
            self._kept[value] = memory

    def run(self, capture: int = NO_CAPTURE) -> None:
        """Evaluate once, or replay the CUDA graph of this number; blocks, releasing the interpreter lock."""
        self._session.run_with_iobinding(self._binding, self._options(capture))

    def record(self, capture: int) -> None:
        """Record the call as CUDA graph of this number.

        It is made several times over, twice here to have all memory allocated and three times by ONNX Runtime
        (its issue 32243), so it must not update any state that matters.
        """
        for number in (NO_CAPTURE, NO_CAPTURE, capture):
            self.run(number)


class CompiledGraph:
    """One ONNX graph, ready to run on one device."""

    def __init__(self, data: bytes, device: Device, threads: int, *, capture: bool = True) -> None:
        """Compile.

        Args:
            data: The serialized model.
            device: Where it runs.
            threads: Of one call, on the CPU.
            capture: Whether its calls may be recorded as CUDA graphs, where the device has such.

        Raises:
            DeviceError: the device does not start.
        """
        self.device = device
        self._run_options: dict[int, Any] = {}
        self._gives_back = False
        with compiling():
            self._session, self.captures = _compile(data, device, threads, capture and device.cuda.graphs)
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Evaluate once with arrays of the host; blocks, releasing the interpreter lock."""
        return self._session.run(list(outputs), feeds, self._options(NO_CAPTURE))  # type: ignore[no-any-return]

    def bind(self) -> BoundGraph:
        """The graph with nothing bound yet."""
        return BoundGraph(self._session, self.device, self._options)

    @contextlib.contextmanager
    def giving_back(self) -> Iterator[None]:
        """On the CPU, calls made meanwhile return to the heap what larger calls before them had taken."""
        self._gives_back = not self.device.has_memory
        try:
            yield
        finally:
            self._gives_back = False

    def _options(self, capture: int) -> Any:
        if self._gives_back:
            options = onnxruntime.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
            return options
        if not self.captures:
            return None
        if capture not in self._run_options:
            options = onnxruntime.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(capture))
            self._run_options[capture] = options
        return self._run_options[capture]

    def forget(self, capture: int) -> None:
        """Forget a CUDA graph."""
        if self.captures:
            self._session.release_captured_graph(capture)
            self._run_options.pop(capture, None)


def _compile(data: bytes, device: Device, threads: int, capture: bool) -> tuple[Any, bool]:
    """A session, and whether its calls can be recorded as CUDA graphs."""
    if device.kind == "cuda" and capture:
        try:
            return _session(data, device, threads, {"enable_cuda_graph": "1"}), True
        except DeviceError:
            raise
        except Exception as error:  # ONNX Runtime refuses where a node has no CUDA kernel, or branches
            log.warning("no CUDA graphs for this network, its kernels are launched one by one: %s", error)
    return _session(data, device, threads, {}), False


def _session(data: bytes, device: Device, threads: int, cuda_options: dict[str, str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle worker threads sleep: a server that waits must not burn its node's cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [device.provider]
    if device.kind == "cuda":
        _preload_cuda()
        providers = [
            (device.provider, device.cuda.provider_options(device.index) | cuda_options),
            "CPUExecutionProvider",
        ]
    session = onnxruntime.InferenceSession(data, options, providers=providers)
    session.disable_fallback()
    if session.get_providers()[0] != device.provider:
        raise DeviceError(f"{device.provider} did not start; {session.get_providers()[0]} would run instead")
    return session
