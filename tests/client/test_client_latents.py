"""The client and a model that walks over another model's latents, on a server in this process."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from latentd_client import Client, Preview
from latentd_client.resume import part_of
from typer.testing import CliRunner, Result

sys.path.append(str(Path(__file__).parents[1] / "server"))

from bundles import SHAPE, write_vae
from latent_bundles import CLIP, write_latent_diffusion
from latentd_client.commands import app
from live import Live, gathered

L = "tiny-latents"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with the VAE and diffusion over its latents."""
    root = tmp_path_factory.mktemp("latent-models")
    write_vae(root)
    write_latent_diffusion(root)
    running = Live(root, self_check_interval=0)
    yield running
    running.stop()


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    """A client of it."""
    with Client(live.serving.addresses["grpc"]) as client:
        yield client


def test_a_loop_over_latents_gives_the_latents_of_sample(client: Client) -> None:
    """Nobody has to say that a loop is about latents: its steps are on the walk's scale and end where Sample ends."""
    walk = {"seed": 3, "steps": 5, "sampler": "ddpm"}
    with client.denoise_loop(L, 2, **walk) as loop:
        loop.override(state=loop.step().state)
        *_, last = loop
    latents = client.sample(L, 2, output="latent", **walk)
    np.testing.assert_array_equal(last.state, latents.array)
    assert last.value_range == latents.value_range == (-CLIP, CLIP)
    step = client.denoise_step(L, last.state[0], 50, 20, label=1)
    assert step.value_range == (-CLIP, CLIP)
    assert step.state is not None
    assert step.state.shape == (1, 3)


def test_previews_are_latents_and_samples_images(client: Client) -> None:
    """Each says the range of what it holds."""
    events = list(client.sample_stream(L, 2, seed=3, steps=6, previews=1))
    assert {event.value_range for event in events if isinstance(event, Preview)} <= {(-CLIP, CLIP)}
    assert events[-1].value_range == (-1, 1)
    assert events[-1].array.shape[1:] == SHAPE


def test_a_walk_between_seeds_is_one_between_noises(client: Client) -> None:
    """The codes that samples were decoded from are not what Decode of the walk's model takes: that is their noise."""
    ends = [client.sample(L, 1, seed=seed, label=0, steps=5).array for seed in (1, 2)]
    noises = [client.encode(L, end, label=0, steps=5).array[0] for end in ends]
    between = client.interpolate(L, 1, 2, 4, label=0, steps=5)
    expected = client.interpolate(L, *noises, 4, label=0, steps=5)
    np.testing.assert_array_equal(between.latents[0], noises[0])
    np.testing.assert_array_equal(between.array, expected.array)


def test_what_a_broken_stream_left_is_asked_for_with_the_same_bytes(live: Live, client: Client) -> None:
    """A part of a request that starts from images, one for each sample, is that part of the whole."""
    images = np.random.default_rng(5).uniform(-1, 1, (4, *SHAPE)).astype(np.float32)
    whole = client.sample(L, 4, seed=3, start=images, strength=0.5, output="draw")
    part = gathered(live.stub.Sample(part_of(whole.resolved_request, 1, 3)))
    assert whole.labels is not None
    assert whole.latents is not None
    assert part == b"".join(
        whole.array[i].tobytes() + bytes([whole.labels[i]]) + whole.latents[i].tobytes() for i in (1, 2)
    )


def test_latentctl_denoise_says_why_there_are_no_pictures(live: Live, tmp_path: Path) -> None:
    """Steps among latents cannot be shown; the answer names the decoder and the command that shows something."""
    gif = tmp_path / "steps.gif"
    result = CliRunner().invoke(app, ["--server", live.serving.addresses["grpc"], "denoise", L, "--gif", str(gif)])
    assert result.exit_code == 2
    assert "latents of tiny-vae@1" in result.output
    assert not gif.exists()


def test_latentctl_does_not_take_codes_for_noise(live: Live, tmp_path: Path) -> None:
    """What `sample` wrote is decoded by the model that decodes, what `encode` wrote by the one that walks."""
    drawn, noise, out = (str(tmp_path / name) for name in ("drawn.npz", "noise.npz", "out.npz"))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["--server", live.serving.addresses["grpc"], *arguments])

    assert run("sample", L, "-n", "2", "-o", drawn).exit_code == 0
    for refused in (run("decode", L, drawn, "-o", out), run("interpolate", L, drawn, drawn, "--label", "0")):
        assert refused.exit_code == 2
        assert "codes for tiny-vae@1" in refused.output
    assert run("decode", "tiny-vae", drawn, "-o", out).exit_code == 0
    assert run("encode", L, drawn, "--label", "0", "-o", noise).exit_code == 0
    assert run("decode", L, noise, "--label", "0", "-o", out).exit_code == 0
