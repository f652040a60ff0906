"""The same network and sampler in PyTorch, eager and compiled: what `tests.bench.gpu` is held against."""

import argparse
import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from latentd_server import samplers
from latentd_server.schedules import Schedule
from latentd_trainer.parity import Precision
from latentd_trainer.spec import ServingSpec
from torch import Tensor


@dataclass
class Rate:
    """What a loop achieved, or why it did not run."""

    precision: str
    compiled: bool
    images_per_s: float | None = None
    memory_mib: float | None = None  # most that tensors took
    why_not: str = ""


def measure(
    spec: ServingSpec,
    schedule: Schedule,
    precision: Precision,
    device: str,
    compiled: bool,
    options: argparse.Namespace,
) -> Rate:
    """Sample full batches, everything on the device. State and coefficients are float32; the network is too, or runs
    under autocast, to float16 on a GPU and to bfloat16 on a CPU.
    """
    rate = Rate(precision, compiled)
    net = copy.deepcopy(spec.graphs[0].module).eval().to(device)
    denoise: Callable[..., Tensor] = torch.compile(net) if compiled else net
    on_gpu = device.startswith("cuda")
    try:
        with torch.inference_mode(), _precision(precision, device):
            _sample(denoise, schedule, spec, device, options.rows, 2)  # compiles, chooses kernels
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            for _ in range(options.batches):
                _sample(denoise, schedule, spec, device, options.rows, options.steps)
            if on_gpu:
                torch.cuda.synchronize(device)
            rate.images_per_s = options.rows * options.batches / (time.perf_counter() - began)
    except Exception as error:  # compiling needs a toolchain, which a machine may lack
        rate.why_not = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if on_gpu and rate.images_per_s is not None:
        rate.memory_mib = torch.cuda.max_memory_allocated(device) / 2**20
    return rate


def _precision(precision: Precision, device: str) -> contextlib.AbstractContextManager[None]:
    if precision == "fp32":
        return contextlib.nullcontext()
    kind = device.partition(":")[0]
    return torch.autocast(kind, torch.float16 if kind == "cuda" else torch.bfloat16)


def _sample(
    denoise: Callable[..., Tensor],
    schedule: Schedule,
    spec: ServingSpec,
    device: str,
    rows: int,
    steps: int,
) -> Tensor:
    """DDIM by the server's own table, so that both do the same arithmetic: x' = a x + b x0 + d m."""
    timesteps = schedule.spaced_timesteps(steps)
    table = samplers.descent(schedule, "ddim", timesteps)
    x = torch.randn(rows, *spec.sample_shape, device=device)
    labels = torch.arange(rows, device=device) % 10
    for timestep, row in zip(table.timesteps.tolist(), table.coefficients.tolist(), strict=True):
        k = dict(zip(samplers.COLUMNS, row, strict=True))
        m = denoise(x, torch.full((rows,), timestep, device=device), labels).float()
        x0 = (k["px"] * x + k["pm"] * m).clamp(k["lo"], k["hi"])
        x = k["a"] * x + k["b"] * x0 + k["d"] * m
    return x
