"""ONNX Runtime: which device, compiled graphs, batch sizes, and the certificate that rows do not see each other.

The only file that imports onnxruntime. A compiled graph is run by one thread at a time.
"""

import ctypes
import hashlib
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]
Feeds = dict[str, Array]

ARITHMETIC_VERSION = 1
"""Raised whenever the server's own arithmetic may change a byte."""


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


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Sizes that calls are padded to: 1, 2, 4, then multiples of 4, up to the limit itself."""
    sizes = {1, 2, *range(4, max_rows, 4), max_rows}
    return tuple(sorted(size for size in sizes if size <= max_rows))


@dataclass(frozen=True)
class Buckets:
    """The sizes a graph may be called with."""

    sizes: tuple[int, ...]  # rising
    certified: bool  # whether a row's bytes are the same in all of them, whatever else is in the call

    def fit(self, rows: int) -> int:
        """The smallest size that holds so many rows."""
        return next(size for size in self.sizes if size >= rows)


def certify(graph: CompiledGraph, make: Callable[[int, np.random.Generator], Feeds], max_rows: int) -> Buckets:
    """Run every bucket once and find those that agree on every byte; this is the warm-up too.

    Each bucket is given the first of the same random rows, then the first row again in its first, middle and
    last slot among hostile neighbours (NaN, huge, zero). The largest bucket that passes sets the class, and the
    buckets that give its bytes are kept.

    Args:
        graph: What to try.
        make: Random feeds for so many rows, every array batched on its first axis but for `coefficients`,
            which is batched on its second.
        max_rows: The largest bucket.
    """
    rows = make(max_rows, np.random.default_rng(0))
    answers: dict[int, list[Array]] = {}
    for size in bucket_sizes(max_rows):
        answer = graph.run(graph.outputs, _take(rows, np.arange(size)))
        if _is_steady(graph, rows, size, answer):
            answers[size] = answer
    if not answers:
        return Buckets(bucket_sizes(max_rows), certified=False)
    reference = answers[max(answers)]
    same = tuple(
        size
        for size, answer in sorted(answers.items())
        if all(got.tobytes() == want[:size].tobytes() for got, want in zip(answer, reference, strict=True))
    )
    if max(same) < max_rows:  # guided lanes and full batches must fit somewhere
        return Buckets(bucket_sizes(max_rows), certified=False)
    return Buckets(same, certified=True)


def _is_steady(graph: CompiledGraph, rows: Feeds, size: int, answer: list[Array]) -> bool:
    want = [output[0].tobytes() for output in answer]
    for slot, hostile in ((0, np.nan), (size // 2, 3e38), (size - 1, 0.0)):
        feeds = _take(rows, np.zeros(size, np.int64))
        for name, array in feeds.items():
            if array.dtype == np.float32:
                others = np.arange(size) != slot
                array[(slice(None), others) if name == "coefficients" else others] = hostile
        got = [output[slot].tobytes() for output in graph.run(graph.outputs, feeds)]
        if got != want:
            return False
    return True


def _take(rows: Feeds, which: NDArray[np.int64]) -> Feeds:
    taken = {name: array[:, which] if name == "coefficients" else array[which] for name, array in rows.items()}
    for name in ("slot", "lane", "row_u", "row_c"):  # these say which row belongs to which: every row to itself
        if name in taken:
            taken[name] = np.arange(len(which))
    return {name: np.ascontiguousarray(array) for name, array in taken.items()}


def determinism_class(digest: str, device: Device, threads: int, buckets: Mapping[int, Buckets]) -> str:
    """Names the boundary of the promise: equal strings and equal requests, equal bytes.

    Covers the weights, this server's arithmetic, runtime, NumPy, device and its kind, threads and bucket classes.
    A graph without a certificate gives a string that no other process shares.
    """
    parts = [
        f"arithmetic={ARITHMETIC_VERSION}",
        digest,
        f"onnxruntime={onnxruntime.__version__}",
        f"numpy={np.__version__}",
        device.provider,
        _processor() if device.kind == "cpu" else _gpu(device.index),
        f"threads={threads}",
        *(f"{role}:{','.join(map(str, sizes.sizes))}" for role, sizes in sorted(buckets.items())),
    ]
    certified = all(sizes.certified for sizes in buckets.values())
    if not certified:
        parts.append(os.urandom(16).hex())
    text = hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]
    return f"{'certified' if certified else 'uncertified'}-{device.kind}-{text}"


_CPU_NAMES = ("model name", "CPU implementer", "CPU part")
_CPU_FEATURES = ("flags", "Features")
_VECTOR_FEATURE = re.compile(r"sse|ssse|avx|fma|f16c|amx|asimd|sve|sme(?!p)|fphp|bf16|i8mm")


@cache
def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model and vector instructions, since kernels are chosen by what it can do.

    The model alone does not tell: virtual machines show one name for several generations, and Arm shows numbers.
    """
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first: dict[str, str] = {}  # what the first core says
    for line in text.splitlines():
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    words = " ".join(first.get(key, "") for key in _CPU_FEATURES).split()
    names = [first[key] for key in _CPU_NAMES if key in first]
    return " ".join([platform.machine(), *names, *sorted(word for word in words if _VECTOR_FEATURE.match(word))])


def _gpu(index: int) -> str:
    """The GPU's model, its driver, and the libraries that bring the kernels."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, name, version = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_int(0)
    if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetName(name, len(name), device):
        raise DeviceError(f"the driver does not name device cuda:{index}")
    driver.cuDriverGetVersion(ctypes.byref(version))
    libraries = " ".join(f"{each}={_installed(each)}" for each in ("nvidia-cudnn-cu13", "nvidia-cublas"))
    return f"{name.value.decode()} driver={version.value} {libraries}"


def _installed(distribution: str) -> str:
    """A library's version where it came as a wheel; else it is the system's."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "system"
