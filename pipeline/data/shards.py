"""The shard format: 256 int32 of header (magic 20240520, version 1, token count), then the tokens as uint16.

It is llm.c's, so other trainers read it too. A shard is written beside its place and appears whole; beside it
lies a sidecar that says what is in it. A reader checks magic, version and size before it trusts a token.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from model.decode import decode, parse_json
from pipeline.errors import DataError
from pipeline.store.copies import sha256_file

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MAX_TOKENS = 2**31 - 1
"""Tokens that the int32 of the header can count."""

Tokens = npt.NDArray[np.uint16]


class ShardError(DataError):
    """A shard or its sidecar is missing, cut short or not what it says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """What is in one shard: `train-00000.json` beside `train-00000.bin`."""

    shard: str
    """Name without the ending."""

    plan: str
    """Digest of the shard plan it was made by."""

    tokens: int
    """Tokens, ends of documents included."""

    documents: int
    """Documents; each ends with one end-of-text token."""

    text_bytes: int
    """UTF-8 bytes of their text."""

    sha256: str
    """Digest of the whole file, header included."""

    source: tuple[tuple[str, int, int], ...]
    """Where the documents were taken from: file, first row, row after the last."""

    def to_json(self) -> bytes:
        """Readable JSON, stable in its order."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, *, where: str) -> "Sidecar":
        """Read a sidecar; raises ShardError, with `where`, for anything that is not one."""
        try:
            sidecar: Sidecar = decode(Sidecar, parse_json(data), "sidecar")
            return sidecar
        except ValueError as err:
            raise ShardError(f"{where}: not a sidecar ({err}); run `krony prepare … --force`") from err


class ShardWriter:
    """Writes a shard document by document; nothing is gathered in memory.

    `path` is a scratch file: it is a shard after the `with` block, and the caller publishes it.
    """

    def __init__(self, path: Path) -> None:
        """Open the scratch file."""
        self.tokens = 0
        self.documents = 0
        self._path = path
        self._file = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def add(self, tokens: npt.NDArray[np.integer]) -> None:
        """Append one document; raises ShardError for a token that is no uint16, before it is written."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= 0xFFFF:
            raise ShardError(
                f"{self._path.name}: token {int(tokens.max()):,} does not fit into 16 bits; "
                "expected a vocabulary of at most 65,536"
            )
        self._file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
        self.tokens += len(tokens)
        self.documents += 1

    def __enter__(self) -> Self:
        """Ready to be added to."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Complete the header; after an error the file stays without one and is no shard."""
        with self._file:
            if kind is None:
                if self.tokens > MAX_TOKENS:
                    raise ShardError(
                        f"{self._path.name}: {self.tokens:,} tokens, a shard holds {MAX_TOKENS:,}"
                    )
                self._file.seek(0)
                self._file.write(_header(self.tokens))


def open_shard(path: Path) -> Tokens:
    """The tokens of a shard as a read-only memory map. Raises ShardError if the file is not a whole shard."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
    except FileNotFoundError:
        raise ShardError(f"{path}: shard is missing; run `krony prepare … --force`") from None
    except OSError as err:
        raise ShardError(f"{path}: cannot be read ({err.strerror or err}); check the place") from err
    except ValueError:
        header = np.zeros(0, dtype="<i4")
    if len(header) < 256 or header[0] != MAGIC:
        found = f"magic {header[0]}" if len(header) else f"{size:,} bytes"
        raise ShardError(
            f"{path}: not a token shard ({found}, expected magic {MAGIC}); run `krony prepare … --force`"
        )
    if header[1] != VERSION:
        raise ShardError(f"{path}: shard version {header[1]}, this reads {VERSION}; use a matching krony")
    promised, held = int(header[2]), (size - HEADER_BYTES) / TOKEN_BYTES
    if promised != held:
        raise ShardError(
            f"{path}: header promises {promised:,} tokens, the file holds {held:,.10g}; "
            "it was cut short or overwritten: run `krony prepare … --force`"
        )
    if promised == 0:
        return np.zeros(0, dtype="<u2")  # an empty region cannot be mapped
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(promised,))


def check_shard(path: Path, sidecar: Sidecar) -> Tokens:
    """`open_shard`, held against its sidecar: count and digest. Raises ShardError naming what differs."""
    tokens = open_shard(path)
    if len(tokens) != sidecar.tokens:
        raise ShardError(f"{path}: {len(tokens):,} tokens, its sidecar says {sidecar.tokens:,}")
    if (found := sha256_file(path)) != sidecar.sha256:
        raise ShardError(
            f"{path}: sha256 {found[:12]}…, its sidecar says {sidecar.sha256[:12]}…; "
            "the file was changed: run `krony prepare … --force`"
        )
    return tokens


def _header(tokens: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()
