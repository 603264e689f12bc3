"""Are the shards what they say? Everything is read again from the disk, and recorded ids are not trusted.

Every shard is hashed; every token lies in the vocabulary; every document ends with the end-of-text token and
decodes to text; the counts are those of the sidecar. The ids of all documents are computed again from that
text: none is on both sides of the split. Some documents are encoded again, by tiktoken: the same tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tiktoken

from pipeline.data.documents import KEY_BYTES, document_id
from pipeline.data.plan import FILE, ShardPlan
from pipeline.data.shards import ShardError, Sidecar, Tokens, check_shard
from pipeline.data.tokenizer import encode_document, load_tokenizer, require_vocabulary
from pipeline.progress import Progress
from pipeline.store.artifacts import Artifact

ENCODE_EVERY = 16
"""Documents of a shard between two that are encoded again."""

_REMEDY = "run `krony prepare … --force`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What was checked and found right."""

    shards: int
    tokens: int
    documents: int

    shared: int
    """Training documents that are also validation documents: 0 unless repeats are kept by the split."""


def verify_tokens(tokens: Artifact, tokenizer: Artifact, *, quiet: bool = False) -> Verified:
    """Check a tokens artifact; raises ShardError naming the first shard that is wrong, and how.

    Takes about as long as encoding on one core. Memory: one shard, and 100 bytes per validation document.
    """
    where = tokens.record.address
    encoding = load_tokenizer(tokenizer.folder())
    require_vocabulary(encoding, int(tokens.record.metrics["vocab_size"]), what=where)
    plan = ShardPlan.from_json(tokens.path(FILE).read_bytes(), where=f"{where}/{FILE}")
    names = [key.removesuffix(".bin") for key in tokens.record.files if key.endswith(".bin")]
    names.sort(key=lambda name: (not name.startswith("val-"), name))  # the smaller side is remembered
    validation: set[bytes] = set()
    count = documents = shared = 0
    with Progress("verify", len(names), unit="shards", quiet=quiet) as progress:
        for number, name in enumerate(names, 1):
            sidecar = Sidecar.from_json(
                tokens.path(f"{name}.json").read_bytes(), where=f"{where}/{name}.json"
            )
            if sidecar.plan != plan.digest:
                raise ShardError(f"{where}/{name}: made by another plan than {FILE}; {_REMEDY}")
            shard = check_shard(tokens.path(f"{name}.bin"), sidecar)
            keys = [
                _key(piece, encoding, again=at % ENCODE_EVERY == 0, name=f"{where}/{name}")
                for at, piece in enumerate(
                    split_documents(
                        shard, vocabulary=encoding.n_vocab, eot=encoding.eot_token, name=f"{where}/{name}"
                    )
                )
            ]
            if len(keys) != sidecar.documents:
                raise ShardError(
                    f"{where}/{name}: {len(keys):,} documents, not {sidecar.documents:,}; {_REMEDY}"
                )
            if name.startswith("val-"):
                validation.update(keys)
            else:
                shared += sum(key in validation for key in keys)
            if shared and plan.dedup:
                raise ShardError(f"{where}/{name}: holds a document that is also validation; {_REMEDY}")
            count, documents = count + len(shard), documents + len(keys)
            progress.update(number, tokens=count)
    return Verified(shards=len(names), tokens=count, documents=documents, shared=shared)


def split_documents(tokens: Tokens, *, vocabulary: int, eot: int, name: str) -> Iterator[Tokens]:
    """The documents of a shard, without their ends. Raises ShardError for a token out of range or no end."""
    if not len(tokens):
        return
    if (largest := int(tokens.max())) >= vocabulary:
        raise ShardError(f"{name}: token {largest:,} of a vocabulary of {vocabulary:,}; {_REMEDY}")
    if tokens[-1] != eot:
        raise ShardError(f"{name}: its last document has no end-of-text token; {_REMEDY}")
    start = 0
    for end in np.flatnonzero(tokens == eot).tolist():
        yield tokens[start:end]
        start = end + 1


def _key(document: Tokens, encoding: tiktoken.Encoding, *, again: bool, name: str) -> bytes:
    try:
        text = encoding.decode_bytes(document.tolist()).decode()
    except UnicodeDecodeError as err:
        raise ShardError(f"{name}: a document is no text ({err.reason}); {_REMEDY}") from err
    if again and not np.array_equal(encode_document(encoding, text)[:-1], document):
        raise ShardError(
            f"{name}: a document has other tokens than tiktoken gives it; "
            "run `krony prepare … --data.encoder tiktoken --force`"
        )
    return bytes.fromhex(document_id(text)[: 2 * KEY_BYTES])
