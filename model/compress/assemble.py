"""A new model from an old one: everything that a plan keeps is copied, the rest is left to the method."""

from typing import Any

import torch

from model.algebra.psd import metric_loss
from model.algebra.weighted import elementwise_loss
from model.compress.contract import ModuleReport, Plan
from model.config import Matrix, ModelError, SplitQKV
from model.gpt2 import GPT2


def transplant(model: GPT2, plan: Plan) -> GPT2:
    """A new model of `plan.spec` with copies of all that keeps its place and shape; the rest is zero.

    Blocks are matched by their source, so dropped blocks leave no hole. Biases of replaced matrices are
    copied where they keep their length. A head that is no longer tied starts as the token table.
    """
    if model.spec != plan.source:
        raise ModelError(f"the {plan.method} plan was made for another model; make it again for this one")
    fresh = GPT2(plan.spec).to(model.wpe.weight)
    index = {block.source: i for i, block in enumerate(model.spec.blocks)}
    changed, old, new = plan.changed(), model.state_dict(), fresh.state_dict()
    kept: dict[str, torch.Tensor] = {}
    for name, value in new.items():
        source, module = name, name.rpartition(".")[0]
        if name.startswith("h."):
            _, i, rest = name.split(".", 2)
            source = f"h.{index[plan.spec.blocks[int(i)].source]}.{rest}"
        is_free = module in changed and not name.endswith(".bias")
        if not is_free and source in old and old[source].shape == value.shape:
            kept[name] = old[source]
    if "lm_head.weight" in new and "lm_head.weight" not in old:
        kept["lm_head.weight"] = model.wte.table().detach()
    fresh.load_state_dict(new | kept, strict=True)
    return fresh.train(model.training)


def source_matrix(model: GPT2, plan: Plan, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (in, out) and bias that stood in `model` where the matrix `name` of the new one stands.

    Blocks are matched by their source; a query, key or value of its own is cut out of a packed `c_attn`.
    """
    _, i, role = name.split(".", 2)
    source = plan.spec.blocks[int(i)].source
    old = next(k for k, block in enumerate(model.spec.blocks) if block.source == source)
    is_packed = not isinstance(model.spec.blocks[old].attn_c_attn, SplitQKV)
    if not (is_packed and role in ("attn.q", "attn.k", "attn.v")):
        layer = model.site(f"h.{old}.{role}")
        bias = layer.full_bias()
        return layer.weight_matrix().detach(), None if bias is None else bias.detach()
    weight, full = model.site(f"h.{old}.attn.c_attn").to_dense()
    block, heads = model.spec.blocks[old], model.spec.arch.n_head
    widths = [heads * width for width in (block.head_qk, block.head_qk, block.head_vo)]
    part = "qkv".index(role[-1])
    return torch.split(weight, widths, dim=1)[part], torch.split(full, widths)[part]


def report_module(
    fresh: GPT2, name: str, weight: torch.Tensor, *, predicted_error: float | None, **others: Any
) -> ModuleReport:
    """The report of one replaced matrix; `weight` (n_in, n_out) is what was there. See `report_matrix`."""
    layer = fresh.site(name)
    kept = layer.weight_matrix().detach()
    return report_matrix(name, layer.matrix, weight, kept, predicted_error=predicted_error, **others)


def report_matrix(
    name: str,
    matrix: Matrix,
    weight: torch.Tensor,
    kept: torch.Tensor,
    *,
    predicted_error: float | None,
    metric: str = "frobenius",
    input_metric: torch.Tensor | None = None,
    output_metric: torch.Tensor | None = None,
    entry_weights: torch.Tensor | None = None,
    bias_error: float = 0.0,
    **details: float | str,
) -> ModuleReport:
    """The report of `kept` in place of `weight`, both (n_in, n_out).

    Errors are tr(G D^T C D) of the weights as stored, in the given metrics (default: the identity), plus
    `bias_error`, what a corrected bias leaves; or sum_ij F_ij D_ij^2 under `entry_weights`. Outside the
    Frobenius metric `frobenius_kept` says what is kept in that one, so that methods can be compared.
    """
    weight = weight.detach().double()
    difference, cost = kept.double() - weight, matrix.cost(*weight.shape)

    def loss(rest: torch.Tensor) -> float:
        if entry_weights is not None:
            return elementwise_loss(rest, entry_weights)
        return metric_loss(rest, input_metric=input_metric, output_metric=output_metric)

    energy, achieved = loss(weight), loss(difference) + bias_error
    if not all(each is None for each in (input_metric, output_metric, entry_weights)):
        details["frobenius_kept"] = _kept(
            float(difference.square().sum()), energy=float(weight.square().sum())
        )
    return ModuleReport(
        name=name,
        structure=matrix.describe(),
        parameters=cost.params,
        dense_parameters=weight.numel(),
        macs=cost.macs,
        rank_bound=cost.rank_bound,
        energy=energy,
        achieved_error=achieved,
        energy_kept=_kept(achieved, energy=energy),
        predicted_error=predicted_error,
        metric=metric,
        details=details,
    )


def _kept(error: float, *, energy: float) -> float:
    return 1.0 - error / energy if energy > 0 else 1.0
