"""Narrower heads: queries and keys by their logits, values and outputs by their product, head by head.

The exact rewrites come first: a key bias adds the same to all logits of a query, and a value bias passes
through attention rows that sum to one, into the output bias. What remains has no key and no value bias.
"""

# d residual width · H heads · s stock head width, r kept · W_q, W_k, W_v (H, d, s), W_o (H, s, d)
# C second moment of the layer input (d, d), mu its mean (d,)

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.algebra.attention import (
    QueryKey,
    ValueOutput,
    cr_scores,
    head_gram,
    head_metric,
    joint_query_key,
    value_output,
)
from model.algebra.nystrom import keep_top
from model.algebra.psd import centred
from model.compress.contract import ModuleReport, Stats
from model.compress.structural_recipe import ModeGPT, ModeGPTJoint
from model.compress.structural_report import narrow_report
from model.gpt2 import GPT2
from model.layers.dense import DenseLinear


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """The matrices of one attention, head by head, in float64."""

    query: Tensor
    query_bias: Tensor
    """(H, s)."""
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    output: Tensor
    output_bias: Tensor
    """(d,)."""

    @classmethod
    def of(cls, model: GPT2, i: int) -> "Heads":
        """Those of block `i` of a model whose attention is dense; absent biases are 0."""
        count, block = model.spec.arch.n_head, model.spec.blocks[i]
        widths = [count * width for width in (block.head_qk, block.head_qk, block.head_vo)]
        packed, bias = (each.double() for each in model.site(f"h.{i}.attn.c_attn").to_dense())
        output, output_bias = (each.double() for each in model.site(f"h.{i}.attn.c_proj").to_dense())
        query, key, value = (
            part.reshape(len(packed), count, -1).transpose(0, 1)
            for part in torch.split(packed, widths, dim=1)
        )
        query_bias, key_bias, value_bias = (part.reshape(count, -1) for part in torch.split(bias, widths))
        return cls(
            query=query,
            query_bias=query_bias,
            key=key,
            key_bias=key_bias,
            value=value,
            value_bias=value_bias,
            output=output.reshape(count, block.head_vo, -1),
            output_bias=output_bias,
        )

    def without_key_bias(self) -> "Heads":
        """The same attention: a query's logits all move by the same, which softmax cannot see."""
        return replace(self, key_bias=torch.zeros_like(self.key_bias))

    def without_value_bias(self) -> "Heads":
        """The same attention, without dropout: rows that sum to one carry the bias to the output."""
        carried = torch.einsum("hs,hsd->d", self.value_bias, self.output)
        return replace(
            self, value_bias=torch.zeros_like(self.value_bias), output_bias=self.output_bias + carried
        )

    def mean_output(self, mean: Tensor) -> Tensor:
        """What a mean input (d,) gives through values and output, biases apart: (d,)."""
        return torch.einsum("c,hcs,hsd->d", mean, self.value, self.output)


def narrow_attention(
    model: GPT2, fresh: GPT2, i: int, stats: Stats, config: ModeGPT | ModeGPTJoint
) -> tuple[ModuleReport, ModuleReport]:
    """Fill both attention matrices of block `i`; the reports hold the error of logits and that of values."""
    original, block = Heads.of(model, i), fresh.spec.blocks[i]
    old = original.without_key_bias().without_value_bias()
    name, device = f"h.{i}.attn.c_attn", original.query.device
    gram, mean = (stats.mean(f"{field}/{name}").to(device) for field in ("gram", "mean"))

    pair, logit_error = _query_key(original, gram, mean, rank=block.head_qk, config=config)
    is_mixed = config.vo_cov == "mixed"
    is_centred = config.bias_correction and not is_mixed
    metric = stats.mean(f"vo_mixed_gram/h.{i}").to(device) if is_mixed else gram
    metric = centred(gram, mean) if is_centred else metric
    narrow = value_output(old.value, old.output, metric, rank=block.head_vo)

    _write(fresh, i, pair, narrow, old.output_bias)
    kept, lost = Heads.of(fresh, i), torch.zeros_like(old.output_bias)
    if is_centred:
        lost = old.mean_output(mean) - kept.mean_output(mean)
        _write(fresh, i, pair, narrow, old.output_bias + lost)
        lost = lost + old.output_bias - Heads.of(fresh, i).output_bias  # what rounding leaves of it

    width = model.spec.arch.head_dim
    logits = narrow_report(
        fresh,
        model,
        name,
        structure=f"queries, keys {block.head_qk}, values {block.head_vo} of {width} per head",
        predicted=logit_error,
        achieved=_logit_error(old, kept, gram, mean),
        energy=float((_query_gram(old, gram, mean) * _key_cov(old, gram, mean)).sum()),
        metric="logit error over all pairs",
    )
    values = narrow_report(
        fresh,
        model,
        f"h.{i}.attn.c_proj",
        structure=f"{block.head_vo} of {width} per head",
        predicted=float(narrow.sigma[..., block.head_vo :].square().sum()),
        achieved=_value_error(old, kept, metric) + float(lost.square().sum()),
        energy=float(narrow.sigma.square().sum()),
        metric="output error per head, mixed inputs" if is_mixed else "output error per head",
    )
    return logits, values


def _query_key(
    heads: Heads, gram: Tensor, mean: Tensor, *, rank: int, config: ModeGPT | ModeGPTJoint
) -> tuple[QueryKey, float]:
    """The narrower pair, and its logit error over all (query, key) pairs, summed over heads."""
    queries, keys = _query_gram(heads, gram, mean), _key_cov(heads, gram, mean)  # (H, s, s)
    if isinstance(config, ModeGPTJoint):
        pair = joint_query_key(heads.query, heads.query_bias, heads.key, queries, keys, rank=rank)
        return pair, float(pair.sigma[..., rank:].square().sum())
    scores = cr_scores(queries, head_gram(heads.key, heads.key_bias, gram, mean))
    keep = torch.stack([keep_top(each, rank) for each in scores])  # (H, r)
    is_cut = torch.ones_like(scores).scatter_(1, keep, 0.0)  # (H, s)
    columns = keep.unsqueeze(1).expand(-1, heads.query.shape[1], -1)
    pair = QueryKey(
        query=heads.query.gather(2, columns),
        query_bias=heads.query_bias.gather(1, keep),
        key=heads.key.gather(2, columns),
        sigma=scores,
    )
    cut = is_cut.unsqueeze(2) * is_cut.unsqueeze(1)
    return pair, float((queries * keys * cut).sum())


def _query_gram(heads: Heads, gram: Tensor, mean: Tensor) -> Tensor:
    """E[q^T q] with the bias, (H, s, s)."""
    return head_gram(heads.query, heads.query_bias, gram, mean)


def _key_cov(heads: Heads, gram: Tensor, mean: Tensor) -> Tensor:
    """Covariance of the keys, (H, s, s): softmax sees no more of them."""
    return head_metric(heads.key, centred(gram, mean))


def _logit_error(old: Heads, new: Heads, gram: Tensor, mean: Tensor) -> float:
    """Mean squared difference of all centred logits, before the scale, summed over heads."""
    both = replace(
        old,
        query=torch.cat([old.query, -new.query], dim=-1),
        query_bias=torch.cat([old.query_bias, -new.query_bias], dim=-1),
        key=torch.cat([old.key, new.key], dim=-1),
    )
    return float((_query_gram(both, gram, mean) * _key_cov(both, gram, mean)).sum())


def _value_error(old: Heads, new: Heads, metric: Tensor) -> float:
    """||C^1/2 (W_v W_o - W_v' W_o')||^2 summed over heads."""
    values = torch.cat([old.value, new.value], dim=-1)
    outputs = torch.cat([old.output, -new.output], dim=-2)
    return float((head_metric(values, metric) * (outputs @ outputs.mT)).sum())


def _write(fresh: GPT2, i: int, pair: QueryKey, narrow: ValueOutput, bias: Tensor) -> None:
    packed, output = fresh.site(f"h.{i}.attn.c_attn"), fresh.site(f"h.{i}.attn.c_proj")
    assert isinstance(packed, DenseLinear)
    assert isinstance(output, DenseLinear)
    assert packed.bias is not None
    assert output.bias is not None
    parts = (part.transpose(0, 1).flatten(1) for part in (pair.query, pair.key, narrow.value))  # (d, H r)
    packed.weight.copy_(torch.cat(list(parts), dim=1))
    packed.bias.copy_(pair.query_bias.flatten())
    output.weight.copy_(narrow.output.flatten(0, 1))
    output.bias.copy_(bias)
