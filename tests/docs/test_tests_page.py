"""The page on tests tells the truth: each test that it names exists, and each promise has one."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from model.compress.methods import METHODS

PROJECT = Path(__file__).resolve().parents[2]
TABLE = (PROJECT / "docs" / "tests.md").read_text().partition("|---|")[2].splitlines()[1:]
NAMED = [re.search(r"`([\w/]+\.py)::(\w+)` \|$", line) for line in TABLE]
PROMISES = [*(f"T{number}" for number in range(1, 23)), *(f"I{number}" for number in range(1, 10))]


@cache
def functions(path: Path) -> frozenset[str]:
    body = ast.parse(path.read_text()).body
    return frozenset(item.name for item in body if isinstance(item, ast.FunctionDef))


@pytest.mark.parametrize("line", range(len(TABLE)))
def test_a_row_names_a_test_that_exists(line: int):
    found = NAMED[line]
    assert found, TABLE[line]
    assert found[2].startswith("test_")
    assert found[2] in functions(PROJECT / "tests" / found[1])


def test_every_promise_has_its_rows_in_order():
    assert [cell for line in TABLE if (cell := line.split("|")[1].strip())] == PROMISES


def test_what_holds_for_every_method_is_tried_on_every_method():
    text = (PROJECT / "tests" / "properties" / "test_method_invariants.py").read_text()
    recipes = text.partition("RECIPES = {")[2].partition("\n}")[0]
    assert re.findall(r'^    "(\w+)":', recipes, re.MULTILINE) == list(METHODS)
