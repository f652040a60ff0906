"""VAE-GAN: what it takes over from a VAE's run, what training changes, what is served, and how the two are compared."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentd.v1 import model_pb2
from latentd_trainer import bundle as bundles
from latentd_trainer import classifier, evaluate, export, start
from latentd_trainer.card import start_figures
from latentd_trainer.checkpoint import CHECKPOINT_FILE, RunRecord, load_run, read_record
from latentd_trainer.cli import app
from latentd_trainer.data import load, scale
from latentd_trainer.families.gan import Game
from latentd_trainer.families.vae import Vae
from latentd_trainer.families.vae_gan import VaeGan
from latentd_trainer.spec import Likelihood, Meaning, Role, ServingSpec
from safetensors.torch import load_file, save
from torch import Tensor
from typer.testing import CliRunner, Result

SIZES = ["--set", "width=8", "--set", "hidden=16", "--set", "latent=3"]
QUICK = ["--set", "batch_size=8", "--set", "discriminator_steps=2", "--steps", "5"]


def call(*arguments: object) -> Result:
    """Run `latentd-train` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


def done(*arguments: object) -> None:
    """Run `latentd-train`, which must not fail."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module", name="vae_run")
def briefly_trained_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny VAE; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "vae"
    done("fit", "vae", "--out", run, *SIZES, "--set", "batch_size=8", "--steps", "30")
    return run


@pytest.fixture(scope="module", name="tuned_run")
def briefly_tuned_vae(vae_run: Path) -> Path:
    """A finished run of five steps from that VAE, in two of which the discriminator learns alone."""
    run = vae_run.with_name("tuned")
    done("fit", "vae_gan", "--from", vae_run, "--out", run, *QUICK)
    return run


@pytest.fixture(name="images")
def held_out_digits() -> tuple[Tensor, Tensor]:
    """Images [12, 1, 8, 8] and labels [12]."""
    digits = load("digits")
    return torch.from_numpy(scale(digits.test.pixels[:12], 17)), torch.from_numpy(digits.test.labels[:12])


def vae_of(run: Path) -> Vae:
    """The VAE of a run."""
    family = load_run(run).family
    assert isinstance(family, Vae)
    return family


def tuned_of(run: Path) -> VaeGan:
    """The VAE-GAN of a run."""
    family = load_run(run).family
    assert isinstance(family, VaeGan)
    return family


def states_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two networks of one kind have the same weights."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == also and torch.equal(value, its) for (name, value), (also, its) in pairs)


def test_it_begins_as_the_vae_and_leaves_the_encoder_alone(vae_run: Path, tuned_run: Path) -> None:
    """Sizes, encoder and data are the VAE's, whose weights the record names; the decoder has moved, in both copies."""
    vae, tuned, record = vae_of(vae_run), tuned_of(tuned_run), read_record(tuned_run)
    assert (tuned.config.width, tuned.config.hidden, tuned.config.latent) == (8, 16, 3)
    assert states_equal(tuned.encoder, vae.encoder)
    assert not states_equal(tuned.decoder, vae.decoder)
    assert not states_equal(tuned.trained_decoder, vae.decoder)
    assert record.info == read_record(vae_run).info
    assert record.start is not None
    assert (record.start["family"], record.start["trained_steps"]) == ("vae", 30)
    assert str(vae_run) not in json.dumps(dict(record.start))


def test_the_discriminator_learns_alone_at_first(vae_run: Path, tmp_path: Path) -> None:
    """While it does, the model is the VAE it began as: same bound, same samples."""
    done("fit", "vae_gan", "--from", vae_run, "--out", tmp_path / "run", *QUICK[:-1], "2")
    vae, tuned = vae_of(vae_run), tuned_of(tmp_path / "run")
    assert states_equal(tuned.trained_decoder, vae.decoder)
    labels = torch.arange(4)
    assert torch.equal(tuned.sample(labels, 1), vae.sample(labels, 1))
    tensors = load_file(tmp_path / "run" / CHECKPOINT_FILE)
    assert any(key.startswith("updaters/discriminator/") for key in tensors)
    assert not any(key.startswith("updaters/decoder/") for key in tensors)


def test_the_likelihood_stays_in_the_loss(
    vae_run: Path, images: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the game is worth nothing, the decoder goes on being trained for the pixels' likelihood, by its weight."""
    monkeypatch.setattr(Game, "generator_loss", lambda *_: torch.zeros(()))
    bounds = {}
    for weight in (0, 1):
        settings = ["--set", f"likelihood_weight={weight}", "--set", "learning_rate=1e-3", "--set", "average_decay=0"]
        settings += ["--set", "discriminator_steps=0", "--set", "batch_size=32", "--steps", "40"]
        done("fit", "vae_gan", "--from", vae_run, "--out", tmp_path / str(weight), *settings)
        bounds[weight] = tuned_of(tmp_path / str(weight)).importance_weighted_bound(*images, draws=8, seed=0).mean()
    before = vae_of(vae_run).importance_weighted_bound(*images, draws=8, seed=0).mean()
    assert bounds[0] == before
    assert bounds[1] > before + 1


def test_a_run_that_fell_over_at_once_resumes_without_the_vae(
    vae_run: Path, tuned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 0 holds what was taken over: resumed, the run is bit for bit one that never stopped."""
    began = Path(shutil.copytree(vae_run, tmp_path / "vae"))
    with monkeypatch.context() as patch:
        patch.setattr(VaeGan, "step", lambda *_: {"discriminator": torch.tensor(math.nan)})
        result = call("fit", "vae_gan", "--from", began, "--out", tmp_path / "run", *QUICK)
        assert result.exit_code == 1
        assert "step 1: a loss is not finite" in result.output
    shutil.rmtree(began)
    done("fit", "vae_gan", "--out", tmp_path / "run", "--resume", *QUICK)
    whole, parts = (load_file(run / CHECKPOINT_FILE) for run in (tuned_run, tmp_path / "run"))
    assert whole.keys() == parts.keys()
    assert all(whole[key].numpy().tobytes() == parts[key].numpy().tobytes() for key in whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae_gan"], "vae_gan goes on from a trained vae: give its run with --from"),
        (["gan", "--from", "{vae}"], "gan starts with fresh weights; --from is for families that go on from another"),
        (["vae_gan", "--from", "{tuned}"], "goes on from a trained vae; {tuned} is vae_gan"),
        (["vae_gan", "--from", "{vae}", "--set", "latent=4", "--set", "width=16"], "width is 8 in {vae}, not 16"),
        (["vae_gan", "--from", "{vae}", "--set", "latent=4", "--set", "width=16"], "latent is 3 in {vae}, not 4"),
        (["vae_gan", "--from", "{vae}", "--set", "score=both"], "score='both': must be one of bound, realness"),
        (["vae_gan", "--from", "{vae}", "--data", "{other}"], "{vae} was trained on other data than {other}"),
        (["vae_gan", "--from", "{nothing}"], "cannot be read (No such file or directory); is {nothing} a run?"),
    ],
)
def test_what_it_cannot_go_on_from_is_said(
    arguments: list[str], message: str, vae_run: Path, tuned_run: Path, tmp_path: Path
) -> None:
    """Each wrong start has its own message, and leaves no run behind."""
    np.savez(tmp_path / "other.npz", x=np.arange(1280, dtype=np.uint8).reshape(20, 8, 8) % 17, y=np.arange(20) % 10)
    places = {"vae": vae_run, "tuned": tuned_run, "other": tmp_path / "other.npz", "nothing": tmp_path / "nothing"}
    result = call("fit", *(each.format(**places) for each in arguments), "--out", tmp_path / "run")
    assert result.exit_code in (1, 2)
    assert message.format(**places) in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_does_not_change_its_start(vae_run: Path, tuned_run: Path, tmp_path: Path) -> None:
    """--from may be given again with --resume, but only the same VAE."""
    run = Path(shutil.copytree(tuned_run, tmp_path / "run"))
    done("fit", "vae_gan", "--from", vae_run, "--out", run, "--resume")
    done("fit", "vae", "--out", tmp_path / "vae", *SIZES, "--set", "batch_size=8", "--steps", "1", "--seed", "1")
    result = call("fit", "vae_gan", "--from", tmp_path / "vae", "--out", run, "--resume")
    assert result.exit_code == 2
    assert f"it went on from another run than {tmp_path / 'vae'}" in result.output


@pytest.mark.parametrize(
    ("score", "meaning"),
    [("bound", Meaning.MEANING_EVIDENCE_LOWER_BOUND), ("realness", Meaning.MEANING_REAL_PROBABILITY)],
)
def test_score_is_the_bound_or_p_real(score: str, meaning: int, tuned_run: Path, images: tuple[Tensor, Tensor]) -> None:
    """One scorer is exported, as `score` says; the card tells of a bound on the likelihood either way."""
    trained = tuned_of(tuned_run)
    settings = read_record(tuned_run).settings
    family = VaeGan(type(trained.config)(**{**settings, "score": score}), trained.info)
    for name, module in family.modules.items():
        module.load_state_dict(trained.modules[name].state_dict())
    spec = family.serving_spec()
    (scorer,) = (graph for graph in spec.graphs if graph.role == Role.ROLE_SCORER)
    assert [output.meaning for output in scorer.outputs] == [meaning]
    assert spec.family == model_pb2.Model.FAMILY_VAE_GAN
    assert spec.likelihood is not None
    assert spec.likelihood.kind == Likelihood.KIND_BOUND
    if score == "realness":
        with torch.no_grad():
            expected = trained.modules["discriminator"](*images).sigmoid()
            assert torch.equal(scorer.module(*images), expected)


def test_the_record_names_the_weights_that_the_vae_s_bundle_has(vae_run: Path, tuned_run: Path, tmp_path: Path) -> None:
    """A bundle's checkpoint is known again by its digest, and that of another network is not."""
    recorded = read_record(tuned_run).start
    assert recorded is not None
    for run, same in ((vae_run, True), (tuned_run, False)):
        weights = export.weights(load_run(run).family.serving_spec())
        (tmp_path / CHECKPOINT_FILE).write_bytes(save(weights))
        assert start.is_served_by(recorded, tmp_path) == same


@pytest.fixture(scope="module", name="data")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 4 x 4 images in three classes: bars at three heights, with noise."""
    x = np.random.default_rng(0).integers(0, 5, (300, 4, 4))
    x[np.arange(300), np.arange(300) % 3] += 11
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x=x.astype(np.uint8), y=np.arange(300) % 3, levels=17)
    return path


@pytest.fixture(scope="module", name="models")
def exported_models(
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_specs: dict[str, Callable[[], ServingSpec]],
    write_tiny: Callable[..., Path],
) -> Path:
    """Bundles `tiny-vae` and, of other weights, `tiny-tuned`, which says it was tuned from it; not to be changed."""
    models = tmp_path_factory.mktemp("models")
    record = RunRecord("vae", {}, str(data), load(str(data)).info, 0, "fp32", 1, 1, {})
    vae, tuned = tiny_specs["vae"](), tiny_specs["vae"]()
    write_tiny(models, "vae", vae, record)
    with torch.no_grad():
        tuned.graphs[0].module.layers[0].bias += 0.3
    began = {"family": "vae", "weights": start.weights_digest(export.weights(vae))}
    tuned = dataclasses.replace(tuned, family=model_pb2.Model.FAMILY_VAE_GAN)
    write_tiny(models, "tuned", tuned, dataclasses.replace(record, start=began))
    return models


@pytest.fixture(name="quick")
def quick_evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path) -> list[Any]:
    """Options of an evaluation by a briefly trained classifier, few samples and draws, with the bars of digits."""
    monkeypatch.setattr(classifier, "STEPS", 30)
    monkeypatch.setattr(evaluate, "SAMPLE_COUNT", 120)
    monkeypatch.setattr(evaluate, "BOUND_DRAWS", 4)
    monkeypatch.setattr(evaluate, "DATASET", "tiny")
    return ["--data", data, "--cache", tmp_path / "cache", "--threads", "1", "--out", tmp_path / "out", "--card"]


def test_the_card_has_the_vae_s_figures_beside_its_own(models: Path, quick: list[Any], tmp_path: Path) -> None:
    """Measured again in the same way: the VAE's reference and digest, and the very figures of its own evaluation."""
    vae, tuned = (
        Path(shutil.copytree(models / name, tmp_path / "m" / name)) / "1" for name in ("tiny-vae", "tiny-tuned")
    )
    done("evaluate", tuned, "--against", vae, *quick)
    done("evaluate", vae, *quick[:6], "--out", tmp_path / "vae-out", "--card")
    card, its = bundles.read(tuned).model.card, bundles.read(vae).model
    (comparison,) = card.comparisons
    assert (comparison.relation, comparison.model, comparison.digest) == ("tuned from", "tiny-vae@1", its.digest)
    assert dict(comparison.metrics) == dict(its.card.metrics)
    assert start_figures(card)["frechet-distance-mean"] != card.metrics["frechet-distance-mean"]
    assert card.likelihood.nats == card.metrics["iwae-4"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"Tuned from tiny-vae@1, digest `{its.digest}`." in report
    assert "| tiny-vae@1, mean |" in report
    change = card.metrics["recall-mean"] - comparison.metrics["recall-mean"]
    assert f"| change of recall-mean >= 0.05 | {change:.3f} | {'met' if change >= 0.05 else 'missed'} |" in report
    done("evaluate", tuned, *quick)
    assert not bundles.read(tuned).model.card.comparisons


def test_without_its_vae_a_change_was_not_measured(models: Path, quick: list[Any]) -> None:
    """`--bars` fails, and says which option was missing."""
    result = call("evaluate", models / "tiny-tuned" / "1", "--bars", *quick[:-1])
    assert result.exit_code == 1
    assert "change of recall-mean >= 0.05: was not measured, as --against names no model that it was" in result.output


def test_another_model_than_its_vae_is_refused(models: Path, quick: list[Any]) -> None:
    """Weights are compared, not names; before anything is measured. What is no bundle is said to be none."""
    tuned = models / "tiny-tuned" / "1"
    result = call("evaluate", tuned, "--against", tuned, *quick[:-1])
    assert result.exit_code == 1
    assert "was tuned from other weights than those of" in result.output
    result = call("evaluate", tuned, "--against", models / "nothing" / "1", *quick[:-1])
    assert result.exit_code == 1
    assert "a bundle is a folder NAME/VERSION" in " ".join(result.output.split())


def test_any_model_may_be_compared_with_another(models: Path, quick: list[Any], tmp_path: Path) -> None:
    """A model that started afresh takes any other beside it, and says that they were compared and no more."""
    vae = Path(shutil.copytree(models / "tiny-vae", tmp_path / "m" / "tiny-vae")) / "1"
    done("evaluate", vae, "--against", models / "tiny-tuned" / "1", *quick)
    card = bundles.read(vae).model.card
    assert [(each.relation, each.model) for each in card.comparisons] == [("compared with", "tiny-tuned@1")]
    assert not start_figures(card)
