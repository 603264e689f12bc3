"""Speed and memory in the report: ratios under a dense side of the same machine, and what is missing."""

import re

import pandas as pd
import pytest

from analysis.report import explained, write_report
from analysis.speed import load_speeds, speed_table, speed_text
from analysis.versus import versus
from analysis.versus_text import versus_text
from pipeline.errors import ConfigError
from pipeline.store.artifacts import Identity, Store

DENSE_SIZE = 124_439_808
PLACE = {"chip": "Chip 7", "cpus": 4, "torch": "2.13.0"}
DENSE = {"prefill": 1000.0, "decode@1": 0.010, "decode@32": 0.040, "memory": 900e6, "checkpoint": 500e6}
UNITS = {
    "prefill": "tokens/s",
    "decode@1": "s/token",
    "decode@32": "s/token",
    "memory": "bytes",
    "checkpoint": "bytes",
}
SIDES = {"dense": 1.0, "factored": 1.25, "materialised": 0.5}


def figures(sides):
    rows = []
    for side in sides:
        for quantity, dense in DENSE.items():
            ratio = SIDES[side]
            is_time = UNITS[quantity] == "s/token"
            row = {"side": side, "quantity": quantity, "unit": UNITS[quantity], "ratio": ratio}
            row["value"] = dense / ratio if is_time else dense * ratio
            if UNITS[quantity] != "bytes":
                row |= {"ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01, "rounds": 40}
                row |= {"low": 0.9 * row["value"], "high": 1.1 * row["value"]}
            rows.append(row)
    return rows


TOKENIZER = Identity("tokenizer", "gpt2", {"name": "gpt2"})
TOKENS = Identity(
    "tokens",
    "openwebtext-gpt2",
    {"split": "nanogpt"},
    {"corpus": Identity("corpus", "openwebtext", {"revision": "f3808c30"}), "tokenizer": TOKENIZER},
)
TEACHER = Identity("teacher", "gpt2", {"id": "openai-community/gpt2"})


def measure(lab, store, invented, *, chip="Chip 7", sides=tuple(SIDES), held=0.99, **settings):
    """An artifact of kind `speed` of an invented model of the study, as `krony speed` writes it."""
    model = lab.train(store, invented, teacher=TEACHER, tokens=TOKENS, tokenizer=TOKENIZER)
    config = {"prompt": 512, "past": 32, "tokens": 32, "dtype": "float32", "device": "cpu", "threads": 1}
    identity = Identity("speed", f"{model.name}-cpu", config | settings, {"model": model, "teacher": TEACHER})
    metrics = {
        "figures": figures(sides),
        "parameters": invented.parameters,
        "parameters_by_side": {
            "dense": DENSE_SIZE,
            "factored": invented.parameters,
            "materialised": DENSE_SIZE,
        },
        "n_embd": 768,
        "held": {"prefill": 0.99, "decode@1": held, "decode@32": 0.99},
    }
    lab.put(store, identity, {"turns.parquet": b"calls"}, metrics, place={**PLACE, "chip": chip})


@pytest.fixture(scope="module")
def store(study_store, tmp_path_factory) -> Store:
    """A study of four models: one is measured, one on two machines, one without its dense side, one not."""
    lab = study_store
    big, prune, small, _ = models = [lab.MODELS[place] for place in (1, 2, 3, 5)]
    store = lab.write_study(tmp_path_factory.mktemp("study"), models=models, protocols=("krony/wt103",))
    measure(lab, store, big, held=0.31)
    measure(lab, store, small)
    measure(lab, store, small, chip="Chip 9", threads=8)
    measure(lab, store, prune, sides=("factored", "materialised"))
    return store


@pytest.fixture(scope="module")
def out(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(store, folder)
    return folder


def addresses(store):
    return [record.address for record in store.records("speed")]


def test_two_machines_never_share_a_dense_row(store):
    table = speed_table(load_speeds(store, addresses(store)))
    texts = [[cell.text for cell in row] for row in table.rows]
    on = [row[2] for row in texts]
    assert [row[2] for row in texts if row[1] == "dense"] == ["[1]", "[2]"]
    assert on == sorted(on)
    assert sum("Chip 7, 1 thread" in note for note in table.notes) == 1
    assert sum("Chip 9, 8 threads" in note for note in table.notes) == 1


def test_dense_is_absolute_once_and_everything_else_a_ratio(store):
    table = speed_table(load_speeds(store, addresses(store)))
    heads = [column.title for column in table.columns]
    assert heads[4:] == ["checkpoint", "memory", "prefill", "decode@1", "decode@32"]
    for row in table.rows:
        cells = [cell.text for cell in row]
        if cells[1] == "dense":
            assert cells[4:] == ["500.0 MB", "900.0 MB", "1,000 tok/s", "10.00 ms/token", "40.00 ms/token"]
        elif cells[1] == "factored":
            assert cells[4:] == ["125.0 %", "125.0 %", "1.25×", "1.25×", "1.25×"]
            assert row[6].detail == "1.24–1.26"


def test_the_page_has_the_table_in_every_format(out):
    for name in ("report.html", "report.md"):
        text = (out / name).read_text()
        assert "Speed and memory" in text
        assert "1.25×" in text
        assert "Chip 9, 8 threads" in text
    assert r"1.25$\times$" in (out / "speed.tex").read_text()
    rows = pd.read_csv(out / "speed.csv")
    assert set(rows["side"]) == set(SIDES)
    assert len(rows) == 3 * 3 * 5  # measurements, sides, quantities
    assert (rows.loc[rows["side"] == "dense", "ratio"] == 1.0).all()


def test_a_busy_machine_is_said(store):
    notes = speed_table(load_speeds(store, addresses(store))).notes
    (busy,) = [note for note in notes if "busy" in note]
    assert "Chip 7" in busy
    assert "31 to 99 % of the time" in busy


def test_a_missing_dense_side_is_a_clear_line(store, out):
    (missing,) = re.findall(r"speed/[^:<]*: no dense side[^<]*", (out / "report.html").read_text())
    assert "krony speed --force" in missing
    assert "kron_prune" in missing


def test_a_store_without_measurements_has_no_such_section(study_store, tmp_path):
    store = study_store.write_study(
        tmp_path / "store", models=study_store.MODELS[:1], protocols=("krony/wt2",)
    )
    write_report(store, tmp_path / "report")
    assert "Speed and memory" not in (tmp_path / "report" / "report.html").read_text()
    assert not (tmp_path / "report" / "speed.csv").exists()
    assert speed_text(load_speeds(store, [])) == "nothing measured yet"


def test_a_report_of_some_scores_shows_the_speed_of_their_models_alone(store, tmp_path):
    (record,) = [
        r
        for r in store.records("scores")
        if r.name.startswith("kron_vl") and r.metrics["parameters"] == 81_972_576
    ]
    write_report(store, tmp_path, scores=[record.address])
    rows = pd.read_csv(tmp_path / "speed.csv")
    assert set(rows["variant"]) == {"kron-82m"}


def test_one_figure_says_where_it_comes_from(store):
    found = explained(store, "kron-96m:factored.decode@32")
    assert found.value.startswith("1.25× (95 % 1.24–1.26) as fast as dense: 32.00 ms/token")
    assert "40 rounds" in found.counts
    assert "Chip 7" in found.counts
    kinds = [step.kind for step in found.sources[0].steps]
    assert kinds[:2] == ["speed", "model"]
    assert ("speed.threads", "1") in found.settings
    assert "kron-96m:factored.decode@32" in found.text()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("kron-96n:factored.prefill", "did you mean kron-96m"),
        ("kron-96m:factored.prefil", "there are: dense.prefill, dense.decode@1"),
    ],
)
def test_a_figure_that_is_not_there_is_one_line(store, cell, message):
    with pytest.raises(ConfigError, match=message):
        explained(store, cell)


def test_two_models_stand_side_by_side_where_one_machine_measured_both(store):
    found = versus("kron-96m", "kron-82m", store=store)
    assert {each.a["place"] for each in found.speeds} == {"Chip 7, 1 thread, torch 2.13.0"}
    assert len(found.speeds) == 2 * 5  # the dense side is what they are measured by
    text = versus_text(found)
    assert re.search(r"factored\.prefill +1\.25× \(1\.24–1\.26\) +1\.25×", text)
    assert "Chip 7, 1 thread" in text
    assert "over dense" not in versus_text(versus("kron-96m", "random-82m", store=store))
