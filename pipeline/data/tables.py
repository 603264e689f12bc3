"""A stored corpus: parquet files of documents and one manifest that knows their row groups.

Rows are addressed by file and position. The manifest carries documents and bytes of text per row group, so
that shards are planned and ranges are read without touching anything else. The files are the payload of the
corpus (columns `id`, `text`, `source`), or stay where they are: in a folder or on the hub, known by digest.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from model.decode import decode, parse_json
from pipeline.data.documents import CorpusError, Document, Side
from pipeline.data.files import LONGEST, growth_limit
from pipeline.errors import StoreError
from pipeline.store.copies import sha256_file
from pipeline.store.location import Location, checked_key

FILE = "corpus.json"
FORMAT = 1
GROUP_BYTES = 1 << 18
GROUP_DOCUMENTS = 1000
GROUP_MEMORY = 1 << 30
"""Bytes of text that are read at once at most, whatever a row group says of itself."""
FILE_BYTES = 256 << 20
"""Text per parquet file; what a task copies to its node when the store is remote."""

_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string())])


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFile:
    """One parquet file of documents."""

    name: str
    """Key in the payload, or path within the folder or hub repository."""

    size_bytes: int
    sha256: str

    groups: tuple[tuple[int, int], ...]
    """Documents and bytes of text of each row group, in order."""

    side: Side = ""
    """Side of the split that all of its documents are on."""

    @property
    def documents(self) -> int:
        """Rows."""
        return sum(rows for rows, _ in self.groups)

    @property
    def text_bytes(self) -> int:
        """Bytes of text; for files that we did not write, as parquet reports them."""
        return sum(size for _, size in self.groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The files of a corpus in their order, and where they are."""

    files: tuple[TextFile, ...]

    place: Literal["payload", "folder", "hub"] = "payload"
    """The artifact itself, a folder `root`, or the hub repository `root` at `revision`."""

    root: str = ""
    revision: str = ""
    text_column: str = "text"

    @property
    def documents(self) -> int:
        """Documents in all files."""
        return sum(file.documents for file in self.files)

    @property
    def text_bytes(self) -> int:
        """Bytes of text in all files."""
        return sum(file.text_bytes for file in self.files)

    @property
    def has_ids(self) -> bool:
        """Whether ids are stored, so that nobody has to read text to know them."""
        return self.place == "payload"

    def to_json(self) -> bytes:
        """The manifest as a file; equal manifests give equal bytes."""
        return (json.dumps({"format": FORMAT, **asdict(self)}) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, *, where: str) -> "Manifest":
        """Read a manifest; raises CorpusError, with `where`, for anything that is not one."""
        try:
            raw: dict[str, Any] = parse_json(data)
            if (found := raw.pop("format")) != FORMAT:
                raise CorpusError(
                    f"{where}: corpus format {found}, this reads {FORMAT}; use a matching krony"
                )
            manifest: Manifest = decode(Manifest, raw, "corpus")
            for file in manifest.files:
                checked_key(file.name)
            return manifest
        except (ValueError, TypeError, KeyError, AttributeError, StoreError) as err:
            raise CorpusError(f"{where}: not a corpus ({err}); run `krony prepare … --force`") from err


# --- write ------------------------------------------------------------------------------------------------


def write_documents(
    documents: Iterable[Document],
    *,
    scratch: Path,
    location: Location,
    stem: str,
    side: Side = "",
    limit_bytes: int = 0,
) -> list[TextFile]:
    """Put documents as `<stem>-000.parquet`, `-001`, … and say what is in them; holds one row group.

    Stops after the first document that reaches `limit_bytes` of text; 0 takes all.
    """
    files: list[TextFile] = []
    groups = _grouped(documents, limit_bytes)
    group = next(groups, None)
    while group is not None:
        name = f"{stem}-{len(files):03d}.parquet"
        path = scratch / name
        counts: list[tuple[int, int]] = []
        with pq.ParquetWriter(path, _SCHEMA, compression="zstd", use_dictionary=False) as writer:
            while group is not None and sum(size for _, size in counts) < FILE_BYTES:
                rows, size = group
                columns = [[getattr(row, name) for row in rows] for name in _SCHEMA.names]
                writer.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=len(rows))
                counts.append((len(rows), size))
                group = next(groups, None)
        files.append(
            TextFile(
                name=name,
                size_bytes=path.stat().st_size,
                sha256=sha256_file(path),
                groups=tuple(counts),
                side=side,
            )
        )
        location.put_file(name, path, move=True)
    return files


def _grouped(documents: Iterable[Document], limit_bytes: int) -> Iterator[tuple[list[Document], int]]:
    rows: list[Document] = []
    size = total = 0
    for document in documents:
        rows.append(document)
        size += len(document.text.encode())
        reached = bool(limit_bytes) and total + size >= limit_bytes
        if reached or size >= GROUP_BYTES or len(rows) >= GROUP_DOCUMENTS:
            yield rows, size
            total, rows, size = total + size, [], 0
        if reached:
            return
    if rows:
        yield rows, size


# --- read -------------------------------------------------------------------------------------------------


def row_count(path: Path, *, name: str, text_column: str) -> int:
    """Documents of a parquet file of anybody; raises CorpusError as `row_groups`.

    Looks at no column chunk: pyarrow ends the whole process at some damaged ones.
    """
    return sum(rows for rows, _ in _footer(path, name=name, text_column=text_column, with_sizes=False))


def row_groups(file: Any, *, name: str, text_column: str) -> tuple[tuple[int, int], ...]:
    """Documents and bytes of text of each row group, from the footer of a parquet file, open or by path.

    Raises CorpusError, with `name`, if it has no such column or is no parquet file.
    """
    return tuple(_footer(file, name=name, text_column=text_column, with_sizes=True))


def _footer(file: Any, *, name: str, text_column: str, with_sizes: bool) -> Iterator[tuple[int, int]]:
    """Rows of each row group and, if asked, bytes of its text."""
    try:
        with pq.ParquetFile(file) as reader:
            metadata = reader.metadata
    except (OSError, pa.ArrowException) as err:
        raise CorpusError(f"{name}: not a readable parquet file ({err}); get it again") from err
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if text_column not in names:
        raise CorpusError(
            f"{name}: no column {text_column!r}; it has {', '.join(names)}: set corpus.text_field"
        )
    at = names.index(text_column)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        yield group.num_rows, group.column(at).total_uncompressed_size if with_sizes else 0


def read_rows(
    path: Path, columns: Sequence[str], *, start: int = 0, stop: int, name: str = ""
) -> Iterator[tuple[Any, ...]]:
    """Rows `[start, stop)` of a parquet file as tuples of text `columns`; touches only their row groups.

    Memory: the compressed column of one row group and at most 256 rows. Raises CorpusError, with `name` or
    the path, if the file is damaged, has no text there, or holds more of it than a file of its size can mean.
    """
    where, left = name or str(path), growth_limit(path)
    for row in _rows(path, columns, start=start, stop=stop, where=where):
        longest = max((len(value) for value in row if value is not None), default=0)
        left -= longest
        if longest > LONGEST or left < 0:
            raise CorpusError(
                f"{where}: a document of {longest:,} characters, at most {LONGEST:,} are read; or a file of "
                f"{path.stat().st_size:,} bytes grows to more than {growth_limit(path):,}: cut the text"
            )
        yield row


def _rows(
    path: Path, columns: Sequence[str], *, start: int, stop: int, where: str
) -> Iterator[tuple[Any, ...]]:
    try:
        with pq.ParquetFile(path) as reader:
            for column in columns:
                kind = reader.schema_arrow.field(column).type
                plain = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not (pa.types.is_string(plain) or pa.types.is_large_string(plain)):
                    raise CorpusError(f"{where}: column {column!r} is {kind}, expected text")
            at = 0
            for group in range(reader.metadata.num_row_groups):
                first, at = at, at + reader.metadata.row_group(group).num_rows
                if at <= start or first >= stop:
                    continue
                # A value may stand in many rows and be stored once, so it is the group that bounds a row.
                size = max(1, reader.metadata.row_group(group).total_byte_size)
                at_once = max(1, min(256, GROUP_MEMORY // size))
                for batch in reader.iter_batches(at_once, row_groups=[group], columns=list(columns)):
                    low, high = max(start - first, 0), min(stop - first, len(batch))
                    first += len(batch)
                    if low < high:
                        part = batch.slice(low, high - low)
                        yield from zip(*(part.column(name).to_pylist() for name in columns), strict=True)
    except UnicodeDecodeError as err:
        raise CorpusError(f"{where}: not UTF-8 ({err.reason}); convert it") from err
    except (OSError, KeyError, pa.ArrowException) as err:
        raise CorpusError(f"{where}: not a readable parquet file ({err}); get it again") from err
