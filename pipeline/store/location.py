"""A URI as a set of files: one interface, one code path, on a disk, an NFS mount or an object store.

Keys are relative POSIX paths. A put is atomic for its readers: on a file system temporary name, fsync,
rename; on an object store one upload, see `objects`. Whoever knows what the files must be gives a promise of
it, and then nothing else is ever read, wherever the damage came from. Nothing here knows artifacts.
"""

import builtins
import errno
import hashlib
import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import StoreError
from pipeline.store.copies import is_here, known_digest, node_cache, one_at_a_time, sha256_file, side_by_side
from pipeline.store.objects import (
    READS,
    blocks,
    checked_uri,
    digest,
    open_filesystem,
    patiently,
    reading,
    upload,
    writing,
)

_PART = ".part"

_SENT: dict[str, str] = {}
"""Digests of what this process put on object stores."""

T = TypeVar("T")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`; it takes the place of `target` only if the body succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_PART}")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _renamed(source: Path, target: Path) -> bool:
    """Rename; False between two mounts, which may be of one device: containers and bind mounts."""
    try:
        source.replace(target)
    except OSError as err:
        if err.errno != errno.EXDEV:
            raise
        return False
    return True


def checked_key(key: str) -> str:
    """`key` if it stays inside its location; raises StoreError for absolute paths and `..`."""
    parts = PurePosixPath(key).parts
    if (
        not parts
        or key.startswith("/")
        or "\\" in key
        or "\0" in key
        or any(part in ("..", "") for part in parts)
    ):
        raise StoreError(f"key {key!r} is no place inside a location; expected a relative path without '..'")
    return key


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    return open_filesystem(uri)


class ChangedError(StoreError):
    """A file is not what was promised."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What the files of a finished artifact are."""

    sha256: Mapping[str, str]
    """Digest by key."""

    remedy: str
    """What makes them again."""


@dataclass(frozen=True, slots=True)
class Location:
    """A folder named by a URI: an absolute path, or what `pyarrow.fs` opens (`s3://bucket/prefix`)."""

    uri: str

    promise: Promise | None = field(default=None, compare=False, repr=False)
    """Files that are held against their digest whenever they are opened."""

    @staticmethod
    def of(uri: str | Path) -> "Location":
        """A location from what people write: `~`, relative paths and `file://` become absolute paths."""
        text = str(uri)
        text = text.removeprefix("file://")
        if "://" in text:
            return Location(checked_uri(text))
        return Location(str(Path(text).expanduser().resolve()))

    @property
    def is_local(self) -> bool:
        """Whether its files can be opened by path on every node that mounts it."""
        return "://" not in self.uri

    def child(self, key: str) -> "Location":
        """The location below `key`."""
        promise, above = self.promise, f"{key}/"
        if promise:
            below = {k.removeprefix(above): v for k, v in promise.sha256.items() if k.startswith(above)}
            promise = Promise(below, promise.remedy)
        return Location(f"{self.uri}/{checked_key(key)}", promise)

    # --- write ----------------------------------------------------------------------------------------------

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write `data` under `key`, atomically."""
        with writing(f"{self.uri}/{key}"):
            if self.is_local:
                with replacing(self._path(key)) as scratch:
                    scratch.write_bytes(data)
            else:
                self._upload(key, pa.py_buffer(data))

    def put_file(self, key: str, source: Path, *, move: bool = False) -> None:
        """Copy `source` to `key`, atomically; `move` may rename it instead, on one file system."""
        with writing(f"{self.uri}/{key}"):
            if not self.is_local:
                with pa.memory_map(str(source)) if source.stat().st_size else pa.BufferReader(b"") as file:
                    self._upload(key, file.read_buffer())
            else:
                with replacing(self._path(key)) as scratch:
                    if move and _renamed(source, scratch):
                        move = False  # done; a file may be moved to where it is
                    else:
                        shutil.copyfile(source, scratch)
            if move:
                source.unlink(missing_ok=True)

    def put_folder(self, source: Path, prefix: str = "") -> None:
        """Copy every file below `source`, each atomically, in sorted order."""
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            key = path.relative_to(source).as_posix()
            self.put_file(f"{prefix}/{key}" if prefix else key, path)

    def delete(self, key: str) -> None:
        """Remove `key`; a missing one is fine."""
        with writing(f"{self.uri}/{key}"):
            if self.is_local:
                self._path(key).unlink(missing_ok=True)
                return
            filesystem, root = _filesystem(self.uri)
            with suppress(FileNotFoundError):
                if self.exists(key):
                    patiently(lambda: filesystem.delete_file(f"{root}/{checked_key(key)}"))

    # --- read -----------------------------------------------------------------------------------------------

    def read_bytes(self, key: str) -> bytes:
        """The bytes under `key`; FileNotFoundError without any, ChangedError unless they are as promised."""
        expected = self._promised(key)
        for _ in range(1 if self.is_local else READS):
            data = self._read(key) if self.is_local else b"".join(self._blocks(key))
            if not expected or (found := hashlib.sha256(data).hexdigest()) == expected:
                return data
        raise self._changed(key, found, expected)

    def sha256(self, key: str) -> str:
        """Digest of what is stored under `key`, read now and from there; FileNotFoundError if nothing is."""
        if not self.is_local:
            filesystem, root = _filesystem(self.uri)
            return digest(filesystem, f"{root}/{checked_key(key)}", where=f"{self.uri}/{key}")
        with reading(f"{self.uri}/{key}"):
            return sha256_file(self._path(key))

    def settled_sha256(self, key: str, expected: str = "") -> str:
        """As `sha256`; from an object store once it is what was expected or sent, or two readings agree."""
        seen = {expected or _SENT.get(f"{self.uri}/{key}", "")}
        while True:
            found = self.sha256(key)
            if self.is_local or found in seen or len(seen) > READS:
                return found
            seen.add(found)

    def exists(self, key: str) -> bool:
        """Whether a file lies under `key`."""
        return bool(self._info(key).type == pafs.FileType.File)

    def size(self, key: str) -> int:
        """Bytes under `key`; FileNotFoundError if there are none."""
        info = self._info(key)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.uri}/{key}")
        return int(info.size)

    def list(self, prefix: str = "") -> builtins.list[str]:
        """All keys below `prefix`, recursive and sorted, without temporary names."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file below `prefix` by key, without temporary names; few requests for many files."""
        _, root = self._filesystem()
        found = (i for i in self._select(prefix, recursive=True) if i.type == pafs.FileType.File)
        return {i.path[len(root) + 1 :]: int(i.size) for i in found if not i.path.endswith(_PART)}

    def folders(self, prefix: str = "") -> builtins.list[str]:
        """Names of the folders directly below `prefix`, sorted."""
        found = self._select(prefix, recursive=False)
        return sorted(i.base_name for i in found if i.type == pafs.FileType.Directory)

    def local(self, key: str, *, sha256: str = "") -> Path:
        """A path that can be opened here: the file itself, or a copy in the cache of this node.

        FileNotFoundError if there is none, ChangedError if it is not what `sha256` or the promise says.
        """
        expected = sha256 or self._promised(key)
        if not self.is_local:
            name = expected or hashlib.sha256(f"{self.uri}/{key}:{self._stamp(key)}".encode()).hexdigest()
            target = node_cache() / name[:2] / name / PurePosixPath(key).name
            if not is_here(target, expected):
                with self._holding(target.parent):
                    self._fetch(key, target, expected)
            return target
        path = self._path(key)
        if not path.is_file():
            raise FileNotFoundError(f"{self.uri}/{key}")
        if expected and (found := known_digest(path)) != expected:
            raise self._changed(key, found, expected)
        return path

    def local_files(self, keys: Iterable[str]) -> builtins.list[Path]:
        """As `local`, of several keys at once."""
        return side_by_side(self.local, keys)

    def local_folder(self, prefix: str = "", *, only: Collection[str] = ()) -> Path:
        """A folder that can be opened here and holds all below `prefix`, or its files `only`, as promised."""
        above = f"{prefix}/" if prefix else ""
        keys = [above + name for name in only]
        if self.is_local:
            promised = self.promise.sha256 if self.promise else {}
            self.local_files(key for key in promised if key in keys or (not keys and key.startswith(above)))
            return Path(self.uri) / prefix
        stamps = {key: self._promised(key) or self._stamp(key) for key in keys or self.list(prefix)}
        stamp = "\n".join(f"{key}:{stamps[key]}" for key in sorted(stamps))
        folder = node_cache() / "folders" / hashlib.sha256(f"{self.uri}\n{stamp}".encode()).hexdigest()
        here = side_by_side(lambda key: is_here(folder / key, self._promised(key)), stamps)
        if not all(here):
            with self._holding(folder):
                side_by_side(lambda key: self._fetch(key, folder / key, self._promised(key)), stamps)
        return folder / prefix

    # --- inside ---------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return Path(self.uri) / checked_key(key)

    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        return (pafs.LocalFileSystem(), self.uri) if self.is_local else _filesystem(self.uri)

    def _info(self, key: str) -> pafs.FileInfo:
        filesystem, root = self._filesystem()
        with reading(f"{self.uri}/{key}"):
            return self._ask(lambda: filesystem.get_file_info(f"{root}/{checked_key(key)}"))

    def _select(self, prefix: str, *, recursive: bool) -> builtins.list[pafs.FileInfo]:
        filesystem, root = self._filesystem()
        base = f"{root}/{checked_key(prefix)}" if prefix else root
        with reading(f"{self.uri}/{prefix}"):
            selector = pafs.FileSelector(base, recursive=recursive, allow_not_found=True)
            return self._ask(lambda: builtins.list(filesystem.get_file_info(selector)))

    def _ask(self, work: Callable[[], T]) -> T:
        return work() if self.is_local else patiently(work)

    def _upload(self, key: str, data: pa.Buffer) -> None:
        filesystem, root = _filesystem(self.uri)
        where = f"{self.uri}/{key}"
        _SENT[where] = upload(filesystem, f"{root}/{checked_key(key)}", data, where=where)

    def _read(self, key: str) -> bytes:
        with reading(f"{self.uri}/{key}"):
            return self._path(key).read_bytes()

    def _blocks(self, key: str) -> Iterator[bytes]:
        filesystem, root = _filesystem(self.uri)
        return blocks(filesystem, f"{root}/{checked_key(key)}", where=f"{self.uri}/{key}")

    @contextmanager
    def _holding(self, folder: Path) -> Iterator[None]:
        with ExitStack() as held:
            with writing(str(folder)):
                held.enter_context(one_at_a_time(folder))
            yield

    def _fetch(self, key: str, target: Path, expected: str) -> None:
        """Copy an object to `target` unless it lies there as expected; again if something else arrives."""
        if is_here(target, expected):
            return
        for tries_left in reversed(range(READS)):
            arriving = self._blocks(key)
            first = next(arriving, b"")  # here, so that a missing object is no failure to write
            try:
                with writing(str(target)), replacing(target) as scratch:
                    with scratch.open("wb") as file:
                        file.writelines(itertools.chain([first], arriving))
                    if expected and (found := sha256_file(scratch)) != expected:
                        raise self._changed(key, found, expected)
            except ChangedError:
                if not tries_left:
                    raise
            else:
                break

    def _promised(self, key: str) -> str:
        return self.promise.sha256.get(key, "") if self.promise else ""

    def _changed(self, key: str, found: str, expected: str) -> ChangedError:
        remedy = self.promise.remedy if self.promise else "get it again"
        return ChangedError(
            f"{self.uri}/{key}: sha256 {found[:12]}…, expected {expected[:12]}…; it was changed: {remedy}"
        )

    def _stamp(self, key: str) -> str:
        """What tells two states of an object of one size apart: its ETag, or when it was put."""
        info = self._info(key)
        filesystem, root = _filesystem(self.uri)
        with (
            reading(f"{self.uri}/{key}"),
            patiently(lambda: filesystem.open_input_file(f"{root}/{key}")) as file,
        ):
            tag = (file.metadata() or {}).get("ETag", b"").decode()
        return f"{info.size}:{tag or info.mtime_ns}"
