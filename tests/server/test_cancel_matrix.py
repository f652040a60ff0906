"""Who gives up, where and how: wherever a request stands and however its client leaves, it leaves nothing behind.

Every cell holds the engine while the victim is at one point of its course, lets the client go, waits until the server
has heard of it, and lets the engine go on. Neighbours ride in the victim's own batches.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import books
import pytest
from latentd.v1 import generation_service_pb2 as pb
from live import Live, gathered
from parking import QUEUED, REPLYING, Parking, Place, Stop
from prometheus_client.parser import text_string_to_metric_families
from victims import CALL_WAYS, SEED, STREAM_WAYS, VICTIMS, Client, D, Victim

CODES = {"deadline": "DEADLINE_EXCEEDED", "timeout": "DEADLINE_EXCEEDED"}
"""How a request that was given up is counted; CANCELLED where nothing else is said."""


def walk(sampler: str, steps: int, **fields: Any) -> pb.DiffusionOptions:
    return pb.DiffusionOptions(sampler=sampler, step_count=steps, **fields)


NEIGHBOURS = (
    pb.SampleRequest(model=D, seed=1, sample_count=3, diffusion=walk("ddpm", 12)),
    pb.SampleRequest(model=D, seed=2, sample_count=2, diffusion=walk("heun", 8, guidance_scale=3.0)),
    pb.SampleRequest(model=D, seed=3, diffusion=walk("dpmpp-2m-sde", 9, preview_interval_steps=1)),
    pb.SampleRequest(model="tiny-vae", seed=4, sample_count=5),
)


@pytest.fixture(scope="module")
def parking() -> Parking:
    return Parking()


@pytest.fixture(scope="module")
def live(models_root: Path, parking: Parking, call_length: str) -> Iterator[Live]:
    del call_length  # set before it starts
    running = Live(models_root, parking, max_batch_rows=16, self_check_interval=0)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def alone(live: Live) -> list[bytes]:
    """The neighbours' bytes, each asked for alone."""
    return [live.sample(request) for request in NEIGHBOURS]


class Counters:
    """What a server has counted since this was made."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._before = self._read()

    def _read(self) -> dict[tuple[str, ...], float]:
        text = self._live.serving.door.metrics.exposition().decode()
        return {
            (sample.name.removeprefix("latentd_"), *(sample.labels[key] for key in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(text)
            if family.type == "counter"
            for sample in family.samples
        }

    def ended(self) -> dict[tuple[str, str], int]:
        """How many requests ended, by method and code."""
        found: dict[tuple[str, str], int] = {}
        for key, value in self._read().items():
            if key[0] == "requests_total" and (count := int(value - self._before.get(key, 0))):
                name = (key[2], key[1])
                found[name] = found.get(name, 0) + count
        return found

    def total(self, name: str) -> int:
        """A counter, summed over its labels."""
        now = sum(value for key, value in self._read().items() if key[0] == name)
        return int(now - sum(value for key, value in self._before.items() if key[0] == name))


def cells() -> Iterator[Any]:
    for name, victim in VICTIMS.items():
        places = {QUEUED: QUEUED, "first": 0, "middle": victim.steps // 2, "last": victim.steps - 1, REPLYING: REPLYING}
        if victim.steps == 1:
            del places["middle"], places["last"]
        for place_name, place in places.items():
            for way in STREAM_WAYS if victim.in_stream else CALL_WAYS:
                yield pytest.param(victim, place, way, id=f"{name}-{place_name}-{way}")


@pytest.mark.parametrize(("victim", "place", "way"), list(cells()))
def test_who_gives_up_leaves_nothing_behind(
    victim: Victim, place: Place, way: str, live: Live, parking: Parking, alone: list[bytes]
) -> None:
    """No lane, no backlog, no state; one terminal counter, of the right code; its evaluations are counted as wasted
    and no more are taken; its neighbours' bytes are those of lone runs.
    """
    patience_s = 0.25
    while not give_up(victim, place, way, patience_s, live, parking, alone):
        patience_s *= 2  # the machine is slow: it was over before it came to the place


def give_up(
    victim: Victim, place: Place, way: str, patience_s: float, live: Live, parking: Parking, alone: list[bytes]
) -> bool:
    """One attempt at a cell; False if the deadline passed before the victim was at the place."""
    counters = Counters(live)
    gate = parking.hold(SEED, QUEUED)
    client = Client(live.serving.addresses["grpc"], victim, way, patience_s)
    try:
        if not arrives(gate, client, victim, counters):
            return False  # and leaves nothing to be counted in the next attempt
        calls = [live.stub.Sample(request, timeout=60) for request in NEIGHBOURS]
        until(lambda: live.unfinished == 1 + len(NEIGHBOURS) or victim_is_over(victim, counters))
        live.settle()
        stop = gate if place == QUEUED else parking.hold(SEED, place)
        if place != QUEUED:
            gate.leave.set()
        there = arrives(stop, client, victim, counters)
        if there:
            assert place == QUEUED or stop.jobs >= len(NEIGHBOURS), "the neighbours ride with it"
            client.give_up()
            if way == "timeout":
                until(lambda: time.monotonic() > stop.deadline_s)
            else:
                until(lambda: victim_is_over(victim, counters))
                live.turn()  # the engine has been told too
        parking.clear()
        assert [gathered(call) for call in calls] == alone
    finally:
        parking.clear()
        client.close()
        books.must_rest(lambda: live.serving.door.metrics.exposition().decode())
    assert not live.serving.engine._sinks
    assert not len(live.serving.engine._scheduler)
    if there:
        check_books(victim, place, way, counters)
    return there


def until(condition: Any) -> None:
    """Wait for something that is about to happen in another thread."""
    give_up_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up_s, "it does not happen"
        time.sleep(0.001)


def victim_is_over(victim: Victim, counters: Counters) -> bool:
    return any(method == victim.counted_as and code != "OK" for method, code in counters.ended())


def arrives(stop: Stop, client: Client, victim: Victim, counters: Counters) -> bool:
    """Whether the engine comes to be held before the victim is over, or its time is up on the way to the server."""
    until(lambda: stop.arrived.is_set() or victim_is_over(victim, counters) or client.has_been_answered)
    if stop.arrived.is_set():
        return True
    heard_s = time.monotonic() + 1  # the server hears of a call after its client has left it, or never
    while not victim_is_over(victim, counters) and time.monotonic() < heard_s:
        time.sleep(0.001)
    late = (victim.counted_as, "DEADLINE_EXCEEDED") in counters.ended() or client.has_been_answered
    assert late, counters.ended()
    return False


def check_books(victim: Victim, place: Place, way: str, counters: Counters) -> None:
    """How everybody ended, and what it cost."""
    code = CODES.get(way, "CANCELLED")
    # Nothing was left to be done when its time was up. A loop then ends with the stream, in the middle of its schedule.
    answered = way == "timeout" and place in (victim.steps - 1, REPLYING)
    if answered:
        code = "CANCELLED" if victim.counted_as == "DenoiseLoop" else "OK"
    ended = {("Sample", "OK"): len(NEIGHBOURS)}
    ended[victim.counted_as, code] = ended.get((victim.counted_as, code), 0) + 1
    if victim.in_stream:
        ended["Stream", "OK" if way in ("cancel", "timeout") else code] = 1
    assert counters.ended() == ended
    taken = {QUEUED: 0, REPLYING: victim.steps}.get(place, place if isinstance(place, str) else place + 1)
    assert counters.total("wasted_evaluations_total") == (0 if answered else int(taken) * victim.rows)
    own = 3 * 12 + 2 * 2 * (2 * 8 - 1) + 9 + 5
    assert counters.total("evaluations_total") == own + int(taken) * victim.rows
