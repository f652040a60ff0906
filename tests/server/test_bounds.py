"""Score of diffusion models: the variational bound, against sums in float64 and closed forms, alone and in a crowd."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
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
from live import Live, gathered
from onnx import helper
from parking import Parking
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
    x = samples.astype(np.float64)
    levels = np.linspace(item.min_value, item.max_value, item.level_count) if item.level_count else None
    if levels is not None:
        x = levels[np.abs(x[..., None] - levels).argmin(-1)]
    prior = 0.5 * (alphas[last] ** 2 * x**2 + sigmas[last] ** 2 - 1) - np.log(sigmas[last])
    diffusion = np.zeros(x.shape)
    for t in range(last + 1):
        steps = np.full(len(x), t)
        z = noise.normals(noise.runs(Purpose.SCORE, seed, range(len(x)), [t] * len(x)), PIXELS).reshape(x.shape)
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


class Gaussian:
    """The model of `write_gaussian`, in closed form: its bound and its exact density at every element."""

    def __init__(self, servable: Any) -> None:
        spec = servable.model.diffusion
        self.alphas, self.sigmas = np.array(spec.alphas), np.array(spec.sigmas)
        variance = self.alphas**2 * DEVIATION**2 + self.sigmas**2
        self.gain = self.alphas * DEVIATION**2 / variance
        self.offset = MEAN * (1 - self.gain * self.alphas)
        self.halves = -0.5 * np.diff((self.alphas / self.sigmas) ** 2)  # of t = 1 and on

    def bound(self, x: Floats) -> Floats:
        """The expected bound of each element."""
        off = x[..., None] * (1 - self.gain * self.alphas) - self.offset
        squared = off**2 + (self.gain * self.sigmas) ** 2  # of the estimate's error, by timestep
        prior = 0.5 * (self.alphas[-1] ** 2 * x**2 + self.sigmas[-1] ** 2 - 1) - math.log(self.sigmas[-1])
        last = 0.5 * squared[..., 0] / self.sigmas[0] ** 2 + math.log(self.sigmas[0] * math.sqrt(2 * math.pi))
        return -(prior + squared[..., 1:] @ self.halves + last)

    def deviation(self, x: Floats) -> float:
        """Of the bound of one draw of noise, over all elements of one row."""
        weights = np.concatenate([[0.5 / self.sigmas[0] ** 2], self.halves])
        off = x[..., None] * (1 - self.gain * self.alphas) - self.offset
        spread = (self.gain * self.sigmas) ** 2
        return math.sqrt((weights**2 * (2 * spread**2 + 4 * off**2 * spread)).sum())

    def log_density(self, x: Floats) -> Floats:
        """Ln p of each element: the chain is linear, so what it ends in is normal."""
        mean, variance = 0.0, 1.0
        for t in range(len(self.alphas) - 1, 0, -1):
            kept = self.alphas[t] ** 2 / self.alphas[t - 1] ** 2
            fresh = self.sigmas[t - 1] ** 2 / self.sigmas[t] ** 2 * (1 - kept)
            pull = self.alphas[t - 1] * (1 - kept) / self.sigmas[t] ** 2
            held = self.alphas[t] / self.alphas[t - 1] * self.sigmas[t - 1] ** 2 / self.sigmas[t] ** 2
            slope = pull * self.gain[t] + held
            mean, variance = slope * mean + pull * self.offset[t], slope**2 * variance + fresh
        mean, variance = self.gain[0] * mean + self.offset[0], self.gain[0] ** 2 * variance + self.sigmas[0] ** 2
        return np.asarray(stats.norm.logpdf(x, mean, math.sqrt(variance)))


def test_of_one_gaussian_the_bound_is_known_and_below_the_exact_likelihood(live: Live, here: dict[str, Any]) -> None:
    """The ideal denoiser's bound has a closed form, which the answers agree with to five standard errors, and the
    chain's own density is normal: every row's bound lies below it, and on data by less than a nat an element.
    """
    known, draws = Gaussian(here["gaussian"]), 60
    near = MEAN + DEVIATION * np.random.default_rng(1).standard_normal((4, *SHAPE))
    x = np.concatenate([near, images(2)]).astype(np.float32)
    response = live.stub.Score(asked("gaussian", x, seed=1, draw_count=draws), timeout=60)
    assert response.stats.evaluation_count == len(x) * draws * GAUSSIAN_TIMESTEPS
    expected = known.bound(x.astype(np.float64)).reshape(len(x), -1).sum(1)
    errors = np.array([known.deviation(row) for row in x]) / math.sqrt(draws)
    assert (np.abs(np.array(response.values) - expected) < 5 * errors + 1e-3).all()
    exact = known.log_density(x.astype(np.float64)).reshape(len(x), -1).sum(1)
    assert (expected < exact).all()
    assert (np.array(response.values) < exact + 5 * errors).all()
    assert (exact - expected)[:4].max() < PIXELS  # forty steps are few


def test_fewer_timesteps_estimate_the_same_bound(live: Live) -> None:
    """Over many draws of noise and of timesteps the mean is that of the whole sum. Timestep 0 is in every draw, and its
    noise is the same whatever else is.
    """
    sample, draws = images(1), 60
    whole = live.stub.Score(asked("v", sample, seed=2, draw_count=draws), timeout=60)
    fewer = live.stub.Score(asked("v", sample, seed=2, draw_count=10 * draws, timestep_count=20), timeout=60)
    assert fewer.stats.evaluation_count == 10 * draws * 20
    assert fewer.terms.diffusion[0] == pytest.approx(whole.terms.diffusion[0], rel=0.02)
    few = live.stub.Score(asked("v", sample, seed=2, draw_count=draws, timestep_count=5), timeout=60)
    assert few.terms.reconstruction == whole.terms.reconstruction
    assert few.terms.prior == whole.terms.prior


@pytest.mark.parametrize("count", [2, 8, 99])
def test_every_draw_takes_one_timestep_of_each_run(count: int, here: dict[str, Any]) -> None:
    """Runs are equal but for one, and their lengths are the weights, so that every timestep counts once on average."""
    draws = 60_000 // count // 3
    request = asked("eps", images(3), seed=4, draw_count=draws, timestep_count=count)
    job = bounding(resolve.score(request, here["eps"], Limits())).job
    terms = job.start
    assert isinstance(terms, BoundTerms)
    timesteps = np.array([table.timesteps[0] for table in job.tables]).reshape(-1, count)
    weights = draws * terms.weights.reshape(-1, count)
    assert (timesteps[:, 0] == 0).all()
    np.testing.assert_allclose(weights[:, 0], 1)
    edges = 1 + np.concatenate([[0], np.cumsum(np.rint(weights[0, 1:]))])
    assert edges[-1] == TIMESTEPS
    assert np.ptp(np.diff(edges)) <= 1
    assert ((timesteps[:, 1:] >= edges[:-1]) & (timesteps[:, 1:] < edges[1:])).all()
    counted = np.zeros(TIMESTEPS)
    np.add.at(counted, timesteps.reshape(-1), weights.reshape(-1) / len(weights))
    of_run = np.concatenate([[1.0], np.repeat(np.diff(edges), np.diff(edges).astype(int))])
    assert (np.abs(counted - 1) <= 5 * np.sqrt((of_run - 1) / len(weights)) + 1e-9).all()


def test_a_row_scores_the_same_alone_in_a_request_and_among_others(live: Live) -> None:
    """The first of three rows is a request of its own, and a crowd of walks and scores beside changes no byte."""
    request = asked("v", images(3), seed=3, draw_count=2, timestep_count=30)
    lone = live.stub.Score(request, timeout=60)
    first = live.stub.Score(asked("v", images(3)[:1], seed=3, draw_count=2, timestep_count=30), timeout=60)
    assert list(first.values) == list(lone.values)[:1]
    walk = pb.DiffusionOptions(sampler="ddpm", step_count=25, guidance_scale=2)
    walks = [
        live.stub.Sample(pb.SampleRequest(model="v", seed=seed, sample_count=2, diffusion=walk), timeout=60)
        for seed in range(4)
    ]
    scores = [live.stub.Score.future(asked("v", images(2, seed), seed=seed), timeout=60) for seed in range(4)]
    beside = live.stub.Score(request, timeout=60)
    for call in walks:
        gathered(call)
    for score in scores:
        score.result()
    assert list(beside.values) == list(lone.values)
    assert beside.terms == lone.terms


def test_a_stream_scores_as_a_call_does(live: Live) -> None:
    """The same request under an id, beside another one, is the same answer but for what it cost."""
    request = asked("imported", images(2), seed=9)
    called = live.stub.Score(request, timeout=60)
    answers = live.stream(pb.StreamRequest(id=1, score=request), pb.StreamRequest(id=2, score=asked("v", images(1))))
    (answer,) = answers[1]
    assert answer.final
    for response in (called, answer.score):
        assert response.stats.evaluation_count == 2 * TIMESTEPS
        response.ClearField("stats")
    assert answer.score == called


@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_a_score_that_is_given_up_takes_no_further_evaluation(way: str, root: Path) -> None:
    """Held in its first batch of many and let go by its client, it rides in no other, and its slots are free."""
    parking = Parking()
    live = Live(root, parking, max_batch_rows=16, self_check_interval=0)
    try:
        stop = parking.hold(31, 0)
        request = asked("v", images(4), seed=31)
        call = live.stub.Score.future(request, timeout=2.0 if way == "deadline" else 60)
        assert stop.arrived.wait(60)
        if way == "cancel":
            call.cancel()
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            call.result(60)
        give_up_s = time.monotonic() + 60
        while live.unfinished and time.monotonic() < give_up_s:
            live.turn()
        live.settle()
        parking.clear()
        whole = live.stub.Score(asked("v", images(1), seed=1))  # the held call was slow: a deadline would be refused
        assert whole.stats.evaluation_count == TIMESTEPS
        text = live.serving.door.metrics.exposition().decode()
        assert live.serving.engine.lanes_held == 0
        assert live.serving.engine.backlog == 0
        assert _total(text, "latentd_evaluations_total") == 16 + TIMESTEPS
        assert _total(text, "latentd_wasted_evaluations_total") == 16
    finally:
        parking.clear()
        live.stop()


def _total(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))


def test_a_score_costs_its_terms_at_the_door(here: dict[str, Any]) -> None:
    """Rows by draws by timesteps, one evaluation each, none after another."""
    request = asked("v", images(3), draw_count=2, timestep_count=7)
    job = bounding(resolve.score(request, here["v"], Limits())).job
    assert (job.lane_count, job.evaluations_per_lane, job.rows_per_lane) == (42, 1, 1)


def test_without_a_label_the_unconditional_network_is_scored(live: Live, here: dict[str, Any]) -> None:
    """Given a label, or labels, that class's bound; a model without an unconditional network asks for one."""
    samples = np.repeat(images(1), 3, axis=0)
    given = [live.stub.Score(asked("v", samples, condition=pb.Condition(class_label=c)), timeout=60) for c in range(3)]
    several = live.stub.Score(asked("v", samples, condition=pb.Condition(class_labels=[0, 1, 2])), timeout=60)
    assert list(several.values) == [response.values[row] for row, response in enumerate(given)]
    none = live.stub.Score(asked("v", samples), timeout=60)
    assert none.values[0] not in [response.values[0] for response in given]
    with pytest.raises(FieldsInvalidError) as caught:
        resolve.score(asked("labelled", samples), here["labelled"], Limits())
    (violation,) = caught.value.violations
    assert violation.path == "condition.class_label"
    assert "no unconditional network" in violation.description


def test_every_violation_is_told_at_once(here: dict[str, Any]) -> None:
    """Tensor, label, draws and timesteps."""
    request = asked("v", np.zeros((1, 3, 3), np.float32), draw_count=-1, timestep_count=1)
    request.condition.class_label = len(CLASSES)
    with pytest.raises(FieldsInvalidError) as caught:
        resolve.score(request, here["v"], Limits())
    found = {violation.path for violation in caught.value.violations}
    assert found == {"samples.shape", "condition.class_label", "draw_count", "timestep_count"}


def test_samples_are_rounded_to_the_levels_of_the_data(live: Live) -> None:
    """So that pixels in bytes, and samples that a network drew, have a probability too."""
    levels = np.linspace(-1, 1, 17, dtype=np.float32)
    exact = levels[np.random.default_rng(3).integers(0, 17, (2, *SHAPE))]
    pixels = np.rint((exact + 1) * 127.5).astype(np.uint8)
    off = exact + np.random.default_rng(4).uniform(-0.06, 0.06, exact.shape).astype(np.float32)
    scores = [list(live.stub.Score(asked("v", values), timeout=60).values) for values in (exact, pixels, off)]
    assert scores[1] == scores[0]
    assert scores[2] == scores[0]


@pytest.mark.parametrize("count", [2, 17, 256])
@pytest.mark.parametrize("sigma", [0.004, 0.1, 3.0])
def test_a_decoders_probabilities_sum_to_one(count: int, sigma: float) -> None:
    """Over the levels of an element, wherever its estimate lies."""
    levels = Levels(-1.0, 1.0, count)
    decoder = Decoder(sigma, levels)
    for estimate in (-1.2, -1.0, 0.013, 0.9, 5.0):
        surprise = decoder.surprise(np.linspace(-1, 1, count), np.full(count, estimate))
        assert np.exp(-surprise).sum() == pytest.approx(1.0, abs=1e-12)


def test_the_normal_distribution_is_accurate_in_both_tails() -> None:
    """Against SciPy, down to a thousand deviations, where the probability itself is far below the smallest float."""
    low = np.concatenate([np.linspace(-1000, 30, 4001), np.linspace(-25, 8, 4001)])
    for width in (1e-3, 0.1, 2.0, 50.0):
        found, high = log_normal_between(low, low + width), low + width
        one, other = np.where(low + high > 0, -high, low), np.where(low + high > 0, -low, high)
        expected = log_ndtr(other) + np.log1p(-np.exp(log_ndtr(one) - log_ndtr(other)))
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(
        log_normal_between(np.array([-np.inf, 2.0]), np.array([-2.0, np.inf])), log_ndtr(-2.0), rtol=1e-12
    )


def test_a_lanes_nats_do_not_depend_on_the_lanes_beside_it() -> None:
    """By ones, by pairs or all together, at a width that is no multiple of anything: equal bytes."""
    rng = np.random.default_rng(0)
    lanes, shape = 13, (3, 7, 11)
    samples, estimates = (rng.standard_normal((lanes, *shape)).astype(np.float32) for _ in range(2))
    halves = np.where(np.arange(lanes) % 4 == 0, np.nan, rng.uniform(0, 1e4, lanes))
    ones = np.ones(lanes)
    rows = np.arange(lanes)
    f32 = ones.astype(np.float32)
    terms = BoundTerms(samples, rows, rows, f32, f32, ones, halves, Decoder(0.01, Levels(-1, 1, 256)))
    whole = terms.nats(slice(0, lanes), estimates)
    for size in (1, 2, 5):
        parts = [slice(at, min(at + size, lanes)) for at in range(0, lanes, size)]
        assert np.concatenate([terms.nats(part, estimates[part]) for part in parts]).tobytes() == whole.tobytes()
    assert terms.of_lanes(rows[5:9]).nats(slice(0, 4), estimates[5:9]).tobytes() == whole[5:9].tobytes()


def bounding(plan: Any) -> Bounding:
    assert isinstance(plan, Bounding)
    return plan
