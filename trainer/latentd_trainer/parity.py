"""How far ONNX Runtime's answers are from torch's, and whether a row's answer depends on the rows beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import torch
from latentd.tensor import DTYPES
from latentd.v1 import bundle_pb2, model_pb2
from numpy.typing import NDArray
from torch import nn

from latentd_trainer import chains
from latentd_trainer.contract import state_spec
from latentd_trainer.onnx_graph import GraphError, describe
from latentd_trainer.spec import Meaning, Source

BATCH_SIZES = (1, 2, 3, 7, 16, 64)
"""Batch sizes at which parity is measured."""
CHAIN_STEPS = 10

Precision = Literal["fp32", "fp16"]
"""What a network computes in; see `half.to_half`."""


@dataclass(frozen=True)
class Tolerance:
    """How far a graph may be from torch in float32."""

    row: float  # largest deviation of one evaluation; see `deviation`
    chain: float  # largest deviation after a whole sampling chain; see `chain_deviation`
    draws: float  # share of a draw's elements that may be off, where the last bit decides between two levels


TOLERANCES: Mapping[Precision, Tolerance] = {
    "fp32": Tolerance(row=1e-5, chain=1e-4, draws=1e-3),
    # Float16 has 11 bits, 5e-4 of a value; a network's roundings add up to some of these.
    "fp16": Tolerance(row=1e-2, chain=5e-2, draws=1e-2),
}

Feeds = Mapping[str, NDArray[Any]]
"""Values of every input by name, in the graph's order, [n, *shape]."""
Run = Callable[[Feeds], list[NDArray[Any]]]
"""Evaluates a network: inputs by name to outputs in order."""


def open_session(graph: bytes, threads: int = 1) -> ort.InferenceSession:
    """A session on the CPU provider with default optimisation, as the server opens it.

    Raises:
        GraphError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    # Threads that spin for work take it from other processes; a trainer is seldom alone on its cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base of their own
        raise GraphError(f"ONNX Runtime refuses the graph: {error}") from error


def random_rows(network: bundle_pb2.Network, count: int, seed: int = 0) -> Feeds:
    """Random values for every input, [count, *shape], of the kind and in the range its source calls for."""
    generator = np.random.default_rng(seed)
    return {entry.name: _random(entry, count, generator) for entry in network.inputs}


def _random(entry: bundle_pb2.NetworkInput, count: int, generator: np.random.Generator) -> NDArray[Any]:
    shape = (count, *entry.spec.shape)
    low, high = entry.spec.min_value, entry.spec.max_value
    dtype = DTYPES[entry.spec.data_type]
    if np.issubdtype(dtype, np.integer):
        return generator.integers(int(low), int(high), shape, np.int64, endpoint=True).astype(dtype)
    if low >= high:
        return generator.standard_normal(shape).astype(dtype)
    values = generator.uniform(low, high, shape).astype(dtype)
    # Rounding may reach the upper end of [0, 1), which uniform noise never does.
    below: NDArray[Any] = np.minimum(values, np.nextafter(dtype.type(high), dtype.type(low)))
    return below


def run_onnx(session: ort.InferenceSession, feeds: Feeds) -> list[NDArray[Any]]:
    """The graph's outputs in order, each [n, *shape].

    Raises:
        GraphError: it does not run on these inputs; the message shows them.
    """
    try:
        outputs: list[NDArray[Any]] = session.run(None, feeds)
    except Exception as error:  # its errors have no base of their own
        raise GraphError(f"does not run with inputs {describe(feeds)}: {error}") from error
    return outputs


def run_torch(module: nn.Module, feeds: Feeds) -> list[NDArray[Any]]:
    """The module's outputs in order, each [n, *shape]."""
    with torch.no_grad():
        result = module(*(torch.from_numpy(array) for array in feeds.values()))
    return [tensor.numpy() for tensor in (result if isinstance(result, tuple) else (result,))]


def require_size(size: str, network: bundle_pb2.Network, run: Run) -> None:
    """Make sure that a network takes samples of a size.

    Raises:
        GraphError: it does not run, or does not answer with what the bundle says.
    """
    rows = 2
    hint = "the sides must halve as often as the network halves them, and nothing in it may be made for one size"
    try:
        answers = run(random_rows(network, rows))
    except Exception as error:  # a module may raise anything
        raise GraphError(f"takes no samples of {size}: {' '.join(str(error).split())[:300]}; {hint}") from error
    for output, values in zip(network.outputs, answers, strict=True):
        if values.shape != (rows, *output.spec.shape):
            got = list(values.shape)
            raise GraphError(f"takes no samples of {size}: answers {[rows, *output.spec.shape]} with {got}; {hint}")


def worst_deviation(
    module: nn.Module,
    session: ort.InferenceSession,
    network: bundle_pb2.Network,
    precision: Precision = "fp32",
    sizes: Sequence[int] = BATCH_SIZES,
) -> dict[str, float]:
    """The largest `deviation` of each output over random rows at every size."""
    worst = {output.name: 0.0 for output in network.outputs}
    for size in sizes:
        feeds = random_rows(network, size, seed=size)
        expected = run_torch(module, feeds)
        actual = run_onnx(session, feeds)
        for output, ours, theirs in zip(network.outputs, actual, expected, strict=True):
            worst[output.name] = max(worst[output.name], deviation(output.meaning, ours, theirs, TOLERANCES[precision]))
    return worst


def excesses(deviation: Mapping[str, float], chain_deviation: float = 0.0, precision: Precision = "fp32") -> list[str]:
    """Every deviation that is not within its tolerance, in words; NaN is within none."""
    tolerance = TOLERANCES[precision]
    found = [
        f"output {output!r} differs from torch by {worst:.2g} at some batch size of "
        f"{', '.join(map(str, BATCH_SIZES))}; at most {tolerance.row:g} is allowed"
        for output, worst in deviation.items()
        if not worst <= tolerance.row
    ]
    if not chain_deviation <= tolerance.chain:
        found.append(
            f"samples after {CHAIN_STEPS} steps differ from torch by {chain_deviation:.2g}; "
            f"at most {tolerance.chain:g} is allowed"
        )
    return found


def deviation(
    meaning: int, actual: NDArray[Any], expected: NDArray[Any], tolerance: Tolerance = TOLERANCES["fp32"]
) -> float:
    """Distance of `actual` from `expected`, in the terms in which this output must be close.

    Largest absolute difference, but
    - log-likelihoods and bounds are sums over all pixels, so their rounding grows with their size, which may be
      thousands of nats: there it is relative to max(1, |expected|);
    - draws may be rounded to levels, where the last bit decides between two: there, elements that differ by more
      than the tolerance are left out as long as they are few enough for it.

    Returns infinity for other shapes, and where either is not finite.
    """
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = np.abs(actual.astype(np.float64) - expected)
    if meaning in (Meaning.MEANING_LOG_LIKELIHOOD, Meaning.MEANING_EVIDENCE_LOWER_BOUND):
        difference /= np.maximum(1.0, np.abs(expected))
    if meaning == Meaning.MEANING_SAMPLE_DRAW and np.mean(difference > tolerance.row) <= tolerance.draws:
        difference = difference[difference <= tolerance.row]
    return float(difference.max(initial=0.0))


def row_invariant(session: ort.InferenceSession, network: bundle_pb2.Network, count: int = 64) -> bool:
    """Whether each row's bytes are the same at every batch size of `BATCH_SIZES`, place in the batch and neighbour."""
    feeds = random_rows(network, count)
    together = run_onnx(session, feeds)
    order = np.random.default_rng(1).permutation(count)
    shuffled = run_onnx(session, {name: rows[order] for name, rows in feeds.items()})
    if not all(_same_bytes(rows[order], other) for rows, other in zip(together, shuffled, strict=True)):
        return False
    for size in BATCH_SIZES:
        parts = [
            run_onnx(session, {name: rows[start : start + size] for name, rows in feeds.items()})
            for start in range(0, count, size)
        ]
        for rows, pieces in zip(together, zip(*parts, strict=True), strict=True):
            if not _same_bytes(rows, np.concatenate(pieces)):
                return False
    return True


def _same_bytes(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.tobytes() == other.tobytes()


def chain_deviation(
    module: nn.Module, session: ort.InferenceSession, network: bundle_pb2.Network, model: model_pb2.Model
) -> float:
    """Largest difference between samples of two DDIM chains, one through each runtime, [16, C, H, W].

    Absolute, but relative to the largest value where that is above 1: estimates of x0 that are not clipped may lead far
    beyond the range of samples, and rounding grows with them.
    """
    feeds = random_rows(network, 16)
    clean = state_spec(model)
    start = np.random.default_rng(2).standard_normal((16, *clean.shape), np.float32)
    runs: tuple[Run, Run] = (lambda rows: run_onnx(session, rows), lambda rows: run_torch(module, rows))
    ours, theirs = (
        chains.walk(
            as_denoise(network, feeds, run),
            model.diffusion,
            start,
            min(CHAIN_STEPS, len(model.diffusion.alphas)),
            eta=0.0,
            clip=(clean.min_value, clean.max_value),
            generator=np.random.default_rng(0),
        )
        for run in runs
    )
    return deviation(Meaning.MEANING_SAMPLE, ours, theirs) / max(1.0, float(np.abs(theirs).max()))


def as_denoise(network: bundle_pb2.Network, feeds: Feeds, run: Run) -> chains.Denoise:
    """The denoiser as a function of x_t and t alone, its other inputs held at `feeds`."""
    source = {entry.source: entry.name for entry in network.inputs}

    def denoise(x: chains.Floats, t: NDArray[np.int64]) -> chains.Floats:
        given: Feeds = {source[Source.SOURCE_SAMPLE]: x, source[Source.SOURCE_TIMESTEP]: t}
        return run({**feeds, **given})[0]

    return denoise
