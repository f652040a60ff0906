"""Cards: what every family's says, what follows from the graphs alone, licences, and figures."""

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from latentd.card import likelihood_in_words
from latentd.v1 import model_pb2
from latentd_trainer import card as cards
from latentd_trainer import export, licenses
from latentd_trainer.bundle import BundleError
from latentd_trainer.checkpoint import RunRecord, build_family
from latentd_trainer.cli import app
from latentd_trainer.data import DataInfo
from latentd_trainer.export import Origin, declare
from latentd_trainer.families import FAMILIES
from latentd_trainer.spec import Likelihood, ServingSpec, bound_on_mass, no_likelihood
from typer.testing import CliRunner

Model = model_pb2.Model
INFO = DataInfo("digits", (1, 8, 8), 17, ("a", "b"), (0.5, 0.5), "0" * 64)
DENSITY = Likelihood(kind=Likelihood.KIND_EXACT, measure=Likelihood.MEASURE_DENSITY, explanation="Of pixels.")


def card_of(spec: ServingSpec) -> model_pb2.ModelCard:
    """What export writes into the card of a spec."""
    bundle = declare(spec, Origin("tiny", ("a", "b"), (0.5, 0.5), "MIT", {}), "tiny@1")
    cards.complete(bundle, spec.answers, spec.likelihood)
    return bundle.model.card


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_s_card_says_what_it_can_and_what_is_known_of_its_likelihood(name: str) -> None:
    """A sentence for each method, answered or not; a likelihood and of what, or why there is none; and the paper."""
    card = card_of(build_family(name, {}, INFO, seed=0).serving_spec())
    assert [each.method for each in card.capabilities] == list(cards.METHODS)
    assert set(cards.METHODS) == {value.number for value in Model.Method.DESCRIPTOR.values if value.number}
    assert all(each.description for each in card.capabilities)
    assert card.likelihood.kind
    assert card.likelihood.explanation not in ("", cards.UNSAID)
    assert (card.likelihood.kind == Likelihood.KIND_NONE) == (not card.likelihood.measure)
    assert card.description
    assert card.reference_uri.startswith("https://")


def test_what_a_family_leaves_out_the_graphs_tell(tiny_specs: dict[str, Callable[[], ServingSpec]]) -> None:
    """A one-draw bound is a bound of unknown measure; a critic is no likelihood; nobody's inference is called so."""
    vae, gan = card_of(tiny_specs["vae"]()), card_of(tiny_specs["gan"]())
    assert vae.likelihood == Likelihood(kind=Likelihood.KIND_BOUND, explanation=cards.UNSAID)
    assert gan.likelihood.kind == Likelihood.KIND_NONE
    assert "no density" in gan.likelihood.explanation
    told = {each.method: each.description for each in gan.capabilities}
    assert told[Model.METHOD_ENCODE] == "there is no explicit inference model"
    assert told[Model.METHOD_SCORE] == "P(real), the critic's opinion; no likelihood; given the class"
    answered = {each.method: each.description for each in vae.capabilities}
    assert "IWAE-K" in answered[Model.METHOD_SCORE]
    assert "or a draw from it" in answered[Model.METHOD_SAMPLE]


@pytest.mark.parametrize(
    ("likelihood", "why"),
    [
        (DENSITY, "is KIND_EXACT, scores are KIND_BOUND"),
        (no_likelihood("Because."), "is KIND_NONE, scores are KIND_BOUND"),
        (bound_on_mass(""), "must have a kind and an explanation"),
    ],
)
def test_a_likelihood_that_the_graphs_contradict_is_not_exported(
    likelihood: Likelihood,
    why: str,
    tiny_specs: dict[str, Callable[[], ServingSpec]],
    write_tiny: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """A bound is not passed off as exact, nor hidden, and an unexplained one is refused; nothing is written."""
    spec = dataclasses.replace(tiny_specs["vae"](), likelihood=likelihood)
    with pytest.raises(BundleError, match=f"card.likelihood: {why}"):
        write_tiny(tmp_path, "vae", spec)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("likelihood", "words"),
    [
        (bound_on_mass("Of x."), "lower bound of a probability mass, IWAE-500: -44.36 nats, 1 bits/dim. Of x."),
        (DENSITY, "exact of a density: -12.5 nats. Of pixels."),
        (no_likelihood("Because."), "none. Because."),
        (Likelihood(), "the card does not say."),
    ],
)
def test_a_card_s_figures_are_the_best_known(likelihood: Likelihood, words: str) -> None:
    """The bound of most draws, with bits by dimension; a density has none; where nothing is known no figure is put."""
    card = model_pb2.ModelCard(likelihood=likelihood)
    figures = {"log-likelihood": -12.5, "elbo": -50.0, "iwae-20": -47.0, "iwae-500": -44.3614, "precision": 0.9}
    for _ in range(2):  # a second evaluation replaces the first
        cards.record_figures(card, figures, dimensions=64)
    assert dict(card.metrics) == figures
    assert likelihood_in_words(card.likelihood) == words
    del figures["iwae-20"], figures["iwae-500"], figures["log-likelihood"]
    cards.record_figures(card, figures, dimensions=64)
    assert card.likelihood.HasField("nats") == (likelihood.kind == Likelihood.KIND_BOUND)
    assert ("ELBO: -50 nats" in likelihood_in_words(card.likelihood)) == (likelihood.kind == Likelihood.KIND_BOUND)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("mit OR apache-2.0", "MIT OR Apache-2.0"),
        ("LicenseRef-House", "LicenseRef-House"),
        ("noassertion", licenses.UNKNOWN),
    ],
)
def test_licences_are_written_as_spdx_writes_them(text: str, expected: str) -> None:
    """Case is put right; the word for an unknown licence is one of them."""
    assert licenses.canonical(text) == expected


def test_a_licence_that_spdx_does_not_know_is_refused_by_the_command(tmp_path: Path) -> None:
    """`export --data-license` says what is allowed before it does anything."""
    command = ["export", str(tmp_path), "--name", "x", "--data-license", "free to use"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "license 'free to use': must be an SPDX expression, as Apache-2.0" in result.output


def test_licences_of_the_digits_are_known_and_of_other_data_are_not(
    tiny_specs: dict[str, Callable[[], ServingSpec]],
    tiny_record: Callable[[str], RunRecord],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The embedded set's own licence and latentd's for the weights; for other data what was given, or that none was."""
    origins: list[Origin] = []
    monkeypatch.setattr(export, "package", lambda _, origin, **__: origins.append(origin))
    others = tiny_record("gan")
    digits = dataclasses.replace(others, data="digits")
    given = {"license": "MIT", "data_license": "CC0-1.0"}
    for record, options in ((digits, {}), (others, {}), (digits, given)):
        export.write_bundle(tiny_specs["gan"](), record, datetime.now(UTC), models=tmp_path, name="a", **options)
    assert [(origin.license, origin.dataset_license) for origin in origins] == [
        ("Apache-2.0", "CC-BY-4.0"),
        (licenses.UNKNOWN, licenses.UNKNOWN),
        ("MIT", "CC0-1.0"),
    ]
