"""The client's types, as its users see them."""

import subprocess
import sys
from pathlib import Path


def test_mypy_accepts_user_code_and_catches_mistakes() -> None:
    """Strict mypy finds the inferred types of every method right, and each planted mistake."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", str(here.parents[1] / "pyproject.toml"),
         str(here / "typing_sample.py")],
        cwd=here.parents[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
