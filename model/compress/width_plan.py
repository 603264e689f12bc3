"""Widths that keep a budget: hidden units per MLP and width per head, equal in all blocks or by importance.

Uniform, MLP alone: the largest width that fits. Uniform, all linears: for every head width the largest MLP
width that fits, and of these the two whose keep ratios differ least. By block influence: one keep ratio per
block (MoDeGPT), the largest model that fits, then hidden units to the most important blocks first. Integers
and a few scores, no tensors but theirs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from model.algebra.allocation import allocate_sparsity
from model.compress.budget import Budget, Size
from model.compress.contract import Plan, Stats, Unmeasured
from model.compress.kron_plan import chosen_blocks
from model.compress.structural_recipe import ModeGPTRecipe, WidthRecipe
from model.config import Dense, ModelError, ModelSpec

SMALLEST = 2
"""No head and no MLP is made narrower."""

HALVINGS = 50


@dataclass(frozen=True, slots=True)
class Widths:
    """What one block keeps."""

    hidden: int
    """Hidden units."""

    head: int
    """Width of a query, a key and a value, per head."""


def plan_widths(
    method: str, spec: ModelSpec, recipe: WidthRecipe, budget: Budget, stats: Stats | None
) -> Plan:
    """The narrower model; ModelError for a budget not kept, naming what would keep it.

    Raises Unmeasured where sizes follow from block influence that was not given.
    """
    planner = _Planner(method, spec, recipe, budget)
    if recipe.hidden:
        widths = planner.given()
    elif not budget.is_set:
        raise ModelError(
            f"{method}: hidden = 0 takes as much as the budget allows; set budget.params or hidden"
        )
    elif budget.allocate == "uniform":
        widths = planner.uniform()
    elif budget.allocate == "modegpt_bi":
        widths = planner.by_influence(block_scores(spec, stats, method))
    else:
        raise ModelError(
            f"{method} cannot spread a budget by {budget.allocate}; choose 'uniform' or 'modegpt_bi'"
        )
    result = planner.build(widths)
    words = f"{_words(widths[i].hidden for i in widths)} hidden units"
    if planner.has_heads:
        words += f" and heads of {_words(widths[i].head for i in widths)}"
    budget.check(result, what=f"{method}, {words}", hint=planner.hint)
    return Plan(method=method, source=spec, spec=result, notes=(f"keeps {words}",))


def block_scores(spec: ModelSpec, stats: Stats | None, method: str) -> tuple[float, ...]:
    """Block influence 1 - E[cos(x_l, x_l+1)] of every block; Unmeasured without statistics."""
    keys = [f"block_influence/h.{i}" for i in range(len(spec.blocks))]
    if stats is None or any(key not in stats.sums for key in keys):
        raise Unmeasured(f"{method} needs block_influence here; it is known once the teacher is measured")
    return tuple(1.0 - float(stats.mean(key)) for key in keys)


def require_full(spec: ModelSpec, blocks: Sequence[int], method: str) -> None:
    """ModelError unless the blocks are those of a stock model: dense, full width, with every bias."""
    stock = ModelSpec.dense(spec.arch).blocks
    for i in blocks:
        block = spec.blocks[i]
        if block != replace(stock[0], source=block.source):
            raise ModelError(f"{method}: block {i} is compressed already; it starts from a dense model")


class _Planner:
    """Sizes of one model under one budget."""

    def __init__(self, method: str, spec: ModelSpec, recipe: WidthRecipe, budget: Budget) -> None:
        self.method, self.spec, self.recipe, self.budget = method, spec, recipe, budget
        self.blocks = chosen_blocks(spec, recipe.layers)
        self.has_heads = isinstance(recipe, ModeGPTRecipe) and recipe.targets == "all_linear"
        self.full = Widths(spec.arch.n_inner, spec.arch.head_dim)
        if recipe.rank_multiple < 1 or recipe.hidden < 0:
            raise ModelError(
                f"{method}: rank_multiple={recipe.rank_multiple} must be at least 1, hidden={recipe.hidden} 0"
            )
        require_full(spec, self.blocks, method)

    def build(self, widths: Mapping[int, Widths]) -> ModelSpec:
        """The model with those widths; key and value biases go with the heads."""
        blocks = list(self.spec.blocks)
        for i, width in widths.items():
            narrow = replace(blocks[i], mlp_hidden=width.hidden, mlp_c_fc=Dense(), mlp_c_proj=Dense())
            if self.has_heads:
                narrow = replace(narrow, head_qk=width.head, head_vo=width.head, qkv_bias="query")
            blocks[i] = narrow
        return replace(self.spec, blocks=tuple(blocks))

    def size(self, widths: Mapping[int, Widths]) -> Size:
        """What a model with those widths costs, as far as it is capped."""
        return self.budget.size(self.build(widths))

    def same(self, hidden: int, head: int) -> dict[int, Widths]:
        """The same widths in every chosen block."""
        return dict.fromkeys(self.blocks, Widths(hidden, head))

    def given(self) -> dict[int, Widths]:
        """Widths as the recipe says."""
        recipe, head = self.recipe, self.full.head
        if isinstance(recipe, ModeGPTRecipe) and self.has_heads:
            head = recipe.head_rank
            if not head:
                raise ModelError(f"{self.method}: hidden={recipe.hidden} needs head_rank beside it, or 0")
        if recipe.hidden > self.full.hidden or not 1 <= head <= self.full.head:
            raise ModelError(
                f"{self.method}: hidden={recipe.hidden} and head_rank={head} must be at most "
                f"{self.full.hidden} and {self.full.head}"
            )
        return self.same(recipe.hidden, head)

    def uniform(self) -> dict[int, Widths]:
        """The widths of nearly equal keep ratios that fit; the smallest where nothing does."""
        step = self.recipe.rank_multiple
        heads = range(_up(SMALLEST, step), self.full.head + 1, step) if self.has_heads else [self.full.head]
        found = []
        for head in heads:
            if hidden := self._widest(head):
                gap = abs(hidden / self.full.hidden - head / self.full.head)
                found.append((gap if self.has_heads else 0.0, hidden, head))
        if not found:
            return self.same(_up(SMALLEST, step), _up(SMALLEST, step) if self.has_heads else self.full.head)
        _, hidden, head = min(found)
        return self.same(hidden, head)

    def _widest(self, head: int) -> int:
        """Most hidden units that fit beside a head width; 0 if none do."""
        step = self.recipe.rank_multiple
        first = _up(SMALLEST, step)
        base = self.size(self.same(first, head))
        price = self.size(self.same(first + 1, head)).grown(base, -1)
        most = first + self.budget.most(base, price, limit=self.full.hidden - first) // step * step
        return 0 if most < first else most

    def by_influence(self, scores: Sequence[float]) -> dict[int, Widths]:
        """One keep ratio per block by its score, the largest model that fits, the rest as hidden units."""
        recipe = self.recipe
        chosen = [scores[i] for i in self.blocks]

        def at(average: float) -> dict[int, Widths]:
            cuts = allocate_sparsity(chosen, average=average, eps=recipe.eps, cap=recipe.max_sparsity)
            return {i: self._kept(1.0 - cut) for i, cut in zip(self.blocks, cuts, strict=True)}

        low, high = 0.0, recipe.max_sparsity
        if self.budget.holds(self.size(at(low))):
            return at(low)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.budget.holds(self.size(at(middle))) else (middle, high)
        return self._filled(at(high), sorted(self.blocks, key=lambda i: (-scores[i], i)))

    def _kept(self, share: float) -> Widths:
        step = self.recipe.rank_multiple
        hidden = max(int(share * self.full.hidden + 1e-9) // step * step, _up(SMALLEST, step))
        head = max(round(share * self.full.head) // step * step, _up(SMALLEST, step))
        return Widths(hidden, head)

    def _filled(self, widths: dict[int, Widths], order: Sequence[int]) -> dict[int, Widths]:
        """Hidden units for what is left of the cap, one step per block and round, in order."""
        step, size = self.recipe.rank_multiple, self.size(widths)
        some = next(iter(widths))
        narrower = replace(widths[some], hidden=widths[some].hidden - 1)
        price = size.grown(self.size({**widths, some: narrower}), -1)
        room = self.budget.most(size, price, limit=len(order) * self.full.hidden) // step
        is_moving = room > 0
        while is_moving:
            is_moving = False
            for i in order:
                if room > 0 and widths[i].hidden + step <= self.full.hidden:
                    widths[i] = replace(widths[i], hidden=widths[i].hidden + step)
                    room, is_moving = room - 1, True
        return widths

    def hint(self) -> str:
        """Which settings would keep the budget."""
        ends = (
            self.same(SMALLEST, SMALLEST if self.has_heads else self.full.head),
            self.same(self.full.hidden, self.full.head),
        )
        smallest, largest = (self._count(widths) for widths in ends)
        if self.budget.params and not smallest <= self.budget.params <= largest:
            return f"{self.method} can have {smallest:,} to {largest:,} parameters"
        widths = self.uniform()
        best = widths[self.blocks[0]]
        heads = f", head_rank = {best.head}" if self.has_heads else ""
        return f"hidden = {best.hidden}{heads} has {self._count(widths):,}"

    def _count(self, widths: Mapping[int, Widths]) -> int:
        return self.build(widths).num_parameters(self.budget.convention)


def _up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


def _words(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
