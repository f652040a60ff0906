"""`latentd-train fit` and `settings` as a person meets them."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentd_trainer import checkpoint, cli
from latentd_trainer.cli import app
from latentd_trainer.families import FAMILIES, load_family
from typer.testing import CliRunner, Result

QUICK = ["--set", "batch_size=8", "--set", "width=8", "--set", "hidden=16", "--steps", "3"]


def call(*arguments: object) -> Result:
    """Run `latentd-train` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(result: Result) -> str:
    """Everything printed, on one line."""
    return " ".join(result.output.split())


@pytest.fixture(name="run")
def quick_run(tmp_path: Path) -> Path:
    """A finished VAE run of three steps."""
    result = call("fit", "vae", "--out", tmp_path / "run", *QUICK)
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def test_fit_trains_on_the_embedded_digits(run: Path) -> None:
    """With nothing but a family and a place, digits are trained on with seed 0."""
    record = checkpoint.read_record(run)
    assert (record.family, record.data, record.seed, record.settings["steps"]) == ("vae", "digits", 0, 3)
    assert checkpoint.load_run(run).step == 3


def test_fit_trains_on_other_data(tmp_path: Path) -> None:
    """--data takes a path; sizes, levels and classes of the network are those of the data."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 12), np.uint8)
    np.savez(tmp_path / "set.npz", x=pixels, y=np.arange(12) % 2)
    result = call("fit", "gan", "--out", tmp_path / "run", "--data", tmp_path / "set.npz", *QUICK)
    assert result.exit_code == 0, result.output
    info = checkpoint.read_record(tmp_path / "run").info
    assert (info.shape, info.levels, info.class_names) == ((3, 8, 12), 256, ("0", "1"))


def test_a_run_is_not_overwritten(run: Path) -> None:
    """A second fit into the same directory is refused, and nothing changes."""
    before = (run / "checkpoint.safetensors").read_bytes()
    result = call("fit", "vae", "--out", run, *QUICK)
    assert result.exit_code == 2
    assert "already holds a run; continue it with --resume" in said(result)
    assert (run / "checkpoint.safetensors").read_bytes() == before


NO_LONGER_THAN = """
import faulthandler

faulthandler.dump_traceback_later(100, exit=True)  # a process that hangs says where, and ends
"""
FIT = NO_LONGER_THAN + "from latentd_trainer.__main__ import main; main()"
WAIT_IN_THE_THIRD_STEP = f"""{NO_LONGER_THAN}
import sys

from latentd_trainer.__main__ import main
from latentd_trainer.families.vae import Vae

step = Vae.step


def wait(self, batch, moment):
    if moment.step == 2:
        print("waiting", flush=True)
        sys.stdin.readline()
    return step(self, batch, moment)


Vae.step = wait
main()
"""


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    """While one trains, others are refused, also to resume; once it is gone, even killed, training goes on."""
    arguments = ["fit", "vae", "--out", str(tmp_path / "run"), "--every", "1", *QUICK]
    command = [sys.executable, "-c", WAIT_IN_THE_THIRD_STEP, *arguments]
    told = tmp_path / "told.txt"
    with (
        told.open("w") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as first,
    ):
        try:
            assert first.stdout is not None
            assert "waiting\n" in first.stdout, told.read_text()
            fresh, resumed = call(*arguments), call(*arguments, "--resume")
        finally:
            first.kill()
    assert (fresh.exit_code, resumed.exit_code) == (2, 1)
    assert "already holds a run" in said(fresh)
    assert "another process is training here; wait until it ends" in said(resumed)
    assert checkpoint.load_run(tmp_path / "run").step == 2
    assert call(*arguments, "--resume").exit_code == 0
    assert checkpoint.load_run(tmp_path / "run").step == 3


def test_of_two_that_begin_at_once_one_is_refused(tmp_path: Path) -> None:
    """Exactly one of two processes gets a new directory, and what it leaves is one run from end to end."""
    out, told = tmp_path / "run", [tmp_path / f"{seed}.txt" for seed in (1, 2)]
    both = []
    try:
        for seed, log in enumerate(told, 1):
            with log.open("w") as errors:
                command = [sys.executable, "-c", FIT, "fit", "vae", "--out", out, "--seed", str(seed), *QUICK]
                both.append(subprocess.Popen(command, stdout=errors, stderr=errors))
        codes = [process.wait(timeout=150) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    said_by = [" ".join(log.read_text().split()) for log in told]
    assert sorted(map(bool, codes)) == [False, True], said_by
    refused = said_by[1 - codes.index(0)]
    assert "already holds a run" in refused or "another process is training here" in refused, refused
    assert checkpoint.read_record(out).seed == codes.index(0) + 1
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_run_that_begins_meanwhile_is_not_overwritten(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that another process finished between the first look and the lock stays as it is."""
    before = (run / "checkpoint.safetensors").read_bytes()
    new_record = cli._new_record

    def late(*arguments: Any) -> Any:
        (run / "hidden.json").rename(run / checkpoint.RECORD_FILE)
        return new_record(*arguments)

    monkeypatch.setattr(cli, "_new_record", late)
    (run / checkpoint.RECORD_FILE).rename(run / "hidden.json")
    result = call("fit", "vae", "--out", run, *QUICK)
    assert result.exit_code == 2
    assert "already holds a run; continue it with --resume" in said(result)
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_the_same_command_with_resume_starts_and_continues(tmp_path: Path) -> None:
    """One command line serves the first start and every restart, as a job that is restarted needs it."""
    command = ["fit", "vae", "--out", tmp_path / "run", "--resume", "--seed", "4", *QUICK]
    for _ in range(2):
        result = call(*command)
        assert result.exit_code == 0, result.output
        assert "vae trained for 3 steps" in said(result)


def test_a_run_without_a_checkpoint_starts_again(run: Path) -> None:
    """A run that was killed before its first checkpoint goes on from its start."""
    before = (run / "checkpoint.safetensors").read_bytes()
    (run / "checkpoint.safetensors").unlink()
    assert call("fit", "vae", "--out", run, "--resume").exit_code == 0
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_resume_refuses_another_run_s_options(run: Path) -> None:
    """Every option that contradicts the run is named at once."""
    result = call(
        "fit", "vae", "--out", run, "--resume", "--seed", 1, "--threads", 2, "--steps", 9, "--set", "latent=5"
    )
    assert result.exit_code == 2
    for part in ("seed is 0, not 1", "threads is 1, not 2", "steps is 3, not 9", "latent is 8, not 5"):
        assert part in said(result)
    result = call("fit", "gan", "--out", run, "--resume")
    assert result.exit_code == 2
    assert "family is vae, not gan" in said(result)


def test_resume_refuses_changed_data(tmp_path: Path) -> None:
    """A run does not go on with other data under the same path."""
    path = tmp_path / "set.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8))
    command = ["fit", "vae", "--out", tmp_path / "run", "--data", path, *QUICK]
    assert call(*command).exit_code == 0
    np.savez(path, x=np.random.default_rng(1).integers(0, 256, (12, 8, 8), np.uint8))
    result = call(*command, "--resume")
    assert result.exit_code == 2
    assert "has changed since the run began" in said(result)


def test_resume_tells_of_other_versions(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are promised for equal versions only, and a difference is said."""
    from latentd_trainer import train

    monkeypatch.setattr(train, "versions", lambda: {"torch": "99"})
    result = call("fit", "vae", "--out", run, "--resume")
    assert result.exit_code == 0
    assert "bits may differ" in said(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flow"], "unknown family 'flow': must be one of naive_bayes,"),
        (["vae", "--data", "missing"], "missing: no such file or folder"),
        (["vae", "--set", "latent"], "--set latent: must be NAME=VALUE"),
        (["vae", "--set", "latent=x", "--set", "wings=2"], "latent='x': must be int; unknown setting 'wings'"),
        (["vae", "--seed", str(2**63)], "'--seed'"),
        (["vae", "--set", "clip_norm=-1"], "clip_norm=-1.0: must be at least 0"),
        (["gan", "--set", "average_decay=2"], "average_decay=2.0: must be from 0 to 1"),
        (["vae", "--steps", "0"], "steps=0: must be at least 1"),
        (["vae", "--device", "tpu"], "device 'tpu': must be auto, cpu, cuda or cuda:N"),
        (["vae", "--device", "cpu", "--precision", "bf16"], "precision bf16 needs a CUDA device"),
    ],
)
def test_bad_options_exit_with_2_and_leave_nothing(arguments: Sequence[str], message: str, tmp_path: Path) -> None:
    """What is wrong is said in one line, and no run is begun."""
    result = call("fit", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert message in said(result)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_exits_with_1(run: Path) -> None:
    """A checkpoint that cannot be read ends the program with its name and status 1."""
    (run / "checkpoint.safetensors").write_bytes(b"")
    result = call("fit", "vae", "--out", run, "--resume")
    assert result.exit_code == 1
    assert "checkpoint.safetensors: not a checkpoint" in said(result)


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_lists_every_setting_with_its_default(family: str) -> None:
    """The table holds what --set takes."""
    result = call("settings", family)
    assert result.exit_code == 0
    for entry in dataclasses.fields(load_family(family).config_type):
        assert entry.name in result.output


def test_help_does_not_wait_for_torch() -> None:
    """--help loads neither torch nor scikit-learn, and names every command."""
    code = (
        "import sys; from latentd_trainer.cli import app\n"
        "try: app(['fit', '--help'])\n"
        "finally: print(sorted({'torch', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.rstrip().endswith("[]")
    for option in ("--data", "--out", "--steps", "--set", "--seed", "--device", "--precision", "--threads", "--resume"):
        assert option in result.stdout


@pytest.mark.parametrize("missing", ["typer", "torch"])
def test_without_its_extra_it_says_what_to_install(tmp_path: Path, missing: str) -> None:
    """Where only the client or the server is installed, training tells the extra that it needs."""
    script = f"import sys; sys.modules['{missing}'] = None; from latentd_trainer.__main__ import main; main()"
    command = [sys.executable, "-c", script, "fit", "vae", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"latentd-train needs {missing}: pip install 'latentd[train,cpu]'\n"
