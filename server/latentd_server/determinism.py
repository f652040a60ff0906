"""The boundary of the promise of equal bytes, as a string: what, but the request, bytes may depend on."""

import ctypes
import hashlib
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np

from latentd_server import runtime
from latentd_server.certificate import Buckets
from latentd_server.runtime import Device, DeviceError

ARITHMETIC_VERSION = 1
"""Raised whenever the server's own arithmetic may change a byte."""


def determinism_class(digest: str, device: Device, threads: int, buckets: Mapping[int, Buckets]) -> str:
    """Names the boundary of the promise: equal strings and equal requests, equal bytes.

    Covers the weights, this server's arithmetic, runtime, NumPy, device and its kind, threads and bucket classes.
    A graph without a certificate gives a string that no other process shares.
    """
    parts = [
        f"arithmetic={ARITHMETIC_VERSION}",
        digest,
        f"onnxruntime={runtime.VERSION}",
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
