"""A new model from an old one: everything that a plan keeps is copied, the rest is left to the method."""

import torch

from model.algebra.psd import metric_loss
from model.compress.contract import ModuleReport, Plan
from model.config import ModelError
from model.gpt2 import GPT2


def transplant(model: GPT2, plan: Plan) -> GPT2:
    """A new model of `plan.spec` with copies of all that keeps its place and shape; the rest is zero.

    Blocks are matched by their source, so dropped blocks leave no hole. Biases of replaced matrices are
    copied where they keep their length.
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
    fresh.load_state_dict(new | kept, strict=True)
    return fresh.train(model.training)


def report_module(
    fresh: GPT2,
    name: str,
    weight: torch.Tensor,
    *,
    predicted_error: float | None,
    metric: str = "frobenius",
    input_metric: torch.Tensor | None = None,
    output_metric: torch.Tensor | None = None,
    bias_error: float = 0.0,
    **details: float,
) -> ModuleReport:
    """The report of one replaced matrix; `weight` (n_in, n_out) is what was there.

    Errors are tr(G D^T C D) of the weights as stored, in the given metrics (default: the identity), plus
    `bias_error`, what a corrected bias leaves. Outside the Frobenius metric `frobenius_kept` says what is
    kept in that one, so that methods can be compared.
    """
    layer = fresh.site(name)
    weight = weight.detach().double()
    difference = layer.weight_matrix().detach().double() - weight
    energy = metric_loss(weight, input_metric=input_metric, output_metric=output_metric)
    achieved = metric_loss(difference, input_metric=input_metric, output_metric=output_metric) + bias_error
    if input_metric is not None or output_metric is not None:
        details["frobenius_kept"] = _kept(
            float(difference.square().sum()), energy=float(weight.square().sum())
        )
    return ModuleReport(
        name=name,
        structure=layer.matrix.describe(),
        parameters=layer.cost.params,
        dense_parameters=weight.numel(),
        macs=layer.cost.macs,
        rank_bound=layer.cost.rank_bound,
        energy=energy,
        achieved_error=achieved,
        energy_kept=_kept(achieved, energy=energy),
        predicted_error=predicted_error,
        metric=metric,
        details=details,
    )


def _kept(error: float, *, energy: float) -> float:
    return 1.0 - error / energy if energy > 0 else 1.0
