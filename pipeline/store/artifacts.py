"""Named artifacts: address, require, build in attempts, publish, verify.

    <store>/<kind>/<name>-<fp8>/<attempt>/…      the payload of one attempt
    <store>/<kind>/<name>-<fp8>/record.json      put last; names its attempt; no record = not there

The address follows from the identity alone, so it is known before anything is built. Publishing is atomic and
idempotent: payload first, record last; until then whatever stood there before stays. No locks: two writers of
a deterministic artifact write the same bytes.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError
from pipeline.store.copies import side_by_side
from pipeline.store.location import Location, Promise
from pipeline.store.objects import READERS, READS, StoreAccessError
from pipeline.store.provenance import provenance
from pipeline.store.records import KINDS, FileInfo, InputRef, Record

BUILT_BY = {
    **dict.fromkeys(("corpus", "tokenizer", "tokens"), "prepare"),
    **dict.fromkeys(("teacher", "stats", "init"), "compress"),
    "run": "train",
    "model": "export",
    "scores": "eval",
    "speed": "speed",
    "sweep": "sweep",
}


@dataclass(frozen=True)
class Identity:
    """Everything that decides the content of an artifact, and nothing else."""

    kind: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, "Identity"] = field(default_factory=dict)
    version: int = 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of kind, producer version, identity fields and the fingerprints of the inputs."""
        body = {
            "kind": self.kind,
            "version": self.version,
            "config": self.config,
            "inputs": {role: identity.fingerprint for role, identity in self.inputs.items()},
        }
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def address(self) -> str:
        """`kind/name-fp8`."""
        return f"{self.kind}/{self.name}-{self.fingerprint[:8]}"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact: its record and where its payload lies, which is never read but as recorded."""

    record: Record
    location: Location

    def path(self, name: str) -> Path:
        """One payload file as a local path; raises StoreError if the artifact has no such file."""
        self.require(name)
        return self.location.local(name)

    def paths(self, names: Iterable[str]) -> list[Path]:
        """As `path`, of several files at once."""
        return side_by_side(self.path, names)

    def require(self, name: str) -> None:
        """Raise StoreError if the artifact has no such file."""
        if name not in self.record.files:
            raise StoreError(
                f"{self.record.address} holds no file {name!r}; it has {', '.join(self.record.files)}"
            )

    def folder(self, prefix: str = "", *, only: Collection[str] = ()) -> Path:
        """The payload, the part below `prefix`, or its files `only`, as a local folder."""
        return self.location.local_folder(prefix, only=only)

    def verify(self) -> None:
        """Hash every file again, in the store; raises StoreError naming the first that is not as recorded."""
        files = self.record.files
        found_all = side_by_side(lambda name: self.location.settled_sha256(name, files[name].sha256), files)
        for (name, info), found in zip(files.items(), found_all, strict=True):
            if found != info.sha256:
                raise StoreError(
                    f"{self.record.address}/{name}: sha256 {found[:12]}…, record says {info.sha256[:12]}…; "
                    f"the file was changed: {remedy(self.record.kind)}"
                )


def remedy(kind: str) -> str:
    """What makes an artifact of a kind again."""
    return f"rebuild with `krony {BUILT_BY.get(kind, 'run')} … --force`"


def _artifact(record: Record, attempts: Location) -> Artifact:
    """The artifact of a record below `attempts`; what is read of its payload is held against the record."""
    promise = Promise({key: info.sha256 for key, info in record.files.items()}, remedy(record.kind))
    return Artifact(record, replace(attempts.child(record.attempt), promise=promise))


@dataclass(slots=True)
class Attempt:
    """One try at an artifact: what lies in `location` becomes real when `publish` puts the record."""

    identity: Identity
    store: "Store"
    name: str
    location: Location
    started: str
    artifact: Artifact | None = None

    def publish(
        self,
        *,
        metrics: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        written: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Digest the payload, put the record, and return the finished artifact.

        `written` holds the sha256 of files as their writers knew them: one that is something else by now is
        removed and named by a StoreError, and a rerun makes it again.
        """
        files, sizes, known = {}, self.location.sizes(), written or {}
        digests = side_by_side(lambda key: self.location.settled_sha256(key, known.get(key, "")), sizes)
        for (key, size), digest in zip(sizes.items(), digests, strict=True):
            expected = known.get(key, "")
            if expected and digest != expected:
                self.location.delete(key)
                raise StoreError(
                    f"{self.location.uri}/{key}: changed since it was written, and removed; the same "
                    "command makes it again"
                )
            files[key] = FileInfo(bytes=size, sha256=digest)
        if not files:
            raise StoreError(f"{self.identity.address}: nothing was written, so there is nothing to publish")
        inputs = {}
        for role, identity in self.identity.inputs.items():
            found = self.store.find(identity)
            inputs[role] = InputRef(address=identity.address, digest=found.record.digest if found else "")
        record = Record(
            kind=self.identity.kind,
            name=self.identity.name,
            fingerprint=self.identity.fingerprint,
            attempt=self.name,
            config=dict(self.identity.config),
            inputs=inputs,
            files=files,
            metrics=dict(metrics),
            settings=dict(settings or {}),
            provenance=provenance(),
            started=self.started,
            finished=_now(),
        )
        self.store.root.child(self.identity.address).put_bytes("record.json", record.to_json())
        self.artifact = _artifact(record, self.store.root.child(self.identity.address))
        return self.artifact


class Store:
    """All artifacts below one URI."""

    def __init__(self, uri: str | Path) -> None:
        """Open a store; nothing is created before the first attempt."""
        self.root = Location.of(uri)

    def find(self, identity: Identity) -> Artifact | None:
        """The finished artifact of this identity, or None. Raises StoreError if it is damaged."""
        return self._read(identity.address, fingerprint=identity.fingerprint)

    def require(self, identity: Identity) -> Artifact:
        """The finished artifact of this identity; raises StoreError with the command that builds it."""
        artifact = self.find(identity)
        if artifact is None:
            raise StoreError(
                f"{self.root.uri}: {identity.address} is not there; build it with "
                f"`krony {BUILT_BY[identity.kind]} …` and the same configuration"
            )
        return artifact

    def open(self, address: str) -> Artifact:
        """The finished artifact at an address as people write it; raises StoreError if there is none."""
        artifact = self._read(address.strip("/"), fingerprint="")
        if artifact is None:
            near = (
                [r.address for r in self.records(address.split("/", maxsplit=1)[0])]
                if address.split("/", maxsplit=1)[0] in KINDS
                else []
            )
            raise StoreError(
                f"{self.root.uri}: no artifact {address!r}; there are: {', '.join(near) or 'none'}"
            )
        return artifact

    def records(self, kind: str | None = None) -> list[Record]:
        """All records, or those of one kind, sorted by address. A damaged one raises StoreError."""
        found = []
        for each in KINDS if kind is None else (kind,):
            for _, record in self.scan(each):
                if isinstance(record, StoreError):
                    raise record
                if record:
                    found.append(record)
        return found

    def scan(self, kind: str) -> list[tuple[str, Record | StoreError | None]]:
        """Every address of a kind with its record, the error of a damaged one, or None where only begun.

        From an object store many are read at once: there a record takes as long as a page of them.
        """

        def look(name: str) -> tuple[str, Record | StoreError | None]:
            try:
                return f"{kind}/{name}", self._at_home(self.record(f"{kind}/{name}"), f"{kind}/{name}")
            except FileNotFoundError:
                return f"{kind}/{name}", None
            except StoreError as err:
                if isinstance(err, StoreAccessError) and not self.root.is_local:
                    raise  # it is not this one: nothing can be had
                return f"{kind}/{name}", err

        names = self.root.folders(kind)
        if self.root.is_local or not names:
            return [look(name) for name in names]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(look, names))

    def record(self, address: str) -> Record:
        """The record at an address; FileNotFoundError without one, StoreError if it is damaged.

        From an object store it is read again before it counts as damaged.
        """
        key = f"{address}/record.json"
        for tries_left in reversed(range(1 if self.root.is_local else READS)):
            data = self.root.read_bytes(key)
            try:
                return Record.from_json(data, where=f"{self.root.uri}/{key}")
            except StoreError:
                if not tries_left:
                    raise
        raise AssertionError

    def unfinished(self) -> list[str]:
        """Attempts that no record names: `address/attempt`."""
        lost = []
        for kind in KINDS:
            for name in self.root.folders(kind):
                address = f"{kind}/{name}"
                artifact = self._read(address, fingerprint="", check_files=False)
                named = artifact.record.attempt if artifact else None
                lost += [f"{address}/{attempt}" for attempt in self.root.folders(address) if attempt != named]
        return lost

    @contextmanager
    def attempt(self, identity: Identity, *, resume: bool = False, force: bool = False) -> Iterator[Attempt]:
        """Build an artifact: put files into `attempt.location`, then `attempt.publish(...)`.

        `resume` goes on in the newest unfinished attempt (for the kinds that can); without it every try has a
        folder of its own. `force` opens the next number even where an unfinished or a finished one stands.
        """
        base = self.root.child(identity.address)
        numbers = [int(name.split("-")[0]) for name in base.folders() if name.split("-")[0].isdecimal()]
        newest = max(numbers, default=0)
        done = self._read(identity.address, fingerprint=identity.fingerprint, check_files=False)
        if resume:
            taken = bool(done) and done is not None and done.record.attempt == str(newest)
            name = str(newest if newest and not force and not taken else newest + 1)
        else:
            name = f"{newest + 1}-{uuid.uuid4().hex[:6]}"
        yield Attempt(identity, self, name, base.child(name), _now())

    def _read(self, address: str, *, fingerprint: str, check_files: bool = True) -> Artifact | None:
        try:
            record = self.record(address)
        except FileNotFoundError:
            return None
        if fingerprint and record.fingerprint != fingerprint:
            raise StoreError(
                f"{self.root.uri}/{address}/record.json: fingerprint {record.fingerprint[:16]}…, "
                f"expected {fingerprint[:16]}…; it belongs to another config: use another --store or --force"
            )
        self._at_home(record, address)
        artifact = _artifact(record, self.root.child(address))
        if check_files:
            self._check_sizes(artifact)
        return artifact

    def _at_home(self, record: Record, address: str) -> Record:
        if record.address != address:
            where = f"{self.root.uri}/{address}/record.json"
            raise StoreError(f"{where}: says it is {record.address}; the folder was renamed: move it back")
        return record

    def _check_sizes(self, artifact: Artifact) -> None:
        record, location = artifact.record, artifact.location
        sizes = {} if location.is_local else location.sizes()  # there one request tells a thousand
        for key, info in record.files.items():
            found = sizes[key] if key in sizes else self._size(location, key, record)
            if found != info.bytes:
                raise StoreError(
                    f"{record.address}/{key}: {found:,} bytes, record says {info.bytes:,}; "
                    f"{remedy(record.kind)}"
                )

    def _size(self, location: Location, key: str, record: Record) -> int:
        for delay_s in (0.0, 0.5) if location.is_local else (0.0, 0.5, 1.5):
            time.sleep(delay_s)  # a network file system may show a file late
            with suppress(FileNotFoundError):
                return location.size(key)
        raise StoreError(f"{record.address}/{key}: file is missing; {remedy(record.kind)}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
