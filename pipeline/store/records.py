"""The record: the JSON that makes an artifact real.

An artifact exists when its record exists. The record is put last, names the attempt that holds the payload,
and carries the digest of every file, the identity it was built from, what went in, what was measured, and how
to do it again.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from pipeline.errors import StoreError

Kind = Literal[
    "corpus", "tokenizer", "tokens", "teacher", "stats", "init", "run", "model", "scores", "speed", "sweep"
]
KINDS: tuple[str, ...] = get_args(Kind)
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One payload file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class InputRef:
    """An artifact that went in: its address, and the digest of its payload at that time."""

    address: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is known about one finished artifact."""

    kind: str
    name: str
    fingerprint: str
    attempt: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, InputRef] = field(default_factory=dict)
    files: Mapping[str, FileInfo] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    schema: int = SCHEMA

    @property
    def address(self) -> str:
        """`kind/name-fp8`: where it lies in its store."""
        return f"{self.kind}/{self.name}-{self.fingerprint[:8]}"

    @property
    def digest(self) -> str:
        """One digest over all payload files."""
        lines = "".join(f"{key} {info.sha256}\n" for key, info in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def to_json(self) -> bytes:
        """Readable JSON, stable in its order."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, *, where: str) -> "Record":
        """Read a record; raises StoreError, with `where`, for anything that is not one."""
        try:
            raw = json.loads(data)
            schema = raw["schema"]
            if schema != SCHEMA:
                raise StoreError(
                    f"{where}: record schema {schema}, this version reads {SCHEMA}; use a matching krony"
                )
            files = {key: FileInfo(**info) for key, info in raw.pop("files").items()}
            inputs = {key: InputRef(**ref) for key, ref in raw.pop("inputs").items()}
            return Record(files=files, inputs=inputs, **raw)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise StoreError(
                f"{where}: not a krony record ({err}); rebuild the artifact with --force"
            ) from err
