"""The studies of digits: what is measured of images that are known, and models that are found or trained once."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentd.v1 import bundle_pb2, model_pb2
from latentd_trainer import ladder, train
from latentd_trainer.checkpoint import load_run, read_record
from latentd_trainer.data import load, scale
from latentd_trainer.export import weights
from latentd_trainer.served import UNLABELLED, walk
from latentd_trainer.spec import Meaning, Role, Source
from latentd_trainer.start import weights_digest
from latentd_trainer.study import blur_and_cover, diffusion_and_guidance, digit_models, historical_ladder
from latentd_trainer.study.digit_models import Digits, Sampled
from latentd_trainer.study.section import Settings
from scipy import ndimage


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", name="trained")
def directory_of_what_is_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


def quick(trained: Path) -> Settings:
    return Settings(seed=0, quick=True, trained=trained)


class Known:
    """Networks that answer real training images of the class asked for, or their blur."""

    def __init__(self, family: str) -> None:
        dataset = load("digits")
        self.images, self.labels = scale(dataset.train.pixels, dataset.info.levels), dataset.train.labels
        self.family = family
        self.networks = {Role.ROLE_DECODER: None}
        self.bundle = bundle_pb2.Bundle()

    def run(self, role: int, given: Mapping[int, Any], generator: np.random.Generator) -> dict[int, np.ndarray]:
        rows = [generator.choice(np.flatnonzero(self.labels == label)) for label in given[Source.SOURCE_CLASS_LABEL]]
        images = self.images[rows]
        blurred = ndimage.gaussian_filter(images, (0, 0, 0.7, 0.7)).astype(np.float32)
        if self.family == "gan":
            return {Meaning.MEANING_SAMPLE: images}
        mean = blurred if self.family == "vae" else images
        return {Meaning.MEANING_SAMPLE: mean, Meaning.MEANING_SAMPLE_DRAW: images}


def test_real_images_are_sharp_and_their_blur_is_not(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GAN that answers real images is found sharp, a VAE whose means are their blur blurred, and verdicts follow."""
    monkeypatch.setattr(Digits, "graphs", lambda _, family: Known(family))
    section = blur_and_cover.study(quick(trained))
    figures = section.figures
    assert figures["gan/sharpness"] == pytest.approx(1, abs=0.1)
    assert figures["vae-mean/sharpness"] < 0.3
    assert figures["vae-mean/recall"] < figures["vae-draw/recall"]
    met = {criterion.text for criterion in section.criteria if criterion.is_met(figures)}
    assert {"A VAE's means are blurred", "A GAN's samples are not"} <= met
    assert "A GAN covers less than the VAE's means" not in met
    assert section.verdict == "holds in part"


def test_samples_that_are_not_finite_are_an_error(trained: Path) -> None:
    """They are named, and no figure is made of them."""
    with pytest.raises(train.TrainingError, match="GAN: samples are not finite"):
        Digits(quick(trained)).measure(Sampled("GAN", np.full((60, 1, 8, 8), np.nan, np.float32), np.zeros(60, int)))


def test_pictures_have_a_row_a_class(trained: Path) -> None:
    """Of uneven shares too: the first eight of each class, real ones first."""
    asked = np.repeat(np.arange(10), [8, 30, *[9] * 8])
    images = np.broadcast_to(asked[:, None, None, None], (len(asked), 1, 8, 8)).astype(np.float32)
    rows = Digits(quick(trained)).picture_rows([Sampled("some", images, asked)])
    assert list(rows) == ["real", "some"]
    assert rows["real"].shape == (80, 1, 8, 8)
    np.testing.assert_array_equal(rows["some"][:, 0, 0, 0], np.arange(10).repeat(8))


def test_a_vae_gan_goes_on_from_the_study_s_vae(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts with the weights that the study's own VAE serves; neither is trained a second time."""
    digits = Digits(quick(trained))
    tuned, origin = digits._trained("vae_gan"), digits._trained("vae")
    served = weights_digest(weights(load_run(origin).family.serving_spec()))
    record = read_record(tuned)
    assert record.start is not None
    assert record.start["weights"] == served
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("was trained again"))
    assert Digits(quick(trained))._trained("vae_gan") == tuned
    assert Digits(Settings(seed=0, quick=True, trained=trained))._trained("vae") == origin


def test_an_interrupted_training_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after one of its steps, a run goes on to its end where it is, with the bits of one that was not."""
    whole = Digits(quick(tmp_path / "whole"))._trained("vae")
    digits, advance = Digits(quick(tmp_path / "parts")), digit_models._Told.advance

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digit_models, "_CHECKPOINT_INTERVAL", 1)
    monkeypatch.setattr(digit_models._Told, "advance", lambda told, step, _: stop() if step == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        digits._trained("vae")
    monkeypatch.setattr(digit_models._Told, "advance", advance)
    parts = digits._trained("vae")
    checkpoints = [(run / "checkpoint.safetensors").read_bytes() for run in (whole, parts)]
    assert checkpoints[0] == checkpoints[1]


def test_diffusion_is_studied_alike_twice(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, exported and measured; with what was kept the figures are the same, and nothing is trained again."""
    monkeypatch.setattr(diffusion_and_guidance, "SCALES", (0.0, 1.0, 3.0))
    monkeypatch.setattr(diffusion_and_guidance, "STEP_COUNTS", (4, 10))
    first = diffusion_and_guidance.study(quick(trained))
    assert first.figures["guidance-1/recall"] == first.figures["10-steps/recall"]
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("was trained again"))
    assert diffusion_and_guidance.study(quick(trained)).figures == first.figures


def test_bundles_that_are_given_are_used(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --models the newest version of digits-FAMILY is measured, and a family without one is still trained."""
    for version in ("1", "2", "10"):
        (tmp_path / "digits-gan" / version).mkdir(parents=True)
    digits = Digits(Settings(seed=0, quick=True, trained=trained, models=tmp_path))
    assert digits._given("gan") == tmp_path / "digits-gan" / "10"
    assert digits._given("vae_gan") is None


def test_a_vae_that_is_given_counts_with_the_one_tuned_from_it_only(trained: Path, tmp_path: Path) -> None:
    """Without it, or with one tuned from other weights, both are trained; bundles that were found are named."""
    own = Digits(quick(trained))
    vae, tuned = (own._exported(family) for family in ("vae", "vae_gan"))
    digits = Digits(Settings(seed=0, quick=True, trained=trained, models=tmp_path))
    found = tmp_path / "digits-vae" / "1"
    shutil.copytree(vae, found)
    assert digits._given("vae") is None
    shutil.copytree(tuned, tmp_path / "digits-vae-gan" / "1")
    assert digits._given("vae") == found
    assert digits.taken() == []
    model = digits.graphs("vae").bundle.model
    assert digits.taken() == [f"Not trained for this study, but found: `{model.name}` ({model.digest})."]
    record = tmp_path / "digits-vae-gan" / "1" / "record.json"
    record.write_text(json.dumps({"start": {"weights": "sha256:other"}}))
    assert digits._given("vae") is None
    assert digits._given("vae_gan") is None


class Labels:
    """A network that predicts a multiple of the label it is given, and notes what it was asked."""

    def __init__(self) -> None:
        alphas = np.cos(np.linspace(0.1, 1.5, 20))
        diffusion = model_pb2.DiffusionSpec(
            samplers=["ddim"], prediction=model_pb2.DiffusionSpec.PREDICTION_SAMPLE,
            alphas=alphas, sigmas=np.sqrt(1 - alphas**2),
        )  # fmt: skip
        self.bundle = bundle_pb2.Bundle(model=model_pb2.Model(diffusion=diffusion))
        self.bundle.model.sample_spec.shape.extend((1, 2, 2))
        self.asked: list[int] = []

    def run(self, role: int, given: Mapping[int, Any], _: np.random.Generator) -> dict[int, np.ndarray]:
        labels = given[Source.SOURCE_CLASS_LABEL]
        self.asked.append(int(labels[0]))
        estimate = np.broadcast_to(labels[:, None, None, None], (len(labels), 1, 2, 2))
        return {Meaning.MEANING_PREDICTION: estimate.astype(np.float32)}

    def decoded(self, states: np.ndarray, *_: object) -> np.ndarray:
        return states


@pytest.mark.parametrize(
    ("scale_", "answer", "asked"),
    [(1.0, 4.0, {4}), (0.0, -1.0, {UNLABELLED}), (3.0, -1 + 3 * 5, {4, UNLABELLED}), (0.5, 1.5, {4, UNLABELLED})],
)
def test_guidance_is_a_line_through_both_predictions(scale_: float, answer: float, asked: set[int]) -> None:
    """Of x0 = label the walk gives (1 - w)(-1) + w 4; at 1 and 0 only one of the two is asked for."""
    graphs = Labels()
    images = walk(graphs, np.array([4, 4]), 3, np.random.default_rng(0), guidance_scale=scale_)  # type: ignore[arg-type]  # a fake
    np.testing.assert_allclose(images, answer, rtol=1e-6)
    assert set(graphs.asked) == asked


def test_the_ladder_s_criteria_are_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pairs of neighbours; one rung below the one before it leaves the claim in part."""
    rungs = [
        ladder.Rung(name, "", value, exact=False)
        for name, value in zip("abcdef", (-9, -8, -7, -7.5, -6, -5), strict=True)
    ]
    monkeypatch.setattr(ladder, "climb", lambda *_: rungs)
    section = historical_ladder.study(quick(tmp_path))
    assert [criterion.is_met(section.figures) for criterion in section.criteria] == [True, True, False, True, True]
    assert section.verdict == "holds in part"
    assert ladder.markdown(rungs) in section.body


def test_the_ladder_s_models_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second climb measures the three that the first one kept, with the same figures to the last bit."""
    monkeypatch.setattr(ladder, "BOUND_DRAWS", 5)
    monkeypatch.setattr(ladder, "MIXTURE_STEPS", 2)
    first = historical_ladder.study(quick(tmp_path))
    monkeypatch.setattr(ladder, "train", lambda *_: pytest.fail("was trained again"))
    assert historical_ladder.study(quick(tmp_path)).figures == first.figures
