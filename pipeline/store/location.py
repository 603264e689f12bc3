"""A URI as a set of files: one interface, one code path, on a disk, an NFS mount or an object store.

Keys are relative POSIX paths. A put is atomic for its readers: on a file system temporary name, fsync,
rename; on an object store one PUT. Nothing here knows artifacts.
"""

import builtins
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import pyarrow.fs as pafs

from pipeline.errors import StoreError

_PART = ".part"


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


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=64)
def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as err:
        raise StoreError(
            f"store {uri!r} cannot be opened ({err}); expected a path or s3://bucket/prefix"
        ) from err
    return filesystem, path.rstrip("/")


@dataclass(frozen=True, slots=True)
class Location:
    """A folder named by a URI: an absolute path, or what `pyarrow.fs` opens (`s3://bucket/prefix`)."""

    uri: str

    @staticmethod
    def of(uri: str | Path) -> "Location":
        """A location from what people write: `~`, relative paths and `file://` become absolute paths."""
        text = str(uri)
        text = text.removeprefix("file://")
        if "://" in text:
            return Location(text.rstrip("/"))
        return Location(str(Path(text).expanduser().resolve()))

    @property
    def is_local(self) -> bool:
        """Whether its files can be opened by path on every node that mounts it."""
        return "://" not in self.uri

    def child(self, key: str) -> "Location":
        """The location below `key`."""
        return Location(f"{self.uri}/{checked_key(key)}")

    # --- write ----------------------------------------------------------------------------------------------

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write `data` under `key`, atomically."""
        if self.is_local:
            with self._writing(key), replacing(self._path(key)) as scratch:
                scratch.write_bytes(data)
            return
        filesystem, root = _filesystem(self.uri)
        with self._writing(key), filesystem.open_output_stream(f"{root}/{checked_key(key)}") as stream:
            stream.write(data)

    def put_file(self, key: str, source: Path, *, move: bool = False) -> None:
        """Copy `source` to `key`, atomically; `move` may rename it instead, on one file system."""
        if self.is_local:
            with self._writing(key), replacing(self._path(key)) as scratch:
                if move and source.stat().st_dev == scratch.parent.stat().st_dev:
                    source.replace(scratch)
                else:
                    shutil.copyfile(source, scratch)
        else:
            filesystem, root = _filesystem(self.uri)
            target = f"{root}/{checked_key(key)}"
            with (
                self._writing(key),
                source.open("rb") as file,
                filesystem.open_output_stream(target) as stream,
            ):
                while block := file.read(8 << 20):
                    stream.write(block)
        if move:
            source.unlink(missing_ok=True)

    def put_folder(self, source: Path, prefix: str = "") -> None:
        """Copy every file below `source`, each atomically, in sorted order."""
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            key = path.relative_to(source).as_posix()
            self.put_file(f"{prefix}/{key}" if prefix else key, path)

    def delete(self, key: str) -> None:
        """Remove `key`; a missing one is fine."""
        if self.is_local:
            self._path(key).unlink(missing_ok=True)
            return
        filesystem, root = _filesystem(self.uri)
        if self.exists(key):
            filesystem.delete_file(f"{root}/{checked_key(key)}")

    # --- read -----------------------------------------------------------------------------------------------

    def read_bytes(self, key: str) -> bytes:
        """The bytes under `key`; FileNotFoundError if there are none."""
        try:
            if self.is_local:
                return self._path(key).read_bytes()
            filesystem, root = _filesystem(self.uri)
            with filesystem.open_input_stream(f"{root}/{checked_key(key)}") as stream:
                return bytes(stream.read())
        except (FileNotFoundError, NotADirectoryError) as err:
            raise FileNotFoundError(f"{self.uri}/{key}") from err
        except OSError as err:
            raise StoreError(
                f"{self.uri}/{key}: cannot be read ({err.strerror or err}); check the place"
            ) from err

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
        filesystem, root = self._filesystem()
        base = f"{root}/{checked_key(prefix)}" if prefix else root
        selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
        found = (i.path for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File)
        return sorted(path[len(root) + 1 :] for path in found if not path.endswith(_PART))

    def folders(self, prefix: str = "") -> builtins.list[str]:
        """Names of the folders directly below `prefix`, sorted."""
        filesystem, root = self._filesystem()
        base = f"{root}/{checked_key(prefix)}" if prefix else root
        selector = pafs.FileSelector(base, recursive=False, allow_not_found=True)
        return sorted(
            i.base_name for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.Directory
        )

    def local(self, key: str, *, sha256: str = "") -> Path:
        """A path that can be opened here: the file itself, or a copy in the cache of this node."""
        if self.is_local:
            path = self._path(key)
            if not path.is_file():
                raise FileNotFoundError(str(path))
            return path
        name = sha256 or hashlib.sha256(f"{self.uri}/{key}:{self.size(key)}".encode()).hexdigest()
        target = node_cache() / name[:2] / name / PurePosixPath(key).name
        if not target.exists():
            filesystem, root = _filesystem(self.uri)
            with (
                replacing(target) as scratch,
                filesystem.open_input_stream(f"{root}/{checked_key(key)}") as stream,
                scratch.open("wb") as file,
            ):
                shutil.copyfileobj(stream, file, 8 << 20)
                file.flush()
                if sha256 and (found := sha256_file(scratch)) != sha256:
                    raise StoreError(
                        f"{self.uri}/{key}: read {found[:12]}…, expected {sha256[:12]}…; read it again"
                    )
        return target

    def local_folder(self, prefix: str = "") -> Path:
        """A folder that can be opened here and holds everything below `prefix`."""
        if self.is_local:
            return self._path(prefix) if prefix else Path(self.uri)
        keys = self.list(prefix)
        stamp = "\n".join(f"{key}:{self.size(key)}" for key in keys)
        folder = node_cache() / "folders" / hashlib.sha256(f"{self.uri}\n{stamp}".encode()).hexdigest()
        for key in keys:
            target = folder / key
            if not target.exists():
                with replacing(target) as scratch:
                    scratch.write_bytes(self.read_bytes(key))
        return folder / prefix if prefix else folder

    # --- inside ---------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return Path(self.uri) / checked_key(key)

    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        return (pafs.LocalFileSystem(), self.uri) if self.is_local else _filesystem(self.uri)

    def _info(self, key: str) -> pafs.FileInfo:
        filesystem, root = self._filesystem()
        return filesystem.get_file_info(f"{root}/{checked_key(key)}")

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            reason = err.strerror or str(err)
            raise StoreError(
                f"{self.uri}/{key}: cannot be written ({reason}); free or unlock the place, "
                "or choose another --store"
            ) from err


def node_cache() -> Path:
    """Where this node keeps copies of remote files, by digest: KRONY_CACHE, or a folder for this user."""
    default = Path(tempfile.gettempdir()) / f"krony-cache-{os.getuid()}"
    return Path(os.environ.get("KRONY_CACHE", str(default)))
