"""Which documents are validation, and which are repeats.

Two named splits. `hash` looks at the id alone, so a document stays on its side when the corpus grows.
`nanogpt` is the split of OpenWebText that the field compares on: by position, from one permutation, the
validation share first. Everything here is a function of ids and positions; nothing reads text.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.data.documents import KEY_BYTES

NANOGPT_FRACTION = 0.0005
NANOGPT_SEED = 2357

Keys = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]


def is_validation(document_id: str, fraction: float) -> bool:
    """Split `hash`: whether the document of this id is validation; the first 8 bytes of the id decide."""
    return int(document_id[:16], 16) < fraction * 2.0**64


def nanogpt_validation(documents: int) -> Positions:
    """Split `nanogpt`: the sorted positions of the validation documents among `documents`.

    Equals `datasets`' `train_test_split(test_size=0.0005, seed=2357, shuffle=True)`: the first
    `ceil(0.0005 n)` of one NumPy permutation. Takes 8 bytes of memory per document.
    """
    order = np.random.default_rng(NANOGPT_SEED).permutation(documents)
    return np.sort(order[: math.ceil(NANOGPT_FRACTION * documents)]).astype(np.int64)


def keys_of(ids: Sequence[str]) -> Keys:
    """`(len(ids), 16)` bytes: what deduplication compares."""
    joined = b"".join(bytes.fromhex(each[: 2 * KEY_BYTES]) for each in ids)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, KEY_BYTES)


def repeats(keys: Keys, *, bucket_documents: int = 1 << 22) -> Positions:
    """Sorted positions of documents whose key stands earlier in `keys` `(n, 16)`, which may be a memory map.

    The keys are sorted bucket by bucket, a bucket being an equal share of the key space, at most 256. Memory:
    48 bytes times the larger of `bucket_documents` and n / 256, that is 0.2 GB up to 10^9 documents, and
    2 bytes per document and 8 per repeat.
    """
    buckets = min(256, max(1, math.ceil(len(keys) / bucket_documents)))
    lead = np.ascontiguousarray(keys[:, 0])
    edges = [256 * bucket // buckets for bucket in range(buckets + 1)]
    found = []
    for low, high in itertools.pairwise(edges):
        positions = np.flatnonzero((lead >= low) & (lead < high))
        words = np.ascontiguousarray(keys[positions]).view(np.uint64)  # (m, 2)
        order = np.lexsort((positions, words[:, 1], words[:, 0]))
        ordered = words[order]
        same = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1)) + 1
        found.append(positions[order[same]])
    return np.sort(np.concatenate(found)).astype(np.int64)
