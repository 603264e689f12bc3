"""Random faults on a training and a sweep, round after round; every result must be the undisturbed one.

    python benchmarks/soak.py [--minutes 60] [--seed 0] [--only train:head,sweep] [--out soak.jsonl]
    python benchmarks/soak.py --table soak.jsonl [MORE.jsonl]

A private Ray of three raylets (a head for drivers, two workers of one CPU), token auth, loopback. Each round
copies a small store, starts `krony train` on two workers or `krony sweep` with two trials, lets it come some
way, does one fault to real processes, starts the driver again if it ended by the fault, and compares what is
in the store at the end: weights bit for bit, metrics, the whole history, and no step written twice. Faults
come in an order drawn from the seed, each as often as the others. One row of JSON per fault; the table at the
end. It stops by itself, ends what it started by pid and leaves only its rows (and the folders of rounds that
went wrong). Exit code 1 if any did.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from soak_faults import FAULTS, NOTICE_S, Fault, Scene
from soak_work import (
    EVERY,
    STEPS,
    Driver,
    Raylets,
    build,
    copied,
    outcome,
    steps_on_record,
    to_repeat,
    trials_lost,
    twice,
)

from pipeline.errors import KronyError
from pipeline.progress import duration, say

ROUND_S = 300.0
"""Longest time of a round."""

RAYS_WORDS = ("You have likely discovered a bug in Ray", "Failed to connect to GCS within")
"""What Ray writes before it ends the process of a driver itself, which no caller can catch."""

START_ATTEMPTS = 3
"""Tries to bring a cluster up."""

STARTS = 6
"""Most starts of a driver in a round."""


# --- rounds -------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """One fault and what came of it."""

    number: int
    work: str
    fault: str
    seed: int
    at: int = 0
    """Rows on record when it happened."""
    of: int = 0
    """Rows of the undisturbed run."""
    reached: int = 0
    """Latest step on record when it happened."""
    lost: int = 0
    """Steps that were done again; of a sweep at most so many, by its checkpoints."""
    recovery_s: float = 0.0
    """Longest silence after the fault."""
    wall_s: float = 0.0
    drivers: int = 0
    aborts: int = 0
    """Drivers whose process Ray ended itself, in its own words."""
    lines: list[str] = field(default_factory=list)
    """Last words of drivers that ended early."""
    problems: list[str] = field(default_factory=list)


class Soak:
    """A cluster that is made again when it is lost, and rounds on it."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Build the store."""
        self._folder, self._seed = folder, seed
        self._base = folder / "base"
        self._base.mkdir()
        build(self._base)
        self._lab: Raylets | None = None
        self._whole: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, int] = {}

    def close(self) -> None:
        """End the cluster."""
        lab, self._lab = self._lab, None
        if lab:
            lab.close()

    def learn(self, work: str) -> None:
        """What an undisturbed run leaves."""
        folder = copied(self._base, self._folder / f"whole-{work}")
        driver, began = Driver(work, folder), time.monotonic()
        driver.start(self._whole_lab(durable=True))
        driver.wait(ROUND_S)
        if driver.code:
            raise SystemExit("\n".join(["the undisturbed run failed:", *driver.said[-5:]]))
        self._whole[work], self._rows[work] = outcome(folder), len(steps_on_record(folder))
        say("soak", f"undisturbed {work}: {self._rows[work]} rows in {duration(time.monotonic() - began)}")

    def round(self, number: int, work: str, name: str) -> Round:
        """One fault."""
        fault, result = FAULTS[name], Round(number, work, name, self._seed, of=self._rows[work])
        folder, began = copied(self._base, self._folder / f"round-{number}"), time.monotonic()
        driver, draw = Driver(work, folder), random.Random(f"{self._seed} {number}")  # noqa: S311
        scene = Scene(self._whole_lab(durable=fault.durable), driver, draw)
        try:
            driver.start(scene.lab)
            self._disturb(scene, fault, result)
            self._finish(scene, result)
            self._judge(scene, result)
        except subprocess.TimeoutExpired:
            result.problems.append(f"the driver did not end within {NOTICE_S:.0f} s of its notice")
        except (KronyError, TimeoutError) as err:
            result.problems.append(str(err))
        finally:
            driver.send(signal.SIGKILL)
        result.wall_s, result.drivers = round(time.monotonic() - began, 1), driver.starts
        if not result.problems:
            shutil.rmtree(folder)
        return result

    def _whole_lab(self, *, durable: bool) -> Raylets:
        """The cluster with a head and two workers; a new one where that needs one."""
        for left in reversed(range(START_ATTEMPTS)):
            if self._lab and not (self._lab.is_whole and self._lab.durable == durable):
                self.close()
            try:
                self._lab = lab = self._lab or Raylets(durable=durable)
                lab.settle()
                while len(lab.nodes) < 2:
                    lab.add()
            except Exception as err:  # Ray has no narrower one for a node that does not come up
                if not left:
                    raise
                say("soak", f"a cluster did not come up, once more ({err})")
                self.close()
            else:
                break
        return lab

    def _disturb(self, scene: Scene, fault: Fault, result: Round) -> None:
        """Let it come some way, then do it."""
        folder, wanted = scene.driver.folder, int(result.of * scene.draw.uniform(0.15, 0.7))
        until = time.monotonic() + ROUND_S
        while len(steps_on_record(folder)) < wanted:
            if scene.driver.code is not None or time.monotonic() > until:
                raise TimeoutError("it failed before its fault: " + " ".join(scene.driver.said[-1:]))
            time.sleep(0.05)
        before = steps_on_record(folder)
        result.at, result.reached = len(before), max(step for _, step in before)
        fault.act(scene)
        result.lost = to_repeat(folder) if fault.ends else 0

    def _finish(self, scene: Scene, result: Round) -> None:
        """Wait for the end, and start the driver again where it went down."""
        driver, began = scene.driver, time.monotonic()
        changed, count = began, result.at
        while True:
            now = time.monotonic()
            scene.catch_up()
            if (rows := len(steps_on_record(driver.folder))) != count:
                result.recovery_s = round(max(result.recovery_s, now - changed), 1)
                changed, count = now, rows
            if now - began > ROUND_S or driver.starts > STARTS:
                result.problems.append(f"not over after {now - began:.0f} s and {driver.starts} starts")
                return
            if (code := driver.code) is not None:
                if scene.lab.is_whole:
                    scene.catch_up(at_once=True)
                if code == 0:
                    return
                self._note_end(driver, code, result)
                time.sleep(1.0)
                scene.later.clear()
                scene.lab = self._whole_lab(durable=scene.lab.durable)
                driver.start(scene.lab)
            time.sleep(0.1)

    def _note_end(self, driver: Driver, code: int, result: Round) -> None:
        if code == -signal.SIGKILL:
            return
        said = driver.said
        if reason := next((each for each in said if any(words in each for words in RAYS_WORDS)), ""):
            result.lines.append(f"{code}: {reason[:400]}")
            result.aborts += 1
            return
        last = said[-1] if said else ""
        result.lines.append(f"{code}: {last}")
        if code < 0 or not last.startswith("krony ") or "Traceback" in "".join(said):
            result.problems.append(f"the driver ended with {code} and not with one line: {last}")

    def _judge(self, scene: Scene, result: Round) -> None:
        folder, whole = scene.driver.folder, self._whole[result.work]
        if result.work == "train":
            resumed = scene.driver.resumed()
            result.lost = max(0, result.reached - resumed[0]) if resumed else 0
        elif scene.driver.starts == 1 and not trials_lost(folder):
            result.lost = 0
        if result.lost > EVERY:
            result.problems.append(f"{result.lost} steps were done again, checkpoints are {EVERY} apart")
        if again := twice(folder):
            result.problems.append(f"{len(again)} steps are on record twice, the first {again[0]}")
        found = outcome(folder)
        if differ := sorted(k for k in found.keys() | whole.keys() if found.get(k) != whole.get(k)):
            result.problems.append(f"{len(differ)} results differ from the undisturbed run: {differ[0]} …")


# --- the whole ----------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: each fault, how often, what was lost, how long the recovery took."""
    lines = [
        "| what was done | to | times | wrong | ended by Ray | steps again | longest silence: median, most |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        for work in STEPS:
            mine = [row for row in rows if (row["fault"], row["work"]) == (fault, work)]
            if mine:
                times = [row["recovery_s"] for row in mine]
                bad = sum(bool(row["problems"]) for row in mine)
                aborts = sum(row.get("aborts", 0) for row in mine)
                lost, median = max(row["lost"] for row in mine), statistics.median(times)
                silence = f"{median:.1f} s, {max(times):.1f} s"
                lines.append(f"| {fault} | {work} | {len(mine)} | {bad} | {aborts} | {lost} | {silence} |")
    return "\n".join(lines)


def chosen(text: str) -> list[tuple[str, str]]:
    """Pairs of work and fault whose `work:fault` begins with one of the words given."""
    pairs = [(work, name) for name in FAULTS for work in STEPS]
    words = [word.strip() for word in text.split(",") if word.strip()]
    found = [pair for pair in pairs if not words or any(":".join(pair).startswith(word) for word in words)]
    if not found:
        raise SystemExit(f"--only {text}: none of {', '.join(map(':'.join, pairs))}")
    return found


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rounds until the time is up."""
    stop_at = time.monotonic() + 60 * options.minutes
    machine = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
    machine |= {name: version(name) for name in ("ray", "torch")} | {"python": platform.python_version()}
    pairs, rows = chosen(options.only), []
    soak, draw = Soak(folder, options.seed), random.Random(options.seed)  # noqa: S311
    try:
        for work in sorted({work for work, _ in pairs}):
            soak.learn(work)
        left: list[tuple[str, str]] = []
        while time.monotonic() < stop_at:
            if not left:
                left = draw.sample(pairs, len(pairs))
            row = asdict(soak.round(len(rows) + 1, *left.pop())) | machine
            rows.append(row)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            say("soak", f"{line(row)} · {duration(max(0.0, stop_at - time.monotonic()))} left")
    finally:
        soak.close()
    return rows


def line(row: dict[str, Any]) -> str:
    """A round in one line."""
    what = f"{row['number']} {row['work']}: {row['fault']} at {row['at']}/{row['of']}"
    price = f"{row['lost']} steps again, silent for {row['recovery_s']:.1f} s, {row['drivers']} drivers"
    return f"{what} · {price} · {'; '.join(row['problems']) or 'equal'}"


def main() -> int:
    """Run the rounds, or print the table of earlier ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins later than this")
    parser.add_argument("--seed", type=int, default=0, help="decides order, moments and victims")
    parser.add_argument("--only", default="", help="some of them: `train`, `sweep:head`, comma-separated")
    parser.add_argument("--out", type=Path, default=Path("soak.jsonl"), help="a row per fault is appended")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of such files, do nothing")
    options = parser.parse_args()
    if options.table:
        rows = [json.loads(line) for path in options.table for line in path.read_text().splitlines()]
        print(table(rows))
        return 0
    options.out = options.out.resolve()
    folder = Path(tempfile.mkdtemp(prefix="krony-soak-"))
    rows = run(options, folder)
    print(table(rows))
    if any(row["problems"] for row in rows):
        say("soak", f"rounds that went wrong are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
