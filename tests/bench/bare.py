"""The yardstick: a bare ONNX Runtime loop over the same graphs on the same cores, at its best batch size.

No server, no queue, no messages; for diffusion one request kind after another, each batched with its equals, with the
update as three lines of NumPy. Nothing that serves can be expected to beat it by much.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf.json_format import Parse
from latentd.names import BUNDLE_FILE
from latentd.tensor import DTYPES
from latentd.v1 import bundle_pb2

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Rate:
    """What a loop achieved."""

    per_second: float  # rows by wall time
    per_cpu_second: float  # rows by CPU time of this process


@dataclass(frozen=True)
class Loop:
    """A loop over one network."""

    batch_size: int
    turn: Callable[[], int]  # one turn of it; returns the rows it made

    def measure(self, seconds: float) -> Rate:
        """Go round for so long, after a turn that is not counted."""
        self.turn()
        rows, wall, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds:
            rows += self.turn()
        return Rate(rows / (time.perf_counter() - wall), rows / (time.process_time() - cpu))


def best(loops: list[Loop], seconds: float) -> Loop:
    """The fastest, where all of them together are given so long."""
    return max(loops, key=lambda loop: loop.measure(seconds / len(loops)).per_second)


def read(directory: Path) -> bundle_pb2.Bundle:
    """The bundle in a directory."""
    return Parse((directory / BUNDLE_FILE).read_text(), bundle_pb2.Bundle())


def session(directory: Path, network: bundle_pb2.Network, threads: int) -> onnxruntime.InferenceSession:
    """A session with the thread count the server uses, and spinning as ONNX Runtime has it by default."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(directory / network.file), options, providers=["CPUExecutionProvider"])


def feeds(network: bundle_pb2.Network, rows: int, class_count: int, timestep_count: int) -> dict[str, Any]:
    """Random inputs."""
    rng = np.random.default_rng(0)
    made = {}
    for value in network.inputs:
        shape = (rows, *value.spec.shape)
        if DTYPES[value.spec.data_type] == np.int64:
            is_time = value.source == bundle_pb2.NetworkInput.SOURCE_TIMESTEP
            made[value.name] = rng.integers(0, timestep_count if is_time else class_count, shape)
        else:
            made[value.name] = rng.random(shape, np.float32)
    return made


def best_call(directory: Path, role: int, threads: int, seconds: float) -> Loop:
    """Plain calls of one graph, at the best of all batch sizes."""
    bundle = read(directory)
    network = next(network for network in bundle.networks if network.role == role)
    running = session(directory, network, threads)
    loops = []
    for size in SIZES:
        inputs = feeds(network, size, max(1, len(bundle.model.class_names)), len(bundle.model.diffusion.alphas) or 1)
        outputs = [network.outputs[0].name]

        def run(inputs: dict[str, Any] = inputs, size: int = size, outputs: list[str] = outputs) -> int:
            running.run(outputs, inputs)
            return size

        loops.append(Loop(size, run))
    return best(loops, seconds)


def best_walk(directory: Path, steps: tuple[int, ...], threads: int, seconds: float) -> Loop:
    """Samples by DDIM (eta 0) with equal shares of each step count, every kind batched with its equals."""
    bundle = read(directory)
    (network,) = bundle.networks
    running = session(directory, network, threads)
    alphas, sigmas = np.array(bundle.model.diffusion.alphas), np.array(bundle.model.diffusion.sigmas)
    names = {value.source: value.name for value in network.inputs}
    shape = tuple(bundle.model.sample_spec.shape)
    rng = np.random.default_rng(0)

    def walk(size: int, count: int) -> int:
        x = rng.standard_normal((size, *shape), np.float32)
        times = [round(len(alphas) - i * len(alphas) / count) - 1 for i in range(count)]
        for now, after in zip(times, [*times[1:], -1], strict=True):
            prediction = running.run(
                None,
                {
                    names[bundle_pb2.NetworkInput.SOURCE_SAMPLE]: x,
                    names[bundle_pb2.NetworkInput.SOURCE_TIMESTEP]: np.full(size, now),
                    names[bundle_pb2.NetworkInput.SOURCE_CLASS_LABEL]: np.zeros(size, np.int64),
                },
            )[0]
            alpha, sigma = np.float32(alphas[now]), np.float32(sigmas[now])
            x0 = np.clip(alpha * x - sigma * prediction, -1, 1)  # v-prediction
            eps = sigma * x + alpha * prediction
            alpha, sigma = (np.float32(alphas[after]), np.float32(sigmas[after])) if after >= 0 else (1, 0)
            x = alpha * x0 + sigma * eps
        return size

    def turn(size: int) -> int:
        return sum(walk(size, count) for count in steps)

    return best([Loop(size, partial(turn, size)) for size in (8, 16, 32)], seconds)


def held_to_longest(
    directory: Path, steps: tuple[int, ...], in_flight: int, threads: int, seconds: float
) -> dict[int, float]:
    """Median latency in ms by step count of request-level batching.

    What waits is batched, whatever its step count, and nobody leaves or joins before the longest walk of the batch is
    done. A closed loop on this thread: every request that is answered is followed by another at once. The calls are
    real, all of the same size, without any update.
    """
    bundle = read(directory)
    (network,) = bundle.networks
    running = session(directory, network, threads)
    inputs = feeds(network, in_flight, max(1, len(bundle.model.class_names)), len(bundle.model.diffusion.alphas))
    latencies: dict[int, list[float]] = {count: [] for count in steps}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or not all(latencies.values()):
        asked = time.perf_counter()  # all of them arrived together, when the batch before was answered
        for _ in range(max(steps)):
            running.run(None, inputs)
        for count in steps:
            latencies[count].append(time.perf_counter() - asked)
    return {count: float(np.median(values)) * 1e3 for count, values in latencies.items()}
