"""What scheduling and admission buy, by simulation: the real ones on a fixed curve under a virtual clock."""

from dataclasses import replace

import numpy as np
import pytest
from bench.simulator import (
    LAUNCH_BOUND,
    MEASURED,
    ROWS,
    STEPS,
    Ask,
    Curve,
    Load,
    Outcome,
    RequestLevel,
    StepLevel,
    capacity_per_s,
    closed,
    latencies_s,
    poisson,
    throughput_per_s,
)
from latentd_server.priority import Priority

CURVES = pytest.mark.parametrize("curve", [MEASURED, LAUNCH_BOUND], ids=["measured", "launch-bound"])
MEAN_STEPS = sum(STEPS) / len(STEPS)


def all_at_once(count: int) -> Load:
    """A backlog that fills every batch to the last."""
    return Load([Ask(0.0, STEPS[number % len(STEPS)]) for number in range(count)])


@CURVES
@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.85])
def test_steps_are_quicker_than_requests_at_every_load(curve: Curve, load: float) -> None:
    """Batching by steps has a lower mean and 99th percentile of latency than batching equal requests."""
    per_s = load * capacity_per_s(curve)
    ours, equal = (latencies_s(policy.run(poisson(per_s, 500))) for policy in (StepLevel(curve), RequestLevel(curve)))
    assert len(ours) == len(equal) == 500
    assert ours.mean() < 0.8 * equal.mean()
    assert np.quantile(ours, 0.99) < np.quantile(equal, 0.99)


@CURVES
def test_steps_give_up_no_throughput(curve: Curve) -> None:
    """With everything waiting, steps keep up with equal requests, and leave those held to the longest far behind."""
    ours, equal, held, alone = (
        throughput_per_s(policy.run(all_at_once(960)))
        for policy in (
            StepLevel(curve),
            RequestLevel(curve),
            RequestLevel(curve, equal_steps=False),
            RequestLevel(curve, max_rows=1),
        )
    )
    assert ours > 0.97 * equal
    assert ours > 1.6 * held
    assert ours > 3 * alone
    assert ours == pytest.approx(capacity_per_s(curve), rel=0.06)


def test_a_short_request_does_not_wait_for_long_ones() -> None:
    """With 32 in flight, 10 steps take less than .45 of what they take where the batch is held to its longest, and
    little more than half of what they take where equal requests wait for their turn; batches stay full.
    """
    ours = StepLevel(MEASURED).run(closed(32, 1500))
    short = np.median(latencies_s(ours, 10))
    held = RequestLevel(MEASURED, equal_steps=False).run(closed(32, 1500))
    equal = RequestLevel(MEASURED).run(closed(32, 1500))
    assert short <= 0.45 * np.median(latencies_s(held, 10))
    assert short <= 0.55 * np.median(latencies_s(equal, 10))
    assert throughput_per_s(ours) > 1.1 * throughput_per_s(equal)


def goodput(outcomes: list[Outcome], until_s: float) -> float:
    """Evaluations a second of requests done in time, while requests came, less the first second."""
    return sum(o.ask.steps for o in outcomes if o.served and 1 < o.over_s <= until_s) / (until_s - 1)


def offered(load: float, callers: int, slack: float) -> list[Ask]:
    """Six seconds of an open loop; every request may take `slack` times as long as its steps in full batches."""
    timeouts = {steps: slack * steps * MEASURED(ROWS) for steps in STEPS}
    per_s = load * capacity_per_s(MEASURED)
    asks = list(poisson(per_s, int(6 * per_s), timeout=timeouts.__getitem__).arrived(1e9))
    return [replace(ask, caller=f"caller-{number % callers}") for number, ask in enumerate(asks)]


@pytest.mark.parametrize("callers", [1, 8, 64, 10_000])
@pytest.mark.parametrize("slack", [1.5, 3.0])
def test_three_times_the_load_leaves_the_goodput(callers: int, slack: float) -> None:
    """At 3x what the device can do, what is done in time stays above .9 of the most it ever is; the rest is refused at
    once, and of those who were let in fewer than one in ten come too late.
    """
    peak = 0.0
    for load in (1.0, 3.0):
        asks = offered(load, callers, slack)
        outcomes = StepLevel(MEASURED).run(Load(asks))
        assert len(outcomes) == len(asks)
        reached = goodput(outcomes, asks[-1].at_s)
        peak = max(peak, reached)
    assert reached >= 0.9 * peak
    assert all(o.latency_s <= MEASURED(ROWS) for o in outcomes if o.refusal is not None)
    assert sum(o.late for o in outcomes) < 0.1 * sum(o.served for o in outcomes)


@pytest.mark.parametrize("callers", [1, 8, 10_000])
def test_light_load_refuses_nobody(callers: int) -> None:
    """At .5 of what the device can do, nobody whose deadline leaves some room is refused, and nobody is late."""
    outcomes = StepLevel(MEASURED).run(Load(offered(0.5, callers, 2.0)))
    assert all(outcome.served for outcome in outcomes)


@pytest.mark.parametrize("callers", [1, 8, 64])
def test_estimates_come_true(callers: int) -> None:
    """Once overload lasts, what the door foretells is within a factor of 1.5 of what it then takes, for nine in ten."""
    outcomes = StepLevel(MEASURED).run(Load(offered(3.0, callers, 3.0)))
    errors = [o.latency_s / o.estimate_s for o in outcomes if o.served and o.estimate_s and o.ask.at_s > 1]
    low, high = np.quantile(errors, [0.05, 0.95])
    assert low > 1 / 1.5
    assert high < 1.5


def flood_and(light: list[Ask]) -> list[Outcome]:
    """What becomes of a few requests beside a caller with a thousand."""
    outcomes = StepLevel(MEASURED).run(Load([Ask(0.0, 50, caller="flood") for _ in range(1000)] + light))
    return [outcome for outcome in outcomes if outcome.ask.caller != "flood"]


def test_a_light_caller_does_not_wait_for_a_heavy_one() -> None:
    """Behind a thousand 50-step requests of another, a 10-step request is let in with little time, and makes it."""
    (outcome,) = flood_and([Ask(1.0, 10, 1.3 * 11 * MEASURED(ROWS), caller="light")])
    assert outcome.served
    assert outcome.estimate_s == pytest.approx(outcome.latency_s, rel=0.3)


def test_a_heavy_caller_hears_that_its_own_work_is_in_the_way() -> None:
    """One more of the thousand, with the same deadline, is refused with an estimate of the whole queue."""
    one_more = Ask(1.0, 10, 1.3 * 11 * MEASURED(ROWS), caller="flood")
    outcomes = StepLevel(MEASURED).run(Load([Ask(0.0, 50, caller="flood") for _ in range(1000)] + [one_more]))
    (outcome,) = [outcome for outcome in outcomes if outcome.ask == one_more]
    assert outcome.refusal is not None
    queue_s = 1000 * 50 / ROWS * MEASURED(ROWS) - 1.0
    assert outcome.estimate_s == pytest.approx(queue_s, rel=0.2)


def test_a_high_priority_hardly_notices_a_flood() -> None:
    """While LOW work keeps the device full, HIGH requests take at most a fifth longer than their own steps in full
    batches, and the LOW work goes on.
    """
    low = [Ask(0.0, 50, caller=f"low-{number}", priority=Priority.LOW) for number in range(400)]
    high = [Ask(0.5 + 0.1 * number, 25, caller="high", priority=Priority.HIGH) for number in range(20)]
    outcomes = StepLevel(MEASURED).run(Load(low + high))
    slowest = max(o.latency_s for o in outcomes if o.ask.priority is Priority.HIGH)
    assert slowest <= 1.2 * (25 + 1) * MEASURED(ROWS)
    assert sum(o.ask.priority is Priority.LOW for o in outcomes) == 400
