"""How likely a model finds the end of a sequence: what last words, choices and rolling windows come down to.

A tail is a sequence of which the last tokens are scored. Tails go in batches by length, padded on the right,
where a causal model never sees it; the softmax is fp32 whatever the model computes in, sums are float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.progress import Progress

# B tails of a batch · T inputs, right-padded · V vocabulary


@dataclass(frozen=True, slots=True)
class Tail:
    """The last `targets` tokens of `ids` are scored, each given all before it."""

    ids: tuple[int, ...]
    targets: int


@torch.inference_mode()
def score_tails(
    model: nn.Module, tails: Sequence[Tail], *, batch: int, progress: Progress | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(N,) summed negative log-likelihoods in nats, and (N,) whether every scored token is the argmax.

    The model maps (B, T) ids to (B, T, V) logits; it is left on its device and in evaluation mode.
    """
    nll = np.zeros(len(tails))
    greedy = np.zeros(len(tails), dtype=np.bool_)
    device = next(model.parameters()).device
    model.eval()
    by_length = sorted(range(len(tails)), key=lambda index: (-len(tails[index].ids), index))
    for begin in range(0, len(tails), batch):
        group = by_length[begin : begin + batch]
        rows = _padded([tails[index] for index in group])
        logits = model(torch.tensor(rows, device=device))  # (B, T, V)
        for index, row in zip(group, logits, strict=True):
            tail = tails[index]
            last = len(tail.ids) - 1
            log_p = row[last - tail.targets : last].float().log_softmax(-1).cpu()  # (targets, V)
            goal = torch.tensor(tail.ids[-tail.targets :])
            nll[index] = -float(log_p.gather(1, goal[:, None]).double().sum())
            greedy[index] = bool((log_p.argmax(-1) == goal).all())
        if progress is not None:
            progress.update(begin + len(group))
    return nll, greedy


def _padded(group: Sequence[Tail]) -> list[list[int]]:
    longest = max(len(tail.ids) for tail in group) - 1
    return [[*tail.ids[:-1], *[0] * (longest - len(tail.ids) + 1)] for tail in group]
