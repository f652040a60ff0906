"""Real processes: the trainer from `.venv`, the server from `.venv-server`, where torch cannot be imported."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from processes import Running, start_server

ROOT = Path(__file__).resolve().parents[2]
TRAINER = Path(sys.executable).with_name("latentd-train")
SERVER_PYTHON = ROOT / ".venv-server" / "bin" / "python"
# Small on purpose: what is tested here is the way from data to pixels, not the pixels.
STEPS = "30"


@pytest.fixture(scope="session")
def server_python() -> Path:
    """The interpreter of the torch-free environment."""
    if not SERVER_PYTHON.exists():
        pytest.skip("no .venv-server; `make setup` makes it")
    return SERVER_PYTHON


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with the three families, fitted for 30 steps, exported and verified by the real trainer."""
    root = tmp_path_factory.mktemp("trained")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for family in ("vae", "gan", "diffusion"):
        run, name = str(root / "runs" / family), f"tiny-{family}"
        for command in (
            ["fit", family, "--out", run, "--steps", STEPS],
            ["export", run, "--models", str(root / "models"), "--name", name],
            ["verify", str(root / "models" / name / "1")],
        ):
            done = subprocess.run([TRAINER, *command], capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, f"latentd-train {' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return root / "models"


@pytest.fixture
def server(server_python: Path, trained: Path, tmp_path: Path) -> Iterator[Running]:
    """A running server with the trained models."""
    running = start_server(server_python, trained, tmp_path / "server.log")
    yield running
    if running.process.poll() is None:
        assert running.stop() == 0, running.log.read_text()
