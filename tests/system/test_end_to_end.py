"""From handwritten digits to pixels at a client: the real trainer, the real server without torch, the real client."""

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from latentd_client import Client, LatentdError, MethodUnsupported, Preview, Samples
from processes import Running, start_server

FAMILIES = ("vae", "gan", "diffusion")


def test_torch_cannot_be_imported_where_the_server_runs(server_python: Path) -> None:
    """The server's environment holds neither torch nor what would bring it."""
    for module in ("torch", "safetensors", "sklearn", "onnxscript"):
        done = subprocess.run([server_python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        assert "ModuleNotFoundError" in done.stderr, f"{module} is there"


def test_every_method_of_every_family_answers(server: Running) -> None:
    """Sample, Encode, Decode, DenoiseStep, Score and a client-driven loop, through the library."""
    with Client(server.target) as client:
        assert [model.name for model in client.models()] == ["tiny-diffusion@1", "tiny-gan@1", "tiny-vae@1"]
        drawn = {family: client.sample(f"tiny-{family}", 6, seed=1, label=list(range(6))) for family in FAMILIES}
        for samples in drawn.values():
            assert samples.array.shape == (6, 1, 8, 8)
            assert np.isfinite(samples.array).all()
            assert samples.labels is not None
            assert samples.labels.tolist() == list(range(6))
        images = drawn["diffusion"].array
        encoded = client.encode("tiny-vae", images)
        assert encoded.mean is not None
        assert client.decode("tiny-vae", encoded.latents, label=2).array.shape == images.shape
        noise = client.encode("tiny-diffusion", images, label=1, steps=5).latents
        assert client.decode("tiny-diffusion", noise, label=1, steps=5).array.shape == images.shape
        step = client.denoise_step("tiny-diffusion", noise, 999, 899, label=1)
        assert step.state is not None
        real = client.score("tiny-gan", images, label=3).array
        assert ((real >= 0) & (real <= 1)).all()
        assert (client.score("tiny-vae", images, label=3, seed=0).array < 0).all()
        inverted = client.encode("tiny-gan", images, label=2).latents
        assert client.decode("tiny-gan", inverted, label=2).array.shape == images.shape
        bound = client.score("tiny-diffusion", images, label=3, seed=0, timestep_count=4).array
        assert np.isfinite(bound).all()
        with pytest.raises(
            MethodUnsupported,
            match="tiny-gan@1 does not support DenoiseStep; it supports Sample, Encode, Decode, Score",
        ):
            client.denoise_step("tiny-gan", images, 999, 899, label=1)
        with client.denoise_loop("tiny-diffusion", 2, seed=4, steps=4, label=5) as loop:
            states = [step.state for step in loop]
        assert states[-1] is not None
        want = client.sample("tiny-diffusion", 2, seed=4, steps=4, label=5).array
        assert states[-1].tobytes() == want.tobytes(), "a loop that follows the schedule is Sample"


def test_decoding_the_latents_of_a_sample_gives_the_sample(server: Running) -> None:
    """Sample of a one-shot model is Decode of the latents it reports."""
    with Client(server.target) as client:
        for family in ("vae", "gan"):
            drawn = client.sample(f"tiny-{family}", 5, seed=3)
            assert drawn.latents is not None
            assert drawn.labels is not None
            again = client.decode(f"tiny-{family}", drawn.latents, label=drawn.labels.tolist())
            assert again.array.tobytes() == drawn.array.tobytes()


def test_bytes_survive_a_restart_a_replica_and_a_crowd(
    server_python: Path, trained: Path, server: Running, tmp_path: Path
) -> None:
    """Two processes give equal bytes and equal determinism classes, one of them busy with many other requests."""

    def ask(client: Client) -> list[Samples]:
        return [
            client.sample("tiny-diffusion", 3, seed=11, steps=7, sampler="ddpm"),
            client.sample("tiny-diffusion", 2, seed=12, steps=9, guidance=2.0, label=4),
            client.sample("tiny-vae", 9, seed=13, output="draw"),
        ]

    stop = threading.Event()

    def disturb(number: int) -> None:
        with Client(server.target) as client:
            while not stop.is_set():
                client.sample("tiny-diffusion", 1 + number, seed=number, steps=5 + number, sampler="dpmpp-2m-sde")

    crowd = [threading.Thread(target=disturb, args=(number,)) for number in range(4)]
    replica = start_server(server_python, trained, tmp_path / "replica.log")
    try:
        with Client(replica.target) as client:
            quiet = ask(client)
        for thread in crowd:
            thread.start()
        with Client(server.target) as client:
            busy = ask(client)
    finally:
        stop.set()
        for thread in crowd:
            thread.join()
        assert replica.stop() == 0
    for one, other in zip(quiet, busy, strict=True):
        assert one.determinism_class == other.determinism_class
        assert one.array.tobytes() == other.array.tobytes()


def test_sigterm_loses_nothing_that_was_accepted(server: Running) -> None:
    """A stream under way when SIGTERM comes is finished whole, new work is refused, and the server exits with 0."""
    with Client(server.target, timeout=60) as client:
        total, received = 40, []
        events = client.sample_stream("tiny-diffusion", total, seed=1, steps=200, previews=1)
        for event in events:
            if isinstance(event, Preview):
                server.process.send_signal(signal.SIGTERM)
                break
        received = [event for event in events if isinstance(event, Samples)]
        assert sorted(int(i) for samples in received for i in samples.indices) == list(range(total))
        with pytest.raises(LatentdError):
            client.sample("tiny-vae", 1, timeout=2)
    assert server.process.wait(timeout=60) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_crashing_client_leaves_the_others_alone(server: Running) -> None:
    """A client killed in the middle of a stream frees its lanes and changes no neighbour's byte."""
    code = (
        "import sys; from latentd_client import Client\n"
        "events = Client(sys.argv[1]).sample_stream('tiny-diffusion', 64, seed=5, steps=1000, previews=1)\n"
        "[print('under way', flush=True) for _ in events]"
    )
    victim = subprocess.Popen([sys.executable, "-c", code, server.target], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    with Client(server.target) as client:
        want = client.sample("tiny-diffusion", 4, seed=6, steps=20).array.tobytes()
        assert victim.stdout.readline()
        victim.kill()
        victim.wait()
        victim.stdout.close()
        assert client.sample("tiny-diffusion", 4, seed=6, steps=20).array.tobytes() == want
        # The victim's 64,000 evaluations would keep the device busy for long; they are gone, and counted.
        metrics = _metrics(server)
        while metrics["latentd_queue_depth"] or metrics["latentd_backlog_evaluations"]:
            metrics = _metrics(server)
        assert metrics["latentd_wasted_evaluations_total"] > 0
        assert metrics["latentd_evaluations_total"] < 64_000


def _metrics(server: Running) -> dict[str, float]:
    """The series without labels, and sums over labels of those with."""
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("latentd_"):
            name, value = line.rsplit(" ", 1)
            found[name.split("{")[0]] = found.get(name.split("{")[0], 0.0) + float(value)
    return found


def test_the_command_line_client_draws(server: Running, tmp_path: Path, server_python: Path) -> None:
    """`latentctl` from an environment without torch writes a picture and says as JSON how to repeat it."""
    picture = tmp_path / "digits.png"
    command = [server_python.with_name("latentctl"), "--server", server.target, "--json"]
    done = subprocess.run(
        [*command, "sample", "tiny-gan", "-n", "10", "--seed", "7", "--label", "each", "--out", picture],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seed"] == 7
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_healthz_follows_the_server(server: Running) -> None:
    """`/healthz` is 200 while the server serves."""
    with urllib.request.urlopen(f"http://{server.http}/healthz", timeout=10) as response:
        assert response.status == 200
