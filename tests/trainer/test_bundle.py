import errno
import os
from pathlib import Path

import pytest
from latentd.digest import bundle_digest
from latentd.v1 import bundle_pb2, model_pb2
from latentd_trainer import bundle as bundles
from latentd_trainer.bundle import BundleError, VersionTakenError

FILES = {"decoder.onnx": b"graph", "record.json": b"{}"}


def make(description: str = "first") -> bundle_pb2.Bundle:
    card = model_pb2.ModelCard(description=description, metrics={"b": 2.0, "a": 1.0})
    bundle = bundle_pb2.Bundle(format_version=1, model=model_pb2.Model(name="m@1", card=card))
    bundle.model.digest = bundle_digest(bundle)
    return bundle


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def disk_full_at_third_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the third file's fsync fail, as on a full disk."""
    synced = []
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """A bundle's message and its files come back as they were written, and nothing else is there."""
    directory = tmp_path / "m" / "1"
    bundles.write(directory, make(), FILES)
    assert bundles.read(directory) == make()
    assert set(contents(tmp_path)) == {"m/1/bundle.json", "m/1/decoder.onnx", "m/1/record.json"}


def test_equal_messages_are_equal_bytes() -> None:
    """The order in which metrics were added does not show."""
    other = make()
    other.model.card.ClearField("metrics")
    other.model.card.metrics["a"] = 1.0
    other.model.card.metrics["b"] = 2.0
    assert bundles.to_json(other) == bundles.to_json(make())


def test_a_version_is_never_overwritten_unasked(tmp_path: Path) -> None:
    """Writing to an existing version is refused with what to do, and changes nothing."""
    directory = tmp_path / "m" / "1"
    bundles.write(directory, make(), FILES)
    before = contents(tmp_path)
    with pytest.raises(BundleError, match="exists; give another version, or --replace to put this one in its place"):
        bundles.write(directory, make("second"), FILES)
    assert contents(tmp_path) == before


def test_replacing_leaves_nothing_of_the_old_version(tmp_path: Path) -> None:
    """With `replace` the new version takes the old one's place, file by file."""
    directory = tmp_path / "m" / "1"
    bundles.write(directory, make(), {**FILES, "encoder.onnx": b"old"})
    bundles.write(directory, make("second"), FILES, replace=True)
    assert bundles.read(directory).model.card.description == "second"
    assert set(contents(tmp_path)) == {"m/1/bundle.json", "m/1/decoder.onnx", "m/1/record.json"}


def test_a_version_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that write one free version, the one whose rename comes second is refused and leaves nothing behind."""
    directory = tmp_path / "m" / "1"
    rename, calls = Path.rename, []

    def overtaken(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 1:
            bundles.write(directory, make("overtaker"), FILES)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    with pytest.raises(VersionTakenError, match="exists; give another version"):
        bundles.write(directory, make("overtaken"), FILES)
    assert bundles.read(directory).model.card.description == "overtaker"
    assert [entry.name for entry in directory.parent.iterdir()] == ["1"]


@pytest.mark.usefixtures("disk_full_at_third_file")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """If the last file cannot be written, neither the version, nor the model's folder, nor a temporary one is left."""
    with pytest.raises(BundleError, match=r"cannot be written \(No space left"):
        bundles.write(tmp_path / "models" / "m" / "1", make(), FILES)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_version_intact(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """If a replacement cannot be written, what stood before stands, byte for byte."""
    directory = tmp_path / "m" / "1"
    bundles.write(directory, make(), FILES)
    before = contents(tmp_path)
    request.getfixturevalue("disk_full_at_third_file")
    with pytest.raises(BundleError, match=r"cannot be written \(No space left"):
        bundles.write(directory, make("second"), FILES, replace=True)
    assert contents(tmp_path) == before


def test_a_failed_swap_puts_the_old_version_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second of the two renames fails, the first is undone."""
    directory = tmp_path / "m" / "1"
    bundles.write(directory, make(), FILES)
    before = contents(tmp_path)
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BundleError, match=r"cannot be written \(Input/output error"):
        bundles.write(directory, make("second"), FILES, replace=True)
    assert contents(tmp_path) == before


def test_a_bundle_under_way_is_invisible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the rename, only a name that starts with a dot is there, which servers pass over."""
    seen = []

    def look(self: Path, target: Path) -> Path:
        seen.extend(entry.name for entry in (tmp_path / "m").iterdir())
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "rename", look)
    with pytest.raises(BundleError, match=r"cannot be written \(Input/output error"):
        bundles.write(tmp_path / "m" / "1", make(), FILES)
    assert [name.startswith(".1.") for name in seen] == [True]


def test_the_next_version_is_above_all_others(tmp_path: Path) -> None:
    """Versions count from 1, gaps are not filled, and names that are no numbers do not count."""
    assert bundles.next_version(tmp_path, "m") == 1
    for name in ("2", "7", "latest", ".9.abc"):
        (tmp_path / "m" / name).mkdir(parents=True)
    assert bundles.next_version(tmp_path, "m") == 8


def test_another_card_keeps_the_digest(tmp_path: Path) -> None:
    """Metrics added to the card leave the model the same one."""
    directory = tmp_path / "m" / "1"
    bundles.write(directory, make(), FILES)
    card = make().model.card
    card.metrics["frechet_ratio"] = 1.3
    bundles.replace_card(directory, card)
    bundle = bundles.read(directory)
    assert bundle.model.card == card
    assert bundle.model.digest == bundle_digest(bundle) == make().model.digest


def test_a_card_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the card is replaced leaves the bundle as it was, without a temporary file."""
    directory = tmp_path / "m" / "1"
    bundles.write(directory, make(), FILES)
    before = contents(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        bundles.replace_card(directory, model_pb2.ModelCard(description="second"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot be read: No such file"), (b"{", "is not a bundle as proto JSON"), (b"\xff", "is not a bundle")],
)
def test_a_damaged_message_names_its_file(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    """A missing or damaged bundle.json is an error that names it."""
    if content is not None:
        (tmp_path / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=f"bundle.json: {complaint}"):
        bundles.read(tmp_path)
