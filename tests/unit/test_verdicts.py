"""What a table may claim: only what is significant, Holm over what was declared, McNemar for answers."""

from dataclasses import replace

import pandas as pd
import pytest

from analysis import names
from analysis.compare import ALPHA, compared
from analysis.comparison import comparison
from analysis.frames import load_frames
from analysis.report import write_report
from analysis.schema import SCORES, checked
from analysis.stats import holm, mcnemar
from analysis.tables import latex, markdown, terminal
from analysis.traces import losses
from analysis.verdicts import declared, declared_table
from pipeline.config.load import load_study
from pipeline.config.sweep import load_sweep
from pipeline.errors import ConfigError
from pipeline.store.artifacts import Store

PROTOCOLS = ("krony/wt103", "lambada/openai_last_word")


@pytest.fixture(scope="module")
def study(study_store, tmp_path_factory) -> Store:
    """Two sizes; at the larger one a near tie, at the smaller one a clear winner; read only."""
    chosen = [
        model
        for model in study_store.MODELS
        if model.name in ("kron-96m", "prune-95m", "kron-82m", "random-82m")
    ]
    chosen = [replace(model, worse=0.2551) if model.name == "kron-96m" else model for model in chosen]
    return study_store.write_study(tmp_path_factory.mktemp("verdicts"), models=chosen, protocols=PROTOCOLS)


def unit_losses(gaps: dict[str, list[float]]) -> dict[str, pd.DataFrame]:
    return {
        f"scores/{name}": pd.DataFrame({"nll": [3.0 + gap for gap in values], "tokens": [1] * len(values)})
        for name, values in gaps.items()
    }


def rows_for(frames: dict[str, pd.DataFrame], **changes) -> pd.DataFrame:
    """One column of one size, a row per frame."""
    rows = []
    for address, frame in frames.items():
        row = dict.fromkeys(SCORES)
        row |= {"address": address, "subject": address, "measure": "m v1 x", "protocol": "m", "version": 1}
        row |= {
            "metric": "perplexity",
            "weighting": "tokens",
            "value": float(frame["nll"].mean()),
            "seeds": 1,
        }
        row |= {
            "parameters": 1000,
            "teacher": "teacher/t",
            "is_dense": False,
            "track": "M",
            "label": address,
            "variant": address,
        }
        row |= {"plain_label": address, "unit": "window", "description": "", "method": "svd", "tokens": 1}
        rows.append(row | changes)
    return checked(rows, SCORES)


def bold(table) -> set[str]:
    return {cell.address for row in table.rows for cell in row if cell.is_best}


def bold_texts(table) -> set[str]:
    return {cell.text for row in table.rows for cell in row if cell.is_best}


@pytest.mark.parametrize("units", [8, 200])
def test_nothing_is_bold_where_nobody_is_significantly_worse(units):
    noise = [0.3 * (-1) ** unit for unit in range(units)]
    frames = unit_losses({"a": [0.0] * units, "b": [0.001 + each for each in noise]})
    judged = compared(rows_for(frames), frames.__getitem__, [], resamples=1000)
    assert judged["is_best"].all()
    table = comparison(judged)
    assert not bold(table)
    for text in (terminal(table), markdown(table), latex(table)):
        assert not any(mark in text.split("best (")[0] for mark in ("*", r"\textbf"))


def test_bold_cells_are_those_that_are_not_significantly_worse():
    even = [0.2 * (-1) ** unit for unit in range(200)]
    frames = unit_losses({"a": [0.0] * 200, "tie": [0.002 + e for e in even], "far": [0.5 + e for e in even]})
    judged = compared(rows_for(frames), frames.__getitem__, [], resamples=1000)
    assert bold(comparison(judged)) == {"scores/a", "scores/tie"}
    by = judged.set_index("address")
    assert by.loc["scores/far", "p_adjusted"] < ALPHA <= by.loc["scores/tie", "p_adjusted"]
    assert by.loc["scores/tie", "worse_by"] < by.loc["scores/tie", "detectable"]
    assert by.loc["scores/far", "worse_by"] > by.loc["scores/far", "detectable"]


def test_a_size_with_a_cell_that_cannot_be_compared_has_no_best():
    frames = unit_losses({"a": [0.0] * 100, "far": [0.5 + 0.001 * unit for unit in range(100)]})
    rows = rows_for({**frames, "scores/lost": frames["scores/a"]})
    problems: list[str] = []
    judged = compared(rows, frames.__getitem__, problems, resamples=500)  # no losses of `lost`
    assert judged["is_best"].isna().all()
    assert problems
    assert not bold(comparison(judged))


def test_a_single_document_proves_nothing():
    frames = unit_losses({"a": [0.0], "far": [2.0]})
    judged = compared(rows_for(frames), frames.__getitem__, [], resamples=200)
    assert judged["is_best"].isna().all()
    assert judged["low"].isna().all()


def test_declared_comparisons_are_corrected_together(study, tmp_path):
    pairs = (("kron-96m", "prune-95m"), ("kron-82m", "random-82m"))
    report = write_report(study, tmp_path, comparisons=pairs)
    page = (tmp_path / "report.html").read_text()
    text = report.table.split("declared comparisons")[1]
    rows = [line.split() for line in text.splitlines() if line.startswith(("kron-96m", "kron-82m"))]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (*pair, each) for pair in pairs for each in PROTOCOLS
    ]
    frames = report.frames
    by = {(row["variant"], row["protocol"]): row["address"] for row in frames.scores.to_dict("records")}
    answers = [
        [losses(study, by[name, PROTOCOLS[1]])["correct"].to_numpy() for name in pair] for pair in pairs
    ]
    verdicts = declared(frames.scores, frames.arms, pairs, lambda address: losses(study, address), [])
    assert [each.found.test for each in verdicts] == ["bootstrap", "McNemar"] * 2
    assert [each.found.gap.p_value for each in verdicts[1::2]] == [mcnemar(*members) for members in answers]
    assert [each.p_adjusted for each in verdicts] == holm([each.found.gap.p_value for each in verdicts])
    assert verdicts[2].p_adjusted < ALPHA < verdicts[1].p_adjusted
    shown = bold_texts(declared_table(verdicts))
    assert names.gap(verdicts[2].found.gap.estimate, "perplexity") in shown
    assert names.gap(verdicts[1].found.gap.estimate, "accuracy") not in shown
    assert "Holm over all 4." in text
    assert "Declared comparisons" in page
    assert page.index('id="declared"') < page.index('id="differences"')
    section = page[page.index('id="differences"') : page.index('id="plots"')]
    far = frames.scores.query("variant == 'random-82m' and protocol == 'krony/wt103'").iloc[0]
    assert f">{far['detectable']:.4f}<" in section.replace("\n", "")
    assert f"{far['worse_by']:+.3f}" in section
    assert "Against the best of each size" in (tmp_path / "report.md").read_text()


def test_answers_are_tested_by_mcnemar_with_holm(study):
    frames = load_frames(study)
    column = frames.scores[frames.scores["protocol"] == PROTOCOLS[1]].set_index("variant")
    assert set(column["test"].dropna()) == {"McNemar"}
    answers = {
        name: losses(study, column.loc[name, "address"])["correct"].to_numpy() for name in column.index[1:]
    }
    worse, best = sorted(("kron-82m", "random-82m"), key=lambda name: answers[name].mean())
    assert column.loc[worse, "p_adjusted"] == pytest.approx(holm([mcnemar(answers[worse], answers[best])])[0])
    perplexity = frames.scores[frames.scores["protocol"] == PROTOCOLS[0]]
    assert set(perplexity["test"].dropna()) == {"bootstrap"}


def test_a_declared_variant_without_scores_is_named(study):
    frames, problems = load_frames(study), []
    assert not declared(frames.scores, frames.arms, [("kron-82m", "svd")], no_losses, problems)
    assert problems == ["declared kron-82m against svd: no scores of svd"]


def no_losses(address: str) -> pd.DataFrame:
    raise FileNotFoundError(address)


VARIANTS = '[[variants]]\nname = "one"\n[[variants]]\nname = "two"\n'


def test_a_study_declares_its_comparisons(tmp_path):
    (tmp_path / "study.toml").write_text(f'comparisons = [["one", "two"]]\n{VARIANTS}')
    assert load_study(tmp_path / "study.toml").comparisons == (("one", "two"),)
    (tmp_path / "sweep.toml").write_text(
        'extends = "study.toml"\n[sweep]\naxes = { train.lr = [1e-3, 2e-3] }\n'
    )
    assert load_sweep(tmp_path / "sweep.toml").first.seed == 0
    (tmp_path / "other.toml").write_text('extends = "study.toml"\n[[variants]]\nname = "three"\n')
    assert load_study(tmp_path / "other.toml").comparisons == ()  # they were between other variants


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('comparisons = [["one", "tow"]]', "no variant is named 'tow'; did you mean 'two'?"),
        ('comparisons = [["one", "one"]]', "'one' is compared with itself"),
        ('comparisons = ["one", "two"]', "must be pairs of variants"),
        ("comparisons = 3", "must be pairs of variants"),
    ],
)
def test_a_wrong_declaration_is_one_line(tmp_path, line, expected):
    (tmp_path / "study.toml").write_text(f"{line}\n{VARIANTS}")
    with pytest.raises(ConfigError, match=r"study\.toml") as err:
        load_study(tmp_path / "study.toml")
    assert expected in str(err.value)
