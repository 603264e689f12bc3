"""What an evaluation gives: the number with its protocol, text and counts, and what it is a mean of.

The number goes into the record of a `scores` artifact; the losses of every window, document or passage go
into its `losses.parquet`, so that differences can be tested later without the model. Loads no torch.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.evaluate.protocols import Protocol

LOSSES = "losses.parquet"

LARGEST_LOSS = 700.0
"""Nats; exp of more is no number in float64, and the model has diverged long before."""

Unit = Literal["window", "document", "passage"]


@dataclass(frozen=True, eq=False, slots=True)
class UnitLosses:
    """Sums over the units that a bootstrap resamples. Units without a scored token are left out."""

    index: NDArray[np.int64]
    """(U,) position of the unit in the text."""

    tokens: NDArray[np.int64]
    """(U,) scored tokens; words, where the protocol weighs by them."""

    nll: NDArray[np.float64]
    """(U,) summed negative log-likelihood in nats; NaN where an answer is written, not scored."""

    correct: NDArray[np.bool_] | None = None
    """(U,) whether the greedy continuation was right; only where the protocol asks."""

    @staticmethod
    def sums(losses: NDArray[np.float64], spans: Sequence[tuple[int, int]]) -> "UnitLosses":
        """Sum token losses (NaN = not scored) over half-open spans."""
        scored = np.isfinite(losses)
        nll = np.array([losses[a:b][scored[a:b]].sum() for a, b in spans])
        tokens = np.array([int(scored[a:b].sum()) for a, b in spans], dtype=np.int64)
        keep = np.flatnonzero(tokens)
        return UnitLosses(index=keep.astype(np.int64), tokens=tokens[keep], nll=nll[keep])

    def to_parquet(self) -> bytes:
        """Columns `index`, `tokens`, `nll` and, where known, `correct`."""
        columns: dict[str, NDArray[np.generic]] = {
            "index": self.index,
            "tokens": self.tokens,
            "nll": self.nll,
        }
        if self.correct is not None:
            columns["correct"] = self.correct
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        return sink.getvalue()


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Scores:
    """One model under one protocol."""

    protocol: Protocol
    """As followed: the `@ctx` variant for a model with a shorter context."""

    value: float
    """Perplexity or accuracy, as `protocol.metric` says."""

    loss: float | None
    """Nats per token (or word, or last word), as the protocol weighs; None for a choice of answers."""

    token_loss: float | None
    """Nats per token, every scored token alike; None for a choice of answers."""

    tokens: int
    """Tokens of the text."""

    scored: int
    """Tokens that a loss was taken of."""

    windows: int
    """Windows, or passages."""

    unit: Unit
    """What a row of `units` is."""

    units: UnitLosses
    text: str
    text_sha256: str
    tokens_sha256: str
    bits_per_byte: float | None = None
    perplexity: float | None = None
    """Of the last words, where the value is an accuracy."""

    stderr: float | None = None
    """Standard error of an accuracy."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the record says about how it was measured."""

    def metrics(self) -> dict[str, str | int | float]:
        """What the record says; absent numbers are left out."""
        protocol = self.protocol
        named: dict[str, str | int | float | None] = {
            "protocol": protocol.id,
            "metric": protocol.metric,
            "value": self.value,
            "loss": self.loss,
            "token_loss": self.token_loss,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "stderr": self.stderr,
            "weighting": protocol.weighting,
            "window": protocol.window,
            "stride": protocol.stride,
            "text": self.text,
            "text_sha256": self.text_sha256,
            "tokens_sha256": self.tokens_sha256,
            "tokens": self.tokens,
            "scored": self.scored,
            "windows": self.windows,
            "unit": self.unit,
            "units": len(self.units.index),
        }
        return {key: value for key, value in named.items() if value is not None}
