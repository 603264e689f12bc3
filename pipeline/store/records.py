"""The record: the JSON that makes an artifact real.

An artifact exists when its record exists. The record is put last, names the attempt that holds the payload,
and carries the digest of every file, the identity it was built from, what went in, what was measured, and how
to do it again. A store may be somebody else's: what a record names lies inside its artifact, or it is no
record.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from model.decode import decode, parse_json
from pipeline.errors import CONTROL, StoreError
from pipeline.store.location import checked_key

Kind = Literal[
    "corpus", "tokenizer", "tokens", "teacher", "stats", "init", "run", "model", "scores", "speed", "sweep"
]
KINDS: tuple[str, ...] = get_args(Kind)
SCHEMA = 1
DEEPEST = 64
"""Levels of objects and lists within each other that a record may have."""

_WORD = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f]{1,246}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
        """Readable JSON, stable in its order; `seal` is a digest of all the rest."""
        raw = json.loads(json.dumps(asdict(self), allow_nan=False))
        return (json.dumps({**raw, "seal": _seal(raw)}, indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, *, where: str) -> "Record":
        """Read a record; raises StoreError, with `where`, for anything that is not one."""
        try:
            raw = parse_json(data)
            schema = raw["schema"]
            if schema != SCHEMA:
                raise StoreError(
                    f"{where}: record schema {schema}, this version reads {SCHEMA}; use a matching krony"
                )
            seal = raw.pop("seal", None)  # records of earlier versions have none
            if seal is not None and seal != _seal(raw):
                raise StoreError(f"{where}: damaged, its seal is broken; rebuild the artifact with --force")
            files = {key: decode(FileInfo, info, f"files[{key!r}]") for key, info in raw.pop("files").items()}
            inputs = {
                key: decode(InputRef, ref, f"inputs[{key!r}]") for key, ref in raw.pop("inputs").items()
            }
            record = Record(files=files, inputs=inputs, **raw)
            _require_sound(record)
            return record
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise StoreError(
                f"{where}: not a krony record ({err}); rebuild the artifact with --force"
            ) from err


def _seal(raw: Mapping[str, Any]) -> str:
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _require_sound(record: Record) -> None:
    """Raise ValueError for a field of another type, and for a name that leads out of the artifact."""
    for name in ("kind", "name", "fingerprint", "attempt", "started", "finished"):
        decode(str, getattr(record, name), name)
    for name in ("config", "metrics", "settings", "provenance"):
        _require_shallow(decode(dict, getattr(record, name), name), name, DEEPEST)
    if record.kind not in KINDS:
        raise ValueError(f"kind is {record.kind!r}, expected one of {', '.join(KINDS)}")
    for name in ("name", "attempt"):
        if not _WORD.fullmatch(value := getattr(record, name)) or CONTROL.search(value):
            raise ValueError(f"{name} is {value!r}, expected a word without '/'")
    sizes = {key: info.bytes for key, info in record.files.items()}
    for key in (*sizes, *(ref.address for ref in record.inputs.values())):
        _require_inside(key)
        _require_shallow(key, "a name", 1)
    if any(size < 0 for size in sizes.values()):
        raise ValueError("a file has less than no bytes")
    digests = [record.fingerprint, *(info.sha256 for info in record.files.values())]
    digests += [ref.digest for ref in record.inputs.values() if ref.digest]
    for digest in digests:  # copies of remote files lie under theirs
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{digest!r:.80} is no digest; expected 64 hex digits")


def _require_inside(key: str) -> None:
    try:
        checked_key(key)
    except StoreError as err:
        raise ValueError(str(err)) from err


def _require_shallow(value: Any, where: str, left: int) -> None:
    if left == 0:
        raise ValueError(f"{where} is nested more than {DEEPEST} times")
    if isinstance(value, str) and CONTROL.search(value):
        raise ValueError(f"{where} holds control characters")
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    for each in parts if isinstance(parts, list) else ():
        _require_shallow(each, where, left - 1)
