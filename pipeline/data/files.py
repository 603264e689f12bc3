"""`files`: text files of yours. A line of .jsonl, a row of .parquet and a .txt file is a document.

Each may be compressed with .xz, .gz or .zst. Text is taken verbatim. A .txt file longer than a few pages is
cut at blank lines, so that no file must fit into memory and a corpus of one file has a validation part. The
identity is the names and digests of the files, not where they lie. Standard library at import.

Files may be anybody's: what a compressed one may grow to is bounded, and so is a document. Nothing is
unpacked to a place that the file names.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.config.sources import FilesCorpus
from pipeline.data.documents import CorpusError, Document, Partition
from pipeline.errors import CONTROL

READER = 1
"""Raised whenever the same files give other documents."""

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".xz", ".gz", ".zst")
TXT_CHARACTERS = 32_768
"""A .txt file longer than this is cut at the first blank line after as many characters."""

LONGEST = 1 << 26
"""Characters of a document, and of a line of .jsonl: more than any book, and what a task can hold."""

FREE_BYTES, GROWTH = 1 << 26, 250
"""A compressed file may grow to 64 MiB, a larger one to 250 times its size; real text grows 3 to 30 times."""

_TXT_LONGEST = 1_048_576
_RATIO = {".xz": 3.6, ".gz": 2.6, ".zst": 2.8}


class LocalFiles:
    """The source: one partition per file, sorted by name, validation files among them."""

    def __init__(self, config: FilesCorpus) -> None:
        """Nothing is read before it is asked for."""
        self._config = config

    def identity(self) -> Mapping[str, Any]:
        """Names, sizes and digests of the files, and how their text is found."""
        return {
            "name": "files",
            "reader": READER,
            "text_field": self._config.text_field,
            "max_megabytes": self._config.max_megabytes,
            "files": [
                {"name": each.name, "side": each.side, "sha256": digest(Path(each.stamp))}
                for each in self.partitions()
            ],
        }

    def partitions(self) -> list[Partition]:
        """One per file; `stamp` is its path. Raises CorpusError if a pattern matches nothing."""
        validation = find_files(self._config.validation_paths, what="corpus.validation_paths")
        training = find_files(self._config.paths, what="corpus.paths") - validation
        if not training:
            raise CorpusError("corpus.paths names only validation files; add files to train on")
        root = os.path.commonpath([path.parent for path in training | validation])
        return [
            Partition(
                name=path.relative_to(root).as_posix(),
                stamp=str(path),
                text_bytes=int(path.stat().st_size * _RATIO.get(path.suffix, 1.0)),
                side="" if not validation else "val" if path in validation else "train",
            )
            for path in sorted(training | validation)
        ]

    def read(self, partition: Partition) -> Iterator[Document]:
        """Its documents in order, empty ones left out. Raises CorpusError naming file, line and remedy."""
        path = Path(partition.stamp)
        form = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
        with _reading(path):
            if form == ".parquet":
                found = self._parquet(path)
            else:
                found = _cut(path) if form == ".txt" else self._jsonl(path)
            for number, text in found:
                if text.strip():
                    yield Document.of(text, f"{partition.name}:{number}")

    def _jsonl(self, path: Path) -> Iterator[tuple[int, str]]:
        field = self._config.text_field
        with open_text(path) as file:
            for number, line in _lines(file, path):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as err:
                    raise CorpusError(f"{path}:{number}: not JSON ({err.msg}); fix the line") from err
                except (ValueError, RecursionError) as err:  # a number of 5,000 digits, a thousand brackets
                    raise CorpusError(f"{path}:{number}: no JSON to be read ({err}); fix the line") from err
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                    raise CorpusError(
                        f"{path}:{number}: no text in field {field!r}; it has {has}: set corpus.text_field"
                    )
                yield number, row[field]

    def _parquet(self, path: Path) -> Iterator[tuple[int, str]]:
        from pipeline.data.tables import read_rows, row_count

        field = self._config.text_field
        with tempfile.TemporaryDirectory() as folder:
            plain = path
            if path.suffix in COMPRESSIONS:
                plain = Path(folder) / "plain.parquet"
                with open_bytes(path) as source, plain.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            rows = row_count(plain, name=str(path), text_column=field)
            for number, (text,) in enumerate(read_rows(plain, [field], stop=rows, name=str(path))):
                yield number, text or ""


# --- which files ------------------------------------------------------------------------------------------


def find_files(patterns: tuple[str, ...], *, what: str) -> set[Path]:
    """All files that the patterns name: files, folders, globs. Raises CorpusError if one finds nothing."""
    found: set[Path] = set()
    for pattern in patterns:
        place = Path(pattern).expanduser()
        if place.is_dir():
            new = {path for path in place.rglob("*") if path.is_file() and _is_supported(path)}
        else:
            start = Path(place.anchor)
            new = {path for path in start.glob(str(place.relative_to(start))) if path.is_file()}
        if not new:
            raise CorpusError(
                f"{what}: {pattern!r} matches no file; expected {', '.join(FORMATS)}, "
                f"each also {', '.join(COMPRESSIONS)}"
            )
        for path in new:
            if CONTROL.search(str(path)):
                raise CorpusError(f"{path}: its name holds what is no text, and is recorded; rename it")
            if not _is_supported(path):
                raise CorpusError(
                    f"{path}: not a format that is read here; expected {', '.join(FORMATS)}, "
                    f"each also {', '.join(COMPRESSIONS)}"
                )
        found |= {path.resolve() for path in new}
    return found


def _is_supported(path: Path) -> bool:
    return path.name.endswith(tuple(form + ending for form in FORMATS for ending in ("", *COMPRESSIONS)))


def digest(path: Path) -> str:
    """sha256 of a file; computed once per process for each size and time of change."""
    status = path.stat()
    return _digest(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: str, _size: int, _mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what a file says -------------------------------------------------------------------------------------


def open_bytes(path: Path) -> BinaryIO:
    """A file as plain bytes, whatever its compression; reading raises CorpusError if it outgrows all text."""
    if path.suffix not in COMPRESSIONS:
        return path.open("rb")
    return io.BufferedReader(_Bounded(_OPEN[path.suffix](path), path), 1 << 18)


def _open_zst(path: Path) -> Any:
    import pyarrow as pa  # zstandard's own reader takes a truncated file for a whole one

    return pa.input_stream(str(path), compression="zstd")


_OPEN: Mapping[str, Callable[[Path], Any]] = {".xz": lzma.open, ".gz": gzip.open, ".zst": _open_zst}


def growth_limit(path: Path) -> int:
    """Bytes of text that a file may hold, by its size on the disk."""
    return max(FREE_BYTES, GROWTH * path.stat().st_size)


class _Bounded(io.RawIOBase):
    """The plain bytes of a compressed file, up to what a file of its size may hold."""

    def __init__(self, source: BinaryIO, path: Path) -> None:
        self._source, self._path, self._left = source, path, growth_limit(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            size = self._path.stat().st_size
            raise CorpusError(
                f"{self._path}: its {size:,} bytes grow to more than {growth_limit(self._path):,}, as no "
                f"text does (at most {GROWTH} times); if it is meant, decompress it and name the plain file"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()


def open_text(path: Path) -> io.TextIOWrapper:
    """A file as UTF-8 text; lines end with a line feed and nothing is translated."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="\n")


def _lines(file: io.TextIOWrapper, path: Path) -> Iterator[tuple[int, str]]:
    number = 1
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise CorpusError(
                f"{path}:{number}: a line of more than {LONGEST:,} characters; cut its text into documents"
            )
        yield number, line
        number += 1


def _cut(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the documents of a .txt file; joined they are the file."""
    number, length, lines = 0, 0, list[str]()
    with open_text(path) as file:
        while line := file.readline(_TXT_LONGEST):
            lines.append(line)
            length += len(line)
            if (length >= TXT_CHARACTERS and not line.strip()) or length >= _TXT_LONGEST:
                yield number, "".join(lines)
                number, length, lines = number + 1, 0, []
    yield number, "".join(lines)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as err:
        raise CorpusError(f"{path}: not UTF-8 ({err.reason} near byte {err.start:,}); convert it") from err
    except (EOFError, lzma.LZMAError, zlib.error) as err:
        raise CorpusError(f"{path}: broken compression ({err}); get the file again") from err
    except OSError as err:
        reason = err.strerror or str(err)
        raise CorpusError(f"{path}: cannot be read ({reason}); every node must see the file") from err
