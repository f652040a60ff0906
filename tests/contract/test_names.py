"""The grammar of model references, which is also a defence: what it admits can be part of a path."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentd import names

NAMES = st.from_regex(names.NAME_PATTERN, fullmatch=True)
VERSIONS = st.integers(1, 999_999_999)


@given(NAMES, VERSIONS)
def test_canonical_references_round_trip(name: str, version: int) -> None:
    """NAME@VERSION parses to its parts, and they print as it."""
    reference = names.parse_reference(f"{name}@{version}")
    assert reference == (name, version)
    assert str(reference) == f"{name}@{version}"


@given(NAMES)
def test_a_bare_name_means_the_newest_version(name: str) -> None:
    """NAME parses to version 0 and prints without a version."""
    assert names.is_name(name)
    assert names.parse_reference(name) == (name, 0)
    assert str(names.parse_reference(name)) == name


@pytest.mark.parametrize("name", ["a", "x" * 63, "mnist-ddpm", "a1", "a--b"])
def test_names_that_are_allowed(name: str) -> None:
    """1 to 63 lower-case letters, digits and inner hyphens, starting with a letter."""
    assert names.is_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "", "A", "1a", "-a", "a-", "a_b", "a.b", "x" * 64, "a b", "a\n", "ä", "a\0", "../a", "a/b", "a\\b", ".", "..",
        "a%2e", "a@", "a@0", "a@01", "a@-1", "a@1.0", "a@1@2", "@1", "a@latest", "a@1\n", "a@1234567890", "a@١",
    ],
)  # fmt: skip
def test_references_that_are_refused(text: str) -> None:
    """What could leave a directory, hide in a log line or alias a version is refused, saying what is allowed."""
    with pytest.raises(ValueError, match="must be NAME or NAME@VERSION"):
        names.parse_reference(text)
    assert not names.is_name(text)


@given(st.text(max_size=80))
def test_only_the_grammar_is_admitted(text: str) -> None:
    """A text is admitted exactly when it matches the documented patterns from end to end."""
    documented = re.fullmatch(rf"({names.NAME_PATTERN})(@{names.VERSION_PATTERN})?", text, re.ASCII)
    try:
        reference = names.parse_reference(text)
    except ValueError:
        assert documented is None
    else:
        assert documented is not None
        assert str(reference) == text


def test_sampler_names_follow_the_grammar() -> None:
    """Sampler names are unique and written like model names, so that they need no quoting anywhere."""
    assert len(set(names.SAMPLERS)) == len(names.SAMPLERS)
    assert all(names.is_name(name) for name in names.SAMPLERS)
