"""Score of diffusion models: the variational bound, against sums in float64 and closed forms, alone and in a crowd."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from bundles import CLASSES, F32, I64, IN, NET, OUT, SHAPE, TIMESTEPS, add_network, begin, spec_of, write_bundle
from bundles import write_diffusion as write_plain
from doors import servables
from google.protobuf.json_format import Parse
from latentd import tensor
from latentd.names import BUNDLE_FILE, SAMPLERS
from latentd.v1 import bundle_pb2, model_pb2
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import noise, resolve
from latentd_server.bound_terms import BoundTerms, Decoder, Levels, log_normal_between
from latentd_server.failures import FieldsInvalidError
from latentd_server.noise import Purpose
from latentd_server.plans import Bounding, Limits
from live import Live
from onnx import helper
from scipy import stats
from scipy.special import log_ndtr

Floats = np.ndarray[Any, np.dtype[np.float64]]
Change = Callable[[model_pb2.Model], None]

EPS, V, X0 = (
    model_pb2.DiffusionSpec.PREDICTION_EPSILON,
    model_pb2.DiffusionSpec.PREDICTION_V,
    model_pb2.DiffusionSpec.PREDICTION_SAMPLE,
)
PIXELS = math.prod(SHAPE)
MEAN, DEVIATION = 0.3, 0.2
GAUSSIAN_TIMESTEPS = 40


def write(root: Path, name: str, prediction: int, change: Change) -> None:
    """A tiny denoiser with something changed in its model."""
    directory = write_plain(root, name, prediction=prediction)
    bundle = Parse((directory / BUNDLE_FILE).read_text(), bundle_pb2.Bundle())
    change(bundle.model)
    write_bundle(directory, bundle.model, bundle.networks)


def plain(model: model_pb2.Model) -> None:
    """As it is: continuous, clipped."""


def seventeen(model: model_pb2.Model) -> None:
    """Of digits' levels."""
    model.sample_spec.level_count = 17


def unclipped_bytes(model: model_pb2.Model) -> None:
    """Of 256 levels, and not clipped."""
    model.sample_spec.level_count = 256
    model.diffusion.clip_denoised = False


def imported(model: model_pb2.Model) -> None:
    """DDPM's linear schedule with zero terminal SNR, as diffusers makes it."""
    model.sample_spec.level_count = 2
    kept = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.3, TIMESTEPS)))
    alphas = (kept - kept[-1]) * kept[0] / (kept[0] - kept[-1])
    model.diffusion.alphas[:] = alphas
    model.diffusion.sigmas[:] = np.sqrt(1 - alphas**2)


def no_unconditional(model: model_pb2.Model) -> None:
    """Trained with every label."""
    model.diffusion.guidance_supported = False


MODELS: dict[str, tuple[int, Change]] = {
    "eps": (EPS, plain),
    "v": (V, seventeen),
    "x0": (X0, unclipped_bytes),
    "imported": (V, imported),
    "labelled": (X0, no_unconditional),
}


def write_gaussian(root: Path) -> None:
    """The ideal denoiser of data from N(MEAN, DEVIATION^2), which estimates x0 by gain[t] x + offset[t]."""
    directory = begin(root, "gaussian", 1)
    angle = (np.arange(GAUSSIAN_TIMESTEPS) + 1) / (GAUSSIAN_TIMESTEPS + 1) * np.pi / 2
    alphas, sigmas = np.cos(angle), np.sin(angle)
    gain = alphas * DEVIATION**2 / (alphas**2 * DEVIATION**2 + sigmas**2)
    tables = {"gain": gain, "offset": MEAN * (1 - gain * alphas)}
    weights = {name: values.astype(np.float32).reshape(-1, 1, 1, 1) for name, values in tables.items()}
    nodes = [
        helper.make_node("Gather", ["gain", "t"], ["gain_t"]),
        helper.make_node("Gather", ["offset", "t"], ["offset_t"]),
        helper.make_node("Mul", ["x", "gain_t"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset_t"], ["prediction"]),
    ]
    network = add_network(
        directory,
        NET.ROLE_DENOISER,
        nodes,
        [("x", IN.SOURCE_SAMPLE, F32, SHAPE), ("t", IN.SOURCE_TIMESTEP, I64, ())],
        [("prediction", OUT.MEANING_PREDICTION, SHAPE)],
        weights,
    )
    model = model_pb2.Model(
        name="gaussian@1",
        family=model_pb2.Model.FAMILY_DIFFUSION,
        methods=[model_pb2.Model.METHOD_SAMPLE, model_pb2.Model.METHOD_SCORE],
        sample_spec=spec_of(SHAPE, -1, 1),
        latent_spec=spec_of(SHAPE),
        diffusion=model_pb2.DiffusionSpec(alphas=alphas, sigmas=sigmas, samplers=SAMPLERS, prediction=X0),
    )
    write_bundle(directory, model, [network])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bounded-models")
    for name, (prediction, change) in MODELS.items():
        write(path, name, prediction, change)
    write_gaussian(path)
    return path


@pytest.fixture(scope="module")
def live(root: Path) -> Iterator[Live]:
    running = Live(root, max_batch_rows=16)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def here(root: Path) -> dict[str, Any]:
    return servables(root)


def images(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).uniform(-1, 1, (count, *SHAPE)).astype(np.float32)


def asked(model: str, samples: Any, **fields: Any) -> pb.ScoreRequest:
    return pb.ScoreRequest(model=model, samples=tensor.encode(samples), **fields)


def reference(root: Path, name: str, samples: Any, seed: int, label: int = -1) -> tuple[Floats, Floats, Floats]:
    """L_T, the sum of L_t and L_0 of each row, by the means and variances of DDPM's posteriors (eq. 6, 7, 13)."""
    bundle = Parse((root / name / "1" / BUNDLE_FILE).read_text(), bundle_pb2.Bundle())
    spec, item = bundle.model.diffusion, bundle.model.sample_spec
    session = ort.InferenceSession((root / name / "1" / "denoiser.onnx").read_bytes())
    alphas, sigmas = np.array(spec.alphas), np.array(spec.sigmas)
    last = len(alphas) - 1
    rows = np.arange(len(samples))
    x = samples.astype(np.float64)
    levels = np.linspace(item.min_value, item.max_value, item.level_count) if item.level_count else None
    if levels is not None:
        x = levels[np.abs(x[..., None] - levels).argmin(-1)]
    prior = 0.5 * (alphas[last] ** 2 * x**2 + sigmas[last] ** 2 - 1) - np.log(sigmas[last])
    diffusion = np.zeros(x.shape)
    for t in range(last + 1):
        steps = np.full(len(x), t)
        z = noise.normals(np.full(len(x), seed), rows, steps, Purpose.SCORE, PIXELS).reshape(x.shape)
        noisy = alphas[t] * x + sigmas[t] * z
        feeds = {"x": noisy.astype(np.float32), "t": steps, "y": np.full(len(x), label)}
        out = session.run(None, feeds)[0].astype(np.float64)
        guess = {
            EPS: (noisy - sigmas[t] * out) / max(alphas[t], 1e-12),
            V: alphas[t] * noisy - sigmas[t] * out,
            X0: out,
        }[spec.prediction]
        if spec.clip_denoised:
            guess = guess.clip(item.min_value, item.max_value)
        if t == 0:
            reconstruction = _surprise(x, guess, sigmas[0], levels)
            continue
        kept = alphas[t] ** 2 / alphas[t - 1] ** 2  # 1 - beta_t
        variance = sigmas[t - 1] ** 2 / sigmas[t] ** 2 * (1 - kept)
        pull = alphas[t - 1] * (1 - kept) / sigmas[t] ** 2
        held = alphas[t] / alphas[t - 1] * sigmas[t - 1] ** 2 / sigmas[t] ** 2
        mean, modelled = pull * x + held * noisy, pull * guess + held * noisy
        diffusion += (mean - modelled) ** 2 / (2 * variance)
    return tuple(part.reshape(len(x), -1).sum(1) for part in (prior, diffusion, reconstruction))  # type: ignore[return-value]  # three of them


def _surprise(x: Floats, guess: Floats, sigma: float, levels: Floats | None) -> Floats:
    if levels is None:
        return -stats.norm.logpdf(x, guess, sigma)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    index = np.abs(x[..., None] - levels).argmin(-1)
    low, high = ((edge - guess) / sigma for edge in (edges[index], edges[index + 1]))
    low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
    return -(log_ndtr(high) + np.log1p(-np.exp(log_ndtr(low) - log_ndtr(high))))


@pytest.mark.parametrize("name", MODELS)
def test_the_bound_is_that_of_a_reference_in_float64(name: str, live: Live, root: Path) -> None:
    """Every part of it, for eps, v and x0, with levels and without, clipped or not, and down to no signal at all."""
    samples = images(3)
    label = 1 if name == "labelled" else -1
    condition = pb.Condition(class_label=label) if label >= 0 else None
    response = live.stub.Score(asked(name, samples, seed=5, condition=condition), timeout=60)
    prior, diffusion, reconstruction = reference(root, name, samples, 5, label)
    np.testing.assert_allclose(response.terms.prior, prior, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(response.terms.diffusion, diffusion, rtol=2e-5)
    np.testing.assert_allclose(response.terms.reconstruction, reconstruction, rtol=2e-4)
    total = np.array(response.terms.prior) + response.terms.diffusion + response.terms.reconstruction
    assert list(response.values) == (-total).tolist()
    assert response.type == pb.ScoreResponse.TYPE_EVIDENCE_LOWER_BOUND
    assert response.stats.evaluation_count == 3 * TIMESTEPS
