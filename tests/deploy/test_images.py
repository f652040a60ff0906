"""The server's image, as far as it shows without building it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from server_rules import configured

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy/docker"
DOCKERFILE = DOCKER / "server.Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FLAVOURS = ["cpu", "gpu"]


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    """The linter's verdict on a Dockerfile."""
    return subprocess.run([HADOLINT, path], capture_output=True, text=True, timeout=60)


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile's last stage, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", text))
    lines = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    last = max(number for number, (word, _) in enumerate(lines) if word == "FROM")
    return [(word, rest) for word, rest in lines[last:]]


def locked(flavour: str) -> dict[str, str]:
    """Version by distribution, as the flavour's lock pins them."""
    text = (DOCKER / f"server-{flavour}.lock").read_text()
    return {canonicalize_name(n): v for n, v in re.findall(r"(?m)^([A-Za-z0-9._-]+)==(\S+)", text)}


def entries(lock: str) -> list[str]:
    """The text of each distribution in a lock: version, hashes, and who asks for it."""
    return re.split(r"(?m)^(?=[a-z])", lock)[1:]


def test_the_dockerfile_is_clean() -> None:
    """The linter has nothing to say."""
    done = hadolint(DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_the_linter_would_say_something(tmp_path: Path) -> None:
    """A planted mistake (an unpinned apt package left cached) is reported."""
    planted = tmp_path / "Dockerfile"
    planted.write_text(DOCKERFILE.read_text() + "\nUSER root\nRUN apt-get update && apt-get install -y curl\n")
    assert hadolint(planted).returncode == 1


def test_the_image_runs_the_server_as_nobody_in_particular() -> None:
    """The last stage ends as user 10001, starts `latentd`, and is told to stop by the signal that drains."""
    said = dict(instructions(DOCKERFILE.read_text()))
    assert said["USER"] == "10001:10001"
    assert said["ENTRYPOINT"] == '["latentd"]'
    assert said["STOPSIGNAL"] == "SIGTERM"
    assert said["EXPOSE"].split() == ["8500", "8501", "9090"]


def test_the_image_and_the_manifests_set_the_server_up_alike() -> None:
    """The image's defaults are settings the server accepts, and those of the config map in Kubernetes."""
    said = dict(re.findall(r"(LATENTD_\w+)=(\S+)", dict(instructions(DOCKERFILE.read_text()))["ENV"]))
    assert said
    configured(said)
    kustomization = (ROOT / "deploy/k8s/base/kustomization.yaml").read_text()
    in_kubernetes = dict(re.findall(r"- (LATENTD_\w+)=(\S+)", kustomization))
    assert said.items() <= in_kubernetes.items()


@pytest.mark.parametrize(("module", "status"), [("torch", 1), ("other", 0)])
def test_the_build_fails_where_torch_can_be_imported(tmp_path: Path, module: str, status: int) -> None:
    """The step that looks for torch fails when there is a module of that name, and passes otherwise."""
    [step] = [rest for word, rest in instructions(DOCKERFILE.read_text()) if word == "RUN" and "import torch" in rest]
    (tmp_path / f"{module}.py").touch()
    script = step.partition("&&")[0].replace("python ", f"{sys.executable} -S ")
    assert subprocess.run(["sh", "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL).returncode == status


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_lock_satisfies_the_project(flavour: str) -> None:
    """Each requirement of the server, and no other, is locked at a version it admits; scripts/make_locks.sh does it."""
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(line) for line in [*PROJECT["dependencies"], *extras["server"], *extras[flavour]]]
    versions = locked(flavour)
    assert [str(r) for r in wanted if not r.specifier.contains(versions[canonicalize_name(r.name)])] == []
    text = (DOCKER / f"server-{flavour}.lock").read_text()
    asked_for = {entry.split("==")[0] for entry in entries(text) if "latentd (pyproject.toml)" in entry}
    assert asked_for == {canonicalize_name(r.name) for r in wanted}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_lock_pins_every_file_by_its_hash(flavour: str) -> None:
    """Nothing is installed that was not seen when the lock was made."""
    for entry in entries((DOCKER / f"server-{flavour}.lock").read_text()):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_lock_holds_one_runtime_and_no_trainer(flavour: str) -> None:
    """Exactly one ONNX Runtime is installed, and nothing that can read a pickled model."""
    names = set(locked(flavour))
    assert names & {"onnxruntime", "onnxruntime-gpu"} == {"onnxruntime-gpu" if flavour == "gpu" else "onnxruntime"}
    assert not names & {"torch", "safetensors", "onnxscript", "scikit-learn", "matplotlib"}


def test_both_images_agree_but_for_the_runtime() -> None:
    """CPU and GPU images hold the same version of all that they share."""
    cpu, gpu = locked("cpu"), locked("gpu")
    assert {name: (cpu[name], gpu[name]) for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {}


def test_the_build_context_is_what_the_image_is_made_of() -> None:
    """.dockerignore keeps everything out but what the Dockerfile copies."""
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    let_in = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {
        source.replace("${FLAVOUR}", "*").replace("server-*", "*")
        for line in re.findall(r"(?m)^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text())
        for source in line.split()
    }
    assert let_in == copied
