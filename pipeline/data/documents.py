"""Documents: the unit that is counted, split and deduplicated.

A document is known by the sha256 of its NFC text, so the same text has the same id wherever it was found and
however its accents were composed. The text itself is kept as it came. Standard library only.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import DataError

KEY_BYTES = 16
"""Bytes of an id that deduplication compares: 2^64 documents before a chance collision is likely."""


Side = Literal["", "train", "val"]
"""Which side of the split a part of a corpus is bound to; empty leaves it to the split."""


class CorpusError(DataError):
    """A corpus cannot be read, or holds nothing that can be used."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its id and where it came from (`distribution/path`, `file:line`)."""

    id: str
    text: str
    source: str

    @staticmethod
    def of(text: str, source: str) -> "Document":
        """A document of `text`, made valid Unicode first."""
        text = valid_unicode(text)
        return Document(document_id(text), text, source)


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """A part of a corpus that one task reads: a distribution, a file."""

    name: str
    """Unique in its corpus; partitions are in the order of the corpus."""

    stamp: str = ""
    """What its reader must find again, such as a version; another node may have another one."""

    text_bytes: int = 0
    """Estimate of the text in it, for plans."""

    side: Side = ""
    """Side of the split that all of its documents are on."""


def document_id(text: str) -> str:
    """Hex sha256 of the NFC form of `text`."""
    return hashlib.sha256(unicodedata.normalize("NFC", text).encode()).hexdigest()


def valid_unicode(text: str) -> str:
    r"""`text` without lone surrogates, which a JSON string may carry (`"\ud83d"`) and UTF-8 cannot.

    Pairs are joined and the rest become U+FFFD: what tiktoken does with them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
