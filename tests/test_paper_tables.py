"""The tables of the papers' numbers in docs/: no row is empty, every number has one, and what a row names is there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
HEADING = "## Where the papers' numbers are"


class Row(NamedTuple):
    number: str
    what: str
    where: str
    test: str


def read(page: str) -> list[Row]:
    """The rows of a page's table."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    names = {"nodes.md": HEADING, "methods.md": HEADING.replace("papers'", "paper's")}
    section = re.split(r"^## ", text.split(names[page] + "\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in rows]


ROWS = [*read("methods.md"), *read("nodes.md")]
NUMBERS = {
    "LPGD": "10 11 16 17-19 21 22 28 39 46 67 73-78 79-82 B C.2 C.5 C.6",
    "DDN": "4.4 4.5 4.6 4.7.1 4.7.3 4.7.4 4.8 4.9 Table~1 Table~2 Table~3 Table~4",
    "LEC": "8-14 2.10.5 3.9 4.1 4.2 139-146 147 4.3 4.4 171 4.5 4.6",
    "APX": "2.2 2.3 2.4 2.5 2.6 3.2 3.3 13",
    "PMaF": "2.1 2.2 2 3 4 5 6 7 8 9 10 15 16 17 18 28 40 Table~1 Table~2 Table~4 Table~5 Table~8",
}
"""What the papers number, of what is used here; a range is one number."""


@cache
def source(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)
def test_what_a_row_names_is_there(row: Row) -> None:
    assert row.number
    assert row.what
    files = re.findall(r"`([^`]+)`", row.where)
    assert files, "no file"
    for file in files:
        assert (ROOT / file).is_file(), file
    tests = re.findall(r"`(tests/[^`]+)`", row.test)
    assert tests, "no test"
    for test in tests:
        path, function = test.split("::")
        assert (ROOT / path).is_file(), path
        assert re.search(rf"^def {function}\(", source(path), re.MULTILINE), test


def numbers(row: Row) -> set[tuple[str, str]]:
    """The paper and each of the numbers of a row: ``[PMaF] Tables 5, 8`` are two."""
    found = re.fullmatch(r"\[(\w+)\] (Tables? |section |Propositions? )?(.+)", row.number)
    if found is None:
        return set()
    kind = "Table~" if (found[2] or "").startswith("Table") else ""
    return {(found[1], kind + number.strip()) for number in found[3].split(",")}


@pytest.mark.parametrize("paper", NUMBERS)
def test_every_number_of_a_paper_has_a_row(paper: str) -> None:
    known = set().union(*(numbers(row) for row in ROWS))
    missing = [number for number in NUMBERS[paper].split() if (paper, number) not in known]
    assert not missing
