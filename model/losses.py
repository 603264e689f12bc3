"""Sums of token losses: cross-entropy, and distillation from a teacher's logits. Always fp32, always a sum.

A sum, not a mean, so that workers and micro-batches of any size add up to the same number. Targets below 0 do
not count. Logits of many tokens over a large vocabulary are the largest tensor of a step;
`chunked_cross_entropy_sum` makes them in pieces, and again in the backward pass.
"""

# N tokens · C width · V vocabulary

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.config import ModelError

MAX_LOGITS = 2**27
"""Logits that exist at once (0.5 GB in fp32); what fits is done in one piece, and made only once."""

IGNORE = -100
"""The one negative target that torch ignores."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log p(target), fp32 scalar; logits (..., V), targets (...), those < 0 ignored."""
    flat = targets.reshape(-1)
    flat = flat.masked_fill(flat < 0, IGNORE)
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), flat, ignore_index=IGNORE, reduction="sum"
    )


def chunked_cross_entropy_sum(
    hidden: Tensor,
    targets: Tensor,
    *,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """`cross_entropy_sum(head(hidden), targets)`, at most `max_logits` logits at a time; hidden (..., C)."""
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)  # (N, C), (N,)
    chunk = max(1, max_logits // vocab_size)
    if hidden.shape[0] <= chunk:
        return cross_entropy_sum(head(hidden), targets)

    def piece(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy_sum(head(x), y)

    pairs = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    losses = [checkpoint(piece, x, y, use_reentrant=False) for x, y in pairs]
    return torch.stack(losses).sum()


def distillation_sum(
    student: Tensor, teacher: Tensor, targets: Tensor, *, alpha: float = 0.5, temperature: float = 2.0
) -> Tensor:
    """Sum over tokens of alpha CE + (1 - alpha) T^2 KL(teacher_T || student_T), fp32 (Hinton et al. 2015).

    Logits (..., V) of both; no gradient reaches the teacher. Tokens with a target < 0 count in neither part.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ; "
            "both models need one tokenizer and the same tokens"
        )
    if not (0.0 <= alpha <= 1.0 and temperature > 0.0):
        raise ModelError(f"alpha={alpha} must lie in [0, 1] and temperature={temperature} above 0")
    log_p = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)  # (...)
    divergence = divergence.masked_fill(targets < 0, 0.0).sum()
    return alpha * cross_entropy_sum(student, targets) + (1.0 - alpha) * temperature**2 * divergence
