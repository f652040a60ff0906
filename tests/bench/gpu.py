"""`make bench-gpu`: one U-Net of CIFAR-10's size, sampled by latentd's engine and by PyTorch on the same device.

Weights are random, since speed does not depend on them. For each precision it reports which call sizes give equal
bytes, images/s of DDIM with full calls, and the *gap*: the share of the time in which no call is under way. Writes
`bench/gpu.json`. With `--device cpu --tiny` it runs anywhere, which shows that it runs and nothing else.
"""

import argparse
import asyncio
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentd.v1 import bundle_pb2
from latentd_server import runtime, samplers, step_graph
from latentd_server.certificate import Buckets, bucket_sizes, certify
from latentd_server.engine import Engine
from latentd_server.job import Event, Failed, Finished, Start, StepJob
from latentd_server.metrics import Metrics
from latentd_server.runners import Outcome
from latentd_server.runtime import CompiledGraph, CudaSettings, Device, choose_device
from latentd_server.scheduler import Segment
from latentd_server.schedules import Schedule
from latentd_server.step_runner import PreparedSteps, StepResults, StepRunner
from latentd_server.trials import StepTrial
from latentd_trainer import half, onnx_graph, parity
from latentd_trainer.checkpoint import build_family
from latentd_trainer.data import DataInfo
from latentd_trainer.export import Origin, declare
from latentd_trainer.families.diffusion import PRESETS
from latentd_trainer.parity import Precision
from latentd_trainer.spec import ServingSpec

from tests.bench import gpu_torch

MODEL = "unet@1"
KEY = (MODEL, bundle_pb2.Network.ROLE_DENOISER)
LABELS = tuple("0123456789")
ORIGIN = Origin("random", LABELS, (0.1,) * len(LABELS), "Apache-2.0", {})


@dataclass
class Served:
    """What the engine did with one precision."""

    precision: str
    classes: list[list[int]]  # of call sizes with equal bytes; the first is served with
    unsteady: list[int]  # sizes whose rows see each other
    recorded: bool  # whether calls are CUDA graphs
    certify_s: float
    images_per_s: float
    rows_a_call: float
    call_ms: float  # median
    gap: float  # share of the time between the first call and the last in which none was under way
    memory_mib: float  # of the device; of the process on the CPU


class Timed:
    """A runner whose calls are timed. Fulfils `runners.Runner`."""

    def __init__(self, inner: StepRunner) -> None:
        self._inner = inner
        self.calls: list[tuple[float, float]] = []
        self.rows = 0

    def warm(self) -> None:
        self._inner.warm()

    def prepare(self, segments: Sequence[Segment]) -> PreparedSteps:
        self.rows += sum(segment.rows for segment in segments)
        return self._inner.prepare(segments)

    def run(self, prepared: PreparedSteps) -> StepResults:
        began = time.perf_counter()
        results = self._inner.run(prepared)
        self.calls.append((began, time.perf_counter()))
        return results

    def finish(self, prepared: PreparedSteps, results: StepResults) -> list[Outcome]:
        return self._inner.finish(prepared, results)

    def padded(self, rows: int) -> int:
        return self._inner.padded(rows)

    def forget(self, job_id: int) -> None:
        self._inner.forget(job_id)


def network(tiny: bool) -> ServingSpec:
    """The diffusion family's largest preset, or a tiny one, with weights that are all random."""
    shape = (3, 8, 8) if tiny else (3, 32, 32)
    settings = {"width": 8} if tiny else PRESETS["32x32-large"]
    info = DataInfo("random", shape, 256, LABELS, (0.1,) * len(LABELS), "0" * 64)
    spec = build_family("diffusion", settings, info, seed=0).serving_spec()
    with torch.no_grad():
        for module in spec.graphs[0].module.modules():
            if isinstance(module, torch.nn.Conv2d) and not module.weight.any():  # some begin as zeros
                torch.nn.init.normal_(module.weight, std=0.02)
    return spec


def build(spec: ServingSpec, precision: Precision) -> tuple[bundle_pb2.Bundle, bytes]:
    """The bundle's message and its denoiser, straight from torch; the exporter's checks are left to its own tests."""
    bundle = declare(spec, ORIGIN, MODEL)
    (graph,) = spec.graphs
    exported = onnx_graph.to_onnx(graph, parity.random_rows(bundle.networks[0], onnx_graph.EXAMPLE_BATCH))
    return bundle, onnx_graph.serialize(half.to_half(exported) if precision == "fp16" else exported)


async def serve(spec: ServingSpec, precision: Precision, device: Device, options: argparse.Namespace) -> Served:
    """Certify the step graph, then keep the engine full until enough images are done."""
    before = memory_mib(device)
    bundle, data = build(spec, precision)
    model = bundle.model
    shape = tuple(model.sample_spec.shape)
    names = [value.name for value in bundle.networks[0].inputs]
    fused = step_graph.build(data, *names, bundle.networks[0].outputs[0].name, shape)
    graph = CompiledGraph(fused, device, options.threads)
    sizes = bucket_sizes(options.rows, device.kind)
    runner = StepRunner(graph, shape, Buckets(sizes))
    began = time.perf_counter()
    with runtime.compiling():
        certificate = certify(StepTrial(runner, model, True, options.rows), sizes)
    certified_s = time.perf_counter() - began
    runner.buckets = certificate.buckets
    timed = Timed(runner)
    engine = Engine(Metrics(), max_rows=options.rows, max_backlog=10**9)
    engine.attach({KEY: timed})
    schedule = Schedule.from_spec(model.diffusion, model.sample_spec)
    await sample(engine, schedule, options.rows, 2)
    timed.calls.clear()
    timed.rows = 0
    images = options.rows * options.batches
    await sample(engine, schedule, images, options.steps)
    held = memory_mib(device) - before
    await engine.close()
    times = np.array(timed.calls)
    wall = times[-1, 1] - times[0, 0]
    busy = (times[:, 1] - times[:, 0]).sum()
    return Served(
        precision,
        [list(each) for each in certificate.classes],
        list(certificate.unsteady),
        graph.captures,
        certified_s,
        images / wall,
        timed.rows / len(times),
        float(np.median(times[:, 1] - times[:, 0])) * 1e3,
        float(1 - busy / wall),
        held,
    )


async def sample(engine: Engine, schedule: Schedule, images: int, steps: int) -> None:
    """Draw images by DDIM, every one a request of its own."""
    timesteps = schedule.spaced_timesteps(steps)
    table = samplers.descent(schedule, "ddim", timesteps)
    start = Start(noise_scale=schedule.level(timesteps[0])[1])
    over = asyncio.Event()
    left, failures = images, list[Exception]()

    def sink(event: Event) -> None:
        nonlocal left
        if isinstance(event, Failed):
            failures.append(event.error)
        left -= isinstance(event, Finished | Failed)
        if not left:
            over.set()

    for index in range(images):
        labels = np.array([index % len(LABELS)])
        job = StepJob(MODEL, 1, (table,), start, seed=0, sample_indices=np.array([index]), labels=labels)
        engine.submit(job, caller="bench", deadline=None, sink=sink)
    await over.wait()
    if failures:
        raise failures[0]


def memory_mib(device: Device) -> float:
    """Memory in use: of the whole device, or of this process on the CPU."""
    if device.kind == "cuda":
        free, total = torch.cuda.mem_get_info(device.index)
        return (total - free) / 2**20
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@dataclass
class Report:
    """All of a run."""

    machine: str
    versions: dict[str, str]
    settings: dict[str, Any]
    parameters: int
    served: list[Served] = field(default_factory=list)
    torch: list[gpu_torch.Rate] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a network that any machine can run")
    parser.add_argument("--rows", type=int, default=32, help="rows of a full call")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of an image")
    parser.add_argument("--batches", type=int, default=8, help="images, in full calls")
    parser.add_argument("--threads", type=int, default=1, help="of a call on the CPU")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch the engine's kernels one by one")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--out", type=Path, default=Path("bench/gpu.json"))
    options = parser.parse_args(arguments)
    device = choose_device(options.device, CudaSettings(graphs=not options.no_cuda_graphs))
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    spec = network(options.tiny)
    (graph,) = spec.graphs
    name = torch.cuda.get_device_name(device.index) if device.kind == "cuda" else platform.processor() or "CPU"
    report = Report(
        name,
        {"torch": torch.__version__, "onnxruntime": runtime.VERSION, "python": platform.python_version()},
        {key: str(value) for key, value in vars(options).items()},
        sum(each.numel() for each in graph.module.parameters()),
    )
    model = declare(spec, ORIGIN, MODEL).model
    schedule = Schedule.from_spec(model.diffusion, model.sample_spec)
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    for precision in precisions:
        report.served.append(asyncio.run(serve(spec, precision, device, options)))
        show(report.served[-1])
    for precision in precisions:
        for compiled in (False,) if options.no_compile else (False, True):
            report.torch.append(gpu_torch.measure(spec, schedule, precision, str(device), compiled, options))
            show(report.torch[-1])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(asdict(report), indent=2) + "\n")


def show(result: Served | gpu_torch.Rate) -> None:
    """One line for each figure."""
    print(type(result).__name__)
    for key, value in asdict(result).items():
        print(f"  {key:14} {value:.4g}" if isinstance(value, float) else f"  {key:14} {value}")


if __name__ == "__main__":
    main()
