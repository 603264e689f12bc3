"""Clocks of two machines disagree: no decision hangs on when a file says that it was written.

The files are really dated: half of them in 1971, half in 2100, whatever order they were made in.
"""

import os
from pathlib import Path

import pytest

from pipeline.store.artifacts import Identity, Store
from pipeline.store.location import Location
from pipeline.sweep.ledger import Ledger
from pipeline.tracking.jsonl import HistoryWriter, read_history

PAST, FUTURE = 31_536_000, 4_102_444_800


def misdate(folder: Path) -> None:
    """Newer names become older files."""
    files = sorted(path for path in folder.rglob("*"))
    for number, path in enumerate(files):
        at = FUTURE if number < len(files) / 2 else PAST
        os.utime(path, (at, at))


@pytest.fixture
def prepared(data_lab, tmp_path):
    return data_lab.Prepared(data_lab.config_of(data_lab.write_corpus(tmp_path), tmp_path / "store"))


def test_shards_of_any_date_are_kept_and_only_missing_ones_are_made(
    data_lab, prepared, tmp_path, monkeypatch
):
    made = data_lab.in_process(monkeypatch)
    whole = prepared.tokens()
    kept = data_lab.payload(whole)
    prepared.store.root.child(prepared.chain.tokens.address).delete("record.json")
    whole.location.delete("train-00001.bin")
    misdate(tmp_path / "store")
    made.clear()
    assert data_lab.payload(prepared.tokens()) == kept
    assert made == [1]
    misdate(tmp_path / "store")
    assert prepared.tokens().record == prepared.store.require(prepared.chain.tokens).record
    assert made == [1]


def test_the_newest_attempt_is_the_one_with_the_highest_number(tmp_path):
    store, identity = Store(tmp_path), Identity("run", "words")
    for force in (False, True):
        with store.attempt(identity, resume=True, force=force) as attempt:
            attempt.location.put_bytes("x", b"x")
    misdate(tmp_path)
    with store.attempt(identity, resume=True) as attempt:
        assert attempt.name == "2"


def test_training_goes_on_from_the_latest_step_not_from_the_latest_file(lab, tmp_path):
    run = tmp_path / "run"
    request = lab.request(run, checkpoint_every=5, keep_checkpoints=3, log_every=5)
    lab.fit(request, stop_at=10)
    misdate(run)
    done = lab.fit(request)
    assert done.result.resumed_from == 10
    lab.fit(lab.request(tmp_path / "quiet", checkpoint_every=5, keep_checkpoints=3, log_every=5))
    weights, quiet = lab.weights(run), lab.weights(tmp_path / "quiet")
    assert all(weight.equal(quiet[name]) for name, weight in weights.items())


def test_parts_of_a_history_are_read_in_the_order_of_their_numbers(tmp_path):
    place = Location(str(tmp_path))
    for start in (0, 4):  # a second driver, on another machine
        with HistoryWriter(place, rows_per_part=2) as history:
            for step in range(start, start + 4):
                history.append({"step": step, "loss": float(step)})
    misdate(tmp_path)
    assert [row["step"] for row in read_history(place)] == list(range(8))


def test_a_driver_whose_clock_is_hours_behind_goes_on_with_the_sweep_of_another(tmp_path):
    trial = {"name": "a", "arm": "a", "choices": {}, "picks": {}, "seed": 0, "total_tokens": 100}
    first = Ledger(Location(str(tmp_path)), clock=iter([5e9, 5e9 + 1, 5e9 + 2]).__next__)
    first.tell("session", slots=1)
    first.tell("drawn", key="k", **trial)
    first.tell("started", key="k")
    first.flush()
    misdate(tmp_path)
    second = Ledger(Location(str(tmp_path)), clock=iter([1e9, 1e9 + 3, 1e9 + 7]).__next__)
    assert second.book.is_open
    second.tell("session", slots=1)
    assert second.book.entries["k"].state == "waiting"
    second.tell("started", key="k")
    second.tell("end")
    assert second.book.wall_s == pytest.approx(2 + 7)
    assert second.book.count("running") == 1
