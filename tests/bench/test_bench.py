"""The benchmark itself: it runs, on any bundles of the right names. What it measures is no test's business."""

import json
import math
import subprocess
import sys
from pathlib import Path

from bundles import write_diffusion, write_vae

ROOT = Path(__file__).parents[2]
CELLS = [
    "decode:tiny-vae:32",
    "decode-16:generator:32",
    "stream-decode:tiny-vae:32",
    "sample-256:digits-vae:1",
    "stream-sample:digits-diffusion:8",
    "sample:digits-diffusion:32",
    "stream-mix:digits-diffusion:32",
]
RATES = (
    *("ratio", "cpu_ratio", "rows_per_second", "rows_per_server_cpu_second", "server_cpu_us_per_request", "p50_ms"),
    *("evaluations_per_second", "evaluations_per_server_cpu_second", "mean_batch_rows", "fill"),
)


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """`python -m tests.bench`."""
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_benchmark_gives_a_ratio_for_every_cell(tmp_path: Path) -> None:
    """One load of every kind: a line of the table and an entry of the file each, with finite rates above zero."""
    write_vae(tmp_path, "digits-vae")
    write_diffusion(tmp_path, "digits-diffusion")
    out = tmp_path / "new" / "serving.json"
    done = run("--models", str(tmp_path), "--seconds", "0.3", "--out", str(out), "--cells", *CELLS)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    report = json.loads(out.read_text())
    assert [f"{cell['load']}:{cell['model']}:{cell['in_flight']}" for cell in report["cells"]] == CELLS
    for cell in report["cells"]:
        assert all(math.isfinite(cell[rate]) and cell[rate] > 0 for rate in RATES), cell
        assert cell["fill"] <= 1 or cell["model"] == "digits-diffusion"  # whose guided lanes take two rows
        (row,) = [row for row in rows if row[:3] == [cell["load"], cell["model"], str(cell["in_flight"])]]
        assert row[5] == f"{cell['ratio']:.2f}"
        assert cell["ratio"] == cell["rows_per_second"] / cell["bare_per_second"]
        assert report["bare_batch_sizes"][cell["model"]] in (1, 2, 4, 8, 16, 32, 64, 128)
    assert report["latency"]["stream-mix"]["ratio_of_shortest"] > 0
    assert all(
        math.isfinite(each["ratio"]) and each["ratio"] > 0
        for load in report["naive"].values()
        for each in load.values()
    )
    assert report["rest"]["start_up_s"] > 0


def test_without_models_it_says_how_to_get_them(tmp_path: Path) -> None:
    """Nothing is run or written, and the exit status is that of a wrong command."""
    done = run("--models", str(tmp_path), "--out", str(tmp_path / "serving.json"))
    assert done.returncode == 2
    assert "digits-vae" in done.stderr
    assert "make demo" in done.stderr
    assert not list(tmp_path.iterdir())
