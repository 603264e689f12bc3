"""The history of a run: every row once, in order, whatever the writer lived through."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import StoreError
from pipeline.store.location import Location
from pipeline.tracking.jsonl import HistoryWriter, read_history


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    rows = [{"step": 10 * i, "loss": 1 / (i + 1), "tokens": 10**12 + i, "note": "α"} for i in range(7)]
    with HistoryWriter(Location.of(tmp_path), rows_per_part=3) as history:
        for row in rows:
            history.append(row)
    assert read_history(Location.of(tmp_path)) == rows
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"metrics-{part:05d}.jsonl" for part in (1, 2, 3)
    ]


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path):
    history = HistoryWriter(Location.of(tmp_path))
    history.append({"step": 1, "loss": 2.0})
    assert read_history(Location.of(tmp_path)) == [{"step": 1, "loss": 2.0}]  # and then the process may die


def test_what_is_not_finite_survives_and_stays_json(tmp_path: Path):
    with HistoryWriter(Location.of(tmp_path)) as history:
        history.append({"step": 1, "loss": math.nan, "grad_norm": -math.inf})
    text = (tmp_path / "metrics-00001.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (row,) = read_history(Location.of(tmp_path))
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == -math.inf


@settings(max_examples=40)
@given(lives=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), max_size=5), part=st.integers(1, 4))
def test_after_every_restart_the_last_life_counts(tmp_path_factory, lives: list[tuple[int, int]], part: int):
    location = Location.of(tmp_path_factory.mktemp("run"))
    expected: dict[int, int] = {}
    for life, (start, length) in enumerate(lives):
        begin = min(
            start, max(expected, default=-1) + 1
        )  # a run goes back to a checkpoint, never beyond its end
        expected = {step: by for step, by in expected.items() if step < begin}
        with HistoryWriter(location, rows_per_part=part) as history:
            for step in range(begin, begin + length):
                history.append({"step": step, "life": life})
                expected[step] = life
    assert read_history(location) == [{"step": step, "life": life} for step, life in sorted(expected.items())]


def test_two_histories_share_a_folder_with_other_files(tmp_path: Path):
    location = Location.of(tmp_path)
    location.put_bytes("model.safetensors", b"\x00")
    location.put_bytes("checkpoints/metrics-00001.jsonl", b"not ours")
    with HistoryWriter(location) as one, HistoryWriter(location, "evaluation") as two:
        one.append({"step": 1})
        two.append({"step": 2})
    assert read_history(location) == [{"step": 1}]
    assert read_history(location, "evaluation") == [{"step": 2}]
    assert read_history(location, "nothing") == []


@pytest.mark.parametrize("damage", [b'{"step": 2, "loss"', b"[1, 2]", b'{"loss": 1.0}', b"\xff\xfe"])
def test_a_damaged_part_is_named_with_its_line(tmp_path: Path, damage: bytes):
    location = Location.of(tmp_path)
    location.put_bytes("metrics-00001.jsonl", b'{"step": 1}\n')
    location.put_bytes("metrics-00002.jsonl", b'{"step": 2}\n' + damage + b"\n")
    with pytest.raises(StoreError, match=r"metrics-00002\.jsonl:2"):
        read_history(location)


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": 1.0}, {"step": True}, {"step": -1}])
def test_a_row_without_a_step_is_refused(tmp_path: Path, row: dict[str, float]):
    history = HistoryWriter(Location.of(tmp_path))
    with pytest.raises(ValueError, match="step"):
        history.append(row)
    assert read_history(Location.of(tmp_path)) == []
