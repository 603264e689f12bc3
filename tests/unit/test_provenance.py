"""`krony report --explain ROW:COLUMN`: from one number back to everything that made it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.provenance import explain
from analysis.report import explained, write_report
from jobs import cli
from pipeline.store.artifacts import Store
from pipeline.store.records import Record


@pytest.fixture(scope="module")
def study(study_store, tmp_path_factory) -> Store:
    """Two seeds of one model, another model, and a namesake of it; read only."""
    chosen = [model for model in study_store.MODELS if model.name in ("prune-95m", "kron-82m", "kron-82m-s1")]
    chosen = [replace(model, calibration_seed=3 + model.seed) for model in chosen]
    chosen.append(replace(chosen[0], lr=3e-4))
    names = ("krony/wt103", "krony/wt2")
    return study_store.write_study(tmp_path_factory.mktemp("cells"), models=chosen, protocols=names)


def test_a_cell_leads_to_every_record_that_made_it(study):
    found = explained(study, "kron-82m:krony/wt103")
    assert [source.seed for source in found.sources] == [0, 1]
    assert [source.calibration_seed for source in found.sources] == [3, 4]
    records = {record.address: record for record in study.records()}
    for source in found.sources:
        kinds = [step.kind for step in source.steps]
        assert kinds[0] == "scores"
        assert set(kinds) == {
            "scores",
            "model",
            "run",
            "init",
            "stats",
            "teacher",
            "tokens",
            "tokenizer",
            "corpus",
        }
        for step in source.steps:
            if step.address in records:
                assert step.digest == records[step.address].digest
        scores = records[source.steps[0].address]
        assert source.value == scores.metrics["value"]
        assert scores.config["protocol"] == "krony/wt103"
    settings = dict(found.settings)
    assert settings["run.seed"] == "0, 1"
    assert settings["run.train.lr"] == "0.0006"
    assert settings["init.method.shape"] == "[768, 768]"
    commit = str(study.records("scores")[0].provenance["commit"])
    assert any(commit[:12] in line for line in found.repeat)


def test_a_column_can_be_named_by_its_number(study):
    by_name, by_number = explained(study, "teacher:krony/wt2"), explained(study, "teacher:2")
    assert replace(by_number, cell=by_name.cell) == by_name
    assert explained(study, "teacher:[2]").sources == by_name.sources
    assert "run.seed" not in dict(by_name.settings)
    assert "krony/wt2 v1: Test split of WikiText-2" in by_name.text()


def test_namesakes_have_names_of_their_own(study, capsys):
    assert cli.run("report", ["--store", study.root.uri, "--explain", "prune-95m:1"]) == 2
    line = capsys.readouterr().err
    assert "no row is called 'prune-95m'; did you mean prune-95m@" in line
    name = line.split("did you mean ")[1].split()[0]
    assert explained(study, f"{name}:1").label.startswith("kron_prune")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("kron-82m", "a cell is ROW:COLUMN; rows: teacher, "),
        ("kron-82n:1", "no row is called 'kron-82n'; did you mean kron-82m?"),
        ("kron-82m:raw/wt2", "there are: [1] krony/wt103, [2] krony/wt2"),
        ("kron-82m:9", "no column is called '9'"),
    ],
)
def test_what_is_not_there_is_one_line_that_lists_what_is(study, capsys, cell, expected):
    assert cli.run("report", ["--store", study.root.uri, "--explain", cell]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert len(shown.err.splitlines()) == 1
    assert expected in shown.err


def test_the_page_says_how_to_ask_for_each_cell(study, tmp_path):
    frames = write_report(study, tmp_path).frames
    page = (tmp_path / "report.html").read_text()
    assert 'id="declared"' not in page  # nothing was
    names = {part.split("</code>")[0] for part in page.split("<code>--explain ")[1:]}
    assert len(names) == len(frames.arms)
    for name in names:
        found = explain(frames, name, store=study.root.uri)
        for source in found.sources:
            assert page.count(source.steps[0].address) >= 2
            assert source.steps[-1].digest[:8] in page
        assert f'title="{name} · ' in page


def test_json_holds_what_the_text_cuts(study, capsys):
    words = ["--store", study.root.uri, "--explain", "kron-82m:krony/wt103"]
    assert cli.run("report", words) == 0
    text = capsys.readouterr().out
    assert cli.run("report", [*words, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["sources"][1]["seed"] == 1
    assert body["digests"][0] == ["text wikitext-103-v1", f"sha256 {'ab' * 32}"]
    assert all(step["address"] in text for source in body["sources"] for step in source["steps"])


def test_a_rebuilt_input_is_said(study, study_store, tmp_path):
    chosen = [model for model in study_store.MODELS if model.name == "kron-82m"]
    store = study_store.write_study(tmp_path, models=chosen, protocols=("krony/wt103",))
    init = store.records("init")[0]
    path = Path(store.root.uri) / init.address / "record.json"
    raw = json.loads(path.read_bytes())
    del raw["seal"]
    raw["files"]["report.json"]["sha256"] = "0" * 64
    path.write_text(json.dumps(raw))
    assert Record.from_json(path.read_bytes(), where="here").digest != init.digest
    assert explained(store, "kron-82m:1").sources[0].warnings == (f"changed after use: {init.address}",)
