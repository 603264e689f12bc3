"""What the machinery of a sweep costs beside the same trainings, one after another by a shell loop.

    python benchmarks/sweep_overhead.py CONFIG [--concurrent 1,2] [--keep FOLDER]

Teacher, tokens and starts are built first, so both sides only train, export and score. The loop runs
`python -m jobs.eval TRIAL.toml` for each trial, a process each; every sweep is one `python -m jobs.sweep`
with so many trials at once. Each side has a store of its own, copied from the first. Pure training is what
the trials themselves measured; the last column is pure training / (wall x slots).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from analysis.recipe import recipe
from pipeline import stages
from pipeline.cluster import session
from pipeline.config.load import to_json
from pipeline.config.sweep import SweepStudy, load_sweep
from pipeline.store.artifacts import Store
from pipeline.sweep.identity import sweep_identity
from pipeline.sweep.space import TrialSpec, space_of
from pipeline.work import Work

ROOT = Path(__file__).parents[1]


def prepare(study: SweepStudy, trials: Sequence[TrialSpec]) -> None:
    """Build what both sides share."""
    first = Work.on(study.first, quiet=True)
    with session():
        stages.tokens(first)
        stages.scores(first, of_teacher=True)
        for trial in trials:
            stages.init(first.variant(trial.config))


def command(*words: str) -> float:
    """Run one command of ours and say how many seconds it took; its output only if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *words], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
    return time.monotonic() - began


def pure(store: Path) -> float:
    """Seconds of training in the records of a store's runs."""
    return sum(float(record.settings["session_s"]) for record in Store(store).records("run"))


def main() -> None:
    """Print one table, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/sweeps/overhead.toml"))
    parser.add_argument("--concurrent", default="1,2", help="trials at once, a sweep each")
    parser.add_argument("--keep", type=Path, help="where stores stay; else they are dropped")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="krony-overhead-"))
    flags = ["--store", str(folder / "shared"), "--tracking.uri", "off", "--ray.workers", "0"]
    study = load_sweep(options.config, overrides=flags)
    trials = space_of(study).trials
    prepare(study, trials)
    rows = []

    place = folder / "loop"
    shutil.copytree(folder / "shared", place)
    began = time.monotonic()
    for trial in trials:
        path = folder / f"{trial.key}.toml"
        path.write_text(recipe(to_json(trial.config)))
        command("jobs.eval", str(path), "--store", str(place), "--quiet")
    rows.append(("loop of krony eval", 1, time.monotonic() - began, pure(place)))

    for slots in map(int, options.concurrent.split(",")):
        place = folder / f"sweep-{slots}"
        shutil.copytree(folder / "shared", place)
        words = [str(options.config), *flags, "--store", str(place), "--sweep.concurrent", str(slots)]
        wall = command("jobs.sweep", *words, "--quiet", "--out", str(folder / f"report-{slots}"))
        rows.append((f"krony sweep, {slots} at once", slots, wall, pure(place)))
        again = load_sweep(options.config, overrides=words[1:])
        metrics = Store(place).require(sweep_identity(again)).record.metrics
        rows.append(("  its trials, without Ray's start", slots, metrics["wall_s"], metrics["train_s"]))

    print(f"{len(trials)} trials of {options.config}\n")
    print(f"{'':<36}{'slots':>6}{'wall s':>9}{'training s':>12}{'training / (wall x slots)':>27}")
    for name, slots, wall, training in rows:
        print(f"{name:<36}{slots:>6}{wall:>9.1f}{training:>12.1f}{training / (wall * slots):>27.3f}")
    print(json.dumps([dict(zip(("name", "slots", "wall_s", "train_s"), row, strict=True)) for row in rows]))
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
