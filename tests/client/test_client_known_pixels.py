"""Inpainting, image-to-image and guidance intervals through the library and `latentctl`: what is sent and put back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import SHAPE, FakeServer, Fault
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd_client.commands import app
from PIL import Image
from typer.testing import CliRunner

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (4, *SHAPE)).astype(np.float32)
MASKS = RNG.integers(0, 2, (4, *SHAPE)).astype(bool)


def sent(server: FakeServer, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What a request says is known, and where."""
    known = server.requests("Sample")[index].diffusion.known
    return tensor.decode(known.samples), tensor.decode(known.mask)


def test_known_pixels_and_mask_are_sent(client: Any, server: FakeServer) -> None:
    """Truth values and integers travel as bytes; one image and one mask, were it of one channel, get a batch axis."""
    client.sample("toy-diffusion", 4, known=IMAGES, mask=MASKS)
    values, mask = sent(server)
    np.testing.assert_array_equal(values, IMAGES)
    np.testing.assert_array_equal(mask, MASKS.astype(np.uint8))
    client.sample("toy-diffusion", 4, known=IMAGES[0], mask=MASKS[0, :1])
    values, mask = sent(server, 1)
    assert (values.shape, mask.shape, mask.dtype) == ((1, *SHAPE), (1, 1, *SHAPE[1:]), np.uint8)
    client.sample("toy-diffusion", 4, known=IMAGES[0], mask=MASKS[0].astype(int).tolist())
    assert sent(server, 2)[1].dtype == np.uint8


def test_latents_can_be_asked_for(client: Any, server: FakeServer) -> None:
    """`output="latent"` is the wire's LATENT."""
    client.sample("toy-diffusion", output="latent")
    assert server.requests("Sample")[0].output_mode == pb.OUTPUT_MODE_LATENT


def test_known_pixels_are_cut_with_their_samples(client: Any, server: FakeServer) -> None:
    """When a stream breaks, what is asked for again comes with its own pixels; the result knows all of them."""
    server.fail("Sample", Fault(after=3))  # 1 and 3 have arrived
    samples = client.sample("toy-diffusion", 4, seed=3, known=IMAGES, mask=MASKS)
    values, mask = sent(server, -1)
    np.testing.assert_array_equal(values, IMAGES[2:3])
    np.testing.assert_array_equal(mask, MASKS[2:3])
    resolved = samples.resolved_request.diffusion.known
    np.testing.assert_array_equal(tensor.decode(resolved.samples), IMAGES)
    assert "known" not in samples.facts()["request"].get("diffusion", {})


def test_latentctl_reads_known_pixels_and_mask(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pictures, white being known, or from arrays; a mask of another size is refused before anything is sent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTD_SERVER", server.target)
    half = np.zeros(SHAPE[1:], np.uint8)
    half[:, :2] = 255
    Image.fromarray(half).save("half.png")
    np.save("mask.npy", MASKS[0])
    np.save("wrong.npy", MASKS[:, :, :2])

    def run(mask: str) -> Any:
        return CliRunner().invoke(app, ["sample", "toy-diffusion", "-n", "2", "--known", "half.png", "--mask", mask])

    assert run("half.png").exit_code == 0
    values, mask = sent(server)
    assert values.shape == (1, *SHAPE)
    np.testing.assert_array_equal(mask[0, 0], half // 255)
    assert run("mask.npy").exit_code == 0
    np.testing.assert_array_equal(sent(server, 1)[1], MASKS[:1])
    refused = run("wrong.npy")
    assert refused.exit_code != 0
    assert "mask must have shape [1, 4, 4]" in refused.stderr
    assert len(server.requests("Sample")) == 2


def test_latentctl_starts_from_a_picture(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image-to-image: the file is the start of every sample, and the strength is sent as it was given."""
    monkeypatch.setenv("LATENTD_SERVER", server.target)
    path, out = tmp_path / "start.npy", tmp_path / "out.png"
    np.save(path, IMAGES[0])
    arguments = ["sample", "toy-diffusion", "-n", "2", "--start", str(path), "--strength", "0.25", "-o", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    start = server.requests("Sample")[0].diffusion.start
    np.testing.assert_array_equal(tensor.decode(start.samples), IMAGES[:1])
    assert start.strength == 0.25


@pytest.mark.parametrize("interval", [(None, 7), (2, None), (None, None)])
def test_an_interval_may_be_open(client: Any, server: FakeServer, interval: tuple[int | None, int | None]) -> None:
    """An end that is None is not sent: it is the model's own."""
    client.sample("toy-diffusion", guidance=2, guidance_interval=interval)
    sent_options = server.requests("Sample")[0].diffusion
    assert sent_options.HasField("guidance_interval")
    low, high = interval
    assert sent_options.guidance_interval == pb.GuidanceInterval(min_timestep=low, max_timestep=high)
