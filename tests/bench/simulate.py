"""`python -m tests.bench.simulate`: step-level against request-level batching, by simulation on a step-cost curve.

The scheduler and the door are the server's own. The curve is measured on the step graph of digits-diffusion in the
server's own engine, or built in. Everything else is a virtual clock.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import numpy as np
from latentd_server import samplers
from latentd_server.engine import Engine
from latentd_server.job import Start, StepJob
from latentd_server.models import Registry
from latentd_server.runtime import Device

from tests.bench.simulator import (
    LAUNCH_BOUND,
    MEASURED,
    ROWS,
    SIZES,
    STEPS,
    Ask,
    Curve,
    Load,
    RequestLevel,
    StepLevel,
    capacity_per_s,
    closed,
    interpolated,
    latencies_s,
    poisson,
    throughput_per_s,
)

DIFFUSION = "digits-diffusion"
LOADS = (0.3, 0.5, 0.7, 0.85)
BUILT_IN = {"unet8": MEASURED, "launch-bound": LAUNCH_BOUND}


class _Calls:
    """Fulfils `EngineMetrics`; keeps what network calls took, by rows with padding."""

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}

    def batch_ran(self, model: str, role: int, live_rows: int, padded_rows: int, seconds: float) -> None:
        """One network call."""
        self.seconds.setdefault(padded_rows, []).append(seconds)

    def evaluations_wasted(self, count: int) -> None:
        """Nothing is given up here."""

    def waited_for_loop(self, seconds: float) -> None:
        """What is not waited for is not counted either."""


async def measured(models: Path, rounds: int) -> dict[int, float]:
    """The median duration of a step in the server's own engine, by rows, in seconds. Sizes take turns."""
    calls = _Calls()
    engine = Engine(calls, max_rows=ROWS, max_backlog=10**9)
    registry = Registry(models, engine, Device("cpu"), threads=1, max_rows=ROWS)
    await registry.load_all()
    servable = registry.get(DIFFUSION)
    assert servable.schedule is not None
    timesteps = servable.schedule.spaced_timesteps(5)
    table = samplers.descent(servable.schedule, "ddim", timesteps)
    for _ in range(rounds):
        for size in SIZES:
            over = asyncio.Event()
            job = StepJob(
                servable.model.name,
                size,
                (table,),
                Start(noise_scale=servable.schedule.level(timesteps[0])[1]),
                seed=0,
                sample_indices=np.arange(size),
                labels=np.zeros(size, np.int64),
            )
            engine.submit(job, caller="", deadline=None, sink=lambda event, over=over: over.set())  # type: ignore[misc]
            await over.wait()
    await engine.close()
    # A call of fewer rows can wait in a larger one, so it never costs more.
    falling = np.minimum.accumulate([float(np.median(calls.seconds[size])) for size in SIZES[::-1]])
    return dict(zip(SIZES, falling[::-1].tolist(), strict=True))


def report(curve: Curve, count: int) -> None:
    """Print the table."""
    policies = {
        "step-level": StepLevel(curve),
        "request, equal steps": RequestLevel(curve),
        "request, held to longest": RequestLevel(curve, equal_steps=False),
        "one at a time": RequestLevel(curve, max_rows=1),
    }
    capacity = capacity_per_s(curve)
    print(f"capacity {capacity:,.1f} requests/s in full batches of {ROWS}; steps {STEPS} equally likely")
    print(f"{'':26}{'saturated':>10}" + "".join(f"{f'load {load:g}: mean/p99 ms':>26}" for load in LOADS))
    for name, policy in policies.items():
        saturated = throughput_per_s(policy.run(Load([Ask(0.0, STEPS[i % len(STEPS)]) for i in range(count)])))
        cells = []
        for load in LOADS:
            latencies = latencies_s(policy.run(poisson(load * capacity, count))) * 1e3
            stable = load * capacity < 0.97 * saturated
            cells.append(f"{latencies.mean():,.0f} / {np.quantile(latencies, 0.99):,.0f}" if stable else "unstable")
        print(f"{name:26}{saturated / capacity:>10.2f}" + "".join(f"{cell:>26}" for cell in cells))
    print(f"\n{'closed loop, 32 in flight':26}{'throughput':>10}{'p50 of 10 steps, ms':>26}{'p50 of all, ms':>26}")
    for name, policy in policies.items():
        outcomes = policy.run(closed(32, count))
        short, every = (np.median(latencies_s(outcomes, steps)) * 1e3 for steps in (10, None))
        print(f"{name:26}{throughput_per_s(outcomes) / capacity:>10.2f}{short:>26,.1f}{every:>26,.1f}")


def main() -> int:
    """Measure or take a curve, simulate, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.simulate", description=__doc__)
    parser.add_argument("--curve", choices=["measure", *BUILT_IN], default="measure")
    parser.add_argument("--models", type=Path, default=Path("models"), help="with digits-diffusion")
    parser.add_argument("--rounds", type=int, default=20, help="of measuring")
    parser.add_argument("--requests", type=int, default=3000, help="of every cell")
    options = parser.parse_args()
    if options.curve == "measure":
        if not (options.models / DIFFUSION).exists():
            print(f"no {DIFFUSION} in {options.models}; `make demo` trains it, or take --curve unet8", file=sys.stderr)
            return 2
        points = asyncio.run(measured(options.models, options.rounds))
        curve = interpolated(points)
        print("ms by rows: " + ", ".join(f"{size}: {seconds * 1e3:.2f}" for size, seconds in points.items()))
    else:
        curve = BUILT_IN[options.curve]
    report(curve, options.requests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
