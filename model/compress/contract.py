"""What a compression method promises, and the values that pass between it and everything else.

Three verbs: `stats` says what must be measured on the teacher, `plan` fixes structure and exact count before
a weight is touched, `compress` fills it. A plan is pure and loads no torch; a result knows how far it is from
its prediction, module by module.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from model.config import ModelError, ModelSpec, Site

if TYPE_CHECKING:
    from torch import Tensor

    from model.compress.budget import Budget
    from model.gpt2 import GPT2

Gains = Mapping[str, tuple[float, ...]]
"""By module name: how much each further unit (a rank, a term) lowers the loss, descending."""


class Unmeasured(ModelError):
    """A plan depends on statistics or weights that were not given; with them it can be made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsSpec:
    """What a method must be given, by module name; a recipe's `needs` are the names of these fields."""

    gram: frozenset[str] = frozenset()
    """Sum of x^T x, of x, and the token count, of a module's input."""

    abs_mean: frozenset[str] = frozenset()
    """Sum of |x|."""

    row_fisher: frozenset[str] = frozenset()
    """Squared per-sequence gradients, summed over outputs."""

    col_fisher: frozenset[str] = frozenset()
    """Squared per-sequence gradients, summed over inputs."""

    full_fisher: frozenset[str] = frozenset()
    """Squared per-sequence gradients."""

    delta_gram: frozenset[str] = frozenset()
    """Sum of d^T d, d the gradient of the loss with respect to a module's output."""

    vo_mixed_gram: bool = False
    """Per head, the Gram matrix of attention-averaged inputs."""

    block_influence: bool = False
    """How much each block turns the residual stream."""

    @classmethod
    def everywhere(cls, needs: Iterable[str], arch: ModelSpec) -> Self:
        """`needs` at every weight matrix: what is collected, so that methods with equal needs share it."""
        known = {item.name: item.type for item in fields(cls)}
        sites = frozenset(site.name for site in arch.sites())
        if odd := sorted(set(needs) - set(known)):
            raise ModelError(f"{odd[0]!r} is no statistic; choose from {', '.join(known)}")
        return cls(**{name: True if known[name] is bool else sites for name in needs})  # type: ignore[arg-type]

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the fields that ask for something, sorted."""
        return tuple(sorted(item.name for item in fields(self) if getattr(self, item.name)))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be measured."""
        return not self.needs

    def __or__(self, other: "StatsSpec") -> "StatsSpec":
        merged: dict[str, Any] = {
            item.name: getattr(self, item.name) | getattr(other, item.name) for item in fields(self)
        }
        return StatsSpec(**merged)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """Sums over calibration tokens, in fp64: what workers add up, divided only when read."""

    tokens: int
    """Token positions that were counted."""

    sequences: int
    """Sequences that were counted."""

    sums: "Mapping[str, Tensor]"
    """By `field/module`, such as `gram/h.0.mlp.c_fc`."""

    def mean(self, key: str) -> "Tensor":
        """Sum per token, or per sequence for a Fisher; ModelError if not collected, or not finite."""
        if key not in self.sums:
            raise ModelError(f"statistics hold no {key!r}; collect them again for this method")
        total = self.sums[key]
        if not bool(total.isfinite().all()):
            raise ModelError(f"statistics hold NaN or infinity in {key!r}; check the teacher on its own text")
        return total / (self.sequences if "_fisher/" in key else self.tokens)

    def __add__(self, other: "Stats") -> "Stats":
        if set(self.sums) != set(other.sums):
            raise ModelError(
                "statistics of different fields cannot be added; collect all parts for one method"
            )
        return Stats(
            tokens=self.tokens + other.tokens,
            sequences=self.sequences + other.sequences,
            sums={key: value + other.sums[key] for key, value in self.sums.items()},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRow:
    """One kind of change, in all blocks that it is made in; numbers are per block."""

    role: str
    """Weight matrix, such as `mlp.c_fc`."""

    blocks: tuple[int, ...]
    """Kept blocks with exactly this structure."""

    n_in: int
    """Rows of the matrix."""

    n_out: int
    """Columns of the matrix."""

    structure: str
    """What stands there, in words."""

    parameters: int
    """Parameters without the bias."""

    dense_parameters: int
    """The same of the matrix that was there."""

    rank_bound: int
    """Largest rank that the structure can have."""

    full_rank: int
    """Largest rank of a dense matrix of this size."""

    macs: int
    """Multiply-accumulates per token, factored; a dense one needs `n_in * n_out`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The structure that a method will fill."""

    method: str
    """Name of the method."""

    source: ModelSpec
    """The model before."""

    spec: ModelSpec
    """The model after."""

    notes: tuple[str, ...] = ()
    """What a user should know before paying for it: lost rank, more multiplications than dense."""

    @property
    def num_parameters(self) -> int:
        """Unique parameters after compression, exact; `spec` has the other conventions and the MACs."""
        return self.spec.num_parameters()

    def changed(self) -> dict[str, Site]:
        """Weight matrices that the method replaces, by name in the new model."""
        old = {(self.source.blocks[i].source, role): site for i, role, site in _placed(self.source)}
        return {
            site.name: site
            for i, role, site in _placed(self.spec)
            if (before := old.get((self.spec.blocks[i].source, role))) is None
            or (before.matrix, before.n_in, before.n_out) != (site.matrix, site.n_in, site.n_out)
        }

    def rows(self) -> tuple[PlanRow, ...]:
        """The replaced matrices as a table, equal ones of several blocks in one row."""
        groups: dict[tuple[object, ...], list[int]] = {}
        sites: dict[tuple[object, ...], Site] = {}
        changed = self.changed()
        for i, role, site in _placed(self.spec):
            if site.name in changed:
                key = (role, site.n_in, site.n_out, site.matrix)
                groups.setdefault(key, []).append(i)
                sites[key] = site
        return tuple(_row(sites[key], tuple(blocks)) for key, blocks in groups.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleReport:
    """What became of one weight matrix. Errors are squared, in the method's own metric."""

    name: str
    """Module name, such as `h.0.mlp.c_fc`."""

    structure: str
    """What stands there, in words."""

    parameters: int
    """Parameters without the bias."""

    dense_parameters: int
    """The same of the matrix that was there."""

    macs: int
    """Multiply-accumulates per token, factored."""

    rank_bound: int
    """Largest rank that the structure can have."""

    energy: float
    """||W||^2 in the metric: the error of leaving the matrix out."""

    achieved_error: float
    """||W - K||^2 in the metric, of the weights as stored."""

    energy_kept: float
    """1 - achieved error / energy: 1 is exact, 0 is as bad as nothing, below 0 is worse."""

    predicted_error: float | None = None
    """The same, known from the decomposition alone; None where a method predicts nothing."""

    metric: str = "frobenius"
    """What the errors measure."""

    details: Mapping[str, float | str] = field(default_factory=dict)
    """What the method itself has to say: cut-offs, condition, sweeps, the start that won."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedModel:
    """A filled plan. Its count is that of the plan, or it cannot exist."""

    model: "GPT2"
    plan: Plan
    report: tuple[ModuleReport, ...]

    def __post_init__(self) -> None:
        planned, counted = self.plan.num_parameters, self.model.num_parameters()
        assert planned == counted, f"{self.plan.method}: planned {planned:,} parameters, built {counted:,}"


class CompressionMethod(Protocol):
    """One way to make a GPT-2 smaller, with its settings inside."""

    name: str

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """What must be measured on the teacher before `compress`."""
        ...

    def plan(self, arch: ModelSpec, budget: "Budget", stats: Stats | None = None) -> Plan:
        """Structure and exact count; ModelError names the nearest settings that keep the budget.

        Raises Unmeasured where the structure follows from statistics or weights that are not given.
        """
        ...

    def compress(
        self, model: "GPT2", plan: Plan, stats: Stats | None = None, *, seed: int
    ) -> CompressedModel:
        """Fill the plan. Leaves `model` as it is; equal input and seed give equal bytes."""
        ...


@runtime_checkable
class GainMethod(CompressionMethod, Protocol):
    """A method that can spread a budget by what each unit gains, which the weights decide."""

    def gains(self, model: "GPT2", stats: Stats | None = None) -> Gains:
        """What every further unit gains at each matrix that would be replaced."""
        ...

    def plan_by_gain(self, arch: ModelSpec, budget: "Budget", gains: Gains) -> Plan:
        """As `plan`, with the best gain per parameter taken first."""
        ...


def _placed(spec: ModelSpec) -> list[tuple[int, str, Site]]:
    """(kept block, role, site) of every weight matrix."""
    parts = [(site.name.split(".", 2), site) for site in spec.sites()]
    return [(int(part[1]), part[2], site) for part, site in parts]


def _row(site: Site, blocks: tuple[int, ...]) -> PlanRow:
    cost = site.matrix.cost(site.n_in, site.n_out)
    return PlanRow(
        role=site.name.split(".", 2)[2],
        blocks=blocks,
        n_in=site.n_in,
        n_out=site.n_out,
        structure=site.matrix.describe(),
        parameters=cost.params,
        dense_parameters=site.n_in * site.n_out,
        rank_bound=cost.rank_bound,
        full_rank=min(site.n_in, site.n_out),
        macs=cost.macs,
    )
