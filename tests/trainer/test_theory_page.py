"""The page of theory against the code that it speaks of."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "theory.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[`(?P<name>[^`]+)`\]\((?P<file>[^)]+\.py)\)", re.DOTALL)
SECTIONS = dict(re.findall(r"^## (\d+\. [^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
MATH = re.compile(r"\$\$.*?\$\$|(?<!\$)\$(?!\$)[^$\n]+\$", re.DOTALL)


@cache
def names_in(file: Path) -> frozenset[str]:
    """What a module defines: functions, classes, `Class.method`s, and names that it assigns."""
    return frozenset(_names(ast.parse(file.read_text(encoding="utf-8")).body))


def _names(statements: list[ast.stmt]) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name
        elif isinstance(statement, ast.ClassDef):
            yield statement.name
            yield from (f"{statement.name}.{name}" for name in _names(statement.body))
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def links(text: str) -> list[tuple[str, str]]:
    """(name, file) of every link to code."""
    return [(match["name"], match["file"]) for match in LINK.finditer(text)]


def is_test(name: str, file: str) -> bool:
    return file.startswith("../tests/") and name.startswith("test_")


def test_every_name_that_the_page_links_to_is_there() -> None:
    """Code and tests: the file exists and defines the name; no link to code has another form."""
    found = links(PAGE)
    missing = [
        f"{file}: {name}"
        for name, file in found
        if not (DOCS / file).is_file() or name not in names_in((DOCS / file).resolve())
    ]
    assert missing == []
    assert len(found) == len(re.findall(r"\.py\)", PAGE)) > 80


def test_a_class_knows_its_methods_and_a_module_its_constants() -> None:
    """What the check above rests on: methods by their class, constants with and without a type, nothing else."""
    here = names_in(Path(__file__))
    assert {"LINK", "links", "is_test"} <= here
    assert "Schedule.level" in names_in(DOCS / "../server/latentd_server/schedules.py")
    assert "level" not in names_in(DOCS / "../server/latentd_server/schedules.py")
    assert {"missing", "ast"}.isdisjoint(here)


@pytest.mark.parametrize("title", SECTIONS)
def test_every_section_has_its_papers_its_code_and_its_tests(title: str) -> None:
    """At least one paper, one name of code and one test in each of the numbered sections."""
    text = SECTIONS[title]
    kinds = [is_test(*link) for link in links(text)]
    assert True in kinds
    assert False in kinds
    assert re.search(r"\]\(https://", text)


def test_sections_are_numbered_in_order() -> None:
    """From 1 on, so that what refers to a section finds it."""
    numbers = [int(title.partition(".")[0]) for title in SECTIONS]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {int(number) for number in re.findall(r"derived in section (\d+)", PAGE)} <= set(numbers)


def test_every_statement_names_its_test() -> None:
    """Each point of a list cites a test, a measurement or a paper, and each Shown ends in at least one test."""
    for text in SECTIONS.values():
        for point in re.findall(r"^- .*?(?=^- |^\n|\Z)", text, re.DOTALL | re.MULTILINE):
            assert any(is_test(*link) for link in links(point)) or "](https://" in point or "eq. " in point, point
        for shown in text.split("Shown")[1:]:
            assert is_test(*links(shown)[0]), shown[:80]


def test_formulas_survive_markdown() -> None:
    """GitHub reads a backslash before punctuation, `<` and `|` as Markdown before it reads a formula: none are used."""
    formulas = MATH.findall(PAGE)
    assert len(formulas) > 60
    assert [formula for formula in formulas if re.search(r"\\[^a-zA-Z ]|[<>|]|\*", formula)] == []
    assert PAGE.count("$") % 2 == 0
