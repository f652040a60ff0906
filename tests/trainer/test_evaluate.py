import dataclasses
import functools
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from latentd.digest import bundle_digest
from latentd.v1 import model_pb2
from latentd_trainer import bars, classifier, evaluate, parity
from latentd_trainer import bundle as bundles
from latentd_trainer.bars import Bar, bars_of
from latentd_trainer.checkpoint import RunRecord
from latentd_trainer.cli import app
from latentd_trainer.data import Dataset, Split, load
from latentd_trainer.evaluate import EvaluationError
from latentd_trainer.onnx_graph import GraphError
from latentd_trainer.spec import Role, ServingSpec
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

SAMPLE_METRICS = {
    "frechet-distance",
    "frechet-ratio",
    "precision",
    "recall",
    "density",
    "coverage",
    "neighbour-ratio",
    "histogram-distance",
    "label-agreement",
}
ALWAYS = {"classifier-accuracy", "frechet-floor"}
VARIANTS = {"vae": ("-mean", "-draw"), "gan": ("",), "diffusion": ("-50-steps", "-10-steps")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 4 x 4 images in three classes: bars at three heights, with noise."""
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    x = generator.integers(0, 5, (300, 4, 4))
    x[np.arange(300), labels] += 11
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x=x.astype(np.uint8), y=labels, levels=17)
    return str(path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short training of the classifier, few samples and draws: what is proved is not how good they are."""
    monkeypatch.setattr(classifier, "STEPS", 30)
    monkeypatch.setattr(evaluate, "SAMPLE_COUNT", 120)
    monkeypatch.setattr(evaluate, "BOUND_DRAWS", 20)


@pytest.fixture(scope="module")
def record(images: str) -> RunRecord:
    """Of a training on `images`."""
    return RunRecord("tiny", {}, images, load(images).info, 0, "fp32", 1, 1, {})


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, record: RunRecord, write_tiny: Callable[..., Path]
) -> Callable[[str], Path]:
    """The tiny bundle of a family that says it was trained on `images`; exported once, not to be changed."""
    models = tmp_path_factory.mktemp("models")
    return functools.cache(lambda family: write_tiny(models, family, record=record))


@pytest.fixture
def bundle_of(tmp_path: Path, exported: Callable[[str], Path]) -> Callable[[str], Path]:
    """A copy of a family's tiny bundle."""

    def copy(family: str) -> Path:
        return Path(shutil.copytree(exported(family), tmp_path / "models" / f"tiny-{family}" / "1"))

    return copy


@pytest.fixture
def measure(tmp_path: Path, images: str) -> Callable[..., tuple[int, str]]:
    """Evaluate a bundle; return the status and what was printed."""

    def run(directory: Path, data: str = images, **options: object) -> tuple[int, str]:
        console = Console(file=io.StringIO(), width=200)
        status = evaluate.run(directory, data=data, cache=tmp_path / "cache", threads=1, console=console, **options)
        return status, console.file.getvalue()

    return run


@pytest.mark.parametrize("family", ["vae", "gan", "diffusion"])
def test_every_metric_lands_in_the_card(bundle_of: Callable, measure: Callable, family: str) -> None:
    """The card holds every metric of every way to sample, finite, and the bundle stays the same model."""
    directory = bundle_of(family)
    before = bundles.read(directory)
    assert measure(directory)[0] == 0
    after = bundles.read(directory)
    expected = ALWAYS | {name + variant for name in SAMPLE_METRICS for variant in VARIANTS[family]}
    if family == "vae":
        expected |= {"elbo", "iwae-20", "bits-per-dimension", "smallest-latent-kl"}
        expected |= {f"latent-kl-{index}" for index in range(4)}
    if family == "diffusion":
        expected |= {"elbo", "bits-per-dimension"}
        likelihood = after.model.card.likelihood
        assert likelihood.nats == after.model.card.metrics["elbo"] < 0
        assert likelihood.bits_per_dimension == after.model.card.metrics["bits-per-dimension"]
    assert set(after.model.card.metrics) == expected
    assert np.isfinite(list(after.model.card.metrics.values())).all()
    assert after.model.digest == before.model.digest == bundle_digest(after)
    after.model.card.metrics.clear()
    for field in ("nats", "bits_per_dimension", "draw_count"):
        after.model.card.likelihood.ClearField(field)
    assert after == before


def test_a_second_evaluation_gives_the_same_figures(bundle_of: Callable, measure: Callable) -> None:
    """Every draw follows from the seed, so the same bundle measures the same."""
    directory = bundle_of("diffusion")
    measure(directory)
    first = dict(bundles.read(directory).model.card.metrics)
    measure(directory)
    assert dict(bundles.read(directory).model.card.metrics) == first


def test_a_bound_with_more_draws_is_tighter(bundle_of: Callable, measure: Callable) -> None:
    """IWAE lies above the ELBO, and bits per dimension are the same number in other units."""
    directory = bundle_of("vae")
    measure(directory)
    metrics = bundles.read(directory).model.card.metrics
    assert metrics["elbo"] < metrics["iwae-20"]
    assert metrics["bits-per-dimension"] == pytest.approx(-metrics["iwae-20"] / (16 * np.log(2)))


def test_the_report_shows_the_card_and_a_picture(bundle_of: Callable, measure: Callable, tmp_path: Path) -> None:
    """The report has a row for each way to sample, as many columns in every row, and the picture it links to."""
    directory = bundle_of("vae")
    _, printed = measure(directory, out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# tiny-vae@1\n")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for row in ("| mean |", "| draw |", "| *real images* |", "| iwae-20 |"):
        assert row in text
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.width > picture.height
    assert str(tmp_path / "out" / "report.md") in printed


def test_with_another_place_the_bundle_is_left_alone(bundle_of: Callable, measure: Callable, tmp_path: Path) -> None:
    """With `out` no file of the bundle changes, unless the card is asked for; then it holds what the report shows."""
    directory = bundle_of("gan")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    measure(directory, out=tmp_path / "out")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    measure(directory, out=tmp_path / "out", card=True)
    assert set(before) == {path.name for path in directory.iterdir()}
    precision = bundles.read(directory).model.card.metrics["precision"]
    assert f"{precision:.3f}" in (tmp_path / "out" / "report.md").read_text()


def test_a_cache_that_cannot_be_written_is_named(bundle_of: Callable, measure: Callable, tmp_path: Path) -> None:
    """A classifier that cannot be kept is not trained first; the message says what to do."""
    (tmp_path / "cache").write_text("not a directory")
    with pytest.raises(EvaluationError, match=r"cache: cannot be used \(Not a directory\); name another .* --cache"):
        measure(bundle_of("gan"))


def test_the_command_leaves_nothing_in_the_current_directory(
    bundle_of: Callable, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier goes into the user's cache directory, or where --cache says."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    command = ["evaluate", str(bundle_of("gan")), "--data", images, "--out", str(tmp_path / "out"), "--threads", "1"]
    for more, place in ([], tmp_path / "xdg/latentd/classifiers"), (["--cache", str(tmp_path / "c")], tmp_path / "c"):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output
        assert [path.suffix for path in place.iterdir()] == [".safetensors"]
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("value", [None, "", "not/absolute"])
def test_without_a_cache_directory_it_is_the_home_s(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME counts only as an absolute path, as its specification says."""
    monkeypatch.setenv("HOME", "/home/somebody")
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert classifier.default_cache() == Path("/home/somebody/.cache/latentd/classifiers")


def test_without_another_place_the_report_lies_in_the_bundle(bundle_of: Callable, measure: Callable) -> None:
    """report.md and samples.png join the bundle's files, and nothing else does."""
    directory = bundle_of("gan")
    before = {path.name for path in directory.iterdir()}
    measure(directory)
    assert {path.name for path in directory.iterdir()} - before == {"report.md", "samples.png"}


def test_a_missed_bar_is_named_and_fails(
    bundle_of: Callable, measure: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bars, each one missed is printed with its value and the status is 1; those met are not listed."""
    limits = [Bar("precision", 2.0), Bar("recall", 0.0), Bar("frechet-ratio", 0.0, at_most=True), Bar("iwae-500", 0)]
    monkeypatch.setitem(bars.BARS, model_pb2.Model.FAMILY_GAN, limits)
    monkeypatch.setattr(evaluate, "DATASET", "tiny")
    directory = bundle_of("gan")
    status, printed = measure(directory, bars=True)
    assert status == 1
    missed = [line for line in printed.splitlines() if line.startswith("missed: ")]
    assert [line.split(":")[1].strip() for line in missed] == ["precision >= 2", "frechet-ratio <= 0", "iwae-500 >= 0"]
    assert missed[2].endswith("was not measured")
    monkeypatch.setitem(bars.BARS, model_pb2.Model.FAMILY_GAN, limits[1:2])
    assert measure(directory, bars=True)[0] == 0


@pytest.mark.parametrize(
    ("bar", "value", "missed"),
    [
        (Bar("m", 2.5, at_most=True), 2.5, False),
        (Bar("m", 2.5, at_most=True), 2.51, True),
        (Bar("m", 0.9), 0.9, False),
        (Bar("m", 0.9), 0.89, True),
        (Bar("m", 0.9), float("nan"), True),
        (Bar("m", 2.5, at_most=True), float("nan"), True),
    ],
)
def test_a_bar_is_cleared_at_its_limit_and_never_by_nan(bar: Bar, value: float, missed: bool) -> None:
    """The limit itself clears a bar from either side; NaN clears none."""
    assert bool(bar.missed({"m": value})) is missed


def test_bars_ask_for_metrics_that_are_measured() -> None:
    """Every bar is on a metric that evaluation of that family writes."""
    families = {"vae": model_pb2.Model.FAMILY_VAE, "gan": model_pb2.Model.FAMILY_GAN}
    for name, family in {**families, "diffusion": model_pb2.Model.FAMILY_DIFFUSION}.items():
        measured = {metric + variant for metric in SAMPLE_METRICS for variant in VARIANTS[name]}
        others = {"vae": {"iwae-500", "smallest-latent-kl"}, "gan": {"reconstruction-error"}}.get(name, set())
        assert {bar.metric for bar in bars.BARS[family]} <= measured | others


def test_bars_are_for_digits_only(bundle_of: Callable, measure: Callable) -> None:
    """On other data the bars mean nothing, and asking for them is an error before any work."""
    with pytest.raises(EvaluationError, match="bars are set for digits and"):
        measure(bundle_of("gan"), bars=True)


def test_other_data_of_the_same_shape_are_refused(
    bundle_of: Callable, measure: Callable, tmp_path: Path, images: str
) -> None:
    """The digest of the data in the record tells data of another content apart."""
    with np.load(images) as arrays:
        np.savez(tmp_path / "other.npz", x=arrays["x"][::-1], y=arrays["y"][::-1], levels=17)
    with pytest.raises(EvaluationError, match="tiny-gan@1 was trained on other data than other"):
        measure(bundle_of("gan"), data=str(tmp_path / "other.npz"))


def test_data_of_another_shape_are_refused(bundle_of: Callable, measure: Callable) -> None:
    """The error shows both shapes."""
    with pytest.raises(EvaluationError, match=r"makes samples of shape \[1, 4, 4\], digits holds \[1, 8, 8\]"):
        measure(bundle_of("gan"), data="digits")


def test_data_of_one_class_are_refused(bundle_of: Callable, measure: Callable, tmp_path: Path) -> None:
    """A classifier of one class tells nothing apart."""
    np.savez(tmp_path / "plain.npz", x=np.random.default_rng(0).integers(0, 9, (50, 4, 4), np.uint8))
    with pytest.raises(EvaluationError, match="plain has one class only; evaluation needs labelled images"):
        measure(bundle_of("gan"), data=str(tmp_path / "plain.npz"))


def test_a_bundle_that_cannot_sample_is_refused(
    write_tiny: Callable[..., Path],
    measure: Callable,
    tiny_specs: dict[str, Callable[[], ServingSpec]],
    tmp_path: Path,
    record: RunRecord,
) -> None:
    """A scorer alone has nothing to evaluate."""
    spec = tiny_specs["gan"]()
    scorer = [graph for graph in spec.graphs if graph.role == Role.ROLE_SCORER]
    spec = dataclasses.replace(spec, graphs=scorer, methods=[model_pb2.Model.METHOD_SCORE])
    with pytest.raises(EvaluationError, match="draws no samples: it has neither a decoder nor a denoiser"):
        measure(write_tiny(tmp_path, "gan", spec, record))


def test_labels_are_allotted_in_the_shares_of_the_data() -> None:
    """Counts are within one of the shares, sum to what was asked for, and are in order of class."""
    dataset: Dataset = load("digits")
    model = model_pb2.Model(class_names=["a", "b", "c"], class_probabilities=[0.5, 0.3, 0.2])
    assert evaluate.allotted_labels(model, dataset, 7).tolist() == [0, 0, 0, 0, 1, 1, 2]
    digits = model_pb2.Model(class_names=dataset.info.class_names)
    counts = np.bincount(evaluate.allotted_labels(digits, dataset, 1440))
    assert counts.sum() == 1440
    assert np.abs(counts - 1440 * np.array(dataset.info.class_probabilities)).max() < 1


def test_a_damaged_graph_is_an_error_that_names_it(bundle_of: Callable, measure: Callable) -> None:
    """A graph that ONNX Runtime refuses, or that is missing, is named, and `verify` recommended."""
    directory = bundle_of("gan")
    (directory / "scorer.onnx").write_bytes(b"\xff")
    with pytest.raises(EvaluationError, match=r"scorer\.onnx: ONNX Runtime refuses .* `latentd-train verify` says"):
        measure(directory)
    (directory / "scorer.onnx").unlink()
    with pytest.raises(EvaluationError, match=r"scorer\.onnx: .*No such file"):
        measure(directory)


def test_a_report_that_cannot_be_written_is_an_error(bundle_of: Callable, measure: Callable, tmp_path: Path) -> None:
    """Where the report should go there is a file: the error names it."""
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"out: cannot be written \(File exists\)"):
        measure(bundle_of("gan"), out=tmp_path / "out")


def test_too_few_held_out_images_are_an_error(bundle_of: Callable, measure: Callable, tmp_path: Path) -> None:
    """Neighbourhoods reach to the fifth neighbour, so data that hold out fewer than six images are refused."""
    np.savez(tmp_path / "few.npz", x=np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4) % 17, y=np.arange(20) % 3)
    with pytest.raises(EvaluationError, match="16 images to train on and 4 held out; evaluation needs at least 6"):
        measure(bundle_of("gan"), data=str(tmp_path / "few.npz"))


def test_held_out_copies_are_an_error(
    bundle_of: Callable, measure: Callable, monkeypatch: pytest.MonkeyPatch, images: str
) -> None:
    """Where held-out images lie on training images nothing can be said of copying, and the error says so."""
    real = evaluate.Real.of

    def copied(dataset: Dataset, yardstick: classifier.Yardstick) -> evaluate.Real:
        found = real(dataset, yardstick)
        return dataclasses.replace(found, held_out_images=found.train_images)

    monkeypatch.setattr(evaluate.Real, "of", copied)
    with pytest.raises(EvaluationError, match="copies of training rows; the data need held-out images that were not"):
        measure(bundle_of("gan"))


def test_a_graph_that_does_not_run_is_an_error_that_names_it(
    bundle_of: Callable, measure: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that loads and then fails on a batch is named, and `verify` recommended."""

    def fails(*_: object) -> list[np.ndarray]:
        raise GraphError("does not run")

    monkeypatch.setattr(parity, "run_onnx", fails)
    with pytest.raises(EvaluationError, match=r"decoder\.onnx: does not run; `latentd-train verify` says more"):
        measure(bundle_of("gan"))


def test_samples_that_are_not_finite_are_an_error(
    bundle_of: Callable, measure: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN is not measured."""
    run = parity.run_onnx
    monkeypatch.setattr(parity, "run_onnx", lambda *given: [rows * np.float32("nan") for rows in run(*given)])
    with pytest.raises(EvaluationError, match="tiny-gan@1 draws samples that are not finite"):
        measure(bundle_of("gan"))


def test_the_ratio_compares_as_many_images_on_both_sides() -> None:
    """Real images in place of samples have a ratio near 1, also where more are held out than samples are drawn."""
    features = np.random.default_rng(0).standard_normal((2200, 30), np.float32)
    labels = np.zeros(2000, np.int64)
    train, held_out = (classifier.Reading(part, labels) for part in (features[:1000], features[1000:2000]))

    class Reader:
        """Gives the features above for the two splits."""

        def read(self, images: np.ndarray) -> classifier.Reading:
            return train if images[0, 0, 0, 0] == -1 else held_out

    splits = [Split(np.full((1000, 1, 4, 4), level, np.uint8), labels[:1000]) for level in (0, 1)]
    dataset = Dataset(load("digits").info, *splits)
    real = evaluate.Real.of(dataset, Reader())
    fakes = classifier.Reading(features[2000 : 2000 + evaluate.SAMPLE_COUNT], labels)
    measured = evaluate.compare(np.zeros((len(fakes.features), 1, 4, 4), np.float32), fakes, real, 0)
    assert measured["frechet-ratio"] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("count", "size"), [(5, 9), (7, 7), (10, 4), (1440, 360)])
def test_a_subset_is_spread_over_all_rows(count: int, size: int) -> None:
    """Rows in order of class are all represented: as many as asked for, no gap wider than another by more than one."""
    chosen = evaluate.spread(count, size)
    assert len(chosen) == min(count, size)
    gaps = np.diff([*chosen, count])
    assert chosen[0] == 0
    assert gaps.max() - gaps.min() <= 1


def test_a_helmholtz_machine_is_held_to_the_bar_of_its_objective() -> None:
    """Plain wake-sleep may be a nat worse than the reweighted one, which is the default."""
    model = model_pb2.Model(family=model_pb2.Model.FAMILY_HELMHOLTZ_MACHINE)
    found = {"iwae-500": -18.5}
    assert [bar.missed(found) for bar in bars_of(model, {"objective": "ws"})] == [""]
    assert [bar.missed(found) for bar in bars_of(model, {"objective": "rws"})] == ["iwae-500 >= -18: is -18.5"]
    assert bars_of(model, {}) == bars_of(model, {"objective": "rws"})
