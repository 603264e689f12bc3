"""The store on a real S3 API, over a network that refuses, cuts, delays, damages and kills."""

import itertools
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, StoreError
from pipeline.store import location, objects
from pipeline.store.artifacts import Identity, Store
from pipeline.store.location import ChangedError, Location
from pipeline.store.objects import StoreAccessError

TESTS = Path(__file__).resolve().parents[1]
WORDS = Identity("corpus", "words", {"source": "words"})
SAID = 7


@pytest.fixture(scope="module")
def s3(s3_lab: Any, s3_port: int) -> Iterator[Any]:
    """A network with a server behind it; clients lose their patience sooner than in life."""
    with s3_lab.network(s3_port) as net, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_lab.environment(net).items():
            patch.setenv(name, value)
        patch.setattr(objects, "SILENCE_S", 1.0)
        yield net


@pytest.fixture
def bucket(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place, and an empty cache on this node."""
    monkeypatch.setenv("KRONY_CACHE", str(tmp_path / "cache"))
    return f"s3://lab/{uuid.uuid4().hex[:8]}"


def publish(uri: str, data: bytes = b"words", *, force: bool = False) -> None:
    with Store(uri).attempt(WORDS, force=force) as attempt:
        attempt.location.put_bytes("a/documents.txt", data)
        attempt.publish(metrics={"documents": 1})


def in_one_line(caught: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    line = str(caught.value)
    assert "\n" not in caught.value.line
    assert all(word in line for word in words), line


# --- a quiet network ----------------------------------------------------------------------------------------


def test_files_of_every_size_come_back(bucket: str, s3: Any, tmp_path: Path) -> None:
    place = Location.of(bucket)
    parts = os.urandom(11 << 20)  # an upload of two parts
    small = {"empty": b"", "a/b/one.json": b"{}", "a/archive.gz": b"no gzip at all", "ä ö%20+.txt": b"name"}
    for key, data in small.items():
        place.put_bytes(key, data)
    (tmp_path / "big").write_bytes(parts)
    s3.log.clear()
    place.put_file("a/big.bin", tmp_path / "big", move=True)
    assert sum(request.method == "PUT" for request in s3.log) == 2
    assert not (tmp_path / "big").exists()
    for key, data in {**small, "a/big.bin": parts}.items():
        assert place.read_bytes(key) == data
        assert place.local(key).read_bytes() == data
        assert place.size(key) == len(data)
    assert place.list("a") == ["a/archive.gz", "a/b/one.json", "a/big.bin"]
    assert place.folders() == ["a"]
    assert (place.local_folder("a") / "b/one.json").read_bytes() == b"{}"
    place.delete("a/big.bin")
    place.delete("a/big.bin")
    assert not place.exists("a/big.bin")
    with pytest.raises(FileNotFoundError, match=r"s3://lab/.*a/big\.bin"):
        place.read_bytes("a/big.bin")


def test_a_small_file_is_one_request_to_write(bucket: str, s3: Any) -> None:
    s3.log.clear()
    Location.of(bucket).put_bytes("one.json", b"{}")
    assert [request.method for request in s3.log if request.method in ("PUT", "POST")] == ["PUT"]


def test_another_object_of_the_same_size_is_not_taken_from_the_cache(bucket: str) -> None:
    place = Location.of(bucket)
    for data in (b"one", b"two"):
        place.put_bytes("x/file.txt", data)
        assert place.local("x/file.txt").read_bytes() == data
        assert (place.local_folder("x") / "file.txt").read_bytes() == data


def test_a_damaged_copy_on_this_node_is_fetched_again(bucket: str) -> None:
    publish(bucket)
    artifact = Store(bucket).require(WORDS)
    copies = (artifact.path("a/documents.txt"), artifact.folder("a") / "documents.txt")
    for copy in copies:
        copy.write_bytes(b"WORDS")
    assert artifact.path("a/documents.txt").read_bytes() == b"words"
    assert (artifact.folder("a") / "documents.txt").read_bytes() == b"words"


def test_changed_bytes_of_the_same_length_are_never_read(bucket: str) -> None:
    publish(bucket)
    artifact = Store(bucket).require(WORDS)
    Location(artifact.location.uri).put_bytes("a/documents.txt", b"WORDS")
    for read in (artifact.path, artifact.location.read_bytes, lambda _: artifact.folder("a")):
        with pytest.raises(ChangedError) as caught:
            read("a/documents.txt")
        in_one_line(caught, "a/documents.txt", "krony prepare … --force")
    with pytest.raises(StoreError, match="sha256"):
        artifact.verify()


@pytest.mark.parametrize(
    "uri", ["s3://key:planted-secret@lab/x", "s3://lab/x?secret_key=planted-secret", "s3://"]
)
def test_secrets_and_endpoints_do_not_stand_in_a_uri(uri: str) -> None:
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL") as caught:
        Store(uri)
    assert "planted" not in str(caught.value)


# --- a bad network ------------------------------------------------------------------------------------------

PASSING = ("503", "500", "429", "reset", "reset-after", "hang")


def test_what_passes_by_is_tried_again(bucket: str, s3: Any, s3_lab: Any) -> None:
    size = (
        2  # no more than this: an error in place of fewer bytes than its own is not one that pyarrow retries
    )

    def round_trip(kind: str) -> int:
        place, data = Location.of(f"{bucket}/{kind}"), os.urandom(size)
        with (
            s3.fault(kind, s3_lab.to(f"{kind}/sent", "PUT")) as sending,
            s3.fault(kind, s3_lab.to(f"{kind}/sent", "GET")) as reading,
            s3.fault(kind, s3_lab.to(f"{kind}/sent", "HEAD")) as asking,
            s3.fault(kind, lambda r: "list-type" in r.path and f"%2F{kind}%2F" in r.path) as listing,
        ):
            place.put_bytes("sent", data)
            assert place.read_bytes("sent") == data
            assert place.sizes() == {"sent": size}
            place.delete("sent")
            return sending.done + reading.done + asking.done + listing.done

    with ThreadPoolExecutor(len(PASSING)) as pool:
        assert list(pool.map(round_trip, PASSING)) == [4] * len(PASSING)


@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_bytes_that_did_not_arrive_as_promised_are_read_again(
    bucket: str, s3: Any, s3_lab: Any, kind: str
) -> None:
    publish(bucket, os.urandom(100_000))
    artifact = Store(bucket).require(WORDS)
    expected = artifact.location.read_bytes("a/documents.txt")
    for read in (
        lambda: artifact.location.read_bytes("a/documents.txt"),
        lambda: artifact.path("a/documents.txt").read_bytes(),
        lambda: artifact.folder().joinpath("a/documents.txt").read_bytes(),
    ):
        with s3.fault(kind, s3_lab.to("documents.txt", "GET")) as fault:
            assert read() == expected
            assert fault.done == 1


def test_a_record_that_did_not_arrive_as_it_was_put_is_read_again(bucket: str, s3: Any, s3_lab: Any) -> None:
    publish(bucket)
    for read in (lambda: Store(bucket).require(WORDS).record, lambda: Store(bucket).records()[0]):
        with s3.fault("flip", s3_lab.to("record.json", "GET")) as fault:
            assert read().metrics == {"documents": 1}
            assert fault.done == 1


def test_a_digest_is_not_taken_from_a_reading_that_went_wrong(bucket: str, s3: Any, s3_lab: Any) -> None:
    with Store(bucket).attempt(WORDS) as attempt:
        attempt.location.put_bytes("mine.bin", b"mine" * 100)
        Location(attempt.location.uri).put_bytes("theirs.bin", b"theirs" * 100)
        location._SENT.pop(f"{attempt.location.uri}/theirs.bin")  # as if another process had put it
        with (
            s3.fault("flip", s3_lab.to("mine.bin", "GET")) as one,
            s3.fault("flip", s3_lab.to("theirs.bin", "GET")) as other,
        ):
            artifact = attempt.publish(metrics={})
        assert one.done == other.done == 1
    artifact.verify()


def test_bytes_that_never_arrive_as_promised_are_an_error_and_no_copy(
    bucket: str, s3: Any, s3_lab: Any, tmp_path: Path
) -> None:
    publish(bucket, os.urandom(100_000))
    artifact = Store(bucket).require(WORDS)
    with s3.fault("flip", s3_lab.to("documents.txt", "GET"), times=99):
        for read in (artifact.path, artifact.location.read_bytes, lambda _: artifact.folder()):
            with pytest.raises(ChangedError) as caught:
                read("a/documents.txt")
            in_one_line(caught, "a/documents.txt", "expected")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_what_was_stored_otherwise_than_sent_is_sent_again(bucket: str, s3: Any, s3_lab: Any) -> None:
    data = os.urandom(100_000)
    with s3.fault("flip-sent", s3_lab.to("documents.txt", "PUT")) as fault:
        publish(bucket, data)
        assert fault.done == 1
    artifact = Store(bucket).require(WORDS)
    artifact.verify()
    assert artifact.location.read_bytes("a/documents.txt") == data


def test_what_is_always_stored_otherwise_is_never_published(bucket: str, s3: Any, s3_lab: Any) -> None:
    with s3.fault("flip-sent", s3_lab.to("documents.txt", "PUT"), times=99):
        with pytest.raises(StoreAccessError) as caught:
            publish(bucket, os.urandom(100_000))
        in_one_line(caught, "a/documents.txt", "run again")
    assert Store(bucket).find(WORDS) is None


@pytest.mark.parametrize("kind", ["503", "403"])
def test_a_server_in_lasting_trouble_is_one_line_and_nothing_is_lost(
    bucket: str, s3: Any, s3_lab: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    publish(bucket)
    with s3.fault(kind, s3_lab.to("", "PUT", "POST"), times=9999):
        with pytest.raises(StoreAccessError) as caught:
            publish(bucket, b"other", force=True)
        in_one_line(caught, "a/documents.txt: cannot be written")
    artifact = Store(bucket).require(WORDS)
    assert artifact.path("a/documents.txt").read_bytes() == b"words"
    with s3.fault(kind, lambda _: True, times=9999):
        for use in (lambda: Store(bucket).find(WORDS), Store(bucket).records, artifact.location.list):
            with pytest.raises(StoreAccessError) as caught:
                use()
            in_one_line(caught, "cannot be read")


def test_half_of_a_large_file_never_appears(
    bucket: str, s3: Any, s3_lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    place, data = Location.of(bucket), os.urandom(11 << 20)
    place.put_bytes("big.bin", b"what was there")
    with s3.fault("507", s3_lab.to("partNumber=2", "PUT"), times=99) as fault:
        with pytest.raises(StoreAccessError):
            place.put_bytes("big.bin", data)
        assert fault.done
    assert place.read_bytes("big.bin") == b"what was there"
    assert [request for request in s3.log if "partNumber=1" in request.path]


# --- a process that dies ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forks(s3: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    """One step of a writer of `crash_lab.py`, as a process; `born` hears its id before it begins."""
    surroundings = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    words = [sys.executable, str(TESTS / "crash_lab.py"), "serve"]
    with subprocess.Popen(
        words, env=surroundings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout

        def run(writer: str, step: str, root: str, *, born: Callable[[int], None] = lambda _: None) -> Any:
            print(json.dumps({"writer": writer, "step": step, "root": root}), file=process.stdin, flush=True)
            born(int(process.stdout.readline()))
            print("go", file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writer", "kind"),
    [
        ("publishing", "kill"),
        pytest.param("publishing", "kill-after", marks=pytest.mark.nightly),
        pytest.param("checkpointing", "kill", marks=pytest.mark.nightly),
        pytest.param("checkpointing", "kill-after", marks=pytest.mark.nightly),
    ],
)
def test_a_kill_at_any_request_that_writes_leaves_what_was_there_or_what_was_meant(
    bucket: str, s3: Any, s3_lab: Any, crash_lab: Any, forks: Callable[..., Any], writer: str, kind: str
) -> None:
    here, left = crash_lab.WRITERS[writer](), []
    for number in itertools.count():
        root = f"{bucket}/{number}"
        here.prepare(root)
        passed = itertools.count()

        def hits(request: Any, number: int = number, passed: Iterator[int] = passed) -> bool:
            return request.method in s3_lab.WRITES and next(passed) == number

        fault = s3_lab.Fault(kind, hits)

        def born(pid: int, fault: Any = fault) -> None:
            fault.victim = pid
            s3.faults.append(fault)

        end = forks(writer, "write", root, born=born)
        s3.faults.remove(fault)
        left.append(here.read(root))
        if not fault.done:
            assert end["code"] == 0
            break
        assert end["code"] == -signal.SIGKILL
        here.write(root)
        assert here.read(root) == "new"
    assert len(left) >= 5
    assert (left[0], left[-1]) == ("old", "new")
    assert set(left) == {"old", "new"}


def test_ctrl_c_in_an_upload_leaves_a_whole_object(
    bucket: str, s3: Any, s3_lab: Any, crash_lab: Any, forks: Any
) -> None:
    crash_lab.WRITERS["publishing"]().prepare(bucket)
    with s3.fault("interrupt", s3_lab.to("one.txt", "PUT")) as fault:

        def born(pid: int) -> None:
            fault.victim = pid

        end = forks("publishing", "write", bucket, born=born)
        assert "KeyboardInterrupt" in end["text"]
    assert crash_lab.WRITERS["publishing"]().read(bucket) == "old"
    store = Store(f"{bucket}/store")
    (attempt,) = store.unfinished()
    assert store.root.read_bytes(f"{attempt}/a/one.txt") == b"new" * 1000


# --- what people run ----------------------------------------------------------------------------------------


def test_verbs_on_a_store_that_cannot_be_reached_end_with_a_line_and_code_3(
    bucket: str, s3: Any, python: Callable[..., Any], free_port: int, tmp_path: Path
) -> None:
    publish(bucket)
    verb = ("-m", "jobs.cli", "compare", "a", "b", "--store", bucket)
    there = python(*verb)
    assert there.returncode == 1
    assert "the store holds none" in there.stderr
    assert "planted" not in there.stdout + there.stderr
    nowhere = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port}", "AWS_MAX_ATTEMPTS": "1"}
    gone = python(*verb, env=nowhere)
    assert gone.returncode == 3
    (line,) = gone.stderr.splitlines()
    assert line.startswith("krony compare: s3://lab/")
    assert "cannot be read" in line
