"""Two published Kronecker compressions of GPT-2, as far as they are known; the rest is defined by us.

KnGPT2 (arXiv 2110.08152) factors attention, MLP and embedding; TQCompressor (arXiv 2401.16367) MLP and
embedding, in permuted orders. Both leave every second block dense. Neither is the authors' code: tables call
them "-style (ours)".
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from model.algebra.kron import nearest_kron
from model.algebra.permute_columns import halved_columns
from model.algebra.shapes import KronShape
from model.compress.assemble import report_module, source_matrix, transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, ModuleReport, Plan, Stats, StatsSpec
from model.compress.kron_perm import fit_permuted_block, gathers_of
from model.compress.kron_plan import DOWN, UP, KronChoice, chosen_blocks, with_kron_mlp
from model.compress.kron_recipe import KnGPT2, TQCompressor
from model.compress.kron_table import report_table, set_table, with_kron_table
from model.compress.kronecker import kron_layer, set_factors
from model.compress.side_by_side import side_by_side
from model.config import Dense, Kron, ModelError, ModelSpec, Site
from model.gpt2 import GPT2
from model.layers.embedding import KroneckerEmbedding

Task = Callable[[], tuple[ModuleReport, ...]]
"""A part of the work that touches no other part."""


def odd_blocks(spec: ModelSpec, layers: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks that are named, or every second one from block 1; ModelError if there is none."""
    found = chosen_blocks(spec, layers) if layers else tuple(range(1, len(spec.blocks), 2))
    if not found:
        raise ModelError("a model of one block has no odd blocks; name them in method.layers")
    return found


class KnGPT2Method:
    """KnGPT2-style (ours), see `model.compress.kron_recipe.KnGPT2`."""

    name = "kngpt2"

    def __init__(self, config: KnGPT2) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Weights alone."""
        return StatsSpec()

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """Query, key, value, output and MLP of the odd blocks at half their weights, and half the table."""
        blocks = odd_blocks(arch, self.config.layers)
        apart = {f"h.{i}.attn.{part}": Dense() for i in blocks for part in "qkv"}
        sites = [site for site in arch.with_matrices(apart).sites() if int(site.name.split(".")[1]) in blocks]
        matrices = {site.name: _halved(site) for site in sites}
        spec = arch.with_matrices(matrices)
        spec = with_kron_table(spec, factor=2, gather=False, head=self.config.head)
        _check(self.name, spec, budget)
        return Plan(method=self.name, source=arch, spec=spec)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Exact and deterministic: the seed changes nothing."""
        fresh = transplant(model, plan)
        reports: list[ModuleReport] = []
        for name in plan.changed():
            layer, (weight, bias) = kron_layer(fresh, name), source_matrix(model, plan, name)
            fit = nearest_kron(weight, layer.shape, terms=1, gauge=self.config.gauge)
            set_factors(layer, fit.left, fit.right)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
            reports.append(report_module(fresh, name, weight, predicted_error=fit.error, tail=fit.tail))
        table, matrix = model.wte.table().detach(), fresh.spec.embedding
        assert isinstance(matrix, Kron)
        shape = KronShape(matrix.m1, matrix.n1, matrix.m2, matrix.n2)
        fit = nearest_kron(table, shape, terms=1, gauge=self.config.gauge)
        set_table(fresh, fit.left, fit.right)
        reports.append(report_table(fresh, table, predicted_error=fit.error, tail=fit.tail))
        return CompressedModel(model=fresh, plan=plan, report=tuple(reports))


class TQCompressorMethod:
    """TQCompressor-style (ours), see `model.compress.kron_recipe.TQCompressor`."""

    name = "tqcompressor"

    def __init__(self, config: TQCompressor) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Weights alone."""
        return StatsSpec()

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """Permuted products at the MLPs of the odd blocks and a quarter of the table; or up to a stage of it.

        The structure at the end of a stage is the same from the teacher and from the stage before.
        """
        blocks = odd_blocks(arch, self.config.layers)
        firsts = tuple((arch.arch.n_embd // 2, arch.blocks[i].mlp_hidden // 4) for i in blocks)
        choice = KronChoice(
            shape=firsts[0],
            terms=self.config.terms,
            layer_shapes=firsts,
            layers=blocks,
            gathers=gathers_of(self.config.hidden, outer=True),
        )
        stage = self.config.stage
        spec = arch if stage == "table" else with_kron_mlp(arch, choice, terms=self.config.terms)
        factor = 2 if stage in ("table", "mlp") else 4
        if self.config.before and isinstance(table := arch.embedding, Kron):
            spec = replace(spec, embedding=replace(table, n1=arch.arch.n_embd // factor, n2=factor))
        else:
            spec = with_kron_table(spec, factor=factor, gather=True, head=self.config.head)
        _check(self.name, spec, budget)
        return Plan(method=self.name, source=arch, spec=spec)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Deterministic in the seed, which draws the random starts."""
        config, fresh, changed = self.config, transplant(model, plan), plan.changed()
        fit = partial(fit_permuted_block, model, fresh, config=config, outer=True, seed=seed)
        tasks: list[Task] = [
            partial(fit, i) for i in odd_blocks(model.spec, config.layers) if f"h.{i}.{UP}" in changed
        ]
        if is_narrower := plan.spec.embedding != plan.source.embedding:
            tasks.insert(0, partial(self._narrow, model, fresh, seed=seed))  # the longest first
        found = side_by_side(tasks)
        if is_narrower:
            found.append(found.pop(0))
        return CompressedModel(model=fresh, plan=plan, report=tuple(row for rows in found for row in rows))

    def _narrow(self, model: GPT2, fresh: GPT2, *, seed: int) -> tuple[ModuleReport]:
        """Fill the table, halved from what stands there now as often as the new structure asks."""
        config, table, matrix = self.config, model.wte.table().detach(), fresh.spec.embedding
        assert isinstance(matrix, Kron)
        groups, width = None, 1
        if (
            config.before
            and isinstance(held := model.wte, KroneckerEmbedding)
            and held.gather_out is not None
        ):
            width = held.right.shape[-1]
            groups = held.gather_out.argsort().reshape(-1, width)
        found = halved_columns(
            table,
            times=(matrix.n2 // width).bit_length() - 1,
            groups=groups,
            random_starts=config.random_starts,
            seed=seed,
            max_sweeps=config.max_sweeps,
            rtol=config.rtol,
            gauge=config.gauge,
        )
        set_table(fresh, found.fit.left, found.fit.right, found.order)
        sweeps = {f"sweeps_{k}": float(how.iterations) for k, how in enumerate(found.searches)}
        starts = {f"start_{k}": how.start for k, how in enumerate(found.searches)}
        return (report_table(fresh, table, predicted_error=found.fit.error, **sweeps, **starts),)


def _halved(site: Site) -> Kron:
    """Half the entries: neighbouring outputs share a column of A, or neighbouring inputs a row going down."""
    rows, cols = site.n_in, site.n_out
    is_down = site.name.endswith(DOWN)
    if (rows if is_down else cols) % 2:
        raise ModelError(f"{site.name} is {rows}x{cols}; a product of factor 2 needs an even number to halve")
    return Kron(m1=rows // 2, n1=cols, m2=2, n2=1) if is_down else Kron(m1=rows, n1=cols // 2, m2=1, n2=2)


def _check(method: str, spec: ModelSpec, budget: Budget) -> None:
    budget.require_uniform(method)
    budget.check(spec, what=method, hint=lambda: "its structure is fixed; choose head, layers or another cap")
