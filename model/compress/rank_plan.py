"""The structure that all low-rank methods share: which matrices, and the ranks that a budget allows.

Uniform: one keep ratio everywhere, r = floor(ratio mn / (m+n)) of an (m, n) matrix, with the largest ratio
that fits; found exactly, over the fractions at which a rank changes. By gain: whatever lowers the loss most
per parameter, next. Integers and fractions only.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction

from model.algebra.allocation import greedy_gain
from model.algebra.low_rank import check_rank, largest_rank
from model.compress.budget import Budget, Size
from model.compress.contract import Gains, Plan, Unmeasured
from model.compress.kron_plan import chosen_blocks
from model.compress.low_rank_recipe import LowRankRecipe
from model.config import LowRank, ModelError, ModelSpec, Site


def target_sites(spec: ModelSpec, recipe: LowRankRecipe) -> tuple[Site, ...]:
    """The weight matrices to replace, in order of use; ModelError for a block that is not there."""
    blocks = {f"h.{i}" for i in chosen_blocks(spec, recipe.layers)}
    placed = [(site.name.split(".", 2), site) for site in spec.sites()]
    return tuple(
        site
        for (h, i, role), site in placed
        if f"{h}.{i}" in blocks and (recipe.targets == "all_linear" or role.startswith("mlp."))
    )


def plan_low_rank(method: str, spec: ModelSpec, recipe: LowRankRecipe, budget: Budget) -> Plan:
    """Equal ranks where one is given, else the largest uniform ones; ModelError for a budget not kept."""
    sites = _checked_sites(method, spec, recipe)
    if recipe.rank:
        ranks = dict.fromkeys((site.name for site in sites), recipe.rank)
        return _plan(method, spec, recipe, budget, ranks, what=f"rank {recipe.rank}")
    if not budget.is_set:
        raise ModelError(f"{method}: rank = 0 takes as much as the budget allows; set budget.params or rank")
    if budget.allocate == "greedy_gain":
        raise Unmeasured(
            f"{method}: ranks by gain depend on the weights; they are known when it is compressed"
        )
    if budget.allocate != "uniform":
        raise ModelError(
            f"{method} cannot spread a budget by {budget.allocate}; choose 'uniform' or 'greedy_gain'"
        )
    ranks = uniform_ranks(sites, room=_room(spec, sites, budget), multiple=recipe.rank_multiple)
    return _plan(method, spec, recipe, budget, ranks, what=f"ranks {_words(ranks)}")


def plan_ranks_by_gain(
    method: str, spec: ModelSpec, recipe: LowRankRecipe, budget: Budget, gains: Gains
) -> Plan:
    """The ranks that gain most per parameter; `gains` are squared singular values, weighted, by module."""
    if recipe.rank or not budget.is_set:
        return plan_low_rank(method, spec, recipe, budget)
    sites, multiple = _checked_sites(method, spec, recipe), recipe.rank_multiple
    units = [_grouped(gains[site.name][: _most(site, multiple)], multiple) for site in sites]
    prices = [multiple * (site.n_in + site.n_out) for site in sites]
    room = max(0, _room(spec, sites, budget))
    try:
        counts = greedy_gain(units, prices, budget=room)
    except ModelError as err:
        raise ModelError(f"{method}: {err}; {_range(spec, recipe, budget)}") from err
    ranks = {site.name: multiple * count for site, count in zip(sites, counts, strict=True)}
    return _plan(method, spec, recipe, budget, ranks, what="ranks by gain")


def uniform_ranks(sites: Sequence[Site], *, room: int, multiple: int = 1) -> dict[str, int]:
    """Rank of each matrix at the largest keep ratio whose factors hold at most `room` parameters.

    At least one unit each, even where that does not fit: the caller checks its budget.
    """
    at = {
        (rows, cols): [
            Fraction(rank * (rows + cols), rows * cols)
            for rank in range(multiple, largest_rank(rows, cols) + 1, multiple)
        ]
        for rows, cols in {(site.n_in, site.n_out) for site in sites}
    }  # by shape: the ratios at which the rank rises by one unit

    def ranks(ratio: Fraction) -> dict[str, int]:
        return {
            site.name: multiple * max(1, bisect_right(at[site.n_in, site.n_out], ratio)) for site in sites
        }

    def cost(ratio: Fraction) -> int:
        found = ranks(ratio)
        return sum(found[site.name] * (site.n_in + site.n_out) for site in sites)

    ratios = sorted({ratio for each in at.values() for ratio in each})
    fitting = bisect_right(ratios, room, key=cost)
    return ranks(ratios[max(0, fitting - 1)])


def _checked_sites(method: str, spec: ModelSpec, recipe: LowRankRecipe) -> tuple[Site, ...]:
    """The matrices to replace; ModelError where the given rank, or one unit of ranks, saves nothing."""
    if recipe.rank < 0 or recipe.rank_multiple < 1:
        raise ModelError(
            f"{method}: rank={recipe.rank} and rank_multiple={recipe.rank_multiple} must be at least 0 and 1"
        )
    sites = target_sites(spec, recipe)
    for site in sites:
        try:
            check_rank(site.n_in, site.n_out, recipe.rank or recipe.rank_multiple)
        except ModelError as err:
            raise ModelError(f"{method}: {site.name}: {err}") from err
    return sites


def _plan(
    method: str,
    spec: ModelSpec,
    recipe: LowRankRecipe,
    budget: Budget,
    ranks: Mapping[str, int],
    *,
    what: str,
) -> Plan:
    result = spec.with_matrices({name: LowRank(rank=rank) for name, rank in ranks.items()})
    budget.check(result, what=f"{method}, {what}", hint=lambda: _range(spec, recipe, budget))
    return Plan(method=method, source=spec, spec=result)


def _room(spec: ModelSpec, sites: Sequence[Site], budget: Budget) -> int:
    """Entries of factors that the caps leave; each is one parameter and one multiply-accumulate."""
    everything = sum(site.n_in * site.n_out for site in sites)
    return budget.most(budget.size_without(spec, sites), Size(1, 1), limit=everything)


def _range(spec: ModelSpec, recipe: LowRankRecipe, budget: Budget) -> str:
    """What would keep the budget: the uniform ranks, or the sizes that low rank can have around the cap."""
    sites = target_sites(spec, recipe)

    def at(limit: int) -> tuple[ModelSpec, str]:
        ranks = uniform_ranks(sites, room=limit, multiple=recipe.rank_multiple)
        return spec.with_matrices({name: LowRank(rank=rank) for name, rank in ranks.items()}), _words(ranks)

    best, words = at(_room(spec, sites, budget))
    total = best.num_parameters(budget.convention)
    if budget.fits(budget.size(best)):
        return f"rank = 0 keeps it with {words} ({total:,})"
    ends = [at(limit)[0] for limit in (0, sum(site.n_in * site.n_out for site in sites))]
    smallest, largest = (end.num_parameters(budget.convention) for end in ends)
    if budget.params and not smallest <= budget.params <= largest:
        return f"low rank at these matrices leaves {smallest:,} to {largest:,} parameters"
    return f"the nearest uniform ranks below it are {words} ({total:,}); raise budget.tolerance or its cap"


def _words(ranks: Mapping[str, int]) -> str:
    """The different ranks by role, such as `mlp.c_fc 153`."""
    roles: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        roles.setdefault(name.split(".", 2)[2], set()).add(rank)
    return ", ".join(f"{role} {'/'.join(map(str, sorted(found)))}" for role, found in roles.items())


def _most(site: Site, multiple: int) -> int:
    """Largest rank of a matrix that saves parameters and is a multiple."""
    return largest_rank(site.n_in, site.n_out) // multiple * multiple


def _grouped(gains: Sequence[float], size: int) -> tuple[float, ...]:
    """Gains of `size` units at a time."""
    return tuple(sum(gains[i : i + size]) for i in range(0, len(gains), size))
