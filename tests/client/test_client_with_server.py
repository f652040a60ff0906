"""The client against the real server in a process of its own, with tiny bundles."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import wait_until
from latentd_client import (
    AsyncClient,
    Client,
    FieldsInvalid,
    MethodUnsupported,
    ModelNotFound,
    Preview,
    Retries,
    Samples,
    ServerUnavailable,
)
from latentd_client.resume import assemble

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

import bundles
from live import Live


@dataclass
class Process:
    """A server process that can be killed and started again on its port."""

    models: Path
    log: Path
    port: int
    http_port: int
    running: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until every model is served."""
        command = [sys.executable, "-m", "latentd_server", "--models", str(self.models), "--listen", self.target]
        command += ["--http", f"127.0.0.1:{self.http_port}", "--device", "cpu", "--threads", "1"]
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(command, stdout=log, stderr=log)
        give_up_s = time.monotonic() + 60
        with Client(self.target, retries=Retries(max_attempts=1)) as client:
            while True:
                assert self.running.poll() is None, self.log.read_text()
                assert time.monotonic() < give_up_s, self.log.read_text()
                with contextlib.suppress(ServerUnavailable):
                    models = client.models(timeout=5.0)
                    if models and all(model.state == "active" for model in models):
                        return
                time.sleep(0.05)

    def end(self, how: signal.Signals) -> None:
        """End it: SIGKILL without warning, SIGTERM by a drain."""
        assert self.running is not None
        self.running.send_signal(how)
        self.running.wait()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for this file."""
    root = tmp_path_factory.mktemp("served")
    (root / "models").mkdir()
    bundles.write_all(root / "models")
    process = Process(root / "models", root / "log", *free_ports(2))
    process.start()
    yield process
    if process.running is not None and process.running.poll() is None:
        process.end(signal.SIGKILL)


@pytest.fixture
def client(process: Process) -> Iterator[Client]:
    """A client of it."""
    with Client(process.target) as client:
        yield client


@pytest.mark.parametrize("model", ["tiny-vae", "tiny-gan", "tiny-diffusion"])
def test_every_family_samples_and_reproduces(client: Client, model: str) -> None:
    """The same client call works for each family, and the result can be drawn again byte for byte."""
    samples = client.sample(model, 5)
    assert samples.array.shape == (5, *bundles.SHAPE)
    assert samples.labels is not None
    np.testing.assert_array_equal(samples.reproduce(client).array, samples.array)


def test_samples_do_not_depend_on_the_request_they_came_in(client: Client) -> None:
    """Five samples are the same in one request as in two."""
    whole = client.sample("tiny-diffusion", 5, seed=7, steps=6)
    tail = client.sample("tiny-diffusion", 3, seed=7, steps=6, first_index=2)
    np.testing.assert_array_equal(whole.array[2:], tail.array)
    np.testing.assert_array_equal(whole.labels[2:], tail.labels)


def test_a_loop_gives_the_bytes_of_sample(client: Client) -> None:
    """Taking the steps of the schedule oneself ends in the very bytes of Sample, for a one-step solver."""
    samples = client.sample("tiny-diffusion", 3, seed=7, steps=6, sampler="ddpm")
    with client.denoise_loop("tiny-diffusion", 3, seed=7, steps=6, sampler="ddpm") as loop:
        assert len(loop.remaining) == 6
        *_, last = loop
        assert loop.accepted.determinism_class == samples.determinism_class
    assert last.timestep == -1
    np.testing.assert_array_equal(last.state, samples.array)


def test_a_loop_can_be_steered(client: Client) -> None:
    """Timesteps can be skipped and the state replaced; a refused step leaves the loop where it was."""
    with client.denoise_loop("tiny-diffusion", 2, seed=7, steps=6) as loop:
        skipped = loop.remaining[1]
        assert loop.step(next_timestep=skipped).timestep == skipped
        with pytest.raises(FieldsInvalid):
            loop.step(next_timestep=loop.timestep + 1)
        step = loop.step(state=np.zeros((2, *bundles.SHAPE)))
        assert step.state is not None
        assert list(loop)[-1].timestep == -1


def test_previews_come_from_the_real_server(client: Client) -> None:
    """A diffusion request sends its estimate of x0 on the way, within the model's range."""
    events = list(client.sample_stream("tiny-diffusion", 2, seed=7, steps=6, previews=2))
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.total_steps for preview in previews] == [6] * len(previews)
    assert isinstance(events[-1], Samples)


def test_encode_decode_score_interpolate(client: Client) -> None:
    """The other methods work on the families that have them."""
    samples = client.sample("tiny-vae", 3, seed=7, label=1)
    encoded = client.encode("tiny-vae", samples.array)
    assert encoded.log_variance is not None
    decoded = client.decode("tiny-vae", samples.latents, label=1)
    np.testing.assert_array_equal(decoded.array, samples.array)
    assert client.score("tiny-vae", samples.array).kind == "evidence-lower-bound"
    assert client.interpolate("tiny-vae", 1, 2, 4).array.shape == (4, *bundles.SHAPE)
    assert client.interpolate("tiny-diffusion", 1, 2, 4, label=2, steps=4).array.shape == (4, *bundles.SHAPE)
    step = client.denoise_step("tiny-diffusion", np.zeros((2, *bundles.SHAPE)), 50, 20, label=1)
    assert step.state is not None


def test_errors_are_the_real_servers(client: Client) -> None:
    """What the real server refuses arrives as the exception of its reason, with every violation."""
    with pytest.raises(ModelNotFound):
        client.sample("nope")
    with pytest.raises(MethodUnsupported):
        client.encode("tiny-gan", np.zeros(bundles.SHAPE))
    with pytest.raises(FieldsInvalid) as caught:
        client.sample("tiny-vae", 2, label=77, steps=3, temperature=-1.0)
    assert {violation.path.split(".")[0] for violation in caught.value.violations} == {
        "condition",
        "diffusion",
        "temperature",
    }


async def test_the_asynchronous_client_gets_the_same_bytes(client: Client, process: Process) -> None:
    """Both clients agree, and agree with a crowd of other requests about."""
    alone = client.sample("tiny-diffusion", 4, seed=7, steps=6)
    async with AsyncClient(process.target) as other:
        crowd = await asyncio.gather(*(other.sample("tiny-diffusion", 4, seed=7 + i, steps=6 + i) for i in range(6)))
    np.testing.assert_array_equal(crowd[0].array, alone.array)


def test_a_killed_server_costs_nothing_but_time(process: Process) -> None:
    """A server killed in the middle of a stream and of a loop, and started again: both go on, with the same bytes."""
    arguments: dict[str, Any] = {"seed": 7, "steps": 100, "sampler": "ddpm"}
    patient = Retries(max_attempts=60, max_backoff_s=0.5)
    with Client(process.target, retries=patient) as client:
        whole = client.sample("tiny-diffusion", 64, **arguments)
        with client.denoise_loop("tiny-diffusion", 64, **arguments) as loop:
            for _ in range(5):
                loop.step()
            events = client.sample_stream("tiny-diffusion", 64, **arguments)
            seen = [next(events)]
            process.end(signal.SIGKILL)
            process.start()
            *_, last = loop
        parts = [event for event in (*seen, *events) if isinstance(event, Samples)]
    np.testing.assert_array_equal(assemble(parts, 64).array, whole.array)
    np.testing.assert_array_equal(last.state, whole.array)


def test_a_diffusion_model_is_scored_by_its_bound(client: Client) -> None:
    """In nats and in bits for each element, with the parts that it consists of; fewer timesteps cost less."""
    samples = client.sample("tiny-diffusion", 2, seed=7, guidance=2, guidance_interval=(20, 60))
    assert 2 * 10 < samples.stats.evaluations < 4 * 10
    scores = client.score("tiny-diffusion", samples.array, draws=2, timestep_count=12)
    assert scores.stats.evaluations == 2 * 2 * 12
    assert scores.kind == "evidence-lower-bound"
    assert scores.terms is not None
    parts = scores.terms.prior + scores.terms.diffusion + scores.terms.reconstruction
    np.testing.assert_array_equal(scores.values, -parts)
    assert scores.bits_per_dimension is not None
    np.testing.assert_allclose(scores.bits_per_dimension, parts / (scores.dimensions * np.log(2)))


def every_kind(client: AsyncClient, count: int) -> list[Any]:
    """So many calls of every kind, none of which draws by chance; not yet awaited."""
    calls: list[Any] = []
    for seed in range(count):
        noise = np.random.default_rng(seed).uniform(-1, 1, bundles.SHAPE).astype(np.float32)
        calls += [
            client.encode("tiny-vae", noise, seed=seed),
            client.decode("tiny-vae", np.zeros(bundles.LATENT), seed=seed, output="draw"),
            client.score("tiny-vae", noise, seed=seed),
            client.score("tiny-diffusion", noise, seed=seed, timestep_count=5),
            client.denoise_step("tiny-diffusion", noise, 50, 20, label=1, eta=1.0, seed=seed),
        ]
    return calls


def tensors(answer: Any) -> list[Any]:
    """What an answer holds in bytes."""
    return [getattr(answer, name, None) for name in ("array", "log_variance", "values", "state", "denoised", "noise")]


async def test_shared_streams_change_no_answer(process: Process) -> None:
    """250 calls of every kind at a time, with refused ones among them, give the bytes and the errors of plain calls."""

    def everything(client: AsyncClient) -> list[Any]:
        wrong = [
            client.decode("tiny-vae", np.zeros((2, 99)), label=1),
            client.score("tiny-vae", np.full(bundles.SHAPE, np.nan)),
            client.encode("tiny-gan", np.zeros(bundles.SHAPE)),
        ]
        return [*every_kind(client, 50), *wrong]

    async with AsyncClient(process.target) as plain, AsyncClient(process.target, multiplexed=True) as shared:
        wanted = await asyncio.gather(*everything(plain), return_exceptions=True)
        got = await asyncio.gather(*everything(shared), return_exceptions=True)
    for ours, theirs in zip(got, wanted, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(theirs, Exception):
            assert str(ours) == str(theirs)
        for one, other in zip(tensors(ours), tensors(theirs), strict=True):
            np.testing.assert_array_equal(one, other)
    assert {type(theirs) for theirs in wanted[250:]} <= {FieldsInvalid, MethodUnsupported}


async def test_a_server_may_take_few_requests_on_a_stream(tmp_path: Path) -> None:
    """Its limit on one stream is found and kept; no caller hears of it, as none would who makes plain calls."""
    bundles.write_all(tmp_path)
    server = Live(tmp_path, max_stream_requests=4, max_streams=8)
    try:
        async with AsyncClient(server.serving.addresses["grpc"], multiplexed=True) as client:
            await client.model("tiny-vae")
            answers = await asyncio.gather(
                *(client.decode("tiny-vae", np.zeros((2, bundles.LATENT)), label=1) for _ in range(100))
            )
            assert len(answers) == 100
            assert client._multiplexer is not None
            assert client._multiplexer._limit == 4
    finally:
        await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
async def test_callers_who_share_a_stream_outlive_their_server(process: Process, how: signal.Signals) -> None:
    """Under steady load the server is ended and another started on its port: every call is answered, and alike."""
    patient = Retries(max_attempts=60, max_backoff_s=0.5)
    answers: list[Any] = []
    over = asyncio.Event()
    async with AsyncClient(process.target, retries=patient, multiplexed=True) as client:

        async def ask() -> None:
            while not over.is_set():
                answers.append(await client.decode("tiny-vae", np.zeros(bundles.LATENT), label=1))

        askers = [asyncio.create_task(ask()) for _ in range(20)]
        await asyncio.to_thread(wait_until, lambda: len(answers) > 100, 60)
        await asyncio.to_thread(process.end, how)
        await asyncio.to_thread(process.start)
        before = len(answers)
        await asyncio.to_thread(wait_until, lambda: len(answers) > before + 100, 60)
        over.set()
        await asyncio.gather(*askers)
    assert len({answer.array.tobytes() for answer in answers}) == 1
