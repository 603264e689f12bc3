"""Reports of modules fitted together: an error belongs to a pair of matrices, and both rows carry it."""

from model.compress.contract import ModuleReport
from model.gpt2 import GPT2

MLP_ERROR = "output error of the pair"
"""Mean squared error of what an MLP adds to the stream, over the calibration tokens."""


def pair_report(
    fresh: GPT2, model: GPT2, i: int, *, predicted: float, achieved: float, energy: float, metric: str
) -> tuple[ModuleReport, ModuleReport]:
    """The rows of both MLP matrices of block `i`, with the error of the block's MLP output."""
    kept, full = fresh.spec.blocks[i].mlp_hidden, model.spec.blocks[i].mlp_hidden

    def row(role: str) -> ModuleReport:
        return narrow_report(
            fresh,
            model,
            f"h.{i}.mlp.{role}",
            structure=f"{kept} of {full} units",
            predicted=predicted,
            achieved=achieved,
            energy=energy,
            metric=metric,
        )

    return row("c_fc"), row("c_proj")


def narrow_report(
    fresh: GPT2,
    model: GPT2,
    name: str,
    *,
    structure: str,
    predicted: float | None,
    achieved: float,
    energy: float,
    metric: str,
    **details: float | str,
) -> ModuleReport:
    """The row of one matrix of the pair."""
    new, old = fresh.site(name), model.site(name)
    cost = new.matrix.cost(new.n_in, new.n_out)
    return ModuleReport(
        name=name,
        structure=structure,
        parameters=cost.params,
        dense_parameters=old.n_in * old.n_out,
        macs=cost.macs,
        rank_bound=cost.rank_bound,
        energy=energy,
        achieved_error=achieved,
        energy_kept=1.0 - achieved / energy if energy > 0 else 1.0,
        predicted_error=predicted,
        metric=metric,
        details=details,
    )
