"""The overload benchmark itself: it runs, and counts every request once. What it measures is no test's business."""

import re
import subprocess
import sys
from pathlib import Path

from bundles import write_diffusion

ROOT = Path(__file__).parents[2]


def test_the_overload_benchmark_tells_of_both_loads(tmp_path: Path) -> None:
    """A peak above zero, and for each load what became of the requests, how fast refusals were and what they said."""
    write_diffusion(tmp_path, "digits-diffusion")
    command = [sys.executable, "-m", "tests.bench.overload", "--models", str(tmp_path), "--seconds", "1"]
    done = subprocess.run(
        [*command, "--factor", "0.5", "--ramp", "0.1", "--rounds", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    peak = re.search(r"peak ([\d,]+) evaluations/s", done.stdout)
    assert peak is not None
    assert int(peak[1].replace(",", "")) > 0
    assert done.stdout.count("of the peak of") == done.stdout.count("refused within") == 4
    assert done.stdout.count("told to come back in") == 4
    assert done.stdout.count("goodput, median") == 2
    refusals = re.search(r"nothing but refusals: (\d+), {'OVERLOADED': (\d+)}", done.stdout)
    assert refusals is not None
    assert refusals[1] == refusals[2]
    assert "the server's CPU time" in done.stdout


def test_without_a_model_it_says_how_to_get_one(tmp_path: Path) -> None:
    """Nothing is run, and the exit status is that of a wrong command."""
    command = [sys.executable, "-m", "tests.bench.overload", "--models", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "make demo" in done.stderr
