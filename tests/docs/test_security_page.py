"""SECURITY.md tells the truth: each test that it names exists, and others can find the page."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "SECURITY.md").read_text()
ROWS = PAGE.partition("| against | done | test |\n|---|---|---|\n")[2].partition("\n\n")[0].splitlines()
ATTACKS = {
    "code in checkpoints",
    "names that lead out",
    "bombs",
    "secrets in what is kept or said",
    "strangers at MLflow",
}


@pytest.mark.parametrize("line", ROWS, ids=range(len(ROWS)))
def test_a_row_names_a_test_that_exists(line: str):
    found = re.search(r"`([\w/]+\.py)::(test_\w+)` \|$", line)
    assert found, line
    body = ast.parse((PROJECT / "tests" / found[1]).read_text()).body
    assert found[2] in {item.name for item in body if isinstance(item, ast.FunctionDef)}


def test_every_kind_of_attack_has_a_row():
    assert len(ROWS) > 30
    assert {line.split("|")[1].strip() for line in ROWS} >= ATTACKS


def test_numbers_of_the_page_are_those_of_the_code():
    from pipeline.data.files import FREE_BYTES, GROWTH, LONGEST
    from pipeline.errors import LONGEST_LINE

    shown = [f"{FREE_BYTES >> 20} MiB", f"{GROWTH} times", f"{LONGEST:,} characters"]
    for text in [*shown, f"{LONGEST_LINE:,} printable"]:
        assert text in PAGE


def test_the_readme_leads_to_it():
    assert "(SECURITY.md)" in (PROJECT / "README.md").read_text()
