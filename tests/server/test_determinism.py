"""The name of the promise: equal strings and equal requests, equal bytes."""

from pathlib import Path

import pytest
from latentd_server import determinism
from latentd_server.certificate import Buckets
from latentd_server.runtime import Device

CPU = Device("cpu")


def test_the_determinism_class_covers_what_can_change_bytes() -> None:
    """Weights, threads and bucket classes each change it; equal conditions give equal strings."""
    sizes = {1: Buckets((1, 2), certified=True)}
    base = determinism.determinism_class("sha256:a", CPU, 2, sizes)
    assert base == determinism.determinism_class("sha256:a", CPU, 2, sizes)
    assert base != determinism.determinism_class("sha256:b", CPU, 2, sizes)
    assert base != determinism.determinism_class("sha256:a", CPU, 1, sizes)
    assert base != determinism.determinism_class("sha256:a", CPU, 2, {1: Buckets((2,), certified=True)})


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


def test_without_a_certificate_nothing_is_promised() -> None:
    """An uncertified graph gives a class that is never equal to another."""
    sizes = {1: Buckets((1, 2), certified=False)}
    classes = {determinism.determinism_class("sha256:a", CPU, 2, sizes) for _ in range(3)}
    assert len(classes) == 3
    assert all(name.startswith("uncertified-") for name in classes)
