"""Faults of single ranks under `torchrun`: a slow one, one that computes nonsense, ranks that come and go.

Also the script that each rank runs: a list of runs, of which each may be disturbed.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 24
TRAIN = {"log_every": 1, "batch_tokens": 112, "max_steps": STEPS, "checkpoint_every": 4}  # 7 rows: 3 and 4
TOLERANCE = {"loss": 1e-5, "val_loss": 1e-5, "grad_norm": 1e-3}
pytestmark = pytest.mark.slow


def launch(lab, python, folder: Path, *runs: tuple[str, str, int]):
    """Name, disturbance and last step (0: all) of runs that two ranks make one after the other."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    path = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    words = (str(Path(__file__)), str(lab.folder), str(folder), json.dumps(runs))
    return python(*launcher, *words, env={"PYTHONPATH": path})


def rows(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "rows.json").read_text())


def assert_alike(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(STEPS + 1))
    for name, tolerance in TOLERANCE.items():
        mine, theirs = ([row[name] for row in r if name in row] for r in (found, expected))
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, err_msg=name)


def test_a_slow_rank_costs_time_and_nonsense_of_one_rank_stops_both_and_is_named(lab, python, tmp_path):
    done = launch(lab, python, tmp_path, ("slow", "sleep", 0), ("nonsense", "nan", 0))
    assert_alike(rows(tmp_path / "slow"), lab.fit(lab.request(tmp_path / "alone", **TRAIN)).rows)
    assert done.returncode != 0
    said = sorted(line for line in done.stderr.splitlines() if line.startswith("rank "))
    assert said, "the first rank to leave says why; torchrun may end the other one before it does"
    for line in said:
        assert "step 5: the loss or its gradient is not a finite number on rank 1 of 2" in line
    kept = {path.name.split(".")[0] for path in (tmp_path / "nonsense/checkpoints").iterdir()}
    assert kept == {"step-00000004"}


@pytest.mark.nightly
def test_a_run_of_two_ranks_then_one_then_two_is_that_of_two(lab, python, tmp_path):
    done = launch(lab, python, tmp_path, ("whole", "", 0), ("elastic", "", 8))
    assert done.returncode == 0, done.stderr
    alone = lab.fit(lab.request(tmp_path / "elastic", **TRAIN), stop_at=16)
    assert (alone.result.resumed_from, alone.result.step) == (8, 16)
    assert launch(lab, python, tmp_path, ("elastic", "", 0)).returncode == 0
    assert_alike(rows(tmp_path / "elastic"), rows(tmp_path / "whole"))


def main(lab_folder: str, folder: str, runs: str) -> int:
    """One rank."""
    from train_lab import Lab

    from pipeline.errors import KronyError
    from pipeline.train.session import Session

    lab, rank = Lab(Path(lab_folder)), int(os.environ["RANK"])
    accumulate = Session._accumulate

    def disturbed(how: str):
        def wrapped(self, inputs, targets):
            accumulate(self, inputs, targets)
            if rank == 1 and how == "sleep" and self.step in (3, 9):
                time.sleep(0.5)
            if rank == 1 and how == "nan" and self.step == 5:
                self._buffer._gradients[7] = float("nan")  # a bit that fell over in its memory

        return wrapped

    for name, how, stop_at in json.loads(runs):
        Session._accumulate = disturbed(how)
        run = Path(folder) / name
        try:
            outcome = lab.fit(lab.request(run, **TRAIN), stop_at=stop_at or None)
        except KronyError as err:
            print(f"rank {rank}: {err.line}", file=sys.stderr, flush=True)
            return 1
        if outcome.rows:
            earlier = json.loads((run / "rows.json").read_text()) if (run / "rows.json").exists() else []
            last = earlier[-1]["step"] if earlier else -1
            rows = earlier + [row for row in outcome.rows if row["step"] > last]
            (run / "rows.json").write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
