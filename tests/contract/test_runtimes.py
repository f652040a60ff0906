"""The contract holds on the oldest protobuf and gRPC that the project admits, and on the newest."""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PORTABLE = ["golden_messages", "stubs", "tensor", "names", "digest", "api_style"]
"""The tests of this folder that need nothing but the contract and its dependencies."""

DEPENDENCIES = {
    re.split(r"[^a-z0-9-]", line)[0]: line
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
}
FLOORS = [re.sub(r">=([0-9.]+).*", r"==\1", DEPENDENCIES[name]) for name in ("protobuf", "grpcio")]
REQUIREMENTS = {
    "oldest": [*FLOORS, DEPENDENCIES["numpy"]],
    "newest": ["protobuf>=7", *(DEPENDENCIES[name] for name in ("protobuf", "grpcio", "numpy"))],
}


def environment(name: str, requirements: list[str]) -> Path:
    """The Python of a throw-away environment holding `requirements`; made once and kept until they change."""
    path = ROOT / f".venv-protobuf-{name}"
    stamp = path / "requirements.txt"
    wanted = "\n".join([*requirements, "pytest>=9", "pytest-asyncio>=1.3", "hypothesis>=6.150"])
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(path, clear=True, with_pip=False)
        pip = [sys.executable, "-m", "pip", "--python", str(path / "bin/python"), "install", "--quiet", "--no-input"]
        subprocess.run([*pip, *wanted.splitlines()], check=True)
        stamp.write_text(wanted)
    return path / "bin/python"


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_the_contract_holds_on_this_runtime(name: str) -> None:
    """Stubs load, golden messages keep their bytes, and the codec and the digest give the same answers."""
    python = environment(name, REQUIREMENTS[name])
    tests = [str(HERE / f"test_{test}.py") for test in PORTABLE]
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "protos"), "CI": "true"},  # CI: Hypothesis without a clock
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d{2,} passed", done.stdout), done.stdout


def test_the_two_runtimes_differ_in_their_major_version() -> None:
    """The promise is worth something: one environment runs protobuf 6, the other 7 or later."""
    majors = [
        subprocess.run(
            [environment(name, REQUIREMENTS[name]), "-c", "import google.protobuf as p; print(p.__version__)"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split(".")[0]
        for name in ("oldest", "newest")
    ]
    assert majors == ["6", "7"]
