"""`make bench`: what is served as a ratio to a bare ONNX Runtime loop, in one run on the same cores.

Prints tables and writes `bench/serving.json`. Absolute figures of a shared machine mean little, ratios of one run do.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import onnxruntime
from latentd.v1 import bundle_pb2

from tests.bench import bare, bundles, naive
from tests.bench.load import STEPS
from tests.bench.served import Server, drive, server

VAE, DIFFUSION = "digits-vae", "digits-diffusion"
MANY = 32
"""In flight, where step counts are compared."""


class Cell(NamedTuple):
    """One load."""

    kind: str
    model: str
    in_flight: int
    max_rows: int = 0  # of a batch; 0 leaves it to the server

    def __str__(self) -> str:
        wide = f":{self.max_rows}" if self.max_rows else ""
        return f"{self.kind}:{self.model}:{self.in_flight}{wide}"


CELLS = (
    Cell("decode", bundles.TINY_VAE, 32),
    Cell("stream-decode", bundles.TINY_VAE, 1),
    Cell("stream-decode", bundles.TINY_VAE, 32),
    Cell("sample-256", bundles.TINY_VAE, 1),
    Cell("sample-256", bundles.TINY_VAE, 8),
    Cell("stream-sample-256", bundles.TINY_VAE, 8),
    Cell("stream-sample-256", bundles.TINY_VAE, 32),
    Cell("decode-16", bundles.GENERATOR, 32),
    Cell("stream-decode-16", bundles.GENERATOR, 32),
    Cell("stream-decode-16", bundles.GENERATOR, 32, 256),
    Cell("decode", VAE, 32),
    Cell("stream-decode", VAE, 32),
    Cell("sample-256", VAE, 1),
    Cell("sample-256", VAE, 1, 256),
    Cell("sample", DIFFUSION, 32),
    Cell("stream-sample", DIFFUSION, 1),
    Cell("stream-sample", DIFFUSION, 8),
    Cell("stream-sample", DIFFUSION, 32),
    Cell("stream-mix", DIFFUSION, 32),
)
NAIVE = (CELLS[0], Cell("sample-256", bundles.TINY_VAE, 1), Cell("sample-256", bundles.TINY_VAE, 8))
"""Loads that plain handlers get too."""
_IDLE_S = 2.0


def machine(threads: int) -> dict[str, Any]:
    """What the figures are from."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "grpcio": grpc.__version__,
        "numpy": np.__version__,
        "threads": threads,
    }


def yardsticks(models: Path, names: set[str], threads: int, seconds: float) -> dict[str, bare.Loop]:
    """A bare loop for each model at the batch size at which it is fastest; to find it takes so many seconds each."""
    loops = {}
    for name in sorted(names):
        directory = models / name / "1"
        if name == DIFFUSION:
            loops[name] = bare.best_walk(directory, STEPS, threads, seconds)
        else:
            loops[name] = bare.best_call(directory, bundle_pb2.Network.ROLE_DECODER, threads, seconds)
        print(f"bare {name}: fastest in batches of {loops[name].batch_size}", flush=True)
    return loops


def run(to: Server, cells: list[Cell], loops: dict[str, bare.Loop], seconds: float) -> list[dict[str, Any]]:
    """Every load, a line each. The bare loop is measured just before and just after: the machine's speed changes."""
    print(
        f"{'load':<18}{'model':<18}{'in flight':>10}{'samples/s':>11}{'bare':>11}{'of bare':>9}{'per CPU s':>11}"
        f"{'CPU us/req':>12}{'rows':>8}{'fill':>6}{'p50 ms':>9}"
    )
    measured = []
    for cell in cells:
        loop = loops[cell.model]
        before = loop.measure(seconds / 4)
        found = drive(to, cell.kind, cell.model, cell.in_flight, seconds)
        around = (before, loop.measure(seconds / 4))
        found |= {"load": cell.kind, "model": cell.model, "in_flight": cell.in_flight, "max_rows": cell.max_rows}
        found["bare_per_second"] = sum(rate.per_second for rate in around) / 2
        found["bare_per_cpu_second"] = sum(rate.per_cpu_second for rate in around) / 2
        found["ratio"] = found["rows_per_second"] / found["bare_per_second"]
        found["cpu_ratio"] = found["rows_per_server_cpu_second"] / found["bare_per_cpu_second"]
        lanes = cell.in_flight * found["rows"] // found["requests"]
        found["fill"] = found["mean_batch_rows"] / min(lanes, to.largest_batch(cell.model))
        measured.append(found)
        print(
            f"{cell.kind:<18}{cell.model:<18}{cell.in_flight:>10}{found['rows_per_second']:>11,.0f}"
            f"{found['bare_per_second']:>11,.0f}{found['ratio']:>9.2f}{found['cpu_ratio']:>11.2f}{found['server_cpu_us_per_request']:>12,.0f}"
            f"{found['mean_batch_rows']:>8.1f}{found['fill']:>6.2f}{found['p50_ms']:>9.2f}",
            flush=True,
        )
    return measured


def compare_latencies(measured: list[dict[str, Any]], models: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Latencies by step count of the diffusion mix, against batches that are held until their longest walk is done."""
    held = bare.held_to_longest(models / DIFFUSION / "1", STEPS, MANY, threads, seconds)
    found: dict[str, Any] = {"held_to_longest_ms": held}
    print(f"\nmedian latency by step count, 32 in flight; batches held to their longest walk: {_by_steps(held)}")
    for cell in measured:
        if cell["model"] == DIFFUSION and cell["in_flight"] == MANY:
            ratio = cell["p50_ms_by_steps"][str(STEPS[0])] / held[STEPS[0]]
            found[cell["load"]] = {"p50_ms_by_steps": cell["p50_ms_by_steps"], "ratio_of_shortest": ratio}
            text = _by_steps({int(steps): each for steps, each in cell["p50_ms_by_steps"].items()})
            print(f"  {cell['load']:<16}{text}; {STEPS[0]} steps: {ratio:.2f} of that")
    return found


def _by_steps(latencies_ms: dict[int, float]) -> str:
    return ", ".join(f"{steps} steps {each:.0f} ms" for steps, each in latencies_ms.items())


def compare_naive(
    own: Cell, measured: dict[str, Any], models: Path, threads: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Server CPU and requests a second of one load, against a plain grpc.aio handler that calls the network itself, and
    one that has its answer ready.
    """
    found: dict[str, dict[str, float]] = {}
    print(f"\n{own.kind} of {own.model}, {own.in_flight} in flight, by plain handlers:")
    for name, empty in (("naive", False), ("empty", True)):
        with naive.server(models / own.model / "1", threads, empty=empty) as to:
            each = drive(to, own.kind, own.model, own.in_flight, seconds)
        cpu_us, per_s = each["server_cpu_us_per_request"], each["requests"] / each["seconds"]
        ratio = measured["server_cpu_us_per_request"] / cpu_us
        speed = measured["requests"] / measured["seconds"] / per_s
        found[name] = {"server_cpu_us_per_request": cpu_us, "requests_per_s": per_s, "ratio": ratio, "speed": speed}
        text = "one that runs the network" if name == "naive" else "one that only answers"
        print(f"  {text:<26}{cpu_us:>6,.0f} us of CPU; latentd takes {ratio:.2f} of that, {speed:.2f} as many a second")
    return found


def rest(to: Server) -> dict[str, float]:
    """What a server costs that has nothing to do."""
    before = to.cpu_s
    time.sleep(_IDLE_S)
    idle = {
        "start_up_s": to.start_up_s,
        "resident_mib": to.resident_mib,
        "idle_cpu_share": (to.cpu_s - before) / _IDLE_S,
    }
    print(
        f"serving {idle['start_up_s']:.2f} s after its start; {idle['resident_mib']:.0f} MiB resident; "
        f"idle it takes {idle['idle_cpu_share']:.1%} of a core"
    )
    return idle


def main() -> int:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="with digits-vae and digits-diffusion")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each cell")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime, in the server and bare")
    parser.add_argument("--out", type=Path, default=Path("bench/serving.json"))
    known = {str(cell): cell for cell in CELLS}
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=known,
        default=list(known),
        metavar="LOAD:MODEL:IN_FLIGHT[:MAX_ROWS]",
        help="which to run; all by default",
    )
    options = parser.parse_args()
    cells = [known[name] for name in options.cells]
    trained = {cell.model for cell in cells} - {bundles.TINY_VAE, bundles.GENERATOR}
    missing = [name for name in sorted(trained) if not (options.models / name / "1").exists()]
    if missing:
        print(f"no bundle of {', '.join(missing)} in {options.models}; `make demo` trains them", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"machine": machine(options.threads)}
    print(json.dumps(report["machine"]))
    with tempfile.TemporaryDirectory() as made:
        models = Path(made)
        for name in (bundles.TINY_VAE, bundles.GENERATOR):
            bundles.write(models, name)
        for name in trained:
            (models / name).symlink_to((options.models / name).resolve())
        loops = yardsticks(models, {cell.model for cell in cells}, options.threads, 3 * options.seconds)
        report["cells"] = []
        for max_rows in sorted({cell.max_rows for cell in cells}):
            with server(models, options.threads, "--max-batch-rows", str(max_rows)) as to:
                most = f"of up to {max_rows} rows" if max_rows else "as large as the server makes them"
                print(f"\nbatches {most}")
                if not max_rows:
                    report["rest"] = rest(to)
                own = [cell for cell in cells if cell.max_rows == max_rows]
                report["cells"] += run(to, own, loops, options.seconds)
        report["naive"] = {
            str(cell): compare_naive(cell, found, models, options.threads, options.seconds)
            for cell, found in zip(sorted(cells, key=lambda cell: cell.max_rows), report["cells"], strict=True)
            if cell in NAIVE
        }
        report["bare_batch_sizes"] = {name: loop.batch_size for name, loop in loops.items()}
        if any(cell.model == DIFFUSION and cell.in_flight == MANY for cell in cells):
            report["latency"] = compare_latencies(report["cells"], models, options.threads, options.seconds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"\nwritten to {options.out}; 'of bare' compares wall time, 'per CPU s' samples per second of the server's "
        "CPU; 'rows' is the mean batch, 'fill' its share of what is in flight"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
