"""Certificates on disk, so that a restart need not try every size of every graph again.

An entry holds the conditions it was found under and is believed under the very same ones only. Entries that cannot
be read, are of another format or say what no trial could have found are left aside with a line in the log, never
an error: without an entry the graph is tried.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentd_server.certificate import Buckets, Certificate, Promise

log = logging.getLogger(__name__)

_FORMAT = 1

_Size = Annotated[int, Field(ge=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    conditions: dict[str, str]
    promise: str
    sizes: Annotated[list[_Size], Field(min_length=1)]
    classes: list[list[_Size]]
    unsteady: list[_Size]
    witness: str


class CertificateCache:
    """Entries in a directory that is this server's to write; it may be shared by servers of one user."""

    def __init__(self, directory: Path | None) -> None:
        """None keeps nothing."""
        self._directory = directory

    def __repr__(self) -> str:
        return str(self._directory or "off")

    def find(self, conditions: Mapping[str, str], sizes: Sequence[int]) -> Certificate | None:
        """What was found under these conditions when these sizes were tried."""
        if self._directory is None:
            return None
        path = self._directory / _name(conditions, sizes)
        try:
            entry = _Entry.model_validate_json(path.read_bytes())
            return _certificate(entry, conditions, sizes)
        except FileNotFoundError:
            return None
        except (OSError, ValidationError, ValueError) as error:
            why = str(error).splitlines()[0]
            log.warning("%s is left aside, and the graph is tried again: %s", path, why)
            return None

    def keep(self, conditions: Mapping[str, str], sizes: Sequence[int], certificate: Certificate) -> None:
        """Write an entry, whole or not at all; a directory that cannot be written costs a line in the log."""
        if self._directory is None:
            return
        entry = _Entry(
            format=_FORMAT,
            conditions=_all_conditions(conditions, sizes),
            promise=certificate.promise,
            sizes=list(certificate.buckets.sizes),
            classes=[list(each) for each in certificate.classes],
            unsteady=list(certificate.unsteady),
            witness=certificate.witness,
        )
        path = self._directory / _name(conditions, sizes)
        try:
            with tempfile.NamedTemporaryFile("w", dir=self._directory, prefix=".", delete=False) as file:
                file.write(entry.model_dump_json())
            try:
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
        except OSError as error:
            log.warning("the certificate is not kept: %s", error)


def open_cache(setting: str, environment: Mapping[str, str]) -> CertificateCache:
    """The cache that `--cache` names: a directory, `off`, or `auto`, which is the user's cache directory as XDG has it.

    A directory that cannot be made or written turns the cache off; under `auto` that is nothing to warn of.
    """
    if setting == "off":
        return CertificateCache(None)
    if setting != "auto":
        directory = Path(setting)
    elif environment.get("XDG_CACHE_HOME", "").startswith("/"):
        directory = Path(environment["XDG_CACHE_HOME"]) / "latentd"
    elif environment.get("HOME", "").startswith("/"):
        directory = Path(environment["HOME"]) / ".cache" / "latentd"
    else:
        return CertificateCache(None)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return CertificateCache(directory)
    except OSError as error:
        level = logging.DEBUG if setting == "auto" else logging.WARNING
        log.log(level, "certificates are not kept: %s cannot be written (%s)", directory, error.strerror)
        return CertificateCache(None)


def _all_conditions(conditions: Mapping[str, str], sizes: Sequence[int]) -> dict[str, str]:
    return {**conditions, "tried": ",".join(map(str, sizes))}


def _name(conditions: Mapping[str, str], sizes: Sequence[int]) -> str:
    text = json.dumps(_all_conditions(conditions, sizes), sort_keys=True)
    return f"certificate-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _certificate(entry: _Entry, conditions: Mapping[str, str], sizes: Sequence[int]) -> Certificate:
    """What an entry says.

    Raises:
        ValueError: it was found under other conditions, or no trial could have found it.
    """
    if entry.format != _FORMAT:
        raise ValueError(f"its format is {entry.format}, not {_FORMAT}")
    if entry.conditions != _all_conditions(conditions, sizes):
        raise ValueError("it was found under other conditions")
    promise = Promise(entry.promise)
    classes = tuple(tuple(each) for each in entry.classes)
    tried = [*entry.unsteady, *(size for each in classes for size in each)]
    if sorted(tried) != sorted(sizes):
        raise ValueError("its classes are not of the sizes that were tried")
    if promise is Promise.BATCHED and (not classes or tuple(entry.sizes) != classes[0] or max(sizes) not in classes[0]):
        raise ValueError("its sizes are not those of its first class")
    if promise is Promise.ALONE and entry.sizes not in ([1], [2], [1, 2]):
        raise ValueError("its sizes are not those of single lanes")
    if promise is Promise.NOTHING:
        raise ValueError("it promises nothing, so the graph is given another chance")
    return Certificate(promise, Buckets(tuple(entry.sizes)), classes, tuple(entry.unsteady), entry.witness)
