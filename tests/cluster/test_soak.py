"""The soak itself, for some rounds: raylets that are killed and that hang, under a training and a sweep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_lost_and_hanging_raylets_change_no_result(tmp_path):
    rows = tmp_path / "rows.jsonl"
    which = ("--minutes", "3", "--seed", "3", "--only", "train:raylet,sweep:raylet", "--out", str(rows))
    done = subprocess.run(
        [sys.executable, str(SOAK), *which], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    faults = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(faults) >= 3
    assert all(not fault["problems"] and 0 < fault["at"] < fault["of"] for fault in faults)
    assert len({(fault["work"], fault["fault"]) for fault in faults}) == len(faults)
    again = subprocess.run(
        [sys.executable, str(SOAK), "--table", str(rows)], capture_output=True, text=True, check=True
    )
    assert again.stdout == done.stdout
