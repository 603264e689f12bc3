"""What the soak works on: a small store, two commands that go on in it, and what must come out of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.append(str(PROJECT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sweep_lab  # noqa: E402
from cluster_lab import Raylets  # noqa: E402

from pipeline import stages  # noqa: E402
from pipeline.store.artifacts import Store  # noqa: E402
from pipeline.work import Work  # noqa: E402

EVERY = 8
"""Steps between two checkpoints: what a fault may cost."""

STEPS = {"train": 120, "sweep": 480}
TRAIN = (
    *("train", "train.toml", "--ray.workers", "2", "--train.max-steps", str(STEPS["train"])),
    *("--train.checkpoint-every", str(EVERY), "--train.log-every", "1"),
)
MEASURED = ("name", "state", "run", "init", "model", "scores", "parameters", "tokens", "val_loss", "rungs")

PASSING = ("metrics-", "checkpoints/")
"""Files of a run that hold speeds."""


def build(folder: Path) -> None:
    """A store with tokens, teacher and start; every round gets a copy."""
    work = Work.on(sweep_lab.build(folder).first, quiet=True)
    stages.init(work)
    stages.scores(work, of_teacher=True)
    (folder / "train.toml").write_text(sweep_lab.BASE.replace("WORDS", str(folder / "words.txt")))
    steps = STEPS["sweep"]
    sweep_lab.write(folder, origin=folder, axes={"train.max_steps": [steps, steps + 1]}, silence_s=20.0)
    sweep = folder / "sweep.toml"
    sweep.write_text(sweep.read_text().replace("checkpoint_every = 4", f"checkpoint_every = {EVERY}"))


def copied(base: Path, folder: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(base, folder))


def steps_on_record(folder: Path) -> list[tuple[str, int]]:
    """Run and step of every row of a history, as often as it was written."""
    return [(run, int(row["step"])) for run, row in _rows(folder)]


def twice(folder: Path) -> list[tuple[str, int]]:
    """Run and step of rows that were written more than once."""
    return [row for row, count in Counter(steps_on_record(folder)).items() if count > 1]


def to_repeat(folder: Path) -> int:
    """Steps since the newest checkpoint of a run, of the run with most."""
    reached: dict[str, int] = {}
    for run, step in steps_on_record(folder):
        reached[run] = max(step, reached.get(run, 0))
    kept = dict.fromkeys(reached, 0)
    for path in (folder / "store" / "run").glob("*/*/checkpoints/step-*.json"):
        run, step = path.parents[2].name, int(path.stem.removeprefix("step-"))
        kept[run] = max(step, kept.get(run, 0))
    return max((step - kept[run] for run, step in reached.items()), default=0)


def trials_lost(folder: Path) -> int:
    """How often a trial of a sweep lost its process while the driver lived."""
    events = "".join(path.read_text() for path in (folder / "store" / "sweep").glob("*/*/*.jsonl"))
    return events.count('"event": "crashed"')


def outcome(folder: Path) -> dict[str, Any]:
    """All that a disturbance must not change; raises StoreError where a file is not what its record says."""
    found: dict[str, Any] = {}
    store = Store(folder / "store")
    for record in store.records():
        if record.kind == "sweep":
            rows = json.loads(store.open(record.address).path("trials.json").read_text())
            found[record.address] = [{name: row[name] for name in MEASURED} for row in rows]
        elif record.kind in ("run", "model", "scores"):
            lasting = {
                n: i.sha256 for n, i in record.files.items() if not n.startswith(("metrics-", "check"))
            }
            found[record.address] = {"metrics": dict(record.metrics), "files": lasting}
            store.open(record.address).verify()
    for run, row in _rows(folder):
        found[f"{run} step {row['step']}"] = {name: x for name, x in row.items() if name != "tokens_per_s"}
    return found


def _rows(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for part in sorted((folder / "store" / "run").glob("*/*/metrics-*.jsonl")):
        found += [(part.parent.parent.name, json.loads(row)) for row in part.read_text().splitlines()]
    return found


class Driver:
    """The command of a round, started as often as it takes."""

    def __init__(self, work: str, folder: Path) -> None:
        """Not started yet."""
        self.work, self.folder = work, folder
        self.starts = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self, lab: Raylets) -> None:
        """Once more, on this cluster."""
        self.starts += 1
        verb = TRAIN if self.work == "train" else ("sweep", "sweep.toml", "--out", "report")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *verb],
                cwd=self.folder,
                env=lab.environment | {"PYTHONPATH": str(PROJECT)},
                stdout=log,
                stderr=log,
                text=True,
            )

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        assert self._process
        return self._process.poll()

    @property
    def said(self) -> list[str]:
        """What the driver wrote since its last start."""
        return self._log.read_text().splitlines()

    def resumed(self) -> list[int]:
        """Steps that the training went on from."""
        said = "".join(path.read_text() for path in sorted(self.folder.glob("driver-*.log")))
        return [int(step.replace(",", "")) for step in re.findall(r"continues at step ([\d,]+)", said)]

    def send(self, number: signal.Signals) -> None:
        """A signal, if it still runs."""
        if self._process:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        """Wait for its end; TimeoutExpired if it goes on."""
        assert self._process
        self._process.wait(timeout_s)

    @property
    def _log(self) -> Path:
        return self.folder / f"driver-{self.starts}.log"
