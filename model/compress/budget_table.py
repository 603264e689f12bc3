"""What every method does under a cap, as rows for people and programs: integers only.

A row is a plan of `at_budget` said shortly: settings that size it, exact parameters, share of the cap,
multiply-accumulates; or the reason why there is none. Rows of two tracks never stand in one table.
"""

from dataclasses import asdict, dataclass
from typing import Any

from model.compress.at_budget import AtBudget, Track, recipes_at
from model.compress.contract import Plan, PlanRow
from model.compress.kron_plan import DOWN
from model.compress.recipe import as_table
from model.config import Dense, Kron, ModelSpec

ABOUT: dict[Track, str] = {"M": "MLP weights alone may change", "A": "any weight may change"}
"""The tracks in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetRow:
    """One method under one cap."""

    method: str
    """Its name, with what it wraps."""

    recipe: dict[str, Any]
    """The settings that give this plan under this cap, as a `[method]` table."""

    settings: str = ""
    """Shapes, ranks or widths, in words; empty where there is no plan."""

    parameters: int = 0
    """Unique parameters; 0 where there is no plan."""

    share: float = 0.0
    """Of the cap."""

    macs_per_token: int = 0
    """Multiply-accumulates per token, factored."""

    reason: str = ""
    """Why nothing of the method comes within the tolerance below the cap; empty where it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetTable:
    """One track under one cap."""

    name: str
    """Of the budget; empty where it is just a number."""

    track: Track
    cap: int
    """Most unique parameters."""

    dense: ModelSpec
    """The model that is compressed."""

    rows: tuple[BudgetRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sizes = {"name": self.name, "track": self.track, "cap": self.cap}
        return sizes | {"model": asdict(self.dense.arch), "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        """The table for a terminal; what cannot keep the cap stands below, with its reason."""
        whole, macs = self.dense.num_parameters(), self.dense.macs_per_token()
        lines = [
            f"{self.name or 'cap'}: at most {self.cap:,} parameters, {self.cap / whole:.1%} of dense",
            f"track {self.track}: {ABOUT[self.track]}",
            f"{'method':<24}{'parameters':>13}{'of the cap':>12}{'MACs/token':>16}{'of dense':>10}  plan",
        ]
        for row in self.rows:
            if not row.reason:
                size = f"{row.parameters:>13,}{row.share:>12.3%}{row.macs_per_token:>16,}"
                lines.append(f"{row.method:<24}{size}{row.macs_per_token / macs:>10.1%}  {row.settings}")
        lines += [f"{row.method:<24}cannot: {row.reason}" for row in self.rows if row.reason]
        return "\n".join(lines)


def budget_table(
    spec: ModelSpec, cap: int, *, track: Track, name: str = "", tolerance: float = 0.002
) -> BudgetTable:
    """Every registered method of a track under `cap` unique parameters of a dense model.

    A row without a reason has at most `cap` parameters and at least `cap * (1 - tolerance)`.
    """
    found = recipes_at(spec, cap, track=track, tolerance=tolerance)
    rows = tuple(_row(entry, cap, least=cap * (1 - tolerance)) for entry in found)
    return BudgetTable(name=name, track=track, cap=cap, dense=spec, rows=rows)


def settings_of(plan: Plan) -> str:
    """What sizes a plan, in a few words: structures by place, then its notes (widths, kept blocks)."""
    places: dict[str, list[str]] = {}
    for row in plan.rows():
        if row.structure != Dense().describe() and not _is_turned(plan, row):
            part = "" if len(row.blocks) == len(plan.spec.blocks) else f" of {len(row.blocks)} blocks"
            place = "mlp" if row.role.startswith("mlp.") else row.role.removeprefix("attn.")
            places.setdefault(f"{row.structure}{part}", []).append(place)
    parts = [f"{', '.join(dict.fromkeys(found))} {structure}" for structure, found in places.items()]
    if plan.spec.embedding != plan.source.embedding:
        parts.append(f"wte {plan.spec.embedding.describe()}")
    return "; ".join([*parts, *plan.notes])


def _row(entry: AtBudget, cap: int, *, least: float) -> BudgetRow:
    recipe, plan = as_table(entry.recipe), entry.plan
    if isinstance(plan, str):
        return BudgetRow(method=entry.label, recipe=recipe, reason=plan)
    words, parameters = settings_of(plan), plan.num_parameters
    return BudgetRow(
        method=entry.label,
        recipe=recipe,
        settings=words,
        parameters=parameters,
        share=parameters / cap,
        macs_per_token=plan.spec.macs_per_token(),
        reason="" if parameters >= least else f"{parameters:,} parameters are the nearest; {words}",
    )


def _is_turned(plan: Plan, row: PlanRow) -> bool:
    """Whether a down-projection has the product of the up-projection, transposed."""
    up = plan.spec.blocks[row.blocks[0]].mlp_c_fc
    return row.role == DOWN and isinstance(up, Kron) and row.structure == up.transposed().describe()
