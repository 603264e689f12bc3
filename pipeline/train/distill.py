"""Distillation: the student's training loss beside a frozen teacher that sees the same rows.

Both models go through their blocks side by side, so states and attention are compared layer by layer and
never kept. A block of the student stands for the teacher's block that it comes from; some may be missing.
"""

import torch
from torch import Tensor, nn

from model.config import ModelError
from model.export import load_native
from model.gpt2 import GPT2, Attention
from model.losses import attention_sum, chunked_distillation_sum, hidden_sum
from pipeline.compress.load import NATIVE_FILES
from pipeline.config.training import DistillConfig
from pipeline.errors import TrainError
from pipeline.train.request import FitRequest


class Distillation(nn.Module):
    """(inputs (B, T), targets (B, T)) -> sum of the losses of all tokens; trains the student alone.

    alpha CE + (1 - alpha) T^2 KL of the logits (Hinton et al. 2015), + `embedding` E + `hidden` mean_l H_l
    + `attention` mean_l A_l over blocks l (after KnGPT2, arXiv 2110.08152). Per token, E = ||s - t||^2 /
    ||t||^2 of what enters the first block, H_l the same of what leaves block l, A_l = KL(t || s) of attention
    rows, the mean over heads. KnGPT2 takes plain mean squares, which depend on the batch and on the size of
    GPT-2's states; the division by the teacher's is ours.
    """

    def __init__(self, student: GPT2, teacher: GPT2, config: DistillConfig) -> None:
        """The teacher is frozen, in evaluation mode. Raises TrainError if the two cannot be compared."""
        super().__init__()
        _require_comparable(student, teacher)
        self.student, self.teacher, self.config = student, teacher.requires_grad_(False).eval(), config

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        config, student, teacher = self.config, self.student, self.teacher
        x = student.embed(inputs)
        with torch.no_grad():
            z = teacher.embed(inputs)
        states, maps, at = x.new_zeros((), dtype=torch.float32), x.new_zeros((), dtype=torch.float32), 0
        embedded = hidden_sum(x, z, targets) if config.embedding else x.new_zeros((), dtype=torch.float32)
        for block, spec in zip(student.h, student.spec.blocks, strict=True):
            z, at = self._teach(z, at, spec.source), spec.source
            if config.attention:
                maps = maps + self._compare_attention(block, x, teacher.h[at], z, targets)
            x, z, at = block(x), self._teach(z, at, at + 1), at + 1
            if config.hidden:
                states = states + hidden_sum(x, z, targets)
        with torch.no_grad():
            z = teacher.ln_f(self._teach(z, at, len(teacher.h)))
        logits = chunked_distillation_sum(
            student.ln_f(x),
            z,
            targets,
            student_head=student.logits,
            teacher_head=teacher.logits,
            vocab_size=student.spec.arch.vocab_size,
            alpha=config.alpha,
            temperature=config.temperature,
        )
        count = len(student.h)
        inner = config.hidden / count * states + config.attention / count * maps
        return logits + config.embedding * embedded + inner

    @torch.no_grad()
    def _teach(self, z: Tensor, first: int, last: int) -> Tensor:
        """The teacher's blocks `first` to `last` - 1."""
        for block in self.teacher.h[first:last]:
            z = block(z)
        return z

    def _compare_attention(
        self, block: nn.Module, x: Tensor, taught: nn.Module, z: Tensor, targets: Tensor
    ) -> Tensor:
        with torch.no_grad():
            teacher = _query_key(taught, z)
        scale = self.student.spec.arch.head_dim**-0.5
        return attention_sum(_query_key(block, x), teacher, targets, scale=scale)


def with_teacher(request: FitRequest, student: GPT2) -> nn.Module:
    """What `request.train.objective` asks for: the student itself for `ce`, else beside its teacher.

    Raises TrainError if there is no teacher to distil from, or it does not fit the student.
    """
    if request.train.objective == "ce":
        return student
    if request.teacher is None:
        raise TrainError("train.objective='kd' needs a teacher to learn from; this model has none: use 'ce'")
    try:
        teacher = load_native(request.teacher.local_folder(only=NATIVE_FILES))
    except (ModelError, FileNotFoundError) as err:
        raise TrainError(f"{request.teacher.uri}: {err}") from err
    return Distillation(student, teacher.to(student.wpe.weight.device), request.train.distill)


def _query_key(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    attention = block.attn
    assert isinstance(attention, Attention)
    query, key, _ = attention.heads(block.ln_1(x))  # type: ignore[operator]
    return query, key


def _require_comparable(student: GPT2, teacher: GPT2) -> None:
    for name in ("n_layer", "n_head", "n_embd", "n_ctx", "vocab_size"):
        mine, other = (getattr(model.spec.arch, name) for model in (student, teacher))
        if mine != other:
            raise TrainError(f"the student stands for {name}={mine:,}, its teacher has {other:,}")
    if [block.source for block in teacher.spec.blocks] != list(range(teacher.spec.arch.n_layer)):
        raise TrainError("a teacher needs all of its blocks; this one has lost some")
