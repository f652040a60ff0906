"""Checkpoints and records: what is refused, and what is never lost."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from latentd_trainer import checkpoint
from latentd_trainer.checkpoint import CheckpointError, RunRecord
from latentd_trainer.data import DataInfo
from latentd_trainer.families import Family
from safetensors import safe_open

INFO = DataInfo("tiny", (1, 8, 8), 17, ("a", "b"), (0.5, 0.5), "0" * 64)
SETTINGS = {"width": 8, "hidden": 16, "latent": 3}


def vae(**settings: int) -> Family:
    """A tiny VAE."""
    return checkpoint.build_family("vae", SETTINGS | settings, INFO, seed=0)


def test_records_survive_their_file(tmp_path: Path) -> None:
    """A record reads back equal to what was written."""
    record = RunRecord("vae", SETTINGS, "digits", INFO, 7, "fp32", 2, 4, {"torch": "2"})
    checkpoint.write_record(tmp_path, record)
    assert checkpoint.read_record(tmp_path) == record


def test_building_a_family_leaves_the_global_generator_alone() -> None:
    """Weights come from the seed, and torch's global stream goes on as if nothing had been built."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = vae(), vae()
    assert torch.equal(torch.rand(3), expected)
    for one, other in zip(first.modules["networks"].parameters(), second.modules["networks"].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_is_tensors_and_json(tmp_path: Path) -> None:
    """The file is plain safetensors whose header holds the step as JSON; loading it unpickles nothing."""
    checkpoint.save(tmp_path, vae(), 12)
    with safe_open(tmp_path / checkpoint.CHECKPOINT_FILE, "pt") as file:
        assert json.loads(file.metadata()["latentd"])["step"] == 12
        assert any(key.startswith("averages/networks/") for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the disk fills up while writing or while renaming, the old content stays and nothing lies beside it."""
    path = tmp_path / "file"
    checkpoint.write_whole(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        checkpoint.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_network_s_checkpoint_is_refused(tmp_path: Path) -> None:
    """A checkpoint of other sizes is named as not of this run."""
    checkpoint.save(tmp_path, vae(), 1)
    with pytest.raises(CheckpointError, match="not a checkpoint of this run"):
        checkpoint.restore(tmp_path, vae(latent=4))


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_damaged_checkpoint_is_named(content: bytes | None, tmp_path: Path) -> None:
    """Missing, empty and cut files are told with their path."""
    checkpoint.save(tmp_path, vae(), 1)
    path = tmp_path / checkpoint.CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: not a checkpoint"):
        checkpoint.restore(tmp_path, vae())
    path.unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: not a checkpoint"):
        checkpoint.restore(tmp_path, vae())


def test_a_checkpoint_from_the_future_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer layout is not guessed at."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 2)
        checkpoint.save(tmp_path, vae(), 1)
    with pytest.raises(CheckpointError, match="format 2; this program knows 1"):
        checkpoint.restore(tmp_path, vae())


@pytest.mark.parametrize("text", ["{", "[]", '{"family": "vae"}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    """A record that is not one is told with its path."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not a run's record"):
        checkpoint.read_record(tmp_path)


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    """Where there is no record, the message asks whether it is a run."""
    with pytest.raises(CheckpointError, match=r"is .* a run\?"):
        checkpoint.load_run(tmp_path)


@pytest.mark.parametrize(
    ("family", "settings", "complaint"),
    [
        ("vae", SETTINGS | {"wings": 2}, "vae has no settings wings; another version may have had them"),
        ("flow", SETTINGS, "unknown family 'flow'"),
        ("vae", SETTINGS | {"width": 3}, "width=3: must be a multiple of 8"),
    ],
)
def test_a_run_that_cannot_be_built_is_named(
    family: str, settings: dict[str, int], complaint: str, tmp_path: Path
) -> None:
    """A run of another version's family or settings is told with its record's path and what is unknown."""
    checkpoint.write_record(tmp_path, RunRecord(family, settings, "digits", INFO, 0, "fp32", 1, 1, {}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{complaint}"):
        checkpoint.load_run(tmp_path)
