"""Batches as a pure function of (seed, step, shards).

The shards are one stream of tokens, cut into rows of `seq_len`; every epoch visits each row once, in an order
drawn from (seed, epoch). Global batch `step` is a slice of the endless sequence of epochs, and rank r of w
takes a contiguous part of it. So the whole state of the data is `step`: a resume, a lost worker and another
world size all read the same tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.shards import Tokens, open_shard
from pipeline.errors import DataError

# N tokens in the stream · T seq_len · R rows per epoch · B rows of a global batch

Rows = npt.NDArray[np.int64]


class TokenStream:
    """Several memory-mapped shards, read as one sequence of tokens, in the order given."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open and validate every shard; raises ShardError naming the first that is damaged."""
        if not paths:
            raise DataError("no shards were given; build them with `krony prepare …`")
        self._shards: list[Tokens] = [open_shard(path) for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        """Tokens in all shards."""
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> Tokens:
        """`(count,)` tokens from position `start`, across shard boundaries. The range must lie inside."""
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens {start:,} to {start + count:,} of a stream of {len(self):,}")
        window = np.empty(count, dtype=np.uint16)
        filled = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < count:
            tokens = self._shards[shard]
            at = start + filled - (int(self._ends[shard]) - len(tokens))
            piece = tokens[at : at + count - filled]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
        return window


class Batches:
    """Rows of a token stream, batch by batch, for any number of ranks."""

    def __init__(self, stream: TokenStream, *, seq_len: int, batch_tokens: int, seed: int) -> None:
        """Raises DataError if the stream is shorter than one row and its last target."""
        if batch_tokens % seq_len:
            raise DataError(f"batch_tokens={batch_tokens:,} must be a multiple of seq_len={seq_len:,}")
        self.rows_per_epoch = (len(stream) - 1) // seq_len  # R; the last target needs one token more
        self.rows_per_batch = batch_tokens // seq_len  # B
        self._stream, self._seq_len, self._seed = stream, seq_len, seed
        if self.rows_per_epoch < 1:
            raise DataError(
                f"the split holds {len(stream):,} tokens, one row needs {seq_len + 1:,}; "
                "take a larger corpus, another split or a shorter seq_len"
            )

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> tuple[Rows, Rows]:
        """Inputs and targets of this rank in global batch `step`: two `(rows, seq_len)` int64 arrays.

        Ranks together have `rows_per_batch` rows; where that is no multiple of `world`, some have one more.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of a world of {world}")
        first = step * self.rows_per_batch
        share = range(
            first + rank * self.rows_per_batch // world, first + (rank + 1) * self.rows_per_batch // world
        )
        T = self._seq_len
        windows = np.empty((len(share), T + 1), dtype=np.int64)
        for window, row in zip(windows, self.rows(share), strict=True):
            window[:] = self._stream.read(row * T, T + 1)
        return windows[:, :-1].copy(), windows[:, 1:].copy()

    def rows(self, visits: range) -> list[int]:
        """Which row of the stream each visit reads; visit v is number v of the endless sequence of epochs."""
        found = []
        for visit in visits:
            epoch, at = divmod(visit, self.rows_per_epoch)
            found.append(int(_order(self._seed, epoch, self.rows_per_epoch)[at]))
        return found


@lru_cache(maxsize=4)  # two epochs of the training and of the validation split
def _order(seed: int, epoch: int, rows: int) -> npt.NDArray[np.uint32 | np.int64]:
    """A permutation of `range(rows)` that depends on (seed, epoch) alone.

    Raw bits of PCG64 are sorted, because NumPy promises those bits across versions and `permutation` not.
    """
    order = stable_order(np.random.PCG64([seed, epoch]).random_raw(rows))
    return order.astype(np.uint32) if rows <= 2**32 else order


def stable_order(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """`np.argsort(keys, kind="stable")` in half of its time, for keys that are far apart.

    Positions take the low bits of the keys, and the values are sorted in place; where only those bits told
    two keys apart, the keys themselves are asked again.
    """
    low = np.uint64(max(1, (len(keys) - 1).bit_length()))
    packed = keys >> low << low | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order = (packed & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)
    packed >>= low
    equal = np.flatnonzero(packed[1:] == packed[:-1])
    for run in np.split(equal, np.flatnonzero(np.diff(equal) > 1) + 1) if len(equal) else ():
        part = slice(run[0], run[-1] + 2)
        order[part] = order[part][np.argsort(keys[order[part]], kind="stable")]
    return order
