"""An artifact opened by the processes of one node: files side by side, and each fetched by one of them.

    python -m benchmarks.node_copies [--files 10] [--megabytes 20] [--processes 2] [--rounds 3]

Opening hashes every file, and on an object store fetches it first: a real S3 API on loopback (moto's, with a
proxy that counts) and an empty cache each time. The other side, by turns with it, takes one file after the
other and waits for nobody's copy.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.store import copies
from pipeline.store.artifacts import Artifact, Identity, Store

PROJECT = Path(__file__).resolve().parents[1]
SIDES = ("plain", "ours")
WORDS = Identity("corpus", "words", {"source": "benchmark"})


def build(uri: str, *, files: int, megabytes: int) -> Artifact:
    """An artifact of random bytes."""
    with Store(uri).attempt(WORDS) as attempt:
        for number in range(files):
            attempt.location.put_bytes(f"{number:03}.bin", os.urandom(megabytes << 20))
        return attempt.publish(metrics={})


def open_all(uri: str, side: str) -> float:
    """Seconds from the record to paths of all files, in this process."""
    if side == "plain":
        copies.HANDS, copies.PATIENCE_S = 1, 0.0
    artifact = Store(uri).require(WORDS)
    begin = time.perf_counter()
    artifact.paths(artifact.record.files)
    return time.perf_counter() - begin


def of_processes(uri: str, side: str, *, processes: int) -> float:
    """Seconds of the slowest of some processes that begin together."""
    words = [sys.executable, "-m", "benchmarks.node_copies", "--open", uri, "--side", side]
    started = [subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE) for _ in range(processes)]
    return max(float(each.communicate()[0]) for each in started)


def by_turns(measure: Callable[[str], float], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of both sides."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, seconds in found.items():
            seconds.append(measure(side))
    return found


def say(what: str, found: dict[str, list[float]], more: str = "") -> None:
    """One line."""
    plain, ours = (
        f"{statistics.median(each):.2f} s ({min(each):.2f}–{max(each):.2f})" for each in found.values()
    )
    print(f"{what}: one after the other {plain}, ours {ours}{more}", flush=True)


def main() -> None:
    """Measure both places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("files", 10), ("megabytes", 20), ("processes", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(open_all(options.open, options.side))
        return
    sys.path.append(str(PROJECT / "tests"))
    import s3_lab

    size = {"files": options.files, "megabytes": options.megabytes}
    with tempfile.TemporaryDirectory(prefix="krony-copies-") as folder:
        disk, cache = f"{folder}/store", Path(folder) / "cache"
        build(disk, **size)
        found = by_turns(lambda side: of_processes(disk, side, processes=1), rounds=options.rounds)
        say("disk, 1 process", found)
        with s3_lab.server(Path(folder) / "log") as port, s3_lab.network(port) as net:
            os.environ.update(s3_lab.environment(net), KRONY_CACHE=str(cache))
            build("s3://lab/store", **size)
            gets: dict[str, int] = {}

            def measure(side: str) -> float:
                shutil.rmtree(cache, ignore_errors=True)
                net.log.clear()
                seconds = of_processes("s3://lab/store", side, processes=options.processes)
                gets[side] = sum(each.method == "GET" and ".bin" in each.path for each in net.log)
                return seconds

            found = by_turns(measure, rounds=options.rounds)
            say(f"S3, {options.processes} processes", found, f"; requests {gets['plain']} and {gets['ours']}")


if __name__ == "__main__":
    main()
