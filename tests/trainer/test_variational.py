"""The variational bound that evaluation reports: against a closed form, and against what the server answers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from latentd.v1 import model_pb2
from latentd_client import Client
from latentd_trainer import bundle as bundles
from latentd_trainer import variational
from latentd_trainer.chains import Floats
from latentd_trainer.served import Graphs
from latentd_trainer.spec import Meaning, Role, ServingSpec, Source
from live import Live
from numpy.typing import NDArray

MEAN, DEVIATION, TIMESTEPS = 0.3, 0.2, 30
SHAPE = (1, 4, 4)


def gaussian() -> tuple[model_pb2.Model, NDArray[np.float64], NDArray[np.float64]]:
    """A model of N(MEAN, DEVIATION^2) whose ideal denoiser estimates x0 by gain[t] x + offset[t]."""
    angles = (np.arange(TIMESTEPS) + 1) / (TIMESTEPS + 1) * np.pi / 2
    alphas, sigmas = np.cos(angles), np.sin(angles)
    gain = alphas * DEVIATION**2 / (alphas**2 * DEVIATION**2 + sigmas**2)
    spec = model_pb2.DiffusionSpec(alphas=alphas, sigmas=sigmas, prediction=model_pb2.DiffusionSpec.PREDICTION_SAMPLE)
    item = model_pb2.TensorSpec(shape=SHAPE, min_value=-1, max_value=1)
    return model_pb2.Model(diffusion=spec, sample_spec=item), gain, MEAN * (1 - gain * alphas)


@pytest.mark.parametrize("terms", [TIMESTEPS, 10])
def test_of_one_gaussian_the_bound_has_a_closed_form(terms: int) -> None:
    """The mean over many images agrees to five standard errors, by all timesteps and by a third of them."""
    model, gain, offset = gaussian()
    alphas, sigmas = np.array(model.diffusion.alphas), np.array(model.diffusion.sigmas)

    def denoise(x: Floats, t: NDArray[np.int64]) -> Floats:
        return (gain[t][:, None, None, None] * x + offset[t][:, None, None, None]).astype(np.float32)

    image = MEAN + DEVIATION * np.random.default_rng(0).standard_normal(SHAPE)
    images = np.repeat(image[None], 4000, axis=0).astype(np.float32)
    found = variational.bound(denoise, model, images, terms, np.random.default_rng(1))
    off = image[..., None] * (1 - gain * alphas) - offset
    squared = off**2 + (gain * sigmas) ** 2
    halves = -0.5 * np.diff((alphas / sigmas) ** 2)
    prior = 0.5 * (alphas[-1] ** 2 * image**2 + sigmas[-1] ** 2 - 1) - np.log(sigmas[-1])
    last = 0.5 * squared[..., 0] / sigmas[0] ** 2 + np.log(sigmas[0] * np.sqrt(2 * np.pi))
    expected = -(prior + squared[..., 1:] @ halves + last).sum()
    assert found.mean() == pytest.approx(expected, abs=5 * found.std() / np.sqrt(len(found)))


def test_evaluation_and_server_agree_on_the_bound(
    tiny_specs: dict[str, Callable[[], ServingSpec]], write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Two programs, two draws of noise: their means over 300 scores of one image agree to five standard errors."""
    directory = write_tiny(tmp_path, "diffusion", tiny_specs["diffusion"]())
    bundle = bundles.read(directory)
    levels = np.linspace(-1, 1, 17, dtype=np.float32)
    image = levels[np.random.default_rng(0).integers(0, 17, SHAPE)]
    images = np.repeat(image[None], 300, axis=0)
    labels = np.full(len(images), 1)
    graphs, generator = Graphs(directory, bundle, 1), np.random.default_rng(2)

    def denoise(x: Floats, t: NDArray[np.int64]) -> Floats:
        given = {Source.SOURCE_SAMPLE: x, Source.SOURCE_TIMESTEP: t, Source.SOURCE_CLASS_LABEL: labels}
        return graphs.run(Role.ROLE_DENOISER, given, generator)[Meaning.MEANING_PREDICTION]

    ours = variational.bound(denoise, bundle.model, images, len(bundle.model.diffusion.alphas), generator)
    live = Live(tmp_path, max_batch_rows=32)
    try:
        with Client(live.serving.addresses["grpc"]) as client:
            theirs = client.score("tiny-diffusion", images, label=1, seed=3).values
    finally:
        live.stop()
    error = np.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
    assert ours.mean() == pytest.approx(theirs.mean(), abs=5 * error)
    assert error < 0.05 * abs(ours.mean())
