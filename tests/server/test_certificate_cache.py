"""Certificates on disk: found again under the same conditions, and never believed under any other."""

import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentd_server.certificate import Buckets, Certificate, Promise
from latentd_server.certificate_cache import CertificateCache, open_cache

KNOWN = {"model": "sha256:a", "threads": "2"}
SIZES = (1, 2, 3, 4)
FOUND = Certificate(Promise.BATCHED, Buckets((2, 3, 4)), classes=((2, 3, 4),), unsteady=(1,), witness="w")


def written(directory: Path) -> Path:
    CertificateCache(directory).keep(KNOWN, SIZES, FOUND)
    [path] = directory.iterdir()
    return path


def test_what_was_kept_is_found(tmp_path: Path) -> None:
    """Another process under the same conditions gets all of it back."""
    written(tmp_path)
    assert CertificateCache(tmp_path).find(KNOWN, SIZES) == FOUND


@pytest.mark.parametrize("promise", [Promise.BATCHED, Promise.ALONE])
def test_writing_twice_leaves_the_last(promise: Promise, tmp_path: Path) -> None:
    """An entry is replaced whole, and nothing else is left in the directory."""
    written(tmp_path)
    sizes = {Promise.BATCHED: (2, 3, 4), Promise.ALONE: (1,)}[promise]
    again = Certificate(promise, Buckets(sizes), classes=((2, 3, 4),), unsteady=(1,), witness="later")
    CertificateCache(tmp_path).keep(KNOWN, SIZES, again)
    assert CertificateCache(tmp_path).find(KNOWN, SIZES) == again
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("known", "sizes"),
    [(KNOWN | {"model": "sha256:b"}, SIZES), (KNOWN | {"more": "1"}, SIZES), ({"model": "sha256:a"}, SIZES),
     (KNOWN, (1, 2, 4))],
)  # fmt: skip
def test_other_conditions_find_nothing(known: dict[str, str], sizes: tuple[int, ...], tmp_path: Path) -> None:
    """A condition more, less or different, or other sizes to try, is another entry."""
    written(tmp_path)
    assert CertificateCache(tmp_path).find(known, sizes) is None


def changed(**fields: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | fields).encode()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: data[: len(data) // 2], "Invalid JSON|validation error"),
        (lambda data: b"", "validation error"),
        (lambda data: b"\xff\xfe", "validation error"),
        (changed(format=2), "format"),
        (changed(more=1), "validation error"),
        (changed(conditions=KNOWN), "other conditions"),
        (changed(promise="everything"), "everything"),
        (changed(promise="nothing"), "promises nothing"),
        (changed(sizes=[1, 2, 3, 4]), "first class"),
        (changed(sizes=[2, 3]), "first class"),
        (changed(sizes=[]), "validation error"),
        (changed(sizes=[2.5]), "validation error"),
        (changed(classes=[[2, 3, 4, 5]]), "not of the sizes"),
        (changed(classes=[[2, 3, 4], [1]]), "not of the sizes"),
        (changed(classes=[], unsteady=[1, 2, 3, 4]), "first class"),
        (changed(promise="alone"), "single lanes"),
    ],
)
def test_an_entry_that_cannot_be_is_left_aside(
    damage: Callable[[bytes], bytes], complaint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut short, foreign, or saying what no trial could have found: a line in the log, no certificate, no error."""
    path = written(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert CertificateCache(tmp_path).find(KNOWN, SIZES) is None
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    if complaint != "Invalid JSON|validation error":
        assert complaint in record.getMessage()


def test_an_entry_under_anothers_name_is_left_aside(tmp_path: Path) -> None:
    """What decides is what an entry says, not how its file is called."""
    path = written(tmp_path)
    other = KNOWN | {"model": "sha256:b"}
    CertificateCache(tmp_path).keep(other, SIZES, FOUND)
    [stranger] = set(tmp_path.iterdir()) - {path}
    stranger.write_bytes(path.read_bytes())
    assert CertificateCache(tmp_path).find(other, SIZES) is None
    assert CertificateCache(tmp_path).find(KNOWN, SIZES) == FOUND


def test_a_directory_that_vanished_costs_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither looking nor keeping raises, and looking for what is not there says nothing."""
    cache = CertificateCache(tmp_path / "gone")
    assert cache.find(KNOWN, SIZES) is None
    assert not caplog.records
    cache.keep(KNOWN, SIZES, FOUND)
    assert "not kept" in caplog.text


def test_without_a_directory_nothing_is_kept() -> None:
    """`off` finds nothing and writes nothing."""
    cache = open_cache("off", {"XDG_CACHE_HOME": "/nowhere"})
    cache.keep(KNOWN, SIZES, FOUND)
    assert cache.find(KNOWN, SIZES) is None
    assert repr(cache) == "off"


def test_auto_is_the_users_cache_directory(tmp_path: Path) -> None:
    """XDG_CACHE_HOME before HOME, relative paths ignored as the specification says; made for the user alone."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path / "home")}
    assert repr(open_cache("auto", environment)) == str(tmp_path / "xdg" / "latentd")
    assert stat.S_IMODE(os.stat(tmp_path / "xdg" / "latentd").st_mode) == 0o700
    environment["XDG_CACHE_HOME"] = "relative"
    assert repr(open_cache("auto", environment)) == str(tmp_path / "home" / ".cache" / "latentd")
    assert repr(open_cache("auto", {})) == "off"


@pytest.mark.parametrize(("setting", "warns"), [("auto", False), ("FILE/cache", True)])
def test_a_place_that_cannot_be_written_turns_the_cache_off(
    setting: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server goes on; only a directory that was asked for by name is worth a warning."""
    (tmp_path / "file").write_text("")
    cache = open_cache(setting.replace("FILE", str(tmp_path / "file")), {"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert repr(cache) == "off"
    assert bool([record for record in caplog.records if record.levelno >= logging.WARNING]) == warns
