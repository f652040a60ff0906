"""Bundle directories, `models/NAME/VERSION/`: read, written whole or not at all, and their card replaced."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToJson, Parse, ParseError
from latentd import names
from latentd.v1 import bundle_pb2, model_pb2

from latentd_trainer.checkpoint import write_whole

RECORD_FILE = "record.json"
"""How the model was trained and exported, as JSON; beside it lies its checkpoint."""


class BundleError(Exception):
    """A bundle that cannot be read or written; the message says why and what would do."""


class VersionTakenError(BundleError):
    """The version is there already, and may not be replaced."""

    def __init__(self, directory: Path) -> None:
        super().__init__(f"{directory} exists; give another version, or --replace to put this one in its place")


def sha256(data: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def next_version(models: Path, name: str) -> int:
    """The number after the newest version of `name` under `models`; 1 if there is none."""
    directory = models / name
    taken = [int(entry.name) for entry in directory.iterdir() if entry.name.isdigit()] if directory.is_dir() else []
    return max(taken, default=0) + 1


def read(directory: Path) -> bundle_pb2.Bundle:
    """Read `bundle.json`. Checks that it parses, nothing else; `verify` checks the rest.

    Raises:
        BundleError: there is no such file, or it is not a Bundle as proto JSON.
    """
    path = directory / names.BUNDLE_FILE
    try:
        return Parse(path.read_text(encoding="utf-8"), bundle_pb2.Bundle())
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}; a bundle is a folder NAME/VERSION") from error
    except (ParseError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: is not a bundle as proto JSON: {error}") from error


def read_record(directory: Path) -> dict[str, Any]:
    """Read `record.json`.

    Raises:
        BundleError: there is no such file, or it is not a JSON object.
    """
    path = directory / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"{path}: is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise BundleError(f"{path}: must hold a JSON object, holds {type(record).__name__}")
    return record


def require_free(directory: Path, replace: bool) -> None:
    """Refuse to write over a version.

    Raises:
        VersionTakenError: `directory` exists and may not be replaced.
    """
    if directory.exists() and not replace:
        raise VersionTakenError(directory)


def write(directory: Path, bundle: bundle_pb2.Bundle, files: Mapping[str, bytes], *, replace: bool = False) -> None:
    """Write a bundle and the files beside it: `directory` is at every moment absent, the old bundle or the new one.

    With `replace` an existing version is moved aside for the moment between two renames; if the second fails it
    is moved back. Of several processes that write one version at once, the first rename decides.

    Raises:
        VersionTakenError: the version exists, if only since a moment, and `replace` is not set.
        BundleError: the disk refused. Either way nothing is left behind and what stood before stands.
    """
    require_free(directory, replace)
    try:
        _write_whole_directory(directory, {**files, names.BUNDLE_FILE: to_json(bundle)}, replace)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and not replace:
            raise VersionTakenError(directory) from error
        raise BundleError(f"{directory}: cannot be written ({error.strerror}); nothing was changed") from error


def _write_whole_directory(directory: Path, files: Mapping[str, bytes], replace: bool) -> None:
    new_parents = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A server lists versions by number, so names that start with a dot are invisible to it.
    aside = directory.parent / f".{directory.name}.{secrets.token_hex(4)}"
    try:
        aside.mkdir()
        for name, data in files.items():
            _write_file(aside / name, data)
        _sync_directory(aside)
        _move_into_place(aside, directory, replace)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    _sync_directory(directory.parent)


def replace_card(directory: Path, card: model_pb2.ModelCard) -> None:
    """Put another card into the bundle; its digest does not cover the card. Readers see the old file or the new.

    Raises:
        BundleError: there is no bundle.
        OSError: the file cannot be written; the old one is intact.
    """
    bundle = read(directory)
    bundle.model.card.CopyFrom(card)
    write_whole(directory / names.BUNDLE_FILE, to_json(bundle))


def to_json(bundle: bundle_pb2.Bundle) -> bytes:
    """`bundle.json`; equal messages give equal bytes."""
    return (MessageToJson(bundle, indent=2, sort_keys=True) + "\n").encode()


def _move_into_place(aside: Path, directory: Path, replace: bool) -> None:
    if not (replace and directory.exists()):
        aside.rename(directory)  # fails if another process has put a version there since `require_free`
        return
    # rename(2) cannot put a directory in the place of one that holds files.
    old = directory.parent / f"{aside.name}.old"
    directory.rename(old)
    try:
        aside.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make renames and new names inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
