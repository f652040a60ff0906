"""Diffusion over a VAE's latents: trained, exported, checked, and served as images in one call."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentd.v1 import model_pb2
from latentd_client import Client
from latentd_trainer import bundle as bundles
from latentd_trainer import cli, encoded
from latentd_trainer.checkpoint import build_family, load_run, read_record
from latentd_trainer.data import load, scale
from latentd_trainer.served import EvaluationError, Graphs, draw_variants
from latentd_trainer.spec import Meaning, Role, Source
from live import Live
from typer.testing import CliRunner

VAE = ["--steps", "30", "--set", "width=8", "--set", "hidden=32", "--set", "latent=8"]
WALK = ["--steps", "80", "--set", "vector_width=32", "--set", "vector_blocks=2", "--set", "timestep_count=50"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a VAE and of diffusion over its latents, and their bundles, all made by the commands."""
    root = tmp_path_factory.mktemp("latent-diffusion")
    for steps in (
        ("fit", "vae", "--out", root / "vae", *VAE),
        ("export", root / "vae", "--name", "own-vae", "--models", root / "models"),
        ("fit", "diffusion", "--latents-of", root / "models/own-vae", "--out", root / "walk", *WALK),
        ("export", root / "walk", "--name", "own-ldm", "--models", root / "models"),
        ("verify", root / "models/own-ldm/1"),
    ):
        done = run(*steps)
        assert done.exit_code == 0, done.output
    return root


def test_latents_are_standardised_draws(root: Path) -> None:
    """Of q(z | x), sixteen an image, with its label; mean and deviation lead back to the decoder's scale."""
    dataset = encoded.load_data("digits", str(root / "models/own-vae/1"))
    split, info = dataset.encoded, dataset.info.latents
    assert split is not None
    assert info is not None
    count = len(dataset.train.labels)
    assert split.values.shape == (16 * count, 8)
    np.testing.assert_allclose(split.values.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(split.values.std(0), 1, atol=1e-5)
    assert np.array_equal(split.labels[count : 2 * count], dataset.train.labels)
    graphs = Graphs(root / "models/own-vae/1", bundles.read(root / "models/own-vae/1"), 1)
    images = scale(dataset.train.pixels[:8], dataset.info.levels)
    posterior = graphs.run(Role.ROLE_ENCODER, {Source.SOURCE_SAMPLE: images}, np.random.default_rng(0))
    means, deviations = (
        posterior[Meaning.MEANING_LATENT_MEAN],
        np.exp(posterior[Meaning.MEANING_LATENT_LOG_VARIANCE] / 2),
    )
    draws = split.values.reshape(16, count, 8)[:, :8] * np.array(info.deviations) + np.array(info.means)
    assert np.abs((draws - means) / deviations).max() < 5
    assert np.abs(split.values).max() <= info.bound


def test_the_bundle_says_whose_latents_they_are(root: Path) -> None:
    """The latent space names the VAE, its digest and the scale; samples are the VAE's."""
    vae, walk = (bundles.read(root / "models" / name / "1").model for name in ("own-vae", "own-ldm"))
    info = read_record(root / "walk").info.latents
    assert info is not None
    space = walk.latent_space
    assert (space.decoder, space.decoder_digest) == ("own-vae@1", vae.digest)
    assert (tuple(space.scales), tuple(space.shifts)) == (info.deviations, info.means)
    assert (list(walk.sample_spec.shape), list(walk.latent_spec.shape)) == ([1, 8, 8], [8])
    assert str(root) not in (root / "models/own-ldm/1/record.json").read_text()
    told = {each.method: each.description for each in walk.card.capabilities}
    assert "over latents of own-vae@1" in told[model_pb2.Model.METHOD_SAMPLE]
    assert "q(x_t" not in told[model_pb2.Model.METHOD_ENCODE], "forward_timestep is refused over latents"
    assert "none on ln p(sample)" in told[model_pb2.Model.METHOD_SCORE]


def test_one_call_gives_images(root: Path) -> None:
    """A server with both answers Sample with what the trained network walks to and the VAE decodes."""
    family = load_run(root / "walk").family
    running = Live(root / "models", max_batch_rows=16)
    try:
        with Client(running.serving.addresses["grpc"]) as client:
            labels = [index % 10 for index in range(20)]
            samples = client.sample("own-ldm", seed=3, label=labels, sampler="ddim", steps=10)
            assert samples.latents is not None
            decoded = client.decode("own-vae", samples.latents, label=labels)
            states = client.sample("own-ldm", seed=3, label=labels, sampler="ddim", steps=10, output="latent")
            step = client.denoise_step("own-ldm", states.array, 20, label=labels)
    finally:
        running.stop()
    assert samples.array.shape == (20, 1, 8, 8)
    np.testing.assert_array_equal(samples.array, decoded.array)
    assert len(np.unique(samples.array.reshape(20, -1), axis=0)) == 20
    network = family.averages["denoiser"].module
    alpha, sigma = (float(levels[20]) for levels in (family.alphas, family.sigmas))  # type: ignore[attr-defined]  # Diffusion's
    x, t, y = torch.from_numpy(states.array.copy()), torch.full((20,), 20), torch.tensor(labels)
    with torch.no_grad():
        x0 = alpha * x - sigma * network(x, t, y)
    bound = family.info.latents.bound  # type: ignore[union-attr]  # it has latents
    np.testing.assert_allclose(step.denoised, x0.clamp(-bound, bound), atol=1e-4)


def test_evaluation_decodes(root: Path) -> None:
    """Samples that are measured are images, decoded by the bundle beside; without that it says what is missing."""
    directory = root / "models/own-ldm/1"
    graphs = Graphs(directory, bundles.read(directory), 1)
    for samples in draw_variants(graphs, np.arange(10), seed=0):
        assert samples.images.shape == (10, 1, 8, 8)
        assert np.abs(samples.images).max() <= 1 + 1e-5
    bundle = bundles.read(directory)
    bundle.model.latent_space.decoder = "absent@1"
    with pytest.raises(EvaluationError, match=r"decoded by absent@1"):
        Graphs(directory, bundle, 1)


def test_it_resumes_with_the_same_latents_only(root: Path, tmp_path: Path) -> None:
    """`--resume` goes on from the record; other latents, families of images and unfit bundles are refused."""
    done = run("fit", "diffusion", "--latents-of", root / "models/own-vae", "--out", root / "walk", "--resume")
    assert done.exit_code == 0, done.output
    other = run("fit", "diffusion", "--latents-of", root / "models/own-ldm", "--out", tmp_path / "a", *WALK)
    assert other.exit_code == 2
    assert "has no encoder to latents" in other.output
    images = run("fit", "gan", "--latents-of", root / "models/own-vae", "--out", tmp_path / "b")
    assert images.exit_code == 2
    assert "is trained on images" in images.output
    nowhere = run("fit", "diffusion", "--latents-of", tmp_path / "nowhere", "--out", tmp_path / "c")
    assert nowhere.exit_code == 2
    assert "cannot be read" in nowhere.output


def test_latents_with_height_and_width_get_a_unet(root: Path) -> None:
    """A U-Net where latents are maps, of as many channels; mirrored latents are refused."""
    info = encoded.load_data("digits", str(root / "models/own-vae/1")).info
    assert info.latents is not None
    maps = type(info)(**{**vars(info), "latents": type(info.latents)(**{**vars(info.latents), "shape": (3, 8, 8)})})
    family = build_family("diffusion", {"width": 8}, maps, 0)
    assert family.sample(torch.tensor([1, 2]), 0).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="mirrored"):
        build_family("diffusion", {"width": 8, "mirrored": 0.5}, maps, 0)
    assert load("digits").info.trained_shape == (1, 8, 8)
