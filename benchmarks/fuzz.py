"""Fuzzing, bounded: spoiled files for every reader; only errors that are made for people may come out.

    python -m benchmarks.fuzz --minutes 10 [--seed 0] [--only record,history] [--engine spoil|atheris]

Targets get equal time. An input follows from seed and number, so a finding is repeated by its
number: `--only TARGET --first NUMBER --inputs 1`. A finding is any other exception, more than 10 seconds, or
memory beyond 24 GB of addresses; after 60 seconds on one input the process ends with a traceback. With
`--engine atheris`, where that is installed, one target is run by libFuzzer, which is led by the coverage of
the Python code. The exit code is 1 if anything was found.
"""

import argparse
import faulthandler
import json
import logging
import os
import platform
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pipeline.progress import Progress

if TYPE_CHECKING:
    from benchmarks.fuzz_targets import Target

SLOW_S, HUNG_S = 10.0, 60.0
ADDRESSES = 24 << 30
SHOWN = 20


@dataclass
class Tally:
    """What became of the inputs of one target."""

    taken: int = 0
    refused: int = 0
    spent_s: float = 0.0
    slowest_s: float = 0.0
    findings: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def tried(self) -> int:
        """Inputs so far."""
        return self.taken + self.refused + sum(self.kinds.values())


def load(engine: str) -> ModuleType:
    """The targets; for atheris with the instruments of its coverage in our own code."""
    if engine != "atheris":
        return import_module("benchmarks.fuzz_targets")
    import atheris

    with atheris.instrument_imports(include=["model", "pipeline"]):
        return import_module("benchmarks.fuzz_targets")


def spoiled(target: "Target", *, seed: int, number: int) -> bytes:
    """Input `number` of a target; number 0 is a sound example."""
    from benchmarks.fuzz_targets import spoil

    draw = random.Random(f"{seed} {target.name} {number}")  # noqa: S311 - no secret hangs on it
    example = draw.choice(target.examples)
    return spoil(example, draw) if number else example


def throw(target: "Target", data: bytes, tally: Tally, *, number: int, scratch: Path) -> None:
    """One input; what comes out is counted."""
    folder = scratch / "input"
    folder.mkdir()
    begin = time.monotonic()
    faulthandler.dump_traceback_later(HUNG_S, exit=True)
    try:
        if target.takes(data, folder):
            tally.taken += 1
        else:
            tally.refused += 1
    except Exception as err:  # noqa: BLE001 - this is what is looked for
        last = traceback.extract_tb(err.__traceback__)[-1]
        kind = f"{type(err).__name__} at {Path(last.filename).name}:{last.lineno}"
        if not tally.kinds[kind]:
            tally.findings.append(f"{target.name} #{number}: {kind}: {str(err)[:200]}")
            print(tally.findings[-1], file=sys.stderr, flush=True)
        tally.kinds[kind] += 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder)
    took = time.monotonic() - begin
    tally.spent_s, tally.slowest_s = tally.spent_s + took, max(tally.slowest_s, took)
    if took > SLOW_S:
        tally.findings.append(f"{target.name} #{number}: {took:.0f} s for {len(data):,} bytes")


def run(options: argparse.Namespace, chosen: "dict[str, Target]", scratch: Path) -> dict[str, Tally]:
    """Inputs for the target that had the least time so far, until the time or the number is reached."""
    tallies = {name: Tally() for name in chosen}
    begin, seconds = time.monotonic(), options.minutes * 60
    with Progress("fuzz", int(seconds), unit="s") as progress:
        while time.monotonic() - begin < seconds:
            left = {name: tally for name, tally in tallies.items() if tally.tried < options.inputs}
            if not left:
                break
            name = min(left, key=lambda each: left[each].spent_s)
            number = options.first + tallies[name].tried
            data = spoiled(chosen[name], seed=options.seed, number=number)
            throw(chosen[name], data, tallies[name], number=number, scratch=scratch)
            tried = sum(each.tried for each in tallies.values())
            found = sum(len(each.findings) for each in tallies.values())
            progress.update(int(time.monotonic() - begin), inputs=tried, findings=found)
    return tallies


def guided(options: argparse.Namespace, target: "Target", scratch: Path) -> None:
    """One target under libFuzzer; ends the process when its time is over or something is found."""
    import atheris

    corpus = scratch / "corpus"
    corpus.mkdir()
    for number in range(200):
        (corpus / str(number)).write_bytes(spoiled(target, seed=options.seed, number=number))
    folder = scratch / "input"

    def one(data: bytes) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        target.takes(data, folder)

    limits = ["-max_len=65536", "-rss_limit_mb=4096", f"-max_total_time={int(options.minutes * 60)}"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    """Print a line per target, and what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, default=10**9, help="inputs per target, if that is less")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of targets, with commas")
    parser.add_argument("--engine", choices=("spoil", "atheris"), default="spoil")
    parser.add_argument("--json", type=Path, help="write the counts there")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    scratch = Path(tempfile.mkdtemp(prefix="krony-fuzz-"))
    os.chdir(scratch)
    try:
        known = load(options.engine).targets(scratch)
        names = options.only.split(",") if options.only else list(known)
        if unknown := [name for name in names if name not in known]:
            parser.error(f"no target {unknown[0]!r}; there are: {', '.join(known)}")
        chosen = {name: known[name] for name in names}
        if options.engine == "atheris":
            guided(options, chosen[names[0]], scratch)
            return 0
        tallies = run(options, chosen, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{'target':<26}{'inputs':>10}{'taken':>10}{'refused':>10}{'other':>8}{'slowest':>10}")
    for name, tally in tallies.items():
        counts = f"{tally.tried:>10,}{tally.taken:>10,}{tally.refused:>10,}{sum(tally.kinds.values()):>8,}"
        print(f"{name:<26}{counts}{tally.slowest_s:>8.2f} s")
    findings = [line for tally in tallies.values() for line in tally.findings]
    tried = sum(tally.tried for tally in tallies.values())
    print(
        f"{tried:,} inputs, {len(findings)} findings, Python {platform.python_version()}, seed {options.seed}"
    )
    for line in findings[:SHOWN]:
        print(f"  {line}")
    if options.json:
        rows = {
            name: {"tried": t.tried, "taken": t.taken, "findings": t.findings} for name, t in tallies.items()
        }
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
