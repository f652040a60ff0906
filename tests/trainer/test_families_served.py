"""Families trained briefly, exported, and asked over gRPC: the server answers what the trained network says."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from latentd_client import Client
from latentd_client.errors import LatentdError
from latentd_trainer import bundle as bundles
from latentd_trainer import evaluate
from latentd_trainer.belief_net import Gibbs, binary_pixels, enumerate_posterior
from latentd_trainer.checkpoint import RunRecord
from latentd_trainer.data import Dataset, load, scale
from latentd_trainer.export import write_bundle
from latentd_trainer.families import Family
from latentd_trainer.families.gan import Gan
from latentd_trainer.families.helmholtz import HelmholtzMachine
from latentd_trainer.families.infogan import Critic, InfoGan
from latentd_trainer.families.naive_bayes import NaiveBayes
from latentd_trainer.families.predictability_minimization import PredictabilityMinimization
from latentd_trainer.families.sigmoid_belief_net import SigmoidBeliefNet
from latentd_trainer.families.vae_gan import VaeGan
from latentd_trainer.ladder import train
from latentd_trainer.served import Graphs
from live import Live

SETTINGS: dict[str, dict[str, Any]] = {
    "naive-bayes": {},
    "sigmoid-belief-net": {"steps": 60, "lower": 5, "upper": 3, "sweeps": 1, "served_sweeps": 16},
    "helmholtz": {"steps": 60, "lower": 6, "upper": 4, "draws": 3},
    "vae-gan": {"steps": 40, "width": 8, "hidden": 16, "latent": 3, "discriminator_steps": 5, "batch_size": 16},
    "predictability-minimization": {"steps": 200, "units": 6, "hidden": 32, "predictor_hidden": 4},
    "gan": {"steps": 40, "width": 8, "hidden": 32, "latent": 5, "inversion": 0.5},
    "infogan": {"steps": 40, "width": 8, "hidden": 32, "codes": 4, "noise": 6},
}
Array = np.ndarray[Any, Any]


class Served(NamedTuple):
    """A server with the models, a client of it, and what was trained."""

    client: Client
    families: dict[str, Family]
    digits: Dataset
    models: Path

    @property
    def images(self) -> Array:
        """Twelve held-out digits, [12, 1, 8, 8] f32."""
        return scale(self.digits.test.pixels[:12], self.digits.info.levels)


@pytest.fixture(scope="module", name="served")
def trained_and_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    digits, models, families = load("digits"), tmp_path_factory.mktemp("models"), {}
    for name, settings in SETTINGS.items():
        family = families[name] = train(name.replace("-", "_"), settings, digits, seed=0)
        record = RunRecord(name, {}, "digits", digits.info, 0, "fp32", 1, 1, {})
        write_bundle(family.serving_spec(), record, datetime(2026, 1, 2, tzinfo=UTC), models=Path(models), name=name)
    running = Live(models, max_batch_rows=16)
    try:
        with Client(running.serving.addresses["grpc"]) as client:
            yield Served(client, families, digits, models)
    finally:
        running.stop()


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_are_their_decoded_latents(served: Served, name: str) -> None:
    """Sample reports what it decoded: Decode of those latents, with labels and seed, gives the same bytes."""
    samples = served.client.sample(name, 20, seed=3)
    assert samples.latents is not None
    again = served.client.decode(name, samples.latents, label=samples.labels, seed=3)
    assert again.array.tobytes() == samples.array.tobytes()
    assert len(np.unique(samples.array.reshape(20, -1), axis=0)) > 1


def test_naive_bayes_answers_bayes_rule(served: Served) -> None:
    """Encode is P(y | x), Score the exact ln p(x) and ln p(x | y), Decode of zeros the mean of the class."""
    family = served.families["naive-bayes"]
    assert isinstance(family, NaiveBayes)
    joint = family.model.log_joint(torch.from_numpy(served.images).flatten(1).double())
    encoded = served.client.encode("naive-bayes", served.images)
    assert encoded.probability is not None
    np.testing.assert_allclose(encoded.probability, joint.softmax(dim=1), atol=1e-6)
    whole = served.client.score("naive-bayes", served.images)
    np.testing.assert_allclose(whole.values, joint.logsumexp(dim=1), rtol=1e-6, atol=1e-4)
    assert whole.kind == "log-likelihood"
    given = served.client.score("naive-bayes", served.images, label=4)
    np.testing.assert_allclose(given.values, (joint - family.model.log_prior)[:, 4], rtol=1e-6, atol=1e-4)
    means = served.client.decode("naive-bayes", np.zeros((10, 1, 8, 8), np.float32), label=list(range(10))).array
    np.testing.assert_allclose(means.reshape(10, -1), family.model.mean, atol=1e-6)


def test_naive_bayes_draws_labels_from_their_shares(served: Served) -> None:
    """Without a label each sample has its own, and looks like its class to the posterior."""
    samples = served.client.sample("naive-bayes", 200, seed=1)
    posterior = served.client.encode("naive-bayes", samples.array).probability
    assert len(np.unique(samples.labels)) == 10
    assert (posterior.argmax(axis=1) == samples.labels).mean() > 0.7


@pytest.mark.parametrize("name", ["sigmoid-belief-net", "helmholtz"])
def test_bounds_come_up_to_the_exact_likelihood(served: Served, name: str) -> None:
    """More draws give more, and never more than ln p(x) summed over all hidden states, but for chance."""
    family = served.families[name]
    assert isinstance(family, SigmoidBeliefNet | HelmholtzMachine)
    exact, _ = enumerate_posterior(family.net, binary_pixels(torch.from_numpy(served.images)))
    few, many = (served.client.score(name, served.images, draws=count, seed=2) for count in (1, 400))
    assert many.kind == "evidence-lower-bound"
    assert np.mean(few.values) < np.mean(many.values) < exact.mean().item() + 0.05
    assert np.mean(many.values) > exact.mean().item() - 0.5


def test_the_belief_net_s_posterior_is_the_exact_one(served: Served) -> None:
    """Averaged over seeds, P(unit = 1 | x) from 16 sweeps is that of the sum over all states; draws are states."""
    family = served.families["sigmoid-belief-net"]
    assert isinstance(family, SigmoidBeliefNet)
    _, exact = enumerate_posterior(family.net, binary_pixels(torch.from_numpy(served.images)))
    answers = [served.client.encode("sigmoid-belief-net", served.images, seed=seed) for seed in range(40)]
    found = np.mean([answer.probability for answer in answers], axis=0)
    np.testing.assert_allclose(found, exact, atol=0.06)
    assert set(np.unique(answers[0].array)) == {0.0, 1.0}
    assert answers[0].array.shape == (12, 8)
    assert Gibbs(family.net, 16).noise_shape == (17, 8)


def test_the_recognition_net_is_what_encode_answers(served: Served) -> None:
    """P(unit = 1 | x) of both layers, and with a seed states that decode to the mean of p(x | z1)."""
    family = served.families["helmholtz"]
    assert isinstance(family, HelmholtzMachine)
    encoded = served.client.encode("helmholtz", served.images, seed=5)
    with torch.no_grad():
        lower = family.recognition.first(binary_pixels(torch.from_numpy(served.images))).sigmoid()
        upper = family.recognition.second(lower).sigmoid()
        means = 2 * family.net.bottom(torch.from_numpy(encoded.array[:, :6].copy())).sigmoid() - 1
    np.testing.assert_allclose(encoded.probability, torch.cat([lower, upper], dim=1), atol=1e-6)
    decoded = served.client.decode("helmholtz", encoded.array).array
    np.testing.assert_allclose(decoded.reshape(12, -1), means, atol=1e-6)


def test_a_vae_gan_is_served_as_a_vae(served: Served) -> None:
    """Encode is the encoder's mean and log variance, Score the bound on ln p(x | y), Sample means or drawn levels."""
    family = served.families["vae-gan"]
    assert isinstance(family, VaeGan)
    labels = served.digits.test.labels[:12]
    images = torch.from_numpy(served.images)
    encoded = served.client.encode("vae-gan", served.images)
    with torch.no_grad():
        mean, log_variance = family.encoder(images)
    np.testing.assert_allclose(encoded.mean, mean, atol=1e-5)
    np.testing.assert_allclose(encoded.log_variance, log_variance, atol=1e-5)
    score = served.client.score("vae-gan", served.images, label=labels, draws=300, seed=1)
    bound = family.importance_weighted_bound(images, torch.from_numpy(labels), draws=300, seed=2)
    assert score.kind == "evidence-lower-bound"
    assert np.mean(score.values) == pytest.approx(bound.mean().item(), abs=1.0)
    means, draws = (served.client.sample("vae-gan", 6, seed=3, output=output).array for output in ("mean", "draw"))
    assert not np.array_equal(means, draws)
    np.testing.assert_allclose((draws + 1) * 8, ((draws + 1) * 8).round(), atol=1e-5)
    card = served.client.model("vae-gan")
    assert (card.family, card.likelihood) == ("vae-gan", "bound")
    assert card.capabilities["denoise"] == "samples are not walked to step by step"


def test_belief_nets_draw_binary_images(served: Served) -> None:
    """A draw has pixels of -1 and 1 alone, on as often as the mean says."""
    for name in ("sigmoid-belief-net", "helmholtz"):
        mean = served.client.sample(name, 300, seed=7).array
        draw = served.client.sample(name, 300, seed=7, output="draw").array
        assert set(np.unique(draw)) == {-1.0, 1.0}
        assert abs(draw.mean() - mean.mean()) < 0.03


def test_codes_are_served_and_come_back_as_images(served: Served) -> None:
    """Encode of predictability minimization is the encoder's code; Decode takes it, ends as bits."""
    name = "predictability-minimization"
    family = served.families[name]
    assert isinstance(family, PredictabilityMinimization)
    images = torch.from_numpy(served.images)
    code = served.client.encode(name, served.images).array
    with torch.no_grad():
        np.testing.assert_allclose(code, family.autoencoder.encode(images), atol=1e-6)
        bits = (code > 0.5).astype(np.float32)
        expected = family.autoencoder.decode(torch.from_numpy(bits))
    np.testing.assert_allclose(served.client.decode(name, bits).array, expected, atol=1e-6)


def test_the_gan_s_encoder_is_its_inverter(served: Served) -> None:
    """Encode gives what the inverter says of an image and its class, no posterior; Decode turns it into an image."""
    family = served.families["gan"]
    assert isinstance(family, Gan)
    labels = served.digits.test.labels[:12]
    encoded = served.client.encode("gan", served.images, label=labels)
    with torch.no_grad():
        given = torch.from_numpy(labels)
        latent = family.modules["encoder"](torch.from_numpy(served.images), given)
        images = family.averages["generator"].module(latent, given)
    np.testing.assert_allclose(encoded.array, latent, atol=1e-5)
    assert (encoded.mean, encoded.log_variance, encoded.probability) == (None, None, None)
    np.testing.assert_allclose(served.client.decode("gan", encoded.array, label=labels).array, images, atol=1e-5)
    with pytest.raises(LatentdError, match="class_label"):
        served.client.encode("gan", served.images)
    card = served.client.model("gan").proto.card
    assert "learned inverter" in card.description
    assert "no explicit inference model" in card.likelihood.explanation


def test_infogan_encodes_to_its_codes(served: Served) -> None:
    """Encode is q(codes | x): mean and log variance of the continuous codes, and P(code) beside them; Score is D."""
    family = served.families["infogan"]
    assert isinstance(family, InfoGan)
    encoded, drawn = (served.client.encode("infogan", served.images, seed=seed) for seed in (None, 4))
    with torch.no_grad():
        critic = family.averages["critic"].module
        assert isinstance(critic, Critic)
        guess = critic.guess(torch.from_numpy(served.images))
        real = critic(torch.from_numpy(served.images)).sigmoid()
    np.testing.assert_allclose(encoded.mean, guess.mean, atol=1e-5)
    np.testing.assert_allclose(encoded.log_variance, guess.log_variance, atol=1e-5)
    np.testing.assert_allclose(encoded.class_probability, guess.logits.softmax(dim=1), atol=1e-6)
    np.testing.assert_array_equal(encoded.array, encoded.mean)
    assert np.abs(drawn.array - encoded.array).min() > 0
    np.testing.assert_array_equal(drawn.class_probability, encoded.class_probability)
    scores = served.client.score("infogan", served.images)
    np.testing.assert_allclose(scores.values, real, atol=1e-6)
    assert scores.kind == "real-probability"


def test_infogan_samples_by_code(served: Served) -> None:
    """The label is the categorical code, one of the model's own; without one each sample has its own, all alike often.

    The generator gets code, continuous codes and noise that Sample draws by the seed: as many rows of Decode are a walk
    along a continuous code.
    """
    assert list(served.client.model("infogan").class_names) == ["code 0", "code 1", "code 2", "code 3"]
    free = served.client.sample("infogan", 400, seed=1)
    assert free.latents is not None
    assert free.latents.shape == (400, 2)
    assert (np.abs(np.bincount(free.labels) / 400 - 0.25) < 0.08).all()
    asked = served.client.sample("infogan", 8, seed=1, label=2)
    assert asked.labels.tolist() == [2] * 8
    np.testing.assert_array_equal(asked.latents, free.latents[:8])
    same = free.labels[:8] == 2
    assert [bool((a == b).all()) for a, b in zip(asked.array, free.array[:8], strict=True)] == same.tolist()
    with pytest.raises(LatentdError, match="from 0 to 3; got 4"):
        served.client.sample("infogan", 1, label=4)
    walk = np.stack([np.linspace(-2, 2, 5), np.zeros(5)], axis=1)
    walked = served.client.decode("infogan", walk, label=2, seed=1).array
    assert len(np.unique(walked.reshape(5, -1), axis=0)) == 5


def test_models_without_classes_say_so(served: Served) -> None:
    """They name no classes, and a label is refused with the reason; a code has no likelihood to score."""
    for name in ("sigmoid-belief-net", "helmholtz", "predictability-minimization"):
        assert not served.client.model(name).class_names
        with pytest.raises(LatentdError, match="takes no class label"):
            served.client.sample(name, 1, label=3)
    with pytest.raises(LatentdError, match="Score"):
        served.client.score("predictability-minimization", served.images)


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("naive-bayes", {"log-likelihood", "accuracy"}),
        ("sigmoid-belief-net", {"elbo", "iwae-4", "bits-per-dimension"}),
        ("helmholtz", {"elbo", "iwae-4", "bits-per-dimension"}),
        (
            "vae-gan",
            {"elbo", "iwae-4", "bits-per-dimension", "smallest-latent-kl"}
            | {f"latent-kl-{index}" for index in range(3)},
        ),
        ("predictability-minimization", {"reconstruction-error", "code-mutual-information", "near-binary-share"}),
        ("gan", {"reconstruction-error"}),
        (
            "infogan",
            {"code-purity", "matched-accuracy", "code-information", "latent-information"}
            | {"latent-kl-0", "latent-kl-1", "smallest-latent-kl"},
        ),
    ],
)
def test_evaluation_measures_what_a_family_has(
    served: Served, name: str, metrics: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact likelihood and accuracy, bounds, or codes: by the bundle's graphs, and nothing that it has not."""
    monkeypatch.setattr(evaluate, "BOUND_DRAWS", 4)
    directory = served.models / name / "1"
    found = evaluate.likelihood(Graphs(directory, bundles.read(directory), 1), served.digits, 0)
    assert found.keys() == metrics
    assert np.isfinite(list(found.values())).all()
    if name == "naive-bayes":
        family = served.families[name]
        assert isinstance(family, NaiveBayes)
        images = torch.from_numpy(scale(served.digits.test.pixels, 17)).flatten(1).double()
        exact = family.model.log_joint(images).logsumexp(dim=1).mean().item()
        assert found["log-likelihood"] == pytest.approx(exact, abs=1e-3)
        assert found["accuracy"] >= 0.9
