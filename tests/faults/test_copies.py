"""Copies of remote files on a node: one process fetches for all, whatever becomes of it; files in threads."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import copies
from pipeline.store.artifacts import Identity, Store
from pipeline.store.copies import one_at_a_time
from pipeline.store.location import ChangedError, Location

PROJECT = Path(__file__).resolve().parents[2]
DATA = b"words" * 40_000
READER = """
import sys
from pipeline.store.location import Location
place = Location.of(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(len(place.local("documents.bin", sha256=sys.argv[2]).read_bytes()), flush=True)
"""


@pytest.fixture(scope="module")
def s3(s3_lab: Any, s3_port: int) -> Iterator[Any]:
    with s3_lab.network(s3_port) as net, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_lab.environment(net).items():
            patch.setenv(name, value)
        Location.of("s3://lab/copies").put_bytes("documents.bin", DATA)
        yield net


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """A process that has loaded what it needs and opens the file when it is sent a line."""
    cache = {"KRONY_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(PROJECT)}
    words = [sys.executable, "-c", READER, "s3://lab/copies", hashlib.sha256(DATA).hexdigest()]
    running = []

    def begin() -> subprocess.Popen[str]:
        running.append(
            subprocess.Popen(
                words, env=os.environ | cache, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("kind", "gets"), [("", 1), ("kill", 2)])
def test_one_process_of_a_node_fetches_and_the_other_waits(
    s3: Any, s3_lab: Any, start: Callable[[], subprocess.Popen[str]], tmp_path: Path, kind: str, gets: int
) -> None:
    both = [start(), start()]
    assert [process.stdout and process.stdout.readline() for process in both] == ["ready\n"] * 2
    has_asked, may_go_on = threading.Event(), threading.Event()

    def held_up(request: Any) -> bool:
        """The first request for the bytes waits, and every other one behind it."""
        if request.method != "GET" or has_asked.is_set():
            return False
        has_asked.set()
        may_go_on.wait(30)
        return bool(kind)

    s3.log.clear()
    with s3.fault(kind, held_up, victim=both[0].pid):
        both[0].stdin.write("go\n")
        both[0].stdin.flush()
        assert has_asked.wait(30)
        both[1].stdin.write("go\n")
        both[1].stdin.flush()
        time.sleep(0.5)  # time enough to ask for the bytes as well
        may_go_on.set()
        said = [process.communicate(timeout=60)[0].strip() for process in both]
    assert said == ["" if kind else str(len(DATA)), str(len(DATA))]
    assert sum(request.method == "GET" for request in s3.log) == gets
    (copy,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert copy.read_bytes() == DATA


def test_a_process_that_hangs_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "PATIENCE_S", 0.2)
    with one_at_a_time(tmp_path / "folder"), one_at_a_time(tmp_path / "folder"):
        pass


def test_a_folder_has_one_holder_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> None:
        with one_at_a_time(tmp_path / "folder"):
            inside.append(number)
            assert len(inside) == 1
            time.sleep(0.01)
            inside.remove(number)

    copies.side_by_side(work, range(6))
    assert not list((tmp_path / "folder").iterdir())  # nothing is left to clean up


@pytest.mark.parametrize("remote", [False, True])
def test_many_files_at_once_are_each_held_against_their_digest(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setenv("KRONY_CACHE", str(tmp_path / "cache"))
    store = Store("s3://lab/copies/store" if remote else tmp_path / "store")
    names = [f"{number:02}.bin" for number in range(20)]
    with store.attempt(Identity("corpus", "words")) as attempt:
        for name in names:
            attempt.location.put_bytes(name, name.encode() * 1000)
        artifact = attempt.publish(metrics={})
    assert [path.read_bytes()[:6].decode() for path in artifact.paths(reversed(names))] == names[::-1]
    assert (artifact.folder() / "07.bin").read_bytes() == b"07.bin" * 1000
    Location(artifact.location.uri).put_bytes("07.bin", b"07.bim" * 1000)
    monkeypatch.setenv("KRONY_CACHE", str(tmp_path / "empty"))
    for read in (artifact.paths, lambda _: artifact.folder(), lambda _: artifact.verify()):
        with pytest.raises(Exception, match=r"07\.bin.*sha256"):
            read(names)
    with pytest.raises(ChangedError):
        artifact.paths(names)
