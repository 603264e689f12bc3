# SPDX-License-Identifier: Apache-2.0
"""A GPT-2 whose weight matrices are held as factors, for `transformers`; written by krony beside the weights.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The maths is GPT-2's. A weight matrix (in, out) is dense, a sum of Kronecker products, or low rank, and is
multiplied by its factors; it is never formed. A tied head reads the token table, which is stored once.
Attention is torch's scaled dot product; attention maps are not kept.
"""

# B batch · T new tokens · S all tokens · C width · H heads · Q, O width of a key, of a value · r terms

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_krony import KronyConfig

Spec = Mapping[str, Any]
GELU = {"gelu_new": "tanh", "gelu": "none"}

LARGE = 131_072  # numbers of a matrix from which blocks are worth their call


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times a weight (in, out).

    BLAS libraries multiply a matrix and one column on a single thread; as a batch of blocks of its rows, all
    threads do, and memory is read twice as fast.
    """
    blocks = _blocks(x, weight, at_most=8)
    if blocks == 1:
        return x @ weight
    parts = torch.bmm(x.reshape(blocks, 1, -1), weight.view(blocks, -1, weight.shape[1]))
    return parts.sum(0).view(*x.shape[:-1], -1)


def scores(x: Tensor, table: Tensor) -> Tensor:
    """Inner products of x (..., C) with every row of a table (V, C), one x in blocks as in `times`."""
    blocks = _blocks(x, table, at_most=64)
    if blocks == 1:
        return F.linear(x, table)
    column = x.reshape(1, -1).t().expand(blocks, -1, 1)
    return torch.bmm(table.view(blocks, -1, table.shape[1]), column).view(*x.shape[:-1], -1)


def _blocks(x: Tensor, matrix: Tensor, *, at_most: int) -> int:
    """Into how many blocks of equally many rows a matrix is cut for this x; 1 unless it is one fp32 row."""
    if x.shape[:-1].numel() != 1 or matrix.numel() < LARGE or not matrix.is_contiguous():
        return 1
    exact = x.dtype == matrix.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or not exact:
        return 1
    return next(blocks for blocks in range(at_most, 0, -1) if matrix.shape[0] % blocks == 0)


class Weight(nn.Module):
    """y = xW + b; the first `n_bias` of `n_out` outputs have a bias."""

    def __init__(self, n_out: int, n_bias: int) -> None:
        super().__init__()
        self.missing = n_out - n_bias
        self.bias = nn.Parameter(torch.zeros(n_bias)) if n_bias else None

    def biased(self, y: Tensor) -> Tensor:
        """Add the bias."""
        if self.bias is None:
            return y
        return y + (F.pad(self.bias, (0, self.missing)) if self.missing else self.bias)


class DenseWeight(Weight):
    """The matrix itself, `weight` (in, out)."""

    def __init__(self, n_in: int, n_out: int, n_bias: int) -> None:
        super().__init__(n_out, n_bias)
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.bias is None or self.missing:
            return self.biased(x @ self.weight)
        if _blocks(x, self.weight, at_most=8) > 1:
            return self.biased(times(x, self.weight))
        return F.linear(x, self.weight.mT, self.bias)


class LowRankWeight(Weight):
    """`first` (in, rank) times `second` (rank, out)."""

    def __init__(self, spec: Spec, n_in: int, n_out: int, n_bias: int) -> None:
        super().__init__(n_out, n_bias)
        self.first = nn.Parameter(torch.zeros(n_in, spec["rank"]))
        self.second = nn.Parameter(torch.zeros(spec["rank"], n_out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.biased((x @ self.first) @ self.second)


class KronWeight(Weight):
    """sum_k s_k A_k (x) B_k: `left` A (r, m1, n1), `right` B (r, m2, n2); in and out may be permuted."""

    gather_in: Tensor | None
    gather_out: Tensor | None

    def __init__(self, spec: Spec, n_in: int, n_out: int, n_bias: int) -> None:
        super().__init__(n_out, n_bias)
        m1, n1, m2, n2, terms = (spec[name] for name in ("m1", "n1", "m2", "n2", "terms"))
        self.left = nn.Parameter(torch.zeros(terms, m1, n1))
        self.right = nn.Parameter(torch.zeros(terms, m2, n2))
        self.scales = nn.Parameter(torch.ones(terms)) if spec["scales"] else None
        self.register_buffer("gather_in", torch.arange(n_in) if spec["gather_in"] else None)
        self.register_buffer("gather_out", torch.arange(n_out) if spec["gather_out"] else None)
        self.a_first = m2 * n1 * (m1 + n2) < m1 * n2 * (m2 + n1)  # the cheaper order of the two products

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        left: Tensor = self.left
        right: Tensor = self.right
        if self.scales is not None:  # into the smaller factor
            scales = self.scales[:, None, None]
            if left.numel() < right.numel():
                left = left * scales
            else:
                right = right * scales
        if self.gather_in is not None:
            x = x[..., self.gather_in]
        y = self.product(x, left, right)
        return self.biased(y if self.gather_out is None else y[..., self.gather_out])

    def product(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """x times the sum, one factor after the other; a factor B with a side of 1 needs no transposition."""
        r, m1, n1 = left.shape
        m2, n2 = right.shape[1:]
        if m2 == 1 and self.a_first:
            y = times(x, left.permute(1, 2, 0).reshape(m1, n1 * r))
            return (y.reshape(*x.shape[:-1], n1, r) @ right[:, 0]).flatten(-2)
        if n2 == 1 and not self.a_first:
            y = (x.reshape(*x.shape[:-1], m1, m2) @ right[:, :, 0].mT).flatten(-2)  # (..., m1*r)
            return times(y, left.transpose(0, 1).reshape(m1 * r, n1))
        x = x.reshape(*x.shape[:-1], m1, m2)
        if self.a_first:
            x = torch.einsum("...pq,rpu->...ruq", x, left)
            return torch.einsum("...ruq,rqv->...uv", x, right).flatten(-2)
        x = torch.einsum("...pq,rqv->...rpv", x, right)
        return torch.einsum("...rpv,rpu->...uv", x, left).flatten(-2)


def make_weight(spec: Spec, n_in: int, n_out: int, n_bias: int) -> Weight:
    """What stands at one weight matrix."""
    if spec["kind"] == "dense":
        return DenseWeight(n_in, n_out, n_bias)
    if spec["kind"] == "low_rank":
        return LowRankWeight(spec, n_in, n_out, n_bias)
    if spec["kind"] == "kron":
        return KronWeight(spec, n_in, n_out, n_bias)
    raise ValueError(f"config.json: a matrix of kind {spec['kind']!r} needs a newer modeling_krony.py")


class Table(nn.Module):
    """A dense table `weight` (rows, width)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))

    def forward(self, idx: Tensor) -> Tensor:
        """Rows of the table: (...) -> (..., width)."""
        return F.embedding(idx, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """Inner products with every row."""
        return scores(x, self.weight)


class KronTable(nn.Module):
    """sum_k s_k A_k (x) b_k: `left` A (r, rows, n1), `right` b (r, 1, n2); the columns may be permuted."""

    gather_out: Tensor | None

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(spec["terms"], spec["m1"], spec["n1"]))
        self.right = nn.Parameter(torch.zeros(spec["terms"], 1, spec["n2"]))
        self.scales = nn.Parameter(torch.ones(spec["terms"])) if spec["scales"] else None
        width = spec["n1"] * spec["n2"]
        self.register_buffer("gather_out", torch.arange(width) if spec["gather_out"] else None)

    def rows(self) -> Tensor:
        """The short rows s_k b_k, (r, n2)."""
        return self.right[:, 0] if self.scales is None else self.right[:, 0] * self.scales[:, None]

    def forward(self, idx: Tensor) -> Tensor:
        """Rows of the table: (...) -> (..., width)."""
        narrow = torch.stack([F.embedding(idx, each) for each in self.left], dim=-1)  # (..., n1, r)
        wide = (narrow @ self.rows()).flatten(-2)
        return wide if self.gather_out is None else wide[..., self.gather_out]

    def logits(self, x: Tensor) -> Tensor:
        """Inner products with every row, through the factors."""
        if self.gather_out is not None:
            x = x[..., self.gather_out.argsort()]
        narrow = x.reshape(*x.shape[:-1], self.left.shape[2], -1) @ self.rows().mT  # (..., n1, r)
        if self.left.shape[0] == 1:
            return scores(narrow[..., 0], self.left[0])
        return F.linear(narrow.mT.flatten(-2), self.left.transpose(0, 1).flatten(1))


class KronyAttention(nn.Module):
    """Causal self-attention; heads may be narrower than stock, the scale stays that of the stock width."""

    def __init__(self, block: Spec, arch: Spec, layer: int) -> None:
        super().__init__()
        width, self.n_head, self.layer = arch["n_embd"], arch["n_head"], layer
        self.scale = (width // self.n_head) ** -0.5
        qk, vo = self.n_head * block["head_qk"], self.n_head * block["head_vo"]
        self.widths = [qk, qk, vo]
        matrix, has_all = block["attn_c_attn"], block["qkv_bias"] == "all"
        self.is_split = matrix["kind"] == "split"
        if self.is_split:
            self.q = make_weight(matrix["q"], width, qk, qk)
            self.k = make_weight(matrix["k"], width, qk, qk if has_all else 0)
            self.v = make_weight(matrix["v"], width, vo, vo if has_all else 0)
        else:
            self.c_attn = make_weight(matrix, width, 2 * qk + vo, 2 * qk + vo if has_all else qk)
        self.c_proj = make_weight(block["attn_c_proj"], vo, width, width)

    def forward(self, x: Tensor, cache: Cache | None, mask: Tensor | None, seen: int) -> Tensor:
        """(B, T, C) -> (B, T, C); keys and values go to the cache, of which `seen` tokens are filled."""
        parts = (
            (self.q(x), self.k(x), self.v(x)) if self.is_split else self.c_attn(x).split(self.widths, dim=-1)
        )
        q, k, v = (part.reshape(*x.shape[:2], self.n_head, -1).transpose(1, 2) for part in parts)
        if cache is not None:
            k, v = (part[:, :, :seen] for part in cache.update(k, v, self.layer))  # (B, H, S, Q or O)
        is_causal = mask is None and q.shape[2] > 1  # one new token sees everything
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale)
        out: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return out


class KronyMLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, block: Spec, arch: Spec) -> None:
        super().__init__()
        width, hidden = arch["n_embd"], block["mlp_hidden"]
        self.gelu = GELU[arch["activation"]]
        self.c_fc = make_weight(block["mlp_c_fc"], width, hidden, hidden)
        self.c_proj = make_weight(block["mlp_c_proj"], hidden, width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))
        return out


class KronyBlock(nn.Module):
    """x + attention, then x + MLP, each behind a LayerNorm."""

    def __init__(self, block: Spec, arch: Spec, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(arch["n_embd"], eps=arch["layer_norm_epsilon"])
        self.attn = KronyAttention(block, arch, layer)
        self.ln_2 = nn.LayerNorm(arch["n_embd"], eps=arch["layer_norm_epsilon"])
        self.mlp = KronyMLP(block, arch)

    def forward(self, x: Tensor, cache: Cache | None, mask: Tensor | None, seen: int) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache, mask, seen)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class KronyForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc] # transformers has no types here
    """The language model that `config.spec` describes."""

    config_class = KronyConfig
    base_model_prefix = "transformer"  # the names have no prefix; this one is never met
    main_input_name = "input_ids"
    _no_split_modules: ClassVar[list[str]] = ["KronyBlock"]
    _supports_sdpa = True

    def __init__(self, config: KronyConfig) -> None:
        super().__init__(config)
        spec = config.spec
        arch, embedding = spec["arch"], spec["embedding"]
        rows, width = arch["vocab_size"], arch["n_embd"]
        self.wte = KronTable(embedding) if embedding["kind"] == "kron" else Table(rows, width)
        self.wpe = Table(arch["n_ctx"], width)
        self.h = nn.ModuleList(KronyBlock(block, arch, i) for i, block in enumerate(spec["blocks"]))
        self.ln_f = nn.LayerNorm(width, eps=arch["layer_norm_epsilon"])
        self.lm_head = None if spec["tied"] else Table(rows, width)
        self.post_init()

    def forward(  # noqa: PLR0917 - the order of transformers
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V), as every causal model of transformers; `labels` are shifted here."""
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: this model computes no attention maps; use the dense export")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past, new = 0 if past_key_values is None else int(past_key_values.get_seq_length()), x.shape[1]
        if past + new > self.config.max_position_embeddings:
            raise ValueError(
                f"{past + new:,} tokens do not fit the context of {self.config.max_position_embeddings:,}"
            )
        if position_ids is None:
            position_ids = _positions(attention_mask, past, new, x.device)
        mask = _mask(attention_mask, past, new, x.device)
        seen = past + new if mask is None else mask.shape[-1]  # a cache of fixed size has room behind
        x = x + self.wpe(position_ids)
        states = [x]
        for block in self.h:
            x = block(x, past_key_values, mask, seen)
            states.append(x)
        states[-1] = x = self.ln_f(x)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head = self.wte if self.lm_head is None else self.lm_head
        logits = head.logits(x[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.wte

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, where it is not the token table."""
        return self.lm_head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights for `from_config`: products of factors have entries of standard deviation 0.02."""
        for name, parameter in module.named_parameters(recurse=False):
            if name == "scales" or (isinstance(module, nn.LayerNorm) and name == "weight"):
                parameter.fill_(1.0)
            elif name == "bias":
                parameter.zero_()
            else:
                summed = {"left": 0, "right": 0, "first": 1, "second": 0}.get(name)
                product = 0.02 if summed is None else (0.02 / parameter.shape[summed] ** 0.5) ** 0.5
                parameter.normal_(std=product)


def _positions(attention_mask: Tensor | None, past: int, new: int, device: torch.device) -> Tensor:
    """Where the new tokens stand, (1 or B, T): padding takes no place."""
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(past, past + new, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]


def _mask(attention_mask: Tensor | None, past: int, new: int, device: torch.device) -> Tensor | None:
    """What each new token may see, (B or 1, 1, T, S); None where causality says it all."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None and (past == 0 or new == 1):
        return None
    seen = torch.arange(past + new, device=device)
    own = torch.arange(past, past + new, device=device)[:, None]
    causal = (seen <= own)[None, None]
    if attention_mask is None:
        return causal
    # A padding token sees itself, so that no row of the softmax is empty.
    return (causal & attention_mask[:, None, None, :].bool()) | (seen == own)
