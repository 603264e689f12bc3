"""LAMBADA's last word: accuracy and perplexity, as lm-evaluation-harness defines them.

The passage is split at its last space; the last word, with the space before it, is the target. Its tokens
are those that the whole passage has beyond the tokens of the context. It is right if each of them is the
argmax; the perplexity is exp of the mean over passages of the target's summed negative log-likelihood.
Perplexity of whole passages is another protocol (`krony/lambada_text`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import EvaluateError
from pipeline.evaluate.protocols import Protocol
from pipeline.evaluate.result import LARGEST_LOSS, Scores, UnitLosses
from pipeline.evaluate.sequences import ids_sha256
from pipeline.evaluate.texts import Text
from pipeline.progress import Progress

# B passages of a batch · T inputs, right-padded · V vocabulary


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage in tokens; its last `targets` tokens are the last word."""

    index: int
    ids: tuple[int, ...]
    targets: int


def passages(text: Text, encoding: tiktoken.Encoding, *, window: int) -> list[Passage]:
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
        found.append(Passage(index, tuple((before + target)[-(window + 1) :]), len(target)))
    return found


@torch.inference_mode()
def evaluate_last_word(
    model: nn.Module,
    protocol: Protocol,
    text: Text,
    encoding: tiktoken.Encoding,
    *,
    batch: int,
    quiet: bool = False,
) -> Scores:
    """Score the last word of every passage; padding is on the right, where a causal model never sees it."""
    items = passages(text, encoding, window=protocol.window)
    nll = np.zeros(len(items))
    correct = np.zeros(len(items), dtype=np.bool_)
    device = next(model.parameters()).device
    model.eval()
    by_length = sorted(items, key=lambda item: (-len(item.ids), item.index))
    with Progress("eval", len(items), unit=f"passages of {protocol.id}", quiet=quiet) as progress:
        for begin in range(0, len(items), batch):
            group = by_length[begin : begin + batch]
            logits = model(torch.tensor(_padded(group), device=device))  # (B, T, V)
            for item, row in zip(group, logits, strict=True):
                last = len(item.ids) - 1
                log_p = row[last - item.targets : last].float().log_softmax(-1).cpu()  # (targets, V)
                goal = torch.tensor(item.ids[-item.targets :])
                nll[item.index] = -float(log_p.gather(1, goal[:, None]).double().sum())
                correct[item.index] = bool((log_p.argmax(-1) == goal).all())
            progress.update(begin + len(group))
    return _aggregate(protocol, text, items, nll, correct)


def _padded(group: Sequence[Passage]) -> list[list[int]]:
    longest = max(len(item.ids) for item in group) - 1
    return [[*item.ids[:-1], *[0] * (longest - len(item.ids) + 1)] for item in group]


def _aggregate(
    protocol: Protocol,
    text: Text,
    items: Sequence[Passage],
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
    return Scores(
        protocol=protocol,
        value=accuracy,
        loss=float(nll.mean()),
        token_loss=float(nll.sum() / targets.sum()),
        perplexity=math.exp(float(nll.mean())),
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
