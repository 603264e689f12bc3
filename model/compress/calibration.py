"""Statistics of a model over calibration sequences: fp64 sums and counts that add up however they are split.

Hooks at every weight matrix read the inputs and, where a statistic asks for it, the gradients of the outputs;
no weight moves and none gets a gradient. Activations are in the model's precision, all products and sums in
float64. Squared gradients are those of single sequences: squaring the mean over a batch would shrink them.
"""

# B sequences · T tokens · m, n inputs and outputs of a weight matrix · H heads · C residual width
# x inputs (B, T, m) · d gradients of a sequence's mean loss with respect to outputs (B, T, n)

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.compress.contract import Stats, StatsSpec
from model.compress.stats_file import HALF
from model.config import ModelError
from model.gpt2 import GPT2, Attention
from model.losses import cross_entropy_sum


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """How statistics are taken."""

    skip_first_tokens: int = 0
    """Positions at the start of every sequence that no statistic counts."""

    fisher: Literal["sequence", "token"] = "sequence"
    """Squares of a sequence's gradient, or sums of the squares of its tokens' gradients."""

    labels: Literal["observed", "sampled"] = "observed"
    """What gradients are taken of: the next token of the text, or one drawn from the model (true Fisher)."""

    seed: int = 0
    """Of sampled labels; with the number of the sequence."""

    delta_trim: float = 0.125
    """Share of positions at each end of a sequence that `delta_gram` leaves out."""

    delta_clip: float = 10.0
    """Longest output gradient of a token in `delta_gram`, in mean lengths over its sequence."""


def collect(
    model: GPT2, spec: StatsSpec, rows: Tensor, *, measurement: Measurement, first: int = 0, batch: int = 1
) -> Stats:
    """The sums that `spec` asks for over token ids `rows` (sequences, T), the first of them number `first`.

    With `batch` 1 a sequence is computed alone, so that not even the rounding of activations depends on how
    sequences are shared out. The model is left as it was.
    """
    collector = Collector(model, spec, measurement)
    with collector.attached():
        for start in range(0, len(rows), batch):
            collector.measure(rows[start : start + batch], first=first + start)
    return collector.stats()


class Collector:
    """Hooks at the weight matrices of a model, and the sums that they fill while `attached`."""

    def __init__(self, model: GPT2, spec: StatsSpec, measurement: Measurement) -> None:
        self.model, self.spec, self.how = model, spec, measurement
        self.tokens = self.sequences = 0
        self.sums: dict[str, Tensor] = {}
        self.fisher_sites = spec.row_fisher | spec.col_fisher | spec.full_fisher
        self.gradient_sites = self.fisher_sites | spec.delta_gram
        self.even = torch.empty(0)  # (B,) 1 where the number of a sequence is even

    def stats(self) -> Stats:
        """What was measured so far, on the CPU."""
        sums = {key: value.cpu() for key, value in sorted(self.sums.items())}
        return Stats(tokens=self.tokens, sequences=self.sequences, sums=sums)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks in place, evaluation mode, exact fp32, no gradients of weights; all undone at the end."""
        model, spec = self.model, self.spec
        with ExitStack() as stack:
            stack.enter_context(_quiet(model))
            for name in sorted(spec.gram | spec.abs_mean | self.gradient_sites):
                hook = model.site(name).register_forward_hook(partial(self._at_site, name))
                stack.callback(hook.remove)
            for i, block in enumerate(model.h):
                if spec.block_influence:
                    stack.callback(block.register_forward_hook(partial(self._at_block, f"h.{i}")).remove)
                if spec.vo_mixed_gram:
                    attention = block.get_submodule("attn")
                    if not isinstance(attention, Attention) or attention.is_split:
                        raise ModelError(f"vo_mixed_gram of h.{i} needs a packed c_attn; measure the teacher")
                    hook = attention.c_attn.register_forward_hook(
                        partial(self._at_attention, f"h.{i}", attention)
                    )
                    stack.callback(hook.remove)
            yield

    def measure(self, ids: Tensor, *, first: int) -> None:
        """Run sequences (B, T), numbered from `first`, forward, and backward where that is asked for."""
        counted = ids.shape[1] - self.how.skip_first_tokens
        if not 2 <= counted <= ids.shape[1]:
            raise ModelError(
                f"sequences of {ids.shape[1]} tokens, {self.how.skip_first_tokens} of them skipped, "
                "leave nothing to measure"
            )
        ids = ids.to(self.model.wpe.weight.device)
        self.even = (torch.arange(first, first + len(ids), device=ids.device) % 2 == 0).double()
        if self.gradient_sites:
            with torch.enable_grad():
                loss = self._loss(ids, first=first) / (ids.shape[1] - 1)
                torch.autograd.grad(loss, self.model.wpe.weight)  # the hooks of all outputs lie on this way
        else:
            with torch.no_grad():
                self.model(ids)
        self.sequences += len(ids)
        self.tokens += len(ids) * counted

    def _loss(self, ids: Tensor, *, first: int) -> Tensor:
        """Sum of next-token losses; every sequence has T - 1 of them."""
        if self.how.labels == "observed":
            total: Tensor = self.model(ids, F.pad(ids[:, 1:], (0, 1), value=-1))
            return total
        logits: Tensor = self.model(ids)[:, :-1]
        numbers = range(first, first + len(ids))
        labels = [_draw(row, seed=self.how.seed, number=i) for row, i in zip(logits, numbers, strict=True)]
        return cross_entropy_sum(logits, torch.stack(labels))

    # --- forward ------------------------------------------------------------------------------------------

    def _at_site(self, name: str, _module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        x = args[0].detach()
        seen = x[:, self.how.skip_first_tokens :].double().flatten(0, 1)  # (B*T, m)
        if name in self.spec.gram:
            self._add("gram", name, seen.mT @ seen)
            self._add("mean", name, seen.sum(dim=0))
        if name in self.spec.abs_mean:
            self._add("abs_mean", name, seen.abs().sum(dim=0))
        if name in self.gradient_sites:
            output.register_hook(partial(self._at_gradient, name, x))  # type: ignore[no-untyped-call]

    def _at_block(self, name: str, _module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        before, after = args[0].detach().double(), output.detach().double()
        cosine = F.cosine_similarity(before, after, dim=-1)  # (B, T)
        self._add("block_influence", name, cosine[:, self.how.skip_first_tokens :].sum())

    @torch.no_grad()
    def _at_attention(
        self, name: str, attention: Attention, _module: nn.Module, args: tuple[Tensor], output: Tensor
    ) -> None:
        """Per head, the Gram matrix of the inputs as its attention averages them."""
        q, k, _ = (
            part.reshape(*part.shape[:2], attention.n_head, -1).transpose(1, 2)
            for part in torch.split(output, attention.widths, dim=-1)
        )  # (B, H, T, width)
        T = q.shape[2]
        causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = (q @ k.mT * attention.scale).masked_fill(~causal, -torch.inf)  # (B, H, T, T)
        mixed = scores.softmax(dim=-1) @ args[0].unsqueeze(1)  # (B, H, T, C)
        mixed = mixed[:, :, self.how.skip_first_tokens :].double()
        self._add("vo_mixed_gram", name, torch.einsum("bhtc,bhtd->hcd", mixed, mixed))

    # --- backward -----------------------------------------------------------------------------------------

    def _at_gradient(self, name: str, x: Tensor, delta: Tensor) -> None:
        spec, skip = self.spec, self.how.skip_first_tokens
        if name in spec.delta_gram:
            d = self._trimmed(delta.double()).flatten(0, 1)
            self._add("delta_gram", name, d.mT @ d)
        if name not in self.fisher_sites:
            return
        x, d = x[:, skip:].double(), delta[:, skip:].double()
        by_token = self.how.fisher == "token"
        squares = x.square().mT @ d.square() if by_token else (x.mT @ d).square_()  # (B, m, n)
        if name in spec.row_fisher:
            rows = squares.sum(dim=2)  # (B, m)
            self._add("row_fisher", name, rows.sum(dim=0))
            self._add(HALF, name, self.even @ rows)
        if name in spec.col_fisher:
            self._add("col_fisher", name, squares.sum(dim=(0, 1)))
        if name in spec.full_fisher:
            self._add("full_fisher", name, squares.sum(dim=0))

    def _trimmed(self, delta: Tensor) -> Tensor:
        """Without both ends of the sequence, and with long rows shortened (LEMS, KFAC-SVD)."""
        cut = int(delta.shape[1] * self.how.delta_trim)
        kept = delta[:, max(cut, self.how.skip_first_tokens) : delta.shape[1] - cut]
        length = kept.norm(dim=-1, keepdim=True)  # (B, t, 1)
        limit = self.how.delta_clip * length.mean(dim=1, keepdim=True)
        return torch.where(length > limit, kept * (limit / length), kept)

    def _add(self, field: str, name: str, value: Tensor) -> None:
        key = f"{field}/{name}"
        if key in self.sums:
            self.sums[key] += value
        else:
            self.sums[key] = value


@contextmanager
def _quiet(model: GPT2) -> Iterator[None]:
    """Evaluation mode, matrix products in full precision, and no gradient of any weight but `wpe`."""
    was_training, precision = model.training, torch.get_float32_matmul_precision()
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(parameter is model.wpe.weight)
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        torch.set_float32_matmul_precision(precision)
        model.train(was_training)


def _draw(logits: Tensor, *, seed: int, number: int) -> Tensor:
    """One token per position (T,) from logits (T, V): the same on every device and in every batch."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    level = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    cumulative = logits.detach().double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, level).clamp_max(logits.shape[-1] - 1)[:, 0]
