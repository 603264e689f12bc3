"""Writers of the store, killed or failed at every single call that changes a file.

A script that runs with `faulty_files.c` preloaded. It makes what a writer needs, counts the calls of one
undisturbed run, and then, for every call and every kind of fault, lets a forked process run into it. What is
left behind is read by another process, the writer runs again, and what was found is printed as JSON.

    LD_PRELOAD=faulty.so python tests/crash_lab.py WRITER FOLDER

With `serve` in place of a writer it forks a process per line of its input, for who puts the faults elsewhere:

    {"writer": "publishing", "step": "write", "root": "s3://lab/x"}

is answered by a process id; after the next line the process begins, and its end is the second answer.
"""

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pipeline.store.provenance import provenance

KINDS = {"count": 0, "killed before": 1, "killed in": 2, "EIO": errno.EIO}
SAID, UNSAID = 7, 9  # exit codes of a writer that met a fault: one line for people, or anything else


class Writer(Protocol):
    """Something that writes, and how to see what it left."""

    def prepare(self, root: str) -> None:
        """What it starts from."""

    def write(self, root: str) -> None:
        """Do it."""

    def read(self, root: str) -> str:
        """A name of what is whole for a reader, or "nothing". Raises if something wrong can be read."""


class Publishing:
    """An artifact of several files, over an older one."""

    def prepare(self, root: str) -> None:
        self._publish(root, b"old", force=False)

    def write(self, root: str) -> None:
        self._publish(root, b"new", force=True)

    def read(self, root: str) -> str:
        from pipeline.store.artifacts import Store

        store = Store(f"{root}/store")
        (record,) = store.records()
        artifact = store.open(record.address)
        artifact.verify()
        assert set(artifact.record.files) == {"a/one.txt", "two.bin", "three/x.txt", "three/y.txt"}
        store.unfinished()
        data = {artifact.path(name).read_bytes()[:3] for name in artifact.record.files}
        (word,) = data
        return word.decode()

    def _publish(self, root: str, word: bytes, *, force: bool) -> None:
        from pipeline.store.artifacts import Identity, Store
        from pipeline.store.scratch import scratch_folder

        store = Store(f"{root}/store")
        with (
            store.attempt(Identity("corpus", "words", {"x": 1}), force=force) as attempt,
            scratch_folder() as scratch,
        ):
            (scratch / "folder/three").mkdir(parents=True)
            for name in ("two.bin", "folder/three/x.txt", "folder/three/y.txt"):
                (scratch / name).write_bytes(word * 40_000)
            attempt.location.put_bytes("a/one.txt", word * 1000)
            attempt.location.put_file("two.bin", scratch / "two.bin", move=True)
            attempt.location.put_folder(scratch / "folder")
            attempt.publish(metrics={"word": word.decode()})


class Checkpointing:
    """A checkpoint over the one before, which is dropped."""

    def prepare(self, root: str) -> None:
        self._save(root, 10)

    def write(self, root: str) -> None:
        self._save(root, 20)

    def read(self, root: str) -> str:
        import torch

        from pipeline.store.location import Location
        from pipeline.train.checkpoint import Checkpoints

        found = Checkpoints(Location.of(f"{root}/run"), fingerprint="ab" * 32, keep=1).newest(on_skip=str)
        assert found, "no checkpoint is whole"
        for tensors, offset in ((found.weights, 0), (found.optimizer, 1000)):
            assert torch.equal(tensors["w"], torch.full((50, 30), found.state.step + offset))
        return {10: "old", 20: "new"}[found.state.step]

    def _save(self, root: str, step: int) -> None:
        import torch

        from pipeline.store.location import Location
        from pipeline.train.checkpoint import Checkpoints, CheckpointState

        losses = dict.fromkeys(("train_loss", "val_loss_initial", "val_loss", "probe"), 1.0)
        state = CheckpointState(step=step, tokens=step, seed=0, fingerprint="ab" * 32, **losses)
        Checkpoints(Location.of(f"{root}/run"), fingerprint="ab" * 32, keep=1).save(
            state,
            weights={"w": torch.full((50, 30), step)},
            optimizer={"w": torch.full((50, 30), step + 1000)},
        )


class Preparing:
    """Corpus, tokenizer and shards from a file of documents, with tasks in this process."""

    def prepare(self, root: str) -> None:
        from data_lab import write_corpus

        write_corpus(Path(root) / "text", documents=24, repeats=2)

    def write(self, root: str) -> None:
        import pytest
        from data_lab import Prepared, in_process

        with pytest.MonkeyPatch.context() as patch:
            in_process(patch)
            Prepared(self._config(root)).tokens()

    def read(self, root: str) -> str:
        from pipeline.chain import chain
        from pipeline.data.tokenizer import load_tokenizer
        from pipeline.data.verify import verify_tokens
        from pipeline.store.artifacts import Store

        config = self._config(root)
        store, links = Store(config.store), chain(config)
        found = {}
        for kind, identity in (
            ("corpus", links.corpus),
            ("tokenizer", links.tokenizer),
            ("tokens", links.tokens),
        ):
            if artifact := store.find(identity):
                artifact.verify()
                found[kind] = artifact
        assert [record.kind for record in store.records()] == list(found)
        if "tokenizer" in found:
            load_tokenizer(found["tokenizer"].folder())
        if "tokens" in found:
            verify_tokens(found["tokens"], found["tokenizer"], quiet=True)
            return "new"
        return "+".join(found) or "nothing"

    def _config(self, root: str) -> Any:
        from data_lab import config_of

        return config_of(Path(root) / "text/corpus.jsonl", Path(root) / "store", shard_tokens=20_000)


class Tokenizing(Preparing):
    """The tokenizer of a corpus that is there."""

    def prepare(self, root: str) -> None:
        super().prepare(root)
        from pipeline.chain import chain
        from pipeline.config.schema import RayConfig
        from pipeline.data.corpora import build_corpus
        from pipeline.store.artifacts import Store

        config = self._config(root)
        build_corpus(config.corpus, chain(config).corpus, Store(config.store), ray=RayConfig(), quiet=True)

    def write(self, root: str) -> None:
        from pipeline.chain import chain
        from pipeline.data.tokenizer import build_tokenizer
        from pipeline.store.artifacts import Store

        config = self._config(root)
        links, store = chain(config), Store(config.store)
        build_tokenizer(config, links.tokenizer, store.require(links.corpus), store)


class Telling:
    """Rows of a history, one part after the other."""

    def prepare(self, root: str) -> None:
        (Path(root) / "run").mkdir()

    def write(self, root: str) -> None:
        from pipeline.store.location import Location
        from pipeline.tracking.jsonl import HistoryWriter, read_history

        place = Location.of(f"{root}/run")
        begin = len(read_history(place))
        with HistoryWriter(place, rows_per_part=3) as history:
            for step in range(begin, 7):
                history.append({"step": step, "loss": 1.0 / (step + 1)})

    def read(self, root: str) -> str:
        from pipeline.store.location import Location
        from pipeline.tracking.jsonl import read_history

        rows = read_history(Location.of(f"{root}/run"))
        assert rows == [{"step": step, "loss": 1.0 / (step + 1)} for step in range(len(rows))]
        return "new" if len(rows) == 7 else f"{len(rows)} rows"


class TakingOver:
    """A sweep that is run again for what failed: it begins with the events of its earlier attempt."""

    def prepare(self, root: str) -> None:
        ledger = self._ledger(root, "1")
        ledger.tell("session", slots=1)
        for key in "abc":
            told: dict[str, Any] = {"name": key, "arm": key, "choices": {}, "picks": {}, "seed": 0}
            ledger.tell("drawn", key=key, total_tokens=9, **told)
            ledger.tell("started", key=key)
            ledger.tell("validated", key=key, tokens=9, val_loss=1.5)
            ledger.tell("ended", key=key, state="finished", reason="", scores={}, train_s=1.0)
        ledger.tell("end")

    def write(self, root: str) -> None:
        from pipeline.store.location import Location

        ledger = self._ledger(root, "2")
        ledger.begin_with(Location.of(f"{root}/1"))
        ledger.tell("retried", key="a")

    def read(self, root: str) -> str:
        first, again = self._ledger(root, "1"), self._ledger(root, "2")
        if again.is_empty:
            return "nothing"
        assert again.book.validated == first.book.validated
        assert again.book.train_s == first.book.train_s == 3.0
        assert {entry.state for key, entry in again.book.entries.items() if key != "a"} == {"finished"}
        return "new" if again.book.entries["a"].state == "waiting" else "taken over"

    def _ledger(self, root: str, attempt: str) -> Any:
        from pipeline.store.location import Location
        from pipeline.sweep.ledger import Ledger

        return Ledger(Location.of(f"{root}/{attempt}"))


WRITERS: Mapping[str, type[Writer]] = {
    "publishing": Publishing,
    "checkpointing": Checkpointing,
    "preparing": Preparing,
    "tokenizing": Tokenizing,
    "telling": Telling,
    "taking over": TakingOver,
}


HEAVY = {
    "checkpointing": ("pipeline.train.checkpoint",),
    "serve": ("pipeline.train.checkpoint",),
    "tokenizing": ("tokenizers", "pyarrow.parquet", "pipeline.data.rows", "data_lab"),
    "preparing": ("tokenizers", "pyarrow.parquet", "pipeline.data.verify", "data_lab"),
    "taking over": ("pipeline.sweep.ledger",),
}
"""What a writer loads; the fewer, the faster a fork."""


@dataclass(frozen=True)
class End:
    """How a forked process ended: its exit code, negative for a signal, and what it said."""

    code: int
    text: str


def forked(work: Callable[[], str], *, born: Callable[[int], None] = lambda _: None) -> End:
    """`work` in a process of its own; its id goes to `born`. A line for people is SAID, all else UNSAID."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with `&`
        code, text = UNSAID, ""
        try:
            from pipeline.errors import KronyError

            try:
                code, text = 0, work()
            except KronyError as err:
                code, text = SAID, str(err)
        except BaseException:  # noqa: BLE001 - whatever it was, the parent hears it
            text = traceback.format_exc()
        finally:
            if hasattr(shim(), "fault_arm"):
                shim().fault_arm(b"", -1, 0)
            os.write(told, text.encode()[:60_000])
            os._exit(code)
    os.close(told)
    born(child)
    with os.fdopen(heard, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return End(os.waitstatus_to_exitcode(status), text)


@cache
def shim() -> ctypes.CDLL:
    """The preloaded library."""
    return ctypes.CDLL(None)


def disturbed(writer: Writer, root: Path, call: int, kind: str) -> End:
    """One run of a writer below `root` that meets a fault; says how many calls it made if it comes back."""

    def work() -> str:
        tempfile.tempdir = str(root / "tmp")
        shim().fault_arm(str(root).encode(), call, KINDS[kind])
        writer.write(str(root))
        return str(shim().fault_calls())

    (root / "tmp").mkdir(exist_ok=True)
    return forked(work)


def every_fault(writer: Writer, folder: Path) -> Iterator[dict[str, Any]]:
    """All calls, all kinds."""
    origin, number = folder / "origin", 0
    origin.mkdir(parents=True)
    prepared = forked(lambda: str(writer.prepare(str(origin))))
    assert prepared.code == 0, prepared.text
    calls = int(disturbed(writer, copy_of(origin, folder / "counted"), -1, "count").text)
    for call in range(calls):
        for kind in list(KINDS)[1:]:
            number += 1
            root = copy_of(origin, folder / str(number))
            met = disturbed(writer, root, call, kind)
            mended = forked(lambda root=root: afterwards(writer, str(root)))
            yield {"call": call, "of": calls, "kind": kind, "met": asdict(met), "mended": asdict(mended)}
            shutil.rmtree(root)


def afterwards(writer: Writer, root: str) -> str:
    """What a fault left, and what there is after another run of the writer."""
    left = writer.read(root)
    writer.write(root)
    return f"{left}, then {writer.read(root)}"


def copy_of(origin: Path, root: Path) -> Path:
    """A folder like `origin`."""
    shutil.copytree(origin, root)
    return root


def serve() -> None:
    """One forked process per line of standard input."""
    for line in sys.stdin:
        asked = json.loads(line)
        work = getattr(WRITERS[asked["writer"]](), asked["step"])
        go, told = os.pipe()

        def begin(work: Callable[[str], str | None] = work, go: int = go, root: str = asked["root"]) -> str:
            os.read(go, 1)
            return str(work(root))

        def born(child: int, told: int = told) -> None:
            print(child, flush=True)
            sys.stdin.readline()
            os.write(told, b"!")

        print(json.dumps(asdict(forked(begin, born=born))), flush=True)
        os.close(go)
        os.close(told)


def main(name: str, folder: str = "") -> None:
    """Print what was found."""
    for module in ("pipeline.chain", "pipeline.tracking.jsonl", *HEAVY.get(name, ())):
        import_module(module)  # once, before the forks
    provenance()
    if name == "serve":
        serve()
        return
    for row in every_fault(WRITERS[name](), Path(folder).resolve()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
