"""`kron_perm`: Van Loan in better orders of rows and columns, found for both MLP matrices of a block at once.

One order of the hidden units serves both matrices and folds into them and the bias, at no cost. Orders on the
residual side, and a second hidden order where it is wanted, stay in the model as index buffers. The stored
order is always among the starts, so a pair is never worse than `kron_vl`.
"""

from functools import partial

import torch
from torch import Tensor

from model.algebra.permute import Orders, permuted_kron_pair
from model.compress.assemble import report_module, transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, ModuleReport, Plan, Stats, StatsSpec
from model.compress.kron_plan import DOWN, UP, Gathers, KronChoice, chosen_blocks, plan_kron_mlp
from model.compress.kron_recipe import KronPerm, TQCompressor
from model.compress.kronecker import course, kron_layer, set_factors
from model.compress.side_by_side import side_by_side
from model.config import ModelSpec
from model.gpt2 import GPT2
from model.layers.kronecker import KroneckerLinear


class KronPermMethod:
    """Permuted pairs, see `model.compress.kron_recipe.KronPerm`."""

    name = "kron_perm"

    def __init__(self, config: KronPerm) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Weights alone."""
        return StatsSpec()

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """As `kron_vl`, with index buffers where an order cannot be folded."""
        choice = KronChoice.of(self.config, gathers=gathers_of(self.config.hidden, outer=self.config.outer))
        return plan_kron_mlp(self.name, arch, choice, budget)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Deterministic in the seed, which draws the random starts."""
        fresh, config = transplant(model, plan), self.config
        fit = partial(fit_permuted_block, model, fresh, config=config, outer=config.outer, seed=seed)
        pairs = side_by_side([partial(fit, i) for i in chosen_blocks(model.spec, config.layers)])
        return CompressedModel(model=fresh, plan=plan, report=tuple(row for pair in pairs for row in pair))


def gathers_of(hidden: str, *, outer: bool) -> Gathers:
    """Which orders stay as index buffers."""
    if hidden == "separate":
        return "all" if outer else "hidden"
    return "outer" if outer else "none"


def fit_permuted_block(
    model: GPT2, fresh: GPT2, block: int, *, config: KronPerm | TQCompressor, outer: bool, seed: int
) -> tuple[ModuleReport, ModuleReport]:
    """Search the orders of one block, fill both its layers, and report on them."""
    names = f"h.{block}.{UP}", f"h.{block}.{DOWN}"
    weights = model.site(names[0]).weight_matrix(), model.site(names[1]).weight_matrix()
    up, down = (kron_layer(fresh, name) for name in names)
    pair = permuted_kron_pair(
        *weights,
        up.shape,
        terms=up.left.shape[0],
        hidden=config.hidden,
        outer=outer,
        random_starts=config.random_starts,
        seed=seed + block,
        max_sweeps=config.max_sweeps,
        rtol=config.rtol,
        gauge=config.gauge,
    )
    set_factors(up, pair.up.left, pair.up.right)
    set_factors(down, pair.down.left, pair.down.right)
    set_orders(up, down, pair.orders)
    ordered = weights[0][:, pair.orders.hidden], weights[1][pair.orders.hidden]
    report_up, report_down = (
        report_module(
            fresh,
            name,
            weight,
            predicted_error=fit.error,
            tail=fit.tail,
            index_bytes=float(sum(buffer.nbytes for buffer in layer.buffers())),
            pair_error=pair.loss,
            **course(pair.convergence),
        )
        for name, weight, fit, layer in zip(names, ordered, (pair.up, pair.down), (up, down), strict=True)
    )
    return report_up, report_down


@torch.no_grad()
def set_orders(up: KroneckerLinear, down: KroneckerLinear, orders: Orders) -> None:
    """Fold the hidden order into the bias between the two layers, and set the index buffers of the rest.

    The hidden units of the new model stand in the order of the up-projection; a down-projection with an order
    of its own gathers from there.
    """
    if up.bias is not None:
        up.bias.copy_(up.bias[orders.hidden])
    for buffer, order in (
        (up.gather_in, orders.inputs),
        (down.gather_in, orders.hidden.argsort()[orders.hidden_down]),
        (down.gather_out, orders.outputs.argsort()),
    ):
        if buffer is not None:
            buffer.copy_(order)
        else:
            assert _is_stored(order), "an order has neither a buffer nor a place to fold into"


def _is_stored(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), device=order.device))
