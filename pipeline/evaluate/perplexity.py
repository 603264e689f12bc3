"""Perplexity by windows: which token is scored in which window, and with what weight.

`windows` is the whole protocol as integers; `token_losses` runs the model over them; `aggregate` weighs.
Every scored token has one loss from one window, in float64 from there on, so that sums per window and per
document, token-weighted and window-weighted means all come from the same numbers. A short window is not
padded: it goes alone, full ones go in batches.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.errors import EvaluateError
from pipeline.evaluate.protocols import Protocol
from pipeline.evaluate.result import LARGEST_LOSS, Scores, UnitLosses
from pipeline.evaluate.sequences import TokenSequence
from pipeline.progress import Progress

# N tokens of the text · B windows of a batch · T inputs of a window · V vocabulary


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass: the model reads ids[begin:end], and the tokens [first, last) are scored."""

    begin: int
    end: int
    first: int
    last: int


def windows(count: int, protocol: Protocol) -> list[Window]:
    """Every window of a text of `count` tokens; windows that would score nothing are left out.

    `inside`: targets lie inside the window, so its first token has no prediction; where windows overlap
    (stride < window) an earlier one has scored it. `shifted`: a window of T inputs has T targets, the last of
    which is the first input of the next window; the end of the text is no special case.
    """
    found: list[Window] = []
    last = 0
    for begin in range(0, count, protocol.stride):
        if protocol.targets == "shifted":
            end = min(begin + protocol.window, count - 1)
            window = Window(begin, end, max(begin + 1, last), end + 1)
        else:
            end = min(begin + protocol.window, count)
            window = Window(begin, end, max(begin + 1, last), end)
        if window.last > window.first:
            found.append(window)
            last = window.last
        if last >= count:
            break
    return found


@torch.inference_mode()
def token_losses(
    model: nn.Module,
    ids: NDArray[np.integer],
    plan: Sequence[Window],
    *,
    batch: int,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """(N,) negative log-likelihood in nats of each scored token, NaN where none is scored.

    The model maps (B, T) ids to (B, T, V) logits; it is left on its device and in evaluation mode.
    """
    losses = np.full(len(ids), np.nan)
    device = next(model.parameters()).device
    model.eval()
    done = 0
    for group in _batches(plan, batch):
        rows = np.stack([np.asarray(ids[w.begin : w.end], dtype=np.int64) for w in group])  # (B, T)
        logits = model(torch.from_numpy(rows).to(device))  # (B, T, V)
        for window, row in zip(group, logits, strict=True):
            targets = torch.from_numpy(np.asarray(ids[window.first : window.last], dtype=np.int64)).to(device)
            predicted = row[window.first - 1 - window.begin : window.last - 1 - window.begin]
            losses[window.first : window.last] = _nll(predicted, targets)
        done += len(group)
        if progress is not None:
            progress.update(done)
    return losses


def evaluate_perplexity(
    model: nn.Module, protocol: Protocol, sequence: TokenSequence, *, batch: int, quiet: bool = False
) -> Scores:
    """Score `sequence` under a window protocol that the model's context can follow."""
    plan = windows(len(sequence.ids), protocol)
    if not plan:
        raise EvaluateError(
            f"{protocol.id}: {sequence.name} has {len(sequence.ids):,} tokens; at least 2 are needed"
        )
    with Progress("eval", len(plan), unit=f"windows of {protocol.id}", quiet=quiet) as progress:
        losses = token_losses(model, sequence.ids, plan, batch=batch, progress=progress)
    return aggregate(losses, protocol, sequence, plan)


def aggregate(
    losses: NDArray[np.float64], protocol: Protocol, sequence: TokenSequence, plan: Sequence[Window]
) -> Scores:
    """Weigh the token losses as the protocol says; raises EvaluateError where the model gave no number."""
    bad = next((w for w in plan if not (losses[w.first : w.last] < LARGEST_LOSS).all()), None)  # NaN too
    if bad is not None:
        raise EvaluateError(
            f"{protocol.id}: the model gives no finite loss for tokens {bad.first:,} to {bad.last - 1:,} of "
            f"{sequence.name}; its weights diverged or are damaged: look at the loss curve of its run"
        )
    per_window = UnitLosses.sums(losses, [(w.first, w.last) for w in plan])
    total, scored = float(per_window.nll.sum()), int(per_window.tokens.sum())
    loss = total / scored
    if protocol.weighting == "windows":
        loss = float((per_window.nll / per_window.tokens).mean())
    documents = None
    if sequence.ends is not None:
        spans = zip([0, *sequence.ends[:-1].tolist()], sequence.ends.tolist(), strict=True)
        documents = UnitLosses.sums(losses, list(spans))
    return Scores(
        protocol=protocol,
        value=math.exp(loss),
        loss=loss,
        token_loss=total / scored,
        bits_per_byte=_bits_per_byte(losses, sequence),
        tokens=len(sequence.ids),
        scored=scored,
        windows=len(plan),
        unit="window" if documents is None else "document",
        units=per_window if documents is None else documents,
        text=sequence.name,
        text_sha256=sequence.text_sha256,
        tokens_sha256=sequence.sha256,
    )


def _bits_per_byte(losses: NDArray[np.float64], sequence: TokenSequence) -> float | None:
    """Bits per byte of text over scored tokens that write bytes: comparable across tokenizers."""
    lengths = sequence.token_bytes[np.asarray(sequence.ids, dtype=np.int64)]
    counted = np.isfinite(losses) & (lengths > 0)
    total_bytes = int(lengths[counted].sum(dtype=np.int64))
    return float(losses[counted].sum()) / math.log(2) / total_bytes if total_bytes else None


def _batches(plan: Sequence[Window], batch: int) -> Iterator[list[Window]]:
    """Consecutive windows of one length, at most `batch` at a time."""
    for _, equal in groupby(plan, key=lambda w: w.end - w.begin):
        group = list(equal)
        yield from (group[i : i + batch] for i in range(0, len(group), batch))


def _nll(logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """(T,) losses of one row; softmax in fp32 whatever the model computes in, by rows to bound memory."""
    return cross_entropy(logits.float(), targets, reduction="none").cpu().double().numpy()
