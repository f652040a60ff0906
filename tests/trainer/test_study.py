"""The study's frame: verdicts follow from figures, and the report is whole whenever it is interrupted."""

import json
import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from latentd_trainer import study
from latentd_trainer.cli import app
from latentd_trainer.study import workers
from latentd_trainer.study.section import Criterion, Picture, Section, Settings
from latentd_trainer.train import InterruptedTraining
from typer.testing import CliRunner, Result

HIGH = Criterion("a is high", "a", ">=", 1.0)
ABOVE = Criterion("a is above b", "a", ">", "b")
CLAIMS = ("first", "second", "third")


def section(a: float = 1.0, b: float = 2.0, *criteria: Criterion) -> Section:
    return Section("A title", "What is said.", "How.", {"a": a, "b": b}, criteria or (HIGH, ABOVE), "What is seen.")


@pytest.mark.parametrize(("a", "verdict"), [(3.0, "holds"), (1.0, "holds in part"), (0.5, "does not hold")])
def test_the_verdict_follows_from_the_figures(a: float, verdict: str) -> None:
    """All criteria met, one of two, none; a bound is a number or another figure."""
    assert section(a).verdict == verdict


def test_a_section_is_refused_with_everything_that_is_wrong() -> None:
    """Figures that are no numbers, criteria about figures or with relations that there are not, and none at all."""
    with pytest.raises(ValueError, match=r"A title: a is nan; there is no figure 'c'; '=' is no relation"):
        section(float("nan"), 2.0, Criterion("wrong", "b", "=", "c"))
    with pytest.raises(ValueError, match="there is no criterion"):
        Section("A title", "", "", {}, (), "")


@pytest.fixture(name="claim")
def add_claim(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Settings], Section]], None]:
    """Put a claim in the place of one of `CLAIMS`."""
    monkeypatch.setattr(study, "CLAIMS", CLAIMS)

    def add(name: str, function: Callable[[Settings], Section]) -> None:
        module = ModuleType(name)
        module.study = function  # type: ignore[attr-defined]  # a module made here
        monkeypatch.setitem(sys.modules, f"latentd_trainer.study.{name}", module)

    for name in CLAIMS:
        add(name, lambda settings: section(a=float(settings.seed)))
    return add


def call(*arguments: object, jobs: int = 1) -> Result:
    return CliRunner().invoke(app, ["study", "--jobs", str(jobs), *map(str, arguments)])


def test_a_report_has_verdicts_figures_and_pictures(claim: Callable, tmp_path: Path) -> None:
    """One section a claim in the order of the report, its verdict in the contents, its picture beside it."""
    picture = Picture("seen.png", "What is seen.", b"PNG")
    claim("second", lambda _: Section("Other", "Said.", "How.", {"a": 1.0}, (HIGH,), "Body.", (picture,)))
    result = call("--out", tmp_path, "--seed", 3, "--only", "second", "--only", "first")
    assert result.exit_code == 0, result.output
    report = (tmp_path / "report.md").read_text()
    assert report.index("| [A title](#first) | **holds** |") < report.index("| [Other](#second) | **holds** |")
    assert "| a is above b | 3 > 2 | yes |" in report
    assert "![What is seen.](seen.png)" in report
    assert (tmp_path / "seen.png").read_bytes() == b"PNG"
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["claims"]["first"] == {"verdict": "holds", "figures": {"a": 3.0, "b": 2.0}}
    assert list(found["claims"]) == ["first", "second"]


@pytest.mark.parametrize(
    ("stop", "status"),
    [(KeyboardInterrupt(), 130), (InterruptedTraining(signal.SIGTERM, 3), 143)],
    ids=["between trainings", "in a training"],
)
def test_an_interrupted_study_leaves_what_it_found(
    claim: Callable, stop: BaseException, status: int, tmp_path: Path
) -> None:
    """Stopped in the second of three claims: the report holds the first, and nothing is said of `fit`'s --resume."""

    def interrupted(_: Settings) -> Section:
        raise stop

    claim("second", interrupted)
    result = call("--out", tmp_path)
    assert result.exit_code == status
    assert "what was found and trained so far is kept" in " ".join(result.output.split())
    assert "--resume" not in result.output
    report = (tmp_path / "report.md").read_text()
    assert "## A title" in report
    assert "Not studied yet: second, third." in report
    assert list(json.loads((tmp_path / "figures.json").read_text())["claims"]) == ["first"]


def test_sigterm_ends_a_study_in_order(claim: Callable, tmp_path: Path) -> None:
    """It comes up as an exception, on which processes that study are ended; then the handler of before is back."""

    def terminated(_: Settings) -> Section:
        signal.raise_signal(signal.SIGTERM)
        return section()

    claim("second", terminated)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        result = call("--out", tmp_path)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 143
    assert list(json.loads((tmp_path / "figures.json").read_text())["claims"]) == ["first"]


def test_unknown_claims_are_refused_at_once(claim: Callable, tmp_path: Path) -> None:
    """All of them are named, with those there are, and nothing is written."""
    result = call("--out", tmp_path / "out", "--only", "nonsense", "--only", "first", "--only", "other")
    assert result.exit_code == 2
    assert "unknown claims nonsense, other: must be of first, second, third" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_every_claim_is_a_module_that_studies() -> None:
    """Each name in CLAIMS imports, and has the function that the frame calls."""
    for name in study.CLAIMS:
        module = __import__(f"latentd_trainer.study.{name}", fromlist=["study"])
        assert callable(module.study), name


@pytest.fixture(scope="module", name="two")
def two_claims_in_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two claims that are quick, each in its own process."""
    out = tmp_path_factory.mktemp("two")
    result = call("--out", out, "--quick", "--only", "vanishing_gradient", "--only", "gan_as_em", jobs=2)
    assert result.exit_code == 0, result.output
    return out


def test_figures_do_not_depend_on_the_number_of_processes(two: Path, tmp_path: Path) -> None:
    """Two claims at once and one after the other: all is equal in figures.json but the command and the seconds."""
    assert call("--out", tmp_path, "--quick", "--only", "gan_as_em", "--only", "vanishing_gradient").exit_code == 0
    found = [json.loads((out / "figures.json").read_text()) for out in (two, tmp_path)]
    for each in found:
        assert set(each.pop("seconds")) == {"vanishing_gradient", "gan_as_em"}
        each.pop("command")
    assert found[0] == found[1]
    assert list(found[0]["claims"]) == list(found[1]["claims"]) == ["vanishing_gradient", "gan_as_em"]
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes() == (two / picture.name).read_bytes()


def test_what_a_process_raises_is_raised_here(tmp_path: Path) -> None:
    """With where it was raised as a note; the other process is ended."""
    names = ("no_such_claim", "no_such_claim_either")
    with pytest.raises(ModuleNotFoundError, match="no_such_claim") as raised:
        list(workers.study_all(names, Settings(0, True, tmp_path), 2, lambda *_: None))
    assert "workers.py" in raised.value.__notes__[0]
    assert not multiprocessing.active_children()
