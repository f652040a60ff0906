"""What deploy/README.md tells people to type is true of the files beside it."""

import re
import shutil

import latentd
import pytest
from manifests import ROOT, of_kind, render

TEXT = (ROOT / "deploy/README.md").read_text()


def found(pattern: str) -> set[str]:
    """Everything in the page that matches; empty is a mistake of the test."""
    matches = set(re.findall(pattern, TEXT))
    assert matches, pattern
    return matches


def test_every_path_exists() -> None:
    """Each file and directory that the page names is there."""
    names = found(r"deploy/[\w./-]*\w") | {f"deploy/{path}" for path in found(r"(?m)^\| `([\w/-]+)` \|")}
    names |= found(r"scripts/\w+\.sh") | found(r"tests/\w+")
    assert [name for name in names if not (ROOT / name.rstrip("/")).exists()] == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="rendering needs kubectl")
def test_every_directory_to_apply_renders() -> None:
    """`kubectl apply -k` is given directories that render."""
    for target in found(r"-k deploy/k8s/(\S+)"):
        assert render(target)


def test_images_carry_this_version() -> None:
    """Tags in commands are this version, with the flavour behind it."""
    assert found(r"latentd-server:([\w.-]+)") == {latentd.__version__, f"{latentd.__version__}-gpu"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="rendering needs kubectl")
def test_the_drain_adds_up_as_told() -> None:
    """The seconds in the section on draining are those of the manifests, and their sum is the grace period."""
    [deployment] = of_kind(render("base"), "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    section = TEXT.split("## Drain")[1].split("\n## ")[0]
    grace = int(re.search(r"`terminationGracePeriodSeconds` \((\d+) s\)", section)[1])
    sleep, drain, spare = (
        int(re.search(pattern, section)[1]) for pattern in (r"For (\d+) s", r"at most (\d+) s", r"(\d+) s are to spare")
    )
    assert grace == spec["terminationGracePeriodSeconds"] == sleep + drain + spare
    assert sleep == spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
