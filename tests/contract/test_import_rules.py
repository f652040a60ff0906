"""Who may import whom, as pyproject.toml says it and import-linter checks it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "latentd": "protos/latentd",
    "latentd_server": "server/latentd_server",
    "latentd_client": "client/latentd_client",
    "latentd_trainer": "trainer/latentd_trainer",
}


def lint(roots: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's verdict on the packages below `roots`, which shadow the installed ones."""
    tool = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [tool, "--no-cache", "--no-logo", "--config", ROOT / "pyproject.toml"],
        cwd=roots,
        env={**os.environ, "PYTHONPATH": str(roots), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The four packages side by side, to be changed."""
    for package, source in PACKAGES.items():
        shutil.copytree(ROOT / source, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_import_rules_are_kept(copy: Path) -> None:
    """No package, and no file of the server, imports what it must not."""
    done = lint(copy)
    assert done.returncode == 0, done.stdout


PLANTED = [
    ("latentd/tensor.py", "latentd_server.job", "latentd.tensor -> latentd_server.job"),
    ("latentd_client/__init__.py", "latentd_server.job", "latentd_client -> latentd_server.job"),
    ("latentd_trainer/spec.py", "latentd_server.job", "latentd_trainer.spec -> latentd_server.job"),
    ("latentd_server/__init__.py", "torch", "latentd_server -> torch"),
    ("latentd_server/scheduler.py", "time", "latentd_server.scheduler -> time"),
    ("latentd_server/noise.py", "random", "latentd_server.noise -> random"),
    ("latentd_server/resolve.py", "asyncio", "latentd_server.resolve -> asyncio"),
    ("latentd_server/schedules.py", "latentd_server.gate", "latentd_server.gate -> onnx"),
    ("latentd_server/scheduler.py", "onnxruntime", "latentd_server.scheduler -> onnxruntime"),
    ("latentd_server/models.py", "grpc", "latentd_server.models -> grpc"),
]


def test_planted_violations_are_found(copy: Path) -> None:
    """Each rule, broken once (directly, and by way of another file), is reported with the import that breaks it."""
    for file, module, _ in PLANTED:
        with (copy / file).open("a") as source:
            source.write(f"\nimport {module}\n")
    done = lint(copy)
    assert done.returncode == 1
    assert [said for _, _, said in PLANTED if said not in done.stdout] == [], done.stdout
