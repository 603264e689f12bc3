"""Token sequences: what windows are cut from.

A sequence knows its ids, the digest of the text they stand for, how many bytes each token writes (for bits
per byte), and where documents end, if it has documents. A count that the protocol does not know is refused.
Loads no torch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import tiktoken
from numpy.typing import NDArray

from pipeline.errors import EvaluateError
from pipeline.evaluate.protocols import Protocol
from pipeline.evaluate.texts import Text

GPT2_VOCABULARY = 50_257


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens to score, in order."""

    name: str
    """Text name."""

    ids: NDArray[np.integer]
    """(N,) token ids."""

    token_bytes: NDArray[np.uint16]
    """(V,) bytes that each token of the vocabulary writes; 0 for special tokens."""

    text_sha256: str
    """Digest of the text; for a tokens artifact, of its shards."""

    ends: NDArray[np.int64] | None = None
    """(D,) one past the end of each document, the last being N; None for a text without documents."""

    @property
    def sha256(self) -> str:
        """Digest of the ids themselves: text and tokenizer in one."""
        return ids_sha256(self.ids)

    def first(self, limit: int) -> "TokenSequence":
        """The first `limit` tokens, all of them for 0; a document that is cut ends there."""
        if limit == 0 or limit >= len(self.ids):
            return self
        ends = self.ends
        if ends is not None:
            ends = np.append(ends[ends < limit], np.int64(limit))
        return replace(self, ids=self.ids[:limit], ends=ends)


def ids_sha256(ids: NDArray[np.integer] | Sequence[int]) -> str:
    """Digest of token ids, whatever integers they are held in."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<u4").tobytes()).hexdigest()


@lru_cache(maxsize=8)
def token_bytes(encoding: tiktoken.Encoding) -> NDArray[np.uint16]:
    """(V,) bytes per token of a byte-level encoding, 0 for special tokens."""
    special = {encoding.encode_single_token(word) for word in encoding.special_tokens_set}
    lengths = [
        0 if index in special else len(encoding.decode_single_token_bytes(index))
        for index in range(encoding.n_vocab)
    ]
    return np.array(lengths, dtype=np.uint16)


def encode_text(text: Text, encoding: tiktoken.Encoding, protocol: Protocol) -> TokenSequence:
    """The joined rows in tokens, no BOS or EOS, `<|endoftext|>` being ordinary text.

    Raises EvaluateError if GPT-2's tokenizer gives another count than the protocol knows.
    """
    ids = np.array(encoding.encode_ordinary(text.joined), dtype=np.int64)
    expected = protocol.gpt2_tokens
    if is_gpt2(encoding) and expected is not None and len(ids) != expected:
        raise EvaluateError(
            f"{protocol.id}: {text.where} has {len(ids):,} GPT-2 tokens, the protocol has {expected:,}; "
            "the text or the tokenizer is not the protocol's"
        )
    return TokenSequence(text.name, ids, token_bytes(encoding), text.sha256)


def is_gpt2(encoding: tiktoken.Encoding) -> bool:
    """Whether this is GPT-2's own BPE."""
    return encoding.name == "gpt2" and encoding.n_vocab == GPT2_VOCABULARY


def document_ends(ids: NDArray[np.integer], *, end_token: int) -> NDArray[np.int64]:
    """One past each end-of-text token; text after the last one is a document too."""
    ends = np.flatnonzero(ids == end_token).astype(np.int64) + 1
    if len(ids) and (len(ends) == 0 or ends[-1] != len(ids)):
        ends = np.append(ends, np.int64(len(ids)))
    return ends
