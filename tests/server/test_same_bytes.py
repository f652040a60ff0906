"""The proof of "same seed, same bytes": what a busy server answers in any crowd is what another one answers alone."""

import contextlib
import random
import re
import shutil
import signal
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from crowds import LONG, METHODS, Asked, asked, equal, messages, parts, wrong
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from latent_bundles import write_latent_diffusion
from latentd.names import SAMPLERS
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc
from server_process import Process

Stub = generation_service_pb2_grpc.GenerationServiceStub
Answers = dict[Any, bytes]

CROWD = 40
"""Requests that are asked at once."""


@pytest.fixture(scope="module")
def root(models_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundles of each family, and diffusion over latents of one of them."""
    copied = shutil.copytree(models_root, tmp_path_factory.mktemp("crowded") / "models")
    write_latent_diffusion(copied)
    return copied


@pytest.fixture(scope="module")
def quiet(root: Path) -> Iterator[Process]:
    """A server that is asked one thing at a time."""
    yield from _process(root)


@pytest.fixture(scope="module")
def busy(root: Path) -> Iterator[Process]:
    """A server that has crowds, and checks itself whenever it has not."""
    yield from _process(root, "--self-check-interval", "0.05")


def _process(root: Path, *arguments: str) -> Iterator[Process]:
    process = Process(root, "--max-batch-rows", "16", *arguments)
    process.line("ready")
    yield process
    process.process.send_signal(signal.SIGTERM)
    assert process.end() == 0
    process.kill()


@pytest.fixture(scope="module")
def servers(quiet: Process, busy: Process) -> Iterator[tuple[Stub, Stub]]:
    """Both, as clients see them."""
    channels = [process.channel() for process in (quiet, busy)]
    yield Stub(channels[0]), Stub(channels[1])
    for channel in channels:
        channel.close()


def lone(each: Asked, stub: Stub) -> Answers:
    """Ask one thing and wait for all of its answer."""
    if each.kind == "sample":
        return parts(each.kind, stub.Sample(each.request, timeout=60))
    if each.kind == "open_denoise":
        road = Road(stub)
        road.add(1, each)
        road.send()
        road.read()
        return parts(each.kind, road.answers[1])
    return parts(each.kind, [getattr(stub, METHODS[each.kind])(each.request, timeout=60)])


class Road:
    """How one request of a crowd gets its answer: over a call of its own, or as one of many on a stream."""

    def __init__(self, stub: Stub) -> None:
        self.wire: list[pb.StreamRequest] = []
        self.answers: dict[int, list[Any]] = {}
        self._asked: dict[int, Asked] = {}
        self._stub = stub

    def add(self, number: int, each: Asked) -> None:
        """Ask for it on this stream."""
        self.wire += messages(number, each)
        self.answers[number] = []
        self._asked[number] = each

    def send(self) -> None:
        """Open the stream and ask everything at once."""
        self._responses = self._stub.Stream(iter(self.wire), timeout=60)

    def read(self) -> None:
        """Take all answers; what nobody is to get an answer to is listened to as well."""
        for response in self._responses:
            if response.id in self.answers:
                answers, each = self.answers[response.id], self._asked[response.id]
                if response.HasField("error"):  # a loop that was left half-way ends when the client stops sending
                    assert each.kind == "open_denoise", response.error.message
                    assert len(answers) == 1 + each.steps, response.error.message
                else:
                    answers.append(getattr(response, response.WhichOneof("response")))
            elif response.id >= _WRONG:
                assert response.error.code


_TIMED, _CANCELLED, _WRONG = 1000, 2000, 3000
"""Where ids of requests begin that are not compared."""


def crowded(crowd: list[Asked], mistakes: list[Asked], dice: random.Random, stub: Stub) -> list[Answers]:
    """Ask everything at once: half over calls of their own, half over two streams; among them requests that are wrong,
    that are cancelled and that have too little time, over either.
    """
    roads = [Road(stub), Road(stub)]
    calls: dict[int, Callable[[], Answers]] = {}
    doomed = []
    for number, each in enumerate(crowd):
        road = roads[number % 2]
        if each.kind == "open_denoise" or dice.random() < 0.5:
            road.add(number, each)
        elif each.kind == "sample":
            call = stub.Sample(each.request, timeout=60)
            calls[number] = partial(parts, "sample", call)
        else:
            future = getattr(stub, METHODS[each.kind]).future(each.request, timeout=60)
            calls[number] = partial(_result, each.kind, future)
        if number % 10 == 2:
            road.wire.append(pb.StreamRequest(id=_TIMED + number, sample=LONG, timeout=Duration(nanos=20_000_000)))
            road.wire.append(pb.StreamRequest(id=_CANCELLED + number, sample=LONG))
            doomed += [stub.Sample(LONG, timeout=0.02), stub.Sample(LONG, timeout=60)]
        if number % 10 == 6:
            road.wire.append(pb.StreamRequest(id=_CANCELLED + number - 4, cancel=pb.Cancel()))
            doomed[-1].cancel()
    for number, each in enumerate(mistakes):
        roads[number % 2].wire += messages(_WRONG + number, each)
    for road in roads:
        road.send()
    for road in roads:
        road.read()
    for call in doomed:
        with contextlib.suppress(grpc.RpcError):  # cancelled, or out of time; it matters to nobody but its neighbours
            list(call)
    streamed = roads[0].answers | roads[1].answers
    return [
        calls[number]() if number in calls else parts(each.kind, streamed[number]) for number, each in enumerate(crowd)
    ]


def _result(kind: str, future: Any) -> Answers:
    return parts(kind, [future.result()])


def prove(servers: tuple[Stub, Stub], requests: int) -> dict[str, int]:
    """Compare at least so many requests; how many there were, of each kind."""
    quiet, busy = servers
    compared: Counter[str] = Counter()

    @settings(
        deadline=None,
        max_examples=-(-requests // CROWD),
        phases=[Phase.reuse, Phase.generate],  # making crowds smaller takes minutes, and what differs is named anyway
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(
        crowd=st.lists(asked, min_size=CROWD, max_size=CROWD),
        mistakes=st.lists(wrong, max_size=3),
        dice=st.randoms(use_true_random=False),
    )
    def crowds_change_nothing(crowd: list[Asked], mistakes: list[Asked], dice: random.Random) -> None:
        want = [lone(each, quiet) for each in crowd]
        got = crowded(crowd, mistakes, dice, busy)
        for each, one, other in zip(crowd, want, got, strict=True):
            assert one
            assert equal(one, other), f"{each.kind}: {each.request}"
            compared[each.kind] += 1

    crowds_change_nothing()
    return compared


def scrape(process: Process) -> list[str]:
    """All of its metrics at one time."""
    address = process.line("listening")["http"]
    with urllib.request.urlopen(f"http://{address}/metrics") as response:
        lines: list[str] = response.read().decode().splitlines()
    return lines


def value(lines: list[str], series: str) -> float:
    """A metric's value, summed over its labels."""
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{series}[{{ ]", line))


def test_a_thousand_requests_have_the_bytes_of_lone_runs(servers: tuple[Stub, Stub], busy: Process) -> None:
    """Every kind of request, over calls and streams, in crowds with cancels, deadlines and mistakes, against another
    process that is asked one thing at a time: equal to the last byte, and the server's own checks agree.
    """
    compared = prove(servers, 1000)
    assert sum(compared.values()) >= 1000
    assert compared.keys() == {"sample", "encode", "decode", "score", "denoise_step", "open_denoise"}
    lines = scrape(busy)
    rows, batches = value(lines, "latentd_batch_rows_sum"), value(lines, "latentd_batch_rows_count")
    assert rows / batches > 2, "requests did ride together"
    checks = value(lines, "latentd_self_checks_total")
    assert checks > 0
    assert value(lines, 'latentd_self_checks_total{.*result="match".*}') == checks


def test_a_restart_changes_no_byte(models_root: Path, tmp_path: Path) -> None:
    """A process that finds the certificates of the one before it gives the same bytes under the same class."""
    requests = [
        pb.SampleRequest(model="tiny-diffusion", seed=3, sample_count=5, diffusion=pb.DiffusionOptions(sampler=name))
        for name in SAMPLERS
    ]
    requests += [pb.SampleRequest(model=model, seed=3, sample_count=5) for model in ("tiny-vae", "tiny-gan")]
    answers = []
    for _ in range(2):
        process = contextlib.contextmanager(_process)(models_root, "--cache", str(tmp_path))
        with process as running, running.channel() as channel:
            found = [_all(Stub(channel).Sample(request, timeout=60)) for request in requests]
        kept = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
        assert len(kept) == 6, "one certificate a graph, written once"
        answers.append((found, kept))
    assert answers[0] == answers[1]


def _all(responses: Any) -> tuple[str, Answers]:
    first, *rest = responses
    return first.accepted.determinism_class, parts("sample", rest)


@pytest.mark.soak
def test_ten_thousand_requests_have_the_bytes_of_lone_runs(servers: tuple[Stub, Stub]) -> None:
    """The same for longer."""
    assert sum(prove(servers, 10_000).values()) >= 10_000


def test_both_servers_promise_the_same(servers: tuple[Stub, Stub]) -> None:
    """Equal bytes are what equal classes promise, so the two processes name one class for every model."""
    for model in ("tiny-diffusion", "tiny-vae", "tiny-gan", "tiny-latents"):
        names = {next(iter(stub.Sample(pb.SampleRequest(model=model)))).accepted.determinism_class for stub in servers}
        assert len(names) == 1
        assert names.pop().startswith("certified-cpu-")
