"""GPT-2, with a seam where every weight matrix plugs in.

The maths is that of the stock model: pre-LayerNorm blocks, learned positions, GELU, tied head. What
stands at a weight matrix is asked of a factory, so a compressed model is this file with other layers. Heads
and MLPs may be narrower than stock; the attention scale stays that of the stock head width.
"""

# B batch · T tokens · C residual width · V vocabulary · H heads · Q, O width of a query or key, of a value

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import causal_attention
from model.config import BlockSpec, Convention, GPT2Config, ModelError, ModelSpec, SplitQKV
from model.layers.embedding import Embedding
from model.layers.factory import LinearFactory, make_linear, make_table
from model.layers.gelu import gelu
from model.layers.kronecker import KroneckerLinear
from model.layers.paired import paired
from model.layers.structured import StructuredLinear
from model.losses import chunked_cross_entropy_sum

GELU: Mapping[str, str] = {"gelu_new": "tanh", "gelu": "none"}
"""How torch calls them."""

CPU_PIECE = 1024
"""Tokens that a Kronecker MLP takes at a time on a CPU: what lies between its factors is cached then."""

Recompute = Literal["none", "mlp", "block"]
"""What is made again in the backward pass instead of being kept; changes memory and time, never a result."""

INIT_STD = 0.02
"""Standard deviation of GPT-2's fresh weights."""


class Attention(nn.Module):
    """Causal self-attention."""

    c_attn: StructuredLinear
    q: StructuredLinear
    k: StructuredLinear
    v: StructuredLinear

    def __init__(self, block: BlockSpec, arch: GPT2Config, layers: dict[str, StructuredLinear]) -> None:
        super().__init__()
        self.n_head, self.scale = arch.n_head, arch.head_dim**-0.5
        self.widths = [arch.n_head * width for width in (block.head_qk, block.head_qk, block.head_vo)]
        self.is_split = isinstance(block.attn_c_attn, SplitQKV)
        for name in ("q", "k", "v") if self.is_split else ("c_attn",):
            self.add_module(name, layers[f"attn.{name}"])
        self.c_proj = layers["attn.c_proj"]

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, H, T, Q) and values (B, H, T, O) of (B, T, C)."""
        parts = (
            (self.q(x), self.k(x), self.v(x)) if self.is_split else self.c_attn(x).split(self.widths, dim=-1)
        )
        q, k, v = (part.reshape(*x.shape[:2], self.n_head, -1).transpose(1, 2) for part in parts)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = self.heads(x)
        y = causal_attention(q, k, v, scale=self.scale)  # (B, H, T, O)
        out: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, arch: GPT2Config, layers: dict[str, StructuredLinear]) -> None:
        super().__init__()
        self.gelu = GELU[arch.activation]
        self.c_fc, self.c_proj = layers["mlp.c_fc"], layers["mlp.c_proj"]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out = paired(self.c_fc, self.c_proj, x, gelu=self.gelu)
        if out is not None:
            return out
        if self._in_pieces(x):
            pieces = torch.split(x.flatten(0, -2), CPU_PIECE)
            return torch.cat([self._both(piece) for piece in pieces]).view(x.shape)
        return self._both(x)

    def _in_pieces(self, x: Tensor) -> bool:
        """Whether the activations between factors are worth keeping in cache; a formed W is formed once."""
        tokens = x.shape[:-1].numel()
        if x.device.type != "cpu" or tokens <= CPU_PIECE or torch.compiler.is_compiling():
            return False
        layers = (self.c_fc, self.c_proj)
        return all(
            isinstance(each, KroneckerLinear) and each.resolve_mode(tokens) == "factored" for each in layers
        )

    def _both(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(gelu(self.c_fc(x), approximate=self.gelu))
        return out


class Block(nn.Module):
    """x + attention, then x + MLP, each behind a LayerNorm."""

    def __init__(self, block: BlockSpec, arch: GPT2Config, factory: LinearFactory) -> None:
        super().__init__()
        layers = {site.name: factory(site) for site in block.sites(arch)}
        self.ln_1 = nn.LayerNorm(arch.n_embd, eps=arch.layer_norm_epsilon)
        self.attn = Attention(block, arch, layers)
        self.ln_2 = nn.LayerNorm(arch.n_embd, eps=arch.layer_norm_epsilon)
        self.mlp = MLP(arch, layers)
        self.recompute: Recompute = "none"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        if recompute == "block":
            whole: Tensor = _remade(self._both, x)
            return whole
        return self._both(x, mlp=partial(_remade, self.mlp) if recompute == "mlp" else None)

    def _both(self, x: Tensor, *, mlp: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + (mlp or self.mlp)(self.ln_2(x))
        return out


def _remade(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which only x is kept for the backward pass; nothing here draws random numbers."""
    out: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return out


def set_recompute(model: "GPT2", what: Recompute) -> None:
    """Choose what every block makes again in the backward pass."""
    for block in model.h:
        block.recompute = what  # type: ignore[assignment]


class GPT2(nn.Module):
    """The language model that a `ModelSpec` describes; weights are zero until `init_weights` or a load."""

    def __init__(self, spec: ModelSpec, *, factory: LinearFactory = make_linear) -> None:
        super().__init__()
        arch = spec.arch
        self.spec = spec
        self.wte = make_table(spec.embedding, rows=arch.vocab_size, width=arch.n_embd)
        self.wpe = Embedding(arch.n_ctx, arch.n_embd)
        self.h = nn.ModuleList(Block(block, arch, factory) for block in spec.blocks)
        self.ln_f = nn.LayerNorm(arch.n_embd, eps=arch.layer_norm_epsilon)
        self.lm_head = None if spec.tied else Embedding(arch.vocab_size, arch.n_embd)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T); with targets (B, T), the fp32 sum of token losses (< 0: none)."""
        x = self.embed(idx)
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.logits(x)
        vocab_size = self.spec.arch.vocab_size
        return chunked_cross_entropy_sum(x, targets, head=self.logits, vocab_size=vocab_size)

    def embed(self, idx: Tensor) -> Tensor:
        """What enters the first block: (B, T) -> (B, T, C)."""
        if idx.shape[-1] > self.spec.arch.n_ctx:
            raise ModelError(f"{idx.shape[-1]:,} tokens do not fit the context of {self.spec.arch.n_ctx:,}")
        tokens: Tensor = self.wte(idx)
        return tokens + self.wpe.weight[: idx.shape[-1]]

    def logits(self, x: Tensor) -> Tensor:
        """The output head: (..., C), after `ln_f`, -> (..., V)."""
        return self.wte.logits(x) if self.lm_head is None else self.lm_head.logits(x)

    def site(self, name: str) -> StructuredLinear:
        """The layer at a weight matrix, such as `h.0.mlp.c_fc`."""
        layer = self.get_submodule(name)
        if not isinstance(layer, StructuredLinear):
            raise ModelError(f"{name!r} is a {type(layer).__name__}, not a weight matrix")
        return layer

    def init_weights(self, *, seed: int) -> "GPT2":
        """Fresh weights as GPT-2 has them: std 0.02, and 0.02 / sqrt(2 L) in both `c_proj`. Returns self.

        Factors are drawn so that their product has that std. The same seed gives the same weights.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / (2 * len(self.h)) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, StructuredLinear):
                std = residual_std if name.endswith("c_proj") else INIT_STD
                module.init_weights(std=std, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif module in (self.wte, self.wpe, self.lm_head):
                module.init_weights(std=INIT_STD, generator=generator)
        return self

    def num_parameters(self, convention: Convention = "tied_all") -> int:
        """Unique trainable parameters, counted on the tensors; equal to `spec.num_parameters`."""
        total = sum(p.numel() for p in self.parameters())
        wte, wpe = (sum(p.numel() for p in table.parameters()) for table in (self.wte, self.wpe))
        return total - {"tied_all": 0, "krony_no_wpe": wpe, "non_embedding": wte + wpe}[convention]
