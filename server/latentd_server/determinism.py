"""The boundary of the promise of equal bytes, as a string: what, but the request, bytes may depend on."""

import ctypes
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np

from latentd_server import runtime
from latentd_server.certificate import Certificate, Promise
from latentd_server.runtime import Device, DeviceError

ARITHMETIC_VERSION = 3
"""Raised whenever the server's own arithmetic may change a byte."""


def conditions(digest: str, device: Device, threads: int) -> dict[str, str]:
    """What bytes may depend on besides the request, the sizes of calls and the server's own arithmetic aside: the
    model, the runtime, NumPy, the kind of processor and the number of threads.
    """
    return {
        "arithmetic": str(ARITHMETIC_VERSION),
        "model": digest,
        "onnxruntime": runtime.VERSION,
        "numpy": np.__version__,
        "provider": device.provider,
        "processor": _processor() if device.kind == "cpu" else _gpu(device.index),
        "threads": str(threads),
    } | ({"settings": repr(device.cuda)} if device.kind == "cuda" else {})


def determinism_class(
    conditions: Mapping[str, str], device: Device, certificates: Mapping[str, Certificate], strict: bool
) -> str:
    """Names the boundary of the promise: equal strings and equal requests, equal bytes.

    Covers the conditions, and of every graph how lanes ride and in which sizes. Where a graph promises nothing the
    string says so, and what follows the prefix tells loads of a model apart; `is_promise` is False for it.
    """
    if any(each.promise is Promise.NOTHING for each in certificates.values()):
        return f"{'uncertified' if strict else 'none'}-{device.kind}-{os.urandom(12).hex()}"
    found = {file: [each.promise, *each.buckets.sizes] for file, each in sorted(certificates.items())}
    text = json.dumps([conditions, found], sort_keys=True)
    return f"certified-{device.kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def joined(own: str, other: str) -> str:
    """The class of answers that two models make, one after the other; promises nothing where one of them does not."""
    for name in (own, other):
        if not is_promise(name):
            return name
    return f"{own.rpartition('-')[0]}-{hashlib.sha256(f'{own} {other}'.encode()).hexdigest()[:24]}"


def is_promise(determinism_class: str) -> bool:
    """Whether a class promises anything."""
    return determinism_class.startswith("certified-")


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
