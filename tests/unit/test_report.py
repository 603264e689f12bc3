"""The report of a store: what a reader finds on it, and what it does with half a store."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pandas as pd
import pytest

from analysis.comparison import comparison, measure_titles
from analysis.frames import load_frames
from analysis.report import comparison_table, write_report
from analysis.schema import SCORES
from pipeline.store.artifacts import Store


@pytest.fixture(scope="module")
def study(study_store, tmp_path_factory) -> Store:
    """A finished study; read only."""
    return study_store.write_study(tmp_path_factory.mktemp("study"), protocols=("krony/wt103", "krony/wt2"))


@pytest.fixture(scope="module")
def written(study, tmp_path_factory) -> Path:
    """Its report."""
    out = tmp_path_factory.mktemp("report")
    write_report(study, out)
    return out


@pytest.fixture
def broken(study, tmp_path) -> Store:
    """A copy of the study to damage."""
    shutil.copytree(study.root.uri, tmp_path / "store")
    return Store(tmp_path / "store")


class Links(HTMLParser):
    """What a page would load, where its links go, and what is there."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.ids.add(values.get("id", ""))
        self.loads += [
            values[key] for key in ("src", "srcset", "data", "poster", "background") if key in values
        ]
        self.links += [values["href"]] if "href" in values else []


def test_the_page_needs_no_network(written):
    page = Links((written / "report.html").read_text())
    assert page.loads
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loads)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= page.ids
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\(", (written / "report.html").read_text())


def test_every_number_leads_to_its_record(study, written):
    page = (written / "report.html").read_text()
    scores = study.records("scores")
    assert scores
    for record in scores:
        assert page.count(record.address) >= 2  # on the number, and in the list of origins
    provenance = study.records("scores")[0].provenance
    assert str(provenance["commit"])[:12] in page


def test_the_page_opens_with_what_was_found(study, written):
    page = (written / "report.html").read_text()
    best = load_frames(study).scores.query("method == 'kron_prune' and protocol == 'krony/wt103'").iloc[0]
    assert page.index("6 models against gpt2, dense") < page.index("kron_prune (384×3072)⊗(2×1) is best of 2")
    assert f"perplexity {best['value']:.2f}, {100 * best['recovery']:.1f} % of the dense quality" in page


def test_published_numbers_never_share_a_column_with_ours(study, written):
    table = comparison(load_frames(study).scores)
    assert all("published" not in column.group for column in table.columns)
    text = (written / "report.md").read_text()
    ours, others = text.split("## Published by others")
    assert "38.22" not in ours
    assert "38.22" in others
    assert "as-published/krony" in others


def test_recovery_and_share_are_against_the_dense_teacher(study):
    scores = load_frames(study).scores
    for _, column in scores.groupby("measure"):
        dense = column[column["is_dense"]].iloc[0]
        expected = dense["value"] / column["value"]
        pd.testing.assert_series_equal(column["recovery"], expected, check_names=False)
        assert (column["share"] == column["parameters"] / dense["parameters"]).all()
    assert set(scores.columns) == set(SCORES)


def test_labels_tell_namesakes_apart(study):
    labels = set(load_frames(study).scores["label"])
    assert "kron_vl (768×768)⊗(1×4) r=1 seed=0" in labels
    assert "kron_vl (768×768)⊗(1×4) r=1 seed=1" in labels
    assert "kron_vl (768×1536)⊗(1×2) r=1" in labels


def test_a_clear_winner_is_marked_and_a_tie_is_a_tie(study):
    scores = load_frames(study).scores
    column = scores[scores["protocol"] == "krony/wt103"].set_index("variant")
    assert bool(column.loc["prune-95m", "is_best"])
    assert not bool(column.loc["random-82m", "is_best"])
    assert column.loc["random-82m", "p_adjusted"] < 0.05
    assert column.loc["random-82m", "worse_by"] == pytest.approx(0.59, abs=0.02)
    assert pd.isna(column.loc["kron-67m", "is_best"])  # alone at its size
    assert (column["low"] < column["value"]).all()
    assert (column["value"] < column["high"]).all()


def test_other_windows_are_another_column(study_store, tmp_path):
    store = study_store.write_study(tmp_path, models=study_store.MODELS[:2], protocols=("krony/wt103",))
    study_store.write_study(tmp_path, models=study_store.MODELS[2:4], protocols=("krony/wt103",), context=256)
    titles = set(measure_titles(load_frames(store).scores).values())
    assert titles == {"krony/wt103", "krony/wt103@ctx256"}
    table = comparison_table(store)
    assert "krony/wt103@ctx256 [2]" in table
    missing = load_frames(store).problems
    assert any("not scored under krony/wt103@ctx256" in problem for problem in missing)


def test_scores_can_be_chosen(study):
    chosen = [record.address for record in study.records("scores") if "kron_prune" in record.name]
    frames = load_frames(study, scores=[*chosen, "scores/nothing-00000000"])
    assert set(frames.scores["address"]) == set(chosen)
    assert "scores/nothing-00000000: no scores" in frames.problems
    assert frames.scores["recovery"].isna().all()  # its dense reference was not chosen


def test_the_terminal_table_fits_and_names_its_protocols(study):
    lines = comparison_table(study).splitlines()
    assert max(map(len, lines)) <= 118
    assert any("krony/wt103 [1]" in line for line in lines)
    assert any(line.startswith("[1] krony/wt103 v1: 286,657 tokens, 280 windows.") for line in lines)
    row = next(line for line in lines if line.startswith("kron-96m"))
    assert "96,128,304   77.2 %" in row


def test_latex_rows_have_as_many_cells_as_columns(written):
    text = (written / "comparison.tex").read_text()
    columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1])
    rows = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(rows) == 7  # two of the models are seeds of one
    for row in rows:
        assert len(re.findall(r"(?<!\\)&", row)) == columns - 1
        assert not re.search(r"(?<!\\)[_%#]", row)
    assert text.count(r"\textbf") == 4  # the best of two sizes, under two protocols
    assert all(rule in text for rule in (r"\toprule", r"\cmidrule(lr){9-10}", r"\bottomrule"))


def test_csv_holds_every_number(study, written):
    table = pd.read_csv(written / "scores.csv")
    assert list(table.columns) == list(SCORES)
    assert len(table) == len(study.records("scores"))
    assert pd.read_csv(written / "history.csv")["val_loss"].notna().any()


def test_figures_are_svg_that_anything_opens(written):
    names = {path.name for path in (written / "figures").iterdir()}
    assert names == {"size-quality-1.svg", "size-quality-2.svg", "loss-curves.svg", "layer-errors.svg"}
    for path in (written / "figures").iterdir():
        root = ET.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert "viewBox" in root.attrib
        assert "nan" not in path.read_text().lower()


def test_the_same_store_gives_the_same_bytes(study, written, tmp_path):
    write_report(study, tmp_path)
    for path in sorted(written.rglob("*.*")):
        assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name


def test_json_of_a_report_is_json(study, tmp_path):
    rows = json.loads(write_report(study, tmp_path).json())
    assert len(rows) == len(study.records("scores"))
    assert all(row["value"] > 0 and row["address"].startswith("scores/") for row in rows)


# --- half a store -------------------------------------------------------------------------------------------


def test_an_empty_store_has_a_report(tmp_path):
    report = write_report(Store(tmp_path / "store"), tmp_path / "out")
    assert "no scores yet" in report.table
    page = (tmp_path / "out/report.html").read_text()
    assert "There are no scores in this store yet." in page
    assert "KronyPT-96M-prune" in page


def test_unfinished_unscored_and_damaged_work_is_named(broken, tmp_path):
    root = Path(broken.root.uri)
    lost = [record for record in broken.records("scores") if "random_init" in record.name]
    for record in lost:
        shutil.rmtree(root / record.address)
    model = next(record for record in broken.records("model") if "random_init" in record.name)
    run = next(record for record in broken.records("run") if record.name == "kron_prune-s0")
    (root / run.address / "record.json").unlink()
    damaged = broken.records("tokenizer")[0].address
    (root / damaged / "record.json").write_text("{")
    report = write_report(broken, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    for text in (
        f"{model.address}: exported, not scored",
        f"{run.address}: started, not finished",
        f"{damaged}/record.json: not a krony record",
    ):
        assert text in page
        assert text in report.table
    assert "kron_vl (768×1536)⊗(1×2) r=1" in page  # the rest is there


def test_many_unfinished_runs_are_one_line(broken):
    for number in range(30):
        (Path(broken.root.uri) / f"run/stopped-{number:02}-00000000" / "1").mkdir(parents=True)
    lines = [line for line in load_frames(broken).problems if "started, not finished" in line]
    assert len(lines) == 1
    assert lines[0].startswith("run: 30 started, not finished: run/stopped-00-00000000, ")


def test_lost_losses_cost_the_interval_alone(broken, tmp_path):
    record = next(record for record in broken.records("scores") if "kron_prune" in record.name)
    (Path(broken.root.uri) / record.address / record.attempt / "losses.parquet").write_bytes(b"no parquet")
    frames = load_frames(broken)
    row = frames.scores.set_index("address").loc[record.address]
    assert pd.notna(row["value"])
    assert pd.isna(row["low"])
    assert any(record.address in problem and "no interval" in problem for problem in frames.problems)
    write_report(broken, tmp_path / "out")


def test_a_damaged_history_costs_its_curve_alone(broken, tmp_path):
    run = broken.records("run")[0]
    (Path(broken.root.uri) / run.address / run.attempt / "metrics-00001.jsonl").write_text("{\n")
    frames = load_frames(broken)
    assert run.address not in set(frames.history["run"])
    assert any("metrics-00001.jsonl:1" in problem for problem in frames.problems)
    write_report(broken, tmp_path / "out")


def test_a_record_of_another_time_is_named(broken):
    address = broken.records("scores")[0].address
    path = Path(broken.root.uri) / address / "record.json"
    record = json.loads(path.read_text())
    del record["seal"], record["metrics"]["value"]
    path.write_text(json.dumps(record))
    assert f"{address}: its record holds no value" in load_frames(broken).problems


def test_errors_of_matrices_are_relative_to_the_matrix(study):
    modules = load_frames(study).modules
    assert set(modules["matrix"]) == {"mlp.c_fc", "mlp.c_proj"}
    assert set(modules["layer"]) == set(range(12))
    assert modules["error"].between(0.3, 1.2).all()


def test_a_store_without_a_dense_reference_says_so(broken, tmp_path):
    for record in broken.records("scores"):
        if record.inputs["model"].address.startswith("teacher/"):
            shutil.rmtree(Path(broken.root.uri) / record.address)
    report = write_report(broken, tmp_path / "out")
    assert "no dense reference, so no recovery" in report.table
    assert "without a dense reference" in (tmp_path / "out/report.html").read_text()


def test_a_rebuilt_input_marks_the_rows_that_used_it(broken, tmp_path):
    init = next(record for record in broken.records("init") if record.name == "kron_prune")
    path = Path(broken.root.uri) / init.address / "record.json"
    record = json.loads(path.read_text())
    del record["seal"]
    record["files"]["model.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    scores = load_frames(broken).scores
    assert set(scores[scores["drifted"] != ""]["method"]) == {"kron_prune"}
    write_report(broken, tmp_path / "out")
    page = (tmp_path / "out/report.md").read_text()
    assert "kron_prune (384×3072)⊗(2×1) †" in page
    assert "† an artifact on the path was rebuilt" in page
    assert f"changed after use: {init.address}" in page


def test_analysis_loads_no_heavy_library(python):
    heavy = ("torch", "ray", "mlflow", "transformers", "datasets", "tokenizers")
    code = f"import sys, analysis.report; print([m for m in {heavy!r} if m in sys.modules])"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
