"""The report of a sweep as files: a page that needs nothing else, a table to print, a recipe to train."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from analysis.sweep_report import write_sweep_report
from analysis.sweeps import open_sweep
from jobs import cli
from pipeline.config.load import load_study, to_json
from pipeline.store.artifacts import Store


@pytest.fixture(scope="module")
def store(sweep_store, tmp_path_factory) -> Store:
    """A sweep with stopped and failed trials; read only."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep_store.write_sweep(folder)
    return Store(folder)


@pytest.fixture(scope="module")
def written(store, tmp_path_factory) -> Path:
    """Its report."""
    out = tmp_path_factory.mktemp("report")
    write_sweep_report(store, "shapes", out)
    return out


class Links(HTMLParser):
    """What a page would load, where its links go, and what is there."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {key: value or "" for key, value in attrs}
        self.tags.add(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.loads += [values[key] for key in ("src", "srcset", "data", "poster") if key in values]
        self.links += [values["href"]] if "href" in values else []


def test_the_page_stands_alone_and_all_its_links_land(written):
    text = (written / "sweep.html").read_text()
    page = Links(text)
    assert text.startswith("<!doctype html>")
    assert len(page.loads) == 5
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loads)
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "object"} & page.tags
    assert not re.search(r"@import|url\(", text)


def test_the_page_says_what_was_found_what_was_lost_and_why(store, written):
    page = (written / "sweep.html").read_text()
    assert "9 arms of scratch-4x256 with 3 seeds: 27 trials, 20 finished, 6 stopped early, 1 failed." in page
    assert "Best: kron_prune 256x256, loss 3.2" in page
    assert "the loss is nan at step 90" in page
    assert "unbalanced: 3 of 6 arms" in page
    assert "Main effects at 197k tokens" in page
    assert "rung 196,608 tokens: place 8 of 9, 3 go on; left at <code>run/random_init-s0-" in page
    sweep = open_sweep(store, "shapes")
    for trial in sweep.trials:
        assert trial.run in page
        assert all(address in page for address in trial.scores.values())


def test_all_files_are_there_and_figures_are_svg(written):
    assert {path.name for path in written.iterdir()} == {
        "sweep.html", "sweep.md", "sweep.csv", "best.toml", "figures",
    }  # fmt: skip
    figures = sorted(path.name for path in (written / "figures").iterdir())
    assert figures == [
        "curves.svg", "effects-early.svg", "effects.svg", "front-macs.svg", "front-parameters.svg",
    ]  # fmt: skip
    for path in (written / "figures").iterdir():
        assert ET.parse(path).getroot().tag.endswith("svg")
        assert "nan" not in path.read_text().lower()
        assert f"figures/{path.name}" in (written / "sweep.md").read_text()
    with (written / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27
    assert {"method", "method.shape", "seed", "state", "val_loss", "reason"} <= set(rows[0])


def test_the_same_sweep_gives_the_same_bytes(store, written, tmp_path):
    write_sweep_report(store, "shapes", tmp_path)
    for path in sorted(written.rglob("*.*")):
        assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name


def test_the_verb_prints_the_ranking_and_writes_a_recipe_to_train(store, tmp_path, capsys):
    words = ["report", "--sweep", "shapes", "--store", store.root.uri, "--out", str(tmp_path)]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if re.match(r" +\d  kron|   \d  random", line)]
    assert rows[0].split()[:3] == ["1", "kron_prune", "256x256"]
    assert re.search(r"\d\.\d{4} ± \d\.\d{4}\*", rows[0])
    assert sum("*" in row for row in rows) == 1
    assert f"krony train {tmp_path / 'best.toml'}" in shown
    (config,) = load_study(tmp_path / "best.toml").configs
    sweep = open_sweep(store, "shapes")
    assert to_json(config) in sweep.configs.values()
    assert cli.main(["train", str(tmp_path / "best.toml"), "--plan"]) == 0
    assert "kron_prune" in capsys.readouterr().out


def test_json_holds_every_arm(store, tmp_path, capsys):
    words = ["report", "--sweep", "shapes", "--store", store.root.uri, "--out", str(tmp_path), "--json"]
    assert cli.main(words) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, None, None]
    assert rows[0]["is_best"]
    assert rows[0]["choices"] == {"method": {"name": "kron_prune"}, "method.shape": [256, 256]}
    assert rows[-1]["loss"] is None
    assert rows[-1]["runs"] == []


def test_an_unknown_sweep_is_one_line(store, tmp_path, capsys):
    assert cli.main(["report", "--sweep", "no", "--store", store.root.uri, "--out", str(tmp_path)]) == 1
    assert "no finished sweep 'no'; there are: shapes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sweep_in_which_nothing_finished_has_a_page(sweep_store, tmp_path):
    rows = []
    for seed in (0, 1):
        row, _ = sweep_store.trial(tmp_path, "kron_vl", (64, 1024), seed, noise=0.01, unhappy=False)
        lost = {"state": "failed", "reason": "CUDA out of <memory> & more", "rungs": [], "val_loss": None}
        rows.append({**row, **lost, "tokens": 0, "parameters": 0, "macs_per_token": 0})
    sweep_store.write_sweep(tmp_path / "store", methods=[], more=rows, name="lost")
    report = write_sweep_report(str(tmp_path / "store"), "lost", tmp_path / "out")
    page = (tmp_path / "out/sweep.html").read_text()
    assert report.best is None
    assert "No trial finished, so there is nothing to rank." in page
    assert "CUDA out of &lt;memory&gt; &amp; more" in page
    assert "2 failed" in report.table
    assert Links(page).loads == []


def test_a_sweep_without_configs_says_that_there_is_no_recipe(sweep_store, tmp_path):
    sweep_store.write_sweep(tmp_path / "store", scored=False, configs=False)
    report = write_sweep_report(str(tmp_path / "store"), "shapes", tmp_path / "out")
    assert report.best is None
    assert not (tmp_path / "out/best.toml").exists()
    assert "holds no configs.json" in report.table
    assert "holds no configs.json" in (tmp_path / "out/sweep.html").read_text()


def test_numbers_drawn_from_a_range_are_a_scatter(sweep_store, tmp_path):
    rows = []
    for number in range(9):
        row, _ = sweep_store.trial(tmp_path, "kron_vl", (256, 256), number, noise=0.1, unhappy=False)
        own = {"key": f"k{number}", "arm": f"lr {number}", "choices": {"train.lr": 1e-4 * 1.7**number}}
        rows.append({**row, **own})
    sweep_store.write_sweep(tmp_path / "store", methods=[], more=rows, name="drawn")
    write_sweep_report(str(tmp_path / "store"), "drawn", tmp_path / "out")
    assert (tmp_path / "out/figures/drawn.svg").exists()


def test_a_report_of_a_sweep_loads_no_heavy_library(python):
    heavy = ("torch", "ray", "mlflow", "transformers", "datasets", "tokenizers")
    done = python(
        "-c", f"import sys, analysis.sweep_report; print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
