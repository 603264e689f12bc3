"""Object stores through pyarrow: patient with a busy server, and an object is whole, as meant, or not there.

Endpoint, region and credentials of `s3://` come from the environment (`AWS_ENDPOINT_URL`, `AWS_REGION`, …),
as for every other tool of that world. Nothing of it stands in a URI, because URIs are recorded.

Three things that pyarrow does not do. Its streams complete an upload when they are closed, also after an
error: so nothing may raise between opening and closing one. Nobody looks whether what was stored is what was
sent: so every upload is read again. And not every trouble is waited for, neither an error in place of fewer
bytes than it has itself, nor one of a code that is not Amazon's: so we wait on top of it.
"""

import hashlib
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import ConfigError, StoreError

ATTEMPTS = 6
"""Tries before a server counts as gone, about half a minute in all; AWS_MAX_ATTEMPTS sets another number."""

SDK_ATTEMPTS = 3
"""Tries that pyarrow makes within each of ours, where it knows the error."""

LONGEST_WAIT_S = 16.0

CONNECT_S = 5.0
SILENCE_S = 20.0
"""Seconds without a byte after which a request is tried again."""

READS = 3
"""Times that something is sent or read before bytes that are not the promised ones are an error."""

READERS = 16
"""Small objects that are read at once."""

_LASTING = re.compile(
    "AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES)"
)
"""What no patience mends."""

_BLOCK = 8 << 20
_AHEAD = 64 << 20
"""Bytes that may be on their way at once: pyarrow keeps a copy of all that is not yet acknowledged."""

T = TypeVar("T")


class StoreAccessError(StoreError):
    """A store that cannot be reached, read or written just now; what it holds is as it was."""

    exit_code = 3


def checked_uri(uri: str) -> str:
    """`uri` without a slash at its end; ConfigError for an `s3://` that holds more than bucket and prefix."""
    parts = urlsplit(uri)
    if parts.scheme == "s3" and ("@" in parts.netloc or parts.query or parts.fragment or not parts.netloc):
        raise ConfigError(
            f"store 's3://{parts.hostname or ''}{parts.path}' is more or less than s3://bucket/prefix; "
            "credentials and endpoint belong into the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_REGION, AWS_ENDPOINT_URL"
        )
    return uri.rstrip("/")


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI, and the path on it. Raises StoreAccessError if it cannot be opened."""
    parts = urlsplit(uri)
    try:
        if parts.scheme != "s3":
            filesystem, path = pafs.FileSystem.from_uri(uri)
            return filesystem, path.rstrip("/")
        environment = os.environ.get
        endpoint = environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL") or ""
        region = environment("AWS_REGION") or environment("AWS_DEFAULT_REGION") or ""
        return _bucket(parts.netloc, endpoint, region), f"{parts.netloc}{parts.path}".rstrip("/")
    except (ValueError, OSError) as err:
        raise StoreAccessError(
            f"store {uri!r} cannot be opened ({err}); expected a path or s3://bucket/prefix"
        ) from err


@lru_cache(maxsize=16)
def _bucket(bucket: str, endpoint: str, region: str) -> pafs.FileSystem:
    place = urlsplit(endpoint)
    where = {"endpoint_override": place.netloc, "scheme": place.scheme} if endpoint else {}
    return pafs.S3FileSystem(
        region=region or ("us-east-1" if endpoint else pafs.resolve_s3_region(bucket)),
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=SDK_ATTEMPTS),
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        allow_delayed_open=True,  # what is small is one PUT
        **where,
    )


# --- whole or not there -----------------------------------------------------------------------------------


def upload(filesystem: pafs.FileSystem, path: str, data: pa.Buffer, *, where: str) -> str:
    """Put `data` at `path`, read it again, return its sha256; StoreAccessError if that is not the same."""
    expected = hashlib.sha256(data).hexdigest()
    for _ in range(READS):
        _uninterrupted(lambda: patiently(lambda: _send(filesystem, path, data)))
        found = digest(filesystem, path, where=where)
        if found == expected:
            return expected
    raise StoreAccessError(
        f"{where}: {found[:12]}… is stored where {expected[:12]}… was sent, {READS} times; does somebody "
        "else write there? If not, the network or the server is damaged: run again, or choose another --store"
    )


def _send(filesystem: pafs.FileSystem, path: str, data: pa.Buffer) -> None:
    stream = filesystem.open_output_stream(path, compression=None)
    for start in range(0, data.size, _AHEAD):
        if start:
            stream.flush()  # waits; after an error of the server closing fails too, and nothing appears
        stream.write(data.slice(start, min(_AHEAD, data.size - start)))
    stream.close()


def _uninterrupted(work: Callable[[], T]) -> T:
    """`work` in a thread of its own: Ctrl-C raises here, after it, and not between its lines."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def digest(filesystem: pafs.FileSystem, path: str, *, where: str) -> str:
    """sha256 of an object as it is stored, read in blocks; FileNotFoundError if there is none."""
    total = hashlib.sha256()
    for block in blocks(filesystem, path, where=where):
        total.update(block)
    return total.hexdigest()


def blocks(filesystem: pafs.FileSystem, path: str, *, where: str) -> Iterator[bytes]:
    """The bytes of an object; FileNotFoundError if there is none, StoreAccessError if not all can be had."""
    with reading(where), patiently(lambda: filesystem.open_input_file(path)) as file:
        for start in range(0, size := file.size(), _BLOCK):
            yield patiently(partial(_read, file, start, min(_BLOCK, size - start)))


def _read(file: pa.NativeFile, start: int, count: int) -> bytes:
    block: bytes = file.read_at(count, start)
    if len(block) != count:
        raise OSError(f"{len(block):,} of {count:,} bytes arrived")
    return block


def patiently(work: Callable[[], T]) -> T:
    """`work`, again after a while if the server is in trouble; the last error if that lasts."""
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS") or ATTEMPTS)
    for number in itertools.count(1):
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError as err:
            if number >= attempts or _LASTING.search(str(err)):
                raise
            time.sleep(random.uniform(0.5, 1.0) * min(2.0 ** (number - 1), LONGEST_WAIT_S))  # noqa: S311
    raise AssertionError


@contextmanager
def reading(where: str) -> Iterator[None]:
    """A server that cannot be read is one line; a missing object stays a FileNotFoundError, by our name."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as err:
        raise FileNotFoundError(where) from err
    except OSError as err:
        raise StoreAccessError(f"{where}: cannot be read ({err.strerror or err}); check the place") from err


@contextmanager
def writing(where: str) -> Iterator[None]:
    """A place that cannot be written is one line."""
    try:
        yield
    except OSError as err:
        raise StoreAccessError(
            f"{where}: cannot be written ({err.strerror or err}); free or unlock the place, "
            "or choose another --store"
        ) from err
