"""The name of the promise: equal strings and equal requests, equal bytes."""

from pathlib import Path

import pytest
from latentd_server import determinism
from latentd_server.certificate import Buckets, Certificate, Promise
from latentd_server.determinism import conditions, determinism_class, is_promise
from latentd_server.runtime import Device

CPU = Device("cpu")
GOOD = {"decoder.onnx": Certificate(Promise.BATCHED, Buckets((1, 2)))}


def test_the_class_covers_what_can_change_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, threads, arithmetic, sizes and how lanes ride each change it; equal conditions give equal strings."""
    known = conditions("sha256:a", CPU, 2)
    base = determinism_class(known, CPU, GOOD, strict=True)
    assert base == determinism_class(conditions("sha256:a", CPU, 2), CPU, GOOD, strict=True)
    assert is_promise(base)
    others = {
        determinism_class(conditions("sha256:b", CPU, 2), CPU, GOOD, strict=True),
        determinism_class(conditions("sha256:a", CPU, 1), CPU, GOOD, strict=True),
        determinism_class(known, CPU, {"decoder.onnx": Certificate(Promise.BATCHED, Buckets((2,)))}, strict=True),
        determinism_class(known, CPU, {"decoder.onnx": Certificate(Promise.ALONE, Buckets((1, 2)))}, strict=True),
    }
    monkeypatch.setattr(determinism, "ARITHMETIC_VERSION", determinism.ARITHMETIC_VERSION + 1)
    others.add(determinism_class(conditions("sha256:a", CPU, 2), CPU, GOOD, strict=True))
    assert len(others - {base}) == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "model name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 fma",
            "model name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 fma avx512f",
        ),
        ("CPU part\t: 0xd0c\nFeatures\t: fp asimd", "CPU part\t: 0xd40\nFeatures\t: fp asimd"),
        ("CPU part\t: 0xd40\nFeatures\t: fp asimd", "CPU part\t: 0xd40\nFeatures\t: fp asimd sve i8mm"),
    ],
    ids=["one name, two generations", "two Arm cores", "one Arm core, two sets of instructions"],
)
def test_processors_that_compute_differently_are_told_apart(one: str, other: str, tmp_path: Path) -> None:
    """Cores with other vector instructions get another class; flags that say nothing of arithmetic do not count."""
    texts = {"one": one, "other": other, "patched": one.replace("fp", "fp ibrs smep", 1)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    first, second, patched = (determinism._processor(tmp_path / name) for name in texts)
    assert first != second
    assert first == patched


@pytest.mark.parametrize(("strict", "prefix"), [(True, "uncertified-cpu-"), (False, "none-cpu-")])
def test_where_nothing_is_promised_the_class_says_so(strict: bool, prefix: str) -> None:
    """A graph without a promise gives a class that is never equal to another, and says whose doing that is."""
    certificates = GOOD | {"scorer.onnx": Certificate(Promise.NOTHING, Buckets((1, 2)))}
    known = conditions("sha256:a", CPU, 2)
    classes = {determinism_class(known, CPU, certificates, strict) for _ in range(3)}
    assert len(classes) == 3
    assert all(name.startswith(prefix) and not is_promise(name) for name in classes)
