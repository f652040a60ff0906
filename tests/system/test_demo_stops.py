"""How `make demo` ends when it cannot go on."""

import functools
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="demo")
def demo_script(tmp_path: Path) -> dict[str, Any]:
    """The script's names, with all its directories empty."""
    names = runpy.run_path(str(ROOT / "scripts" / "demo.py"))["main"].__globals__
    names.update(OUT=tmp_path / "out", MODELS=tmp_path / "models", RUNS=tmp_path / "runs")
    return names


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("no disk"), 1), (KeyboardInterrupt(), 130)])
def test_what_waits_for_its_turn_does_not_begin(
    demo: dict[str, Any], error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """When a family fails or is stopped, those that wait for their turn are not trained, and the status tells."""
    begun: list[str] = []

    def train(family: str) -> str:
        begun.append(family)
        if family == "diffusion":
            raise error
        return family

    demo["train"] = train
    # One at a time, so that the order is sure.
    demo["ThreadPoolExecutor"] = functools.partial(lambda pool, max_workers: pool(1), demo["ThreadPoolExecutor"])
    assert demo["main"]() == status
    assert begun == ["diffusion"]
    assert ("no disk" if status == 1 else "goes on from here") in capsys.readouterr().out
