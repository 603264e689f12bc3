"""A report of somebody else's store: what its records say is shown as text, on pages and in tables."""

import csv
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from analysis.report import write_report

NAME = '=HYPERLINK("http://evil.example")<img src=x onerror=alert(1)></td>$\\frac{$|`x`'


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, attrs))


@pytest.fixture(scope="module")
def report(study_store, tmp_path_factory):
    """The pages of a study in which one model has a name that wants to be more."""
    models = [replace(study_store.MODELS[3], name=NAME), study_store.MODELS[2]]
    store = study_store.write_study(
        tmp_path_factory.mktemp("store"), models=models, protocols=("krony/wt103",)
    )
    folder = tmp_path_factory.mktemp("report")
    return folder, write_report(store, folder)


def test_the_page_has_no_tag_of_a_record(report):
    page = Tags()
    page.feed((report[0] / "report.html").read_text())
    assert "&lt;img src=x onerror=alert(1)&gt;" in (report[0] / "report.html").read_text()
    assert not {tag for tag, _ in page.found} & {"script", "iframe", "object", "link"}
    assert all(dict(attrs)["src"].startswith("data:image/svg") for tag, attrs in page.found if tag == "img")
    assert not [name for _, attrs in page.found for name, _ in attrs if name.startswith("on")]


def test_markdown_has_no_tag_of_a_record(report):
    assert "<img" not in (report[0] / "report.md").read_text()


@pytest.mark.parametrize("name", ["scores.csv", "history.csv"])
def test_no_cell_is_a_formula(report, name):
    with (report[0] / name).open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert any(NAME in cell for cell in cells) or name != "scores.csv"
    assert not [cell for cell in cells if cell.startswith(("=", "@", "\t", "\r"))]
