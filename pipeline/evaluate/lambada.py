"""LAMBADA's last word: accuracy and perplexity, as lm-evaluation-harness defines them.

The passage is split at its last space; the last word, with the space before it, is the target. Its tokens
are those that the whole passage has beyond the tokens of the context. It is right if each of them is the
argmax; the perplexity is exp of the mean over passages of the target's summed negative log-likelihood.
Perplexity of whole passages is another protocol (`krony/lambada_text`).
"""

import math
from collections.abc import Sequence

import numpy as np
import tiktoken
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import EvaluateError
from pipeline.evaluate.protocols import Protocol
from pipeline.evaluate.result import LARGEST_LOSS, Scores, UnitLosses
from pipeline.evaluate.sequences import ids_sha256
from pipeline.evaluate.tails import Tail, score_tails
from pipeline.evaluate.texts import Text
from pipeline.progress import Progress


def passages(text: Text, encoding: tiktoken.Encoding, *, window: int) -> list[Tail]:
    """Every passage, cut from the left to `window` inputs; raises EvaluateError for one without a context."""
    found = []
    for index, row in enumerate(text.rows):
        context, space, word = row.rpartition(" ")
        before = encoding.encode_ordinary(context.rstrip())  # trailing spaces go to the target, as in lm-eval
        target = encoding.encode_ordinary(row)[len(before) :]
        if not (space and word and before) or not 0 < len(target) <= window:
            raise EvaluateError(
                f"{text.where}: row {index:,} has no last word after a context: {row[-60:]!r}"
            )
        found.append(Tail(tuple((before + target)[-(window + 1) :]), len(target)))
    return found


def evaluate_last_word(
    model: nn.Module,
    protocol: Protocol,
    text: Text,
    encoding: tiktoken.Encoding,
    *,
    batch: int,
    quiet: bool = False,
) -> Scores:
    """Score the last word of every passage."""
    items = passages(text, encoding, window=protocol.window)
    with Progress("eval", len(items), unit=f"passages of {protocol.id}", quiet=quiet) as progress:
        nll, correct = score_tails(model, items, batch=batch, progress=progress)
    return _aggregate(protocol, text, items, nll, correct)


def _aggregate(
    protocol: Protocol,
    text: Text,
    items: Sequence[Tail],
    nll: NDArray[np.float64],
    correct: NDArray[np.bool_],
) -> Scores:
    count = len(items)
    bad = np.flatnonzero(~(nll < LARGEST_LOSS))  # NaN too
    if len(bad):
        raise EvaluateError(
            f"{protocol.id}: the model gives no finite loss for passage {bad[0]:,} of {text.name}; "
            "its weights diverged or are damaged: look at the loss curve of its run"
        )
    targets = np.array([item.targets for item in items], dtype=np.int64)
    accuracy = float(correct.mean())
    loss = sum(nll.tolist()) / count  # added in order, as lm-eval adds: equal to the last bit
    return Scores(
        protocol=protocol,
        value=accuracy,
        loss=loss,
        token_loss=float(nll.sum() / targets.sum()),
        perplexity=math.exp(loss),
        stderr=math.sqrt(accuracy * (1 - accuracy) / max(1, count - 1)),
        tokens=sum(len(item.ids) for item in items),
        scored=int(targets.sum()),
        windows=count,
        unit="passage",
        units=UnitLosses(index=np.arange(count), tokens=targets, nll=nll, correct=correct),
        text=text.name,
        text_sha256=text.sha256,
        tokens_sha256=ids_sha256([token for item in items for token in item.ids]),
    )
