"""Conditions of a sweep: every factor shape near a size, every registered method under a cap.

Both are enumerated from integers, before a weight exists; what does not qualify is counted with its reason.
"""

import json
from collections.abc import Mapping
from typing import Any

from model.algebra.shapes import KronShape, legal_shapes
from model.config import ModelSpec
from pipeline.compress.outlook import dense_spec
from pipeline.config.sweep import SweepStudy
from pipeline.errors import ConfigError
from pipeline.sweep.axes import Option, Removed

_SHAPE_KEYS = {
    "shapes_of": "[rows, columns] of the up-projection, or 'mlp'",
    "terms": "[fewest, most], or one number",
    "params": "parameters of the whole model",
    "tolerance": "relative distance from params",
    "limit": "most pairs to keep",
    "keep_rank": "true or false",
    "large_first": "true or false",
}
_METHOD_KEYS = ("methods", "track", "params", "tolerance")


def shape_options(
    study: SweepStudy, path: str, asked: Mapping[str, Any], *, removed: Removed, where: str
) -> tuple[Option, ...]:
    """Every legal (shape, terms) of all MLPs near a size, largest first; ConfigError if there is none.

    Counted in the base config's convention, for the blocks that its method names. Pairs that cannot reach the
    rank of the dense matrix are left out unless `keep_rank = false`, and with `large_first` those whose first
    factor is the smaller; of equal sizes, the one with fewer multiplications comes first.
    """
    if path != "method.shape":
        raise ConfigError(f"{where}: shapes_of is a condition on 'method.shape'")
    if odd := sorted(set(asked) - set(_SHAPE_KEYS)):
        raise ConfigError(f"{where}: {odd[0]!r} is unknown; expected {', '.join(_SHAPE_KEYS)}")
    base = study.first
    dense = dense_spec(base)
    rows, cols = _size(asked["shapes_of"], dense, where=where)
    low, high = _terms(asked.get("terms", 1), where=where)
    params, limit = (_natural(asked, key, where=where) for key in ("params", "limit"))
    tolerance = asked.get("tolerance", 0.002)
    keep_rank, large_first = asked.get("keep_rank", True), asked.get("large_first", False)
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise ConfigError(f"{where}: tolerance={json.dumps(tolerance)} must lie in [0, 1)")
    if not isinstance(keep_rank, bool) or not isinstance(large_first, bool):
        raise ConfigError(f"{where}: keep_rank and large_first must be true or false")
    whole = dense.num_parameters(base.budget.convention)
    named = getattr(base.method, "layers", ())
    matrices = 2 * len(named if isinstance(named, tuple) and named else dense.blocks)
    found: list[tuple[int, int, int, KronShape, int]] = []
    for shape in legal_shapes(rows, cols):
        for terms in range(low, min(high, shape.max_terms) + 1):
            size = whole + matrices * (shape.params(terms) - rows * cols)
            if params and abs(size - params) > tolerance * params:
                removed.add(f"(shape, terms) not within {tolerance:.2%} of {params:,} parameters")
            elif keep_rank and shape.rank_bound(terms) < min(rows, cols):
                removed.add(
                    f"(shape, terms) that cannot reach rank {min(rows, cols)}",
                    example=f"{terms} term(s) of {shape} reach rank {shape.rank_bound(terms)}",
                )
            elif large_first and shape.m1 * shape.n1 < shape.m2 * shape.n2:
                removed.add(
                    "(shape, terms) with the smaller factor first", example=f"{terms} term(s) of {shape}"
                )
            else:
                found.append((-size, terms * min(shape.macs()), -shape.m1 * shape.n1, shape, terms))
    if not found:
        raise ConfigError(f"{where}: no shape of {rows}x{cols} qualifies: {_why(removed)}")
    found.sort()
    kept = found[: limit or None]
    removed.add(f"(shape, terms) beyond the limit of {limit}", len(found) - len(kept))
    return tuple(_shape_option(shape, terms, named=high > 1) for *_, shape, terms in kept)


def method_choices(
    study: SweepStudy, path: str, asked: Mapping[str, Any], *, removed: Removed, where: str
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """One recipe of every registered method under a cap, as (table, choices); the cap is among the choices.

    Those that cannot keep it are counted as removed, each with the reason its plan gives.
    """
    if path != "method":
        raise ConfigError(f"{where}: methods = 'all' is a value of the axis 'method'")
    if odd := sorted(set(asked) - set(_METHOD_KEYS)):
        raise ConfigError(f"{where}: {odd[0]!r} is unknown; expected {', '.join(_METHOD_KEYS)}")
    track, cap = asked.get("track", "M"), _natural(asked, "params", where=where)
    if asked["methods"] != "all" or track not in ("M", "A", "both") or not cap:
        raise ConfigError(
            f"{where}: expected {{ methods = 'all', track = 'M', 'A' or 'both', params = N }} with N above 0"
        )
    from model.compress.at_budget import recipes_at
    from model.compress.recipe import as_table

    base = study.first
    dense, tolerance = dense_spec(base), asked.get("tolerance", base.budget.tolerance)
    found: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for each in ("M", "A") if track == "both" else (track,):
        for row in recipes_at(dense, cap, track=each, convention=base.budget.convention, tolerance=tolerance):
            if isinstance(row.plan, str):
                removed.add(f"{row.label} does not keep {cap:,} parameters", example=row.plan)
                continue
            table = as_table(row.recipe, over=base.method)
            choices = {"method": table, "budget.params": cap}
            if tolerance != base.budget.tolerance:
                choices["budget.tolerance"] = tolerance
            if base.budget.allocate != "uniform":
                choices["budget.allocate"] = "uniform"
            if table not in [known for known, _ in found]:
                found.append((table, choices))
    return found


def _shape_option(shape: KronShape, terms: int, *, named: bool) -> Option:
    label = f"{shape.m1}x{shape.n1}" + (f" r={terms}" if named else "")
    return Option(label, {"method.shape": [shape.m1, shape.n1], "method.terms": terms})


def _size(value: Any, dense: ModelSpec, *, where: str) -> tuple[int, int]:
    found = dense.arch.n_embd, dense.arch.n_inner
    if value in ("mlp", list(found)):
        return found
    raise ConfigError(
        f"{where}: shapes_of={json.dumps(value)}, but the teacher's up-projection is {found[0]}x{found[1]}; "
        f"write {list(found)} or 'mlp'"
    )


def _terms(value: Any, *, where: str) -> tuple[int, int]:
    bounds = value if isinstance(value, list) else [value, value]
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in bounds)
    if len(bounds) != 2 or not whole or not 1 <= bounds[0] <= bounds[1]:
        raise ConfigError(
            f"{where}: terms={json.dumps(value)} must be [fewest, most], at least 1, or a number"
        )
    return bounds[0], bounds[1]


def _natural(asked: Mapping[str, Any], key: str, *, where: str) -> int:
    value = asked.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{where}: {key}={json.dumps(value)} must be a whole number, 0 or more")
    return value


def _why(removed: Removed) -> str:
    return "; ".join(f"{count:,} {reason}" for reason, count in removed.counts.items()) or "none is legal"
