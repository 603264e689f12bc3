"""Sums of token losses: cross-entropy, and distillation from a teacher's logits, states and attention.

Always fp32, always a sum over tokens and never a mean, so that workers and micro-batches of any size add up
to the same number. Targets below 0 do not count. Logits of many tokens over a large vocabulary are the
largest tensor of a step; the `chunked_` forms make them in pieces, and again in the backward pass.
"""

# N tokens · C width · V vocabulary · B batch · H heads · T positions · Q width of a query or key

from collections.abc import Callable
from typing import Any

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

    def piece(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy_sum(head(x), y)

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)  # (N, C), (N,)
    return _in_pieces(piece, *flat, chunk=max(1, max_logits // vocab_size))


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
    if not torch.compiler.is_compiling():
        mix = alpha, temperature
        loss: Tensor = _Distilled.apply(student, teacher.detach(), targets, mix)  # type: ignore[no-untyped-call]
        return loss
    log_p = F.log_softmax(teacher.detach().float() / temperature, dim=-1)  # a compiler fuses this by itself
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1).masked_fill(targets < 0, 0.0).sum()
    return alpha * cross_entropy_sum(student, targets) + (1.0 - alpha) * temperature**2 * divergence


class _Distilled(torch.autograd.Function):
    """`distillation_sum` with its gradient made beside it: one tensor of the size of the logits is kept.

    d/ds = alpha (softmax(s) - target) + (1 - alpha) T (softmax(s / T) - softmax(t / T)); five such tensors
    exist at a time, those of the caller among them.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, targets: Tensor, mix: tuple[float, float]
    ) -> Tensor:
        (alpha, temperature), ignored = mix, targets < 0
        log_p = torch.log_softmax(teacher.float() / temperature, dim=-1)
        log_q = torch.log_softmax(student.float() / temperature, dim=-1)
        p = log_p.exp()
        divergence = log_p.sub_(log_q).mul_(p).sum(dim=-1)  # (...)
        gradient = log_q.exp_().sub_(p).mul_((1.0 - alpha) * temperature)
        del p, log_p, log_q
        log_q = torch.log_softmax(student.float(), dim=-1)
        wanted = targets.clamp_min(0).unsqueeze(-1)  # (..., 1)
        entropy = -log_q.gather(-1, wanted).squeeze(-1)
        gradient.add_(log_q.exp_(), alpha=alpha)
        gradient.scatter_add_(-1, wanted, gradient.new_full((), -alpha).expand(wanted.shape))
        ctx.dtype = student.dtype
        ctx.save_for_backward(gradient.masked_fill_(ignored.unsqueeze(-1), 0.0))
        loss = alpha * entropy + (1.0 - alpha) * temperature**2 * divergence
        return loss.masked_fill(ignored, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None


def chunked_distillation_sum(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    student_head: Callable[[Tensor], Tensor],
    teacher_head: Callable[[Tensor], Tensor],
    vocab_size: int,
    alpha: float = 0.5,
    temperature: float = 2.0,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """`distillation_sum` of the logits that two heads make of hidden states (..., C), piece by piece.

    At most `max_logits` logits exist at a time, those of both models together.
    """

    def piece(x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teacher_head(z)
        return distillation_sum(student_head(x), taught, y, alpha=alpha, temperature=temperature)

    flat = student.flatten(0, -2), teacher.detach().flatten(0, -2), targets.reshape(-1)
    return _in_pieces(piece, *flat, chunk=max(1, max_logits // (2 * vocab_size)))


def hidden_sum(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of ||s - t||^2 / ||t||^2 for states (B, T, C), fp32; no gradient reaches the teacher.

    GPT-2's states have a few huge coordinates, so a plain error would be ruled by a few tokens. The size of
    the teacher is taken token by token, so that the sum does not depend on the batch it stands in.
    """
    teacher = teacher.detach().float()
    error = (student.float() - teacher).square().sum(dim=-1)  # (B, T)
    size = teacher.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (error / size).masked_fill(targets < 0, 0.0).sum()


def attention_sum(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], targets: Tensor, *, scale: float
) -> Tensor:
    """Sum over queries of KL(teacher || student) of causal attention rows, the mean over heads; fp32.

    Each side is (queries, keys), both (B, H, T, Q); widths may differ. The maps, (B, H, T, T), are made
    again in the backward pass: only one layer's exist at a time.
    """
    taught = (teacher[0].detach(), teacher[1].detach())
    loss = checkpoint(_attention_divergence, student, taught, targets, scale, use_reentrant=False)
    assert isinstance(loss, Tensor)
    return loss


def _attention_divergence(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], targets: Tensor, scale: float
) -> Tensor:
    log_q = log_attention(*student, scale=scale)
    with torch.no_grad():
        log_p = log_attention(*teacher, scale=scale)
        p = log_p.exp()
    divergence = (p * (log_p - log_q).masked_fill(_future(log_q), 0.0)).sum(dim=-1).mean(dim=1)  # (B, T)
    return divergence.masked_fill(targets < 0, 0.0).sum()


def log_attention(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """Logarithms of causal attention rows (B, H, T, T), fp32, -inf in the future; both sides (B, H, T, Q).

    The rows that `scaled_dot_product_attention` takes and does not show. Scores are fp32 also where the rest
    is bf16, as they are inside of it: rounded to 8 bits, a score of 30 would be off by a tenth.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ key.float().mT * scale
    return torch.log_softmax(scores.masked_fill(_future(scores), -torch.inf), dim=-1)


def _future(scores: Tensor) -> Tensor:
    """Keys that a query must not see, (T, T)."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


def _in_pieces(piece: Callable[..., Tensor], *rows: Tensor, chunk: int) -> Tensor:
    """The sum of `piece` over slices of `rows` of `chunk` rows, each computed again in the backward pass."""
    if rows[0].shape[0] <= chunk:
        return piece(*rows)
    slices = zip(*(torch.split(tensor, chunk) for tensor in rows), strict=True)
    return torch.stack([checkpoint(piece, *part, use_reentrant=False) for part in slices]).sum()
