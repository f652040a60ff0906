"""The Makefile: few commands, each explained, none that needs instructions."""

import os
import re
import shutil
import subprocess
import tomllib

import pytest
from manifests import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.search(r"(?m)^\.PHONY: (.*)$", MAKEFILE)[1].split()

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the root of the project, as if by hand even where make runs the tests."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_help_is_the_default_and_explains_every_target() -> None:
    """`make` alone lists each target with a line of its own."""
    listed = re.findall(r"(?m)^  make ([\w-]+) +\S+", make().stdout)
    assert listed == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_can_be_made(target: str) -> None:
    """Each target has a recipe whose prerequisites make knows how to make."""
    done = make("--dry-run", target)
    assert done.returncode == 0, done.stderr


def test_every_script_is_there() -> None:
    """The scripts that recipes run exist, and those run by themselves may be."""
    scripts = re.findall(r"(\S+ )?(scripts/\w+\.\w+)", MAKEFILE)
    assert scripts
    assert [name for _, name in scripts if not (ROOT / name).exists()] == []
    alone = [name for before, name in scripts if "python" not in before]
    assert [name for name in alone if not os.access(ROOT / name, os.X_OK)] == []


def test_torch_is_pinned_once() -> None:
    """The version of torch that make installs is the one the trainer asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [wanted] = [line for line in project["optional-dependencies"]["train"] if line.startswith("torch")]
    assert re.findall(r"torch==[\w.]+", MAKEFILE) == [wanted]


def test_an_old_python_is_named(tmp_path) -> None:
    """A Python that is too old is refused with what is needed, before anything is made."""
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 1;; esac\n')
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "latentd needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
