"""Names and numbers as a reader meets them: `kron_vl (64×128)⊗(2×4) r=1`, `81,972,576`, `65.9 %`.

Pure functions of what records hold. A label is as short as it may be; where two rows would share one, what
differs in their configs is added.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pipeline.config.identity import differing

MISSING = "–"


def method_label(method: Mapping[str, Any], *, n_embd: int | None) -> str:
    """Name, factor shapes on the up-projection and terms; the second factor needs the width of the model."""
    name = str(method.get("name", "?"))
    if name == "dense":
        return "dense, trained further"
    if isinstance(method.get("of"), Mapping):
        return f"{name} of {method_label(method['of'], n_embd=n_embd)}"
    if "shape" not in method:
        return name
    m1, n1 = method["shape"]
    second = ""
    if n_embd and n_embd % m1 == 0 and 4 * n_embd % n1 == 0:
        second = f"⊗({n_embd // m1}×{4 * n_embd // n1})"
    terms = f" r={method['terms']}" if "terms" in method else ""
    if method.get("layer_shapes"):
        return f"{name} shapes by block{terms}"
    return f"{name} ({m1}×{n1}){second}{terms}"


def distinct(labels: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels made different, as far as their configs are: leaves in which namesakes differ are added."""
    result = list(labels)
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    for label, group in groups.items():
        leaves = sorted({path for i in group for path in differing(configs[group[0]], configs[i])})
        for i in group if len(group) > 1 else ():
            words = [f"{path.rsplit('.', 1)[-1]}={_leaf(configs[i], path)}" for path in leaves]
            result[i] = " ".join([label, *words])
    return result


def _leaf(config: Mapping[str, Any], path: str) -> str:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return leaf(value)


def leaf(value: Any) -> str:
    """One value of a config: `384×1536`, `0.001`, `rms`."""
    if isinstance(value, list | tuple):
        return "×".join(map(str, value))
    return MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def command(argv: Sequence[str]) -> str:
    """A recorded command line as one would type it again, without the place of the interpreter."""
    if not argv:
        return ""
    path = PurePath(str(argv[0]))
    program = [path.stem]
    if path.suffix == ".py":
        program = ["python", "-m", f"{path.parent.name}.{path.stem}" if path.parent.name else path.stem]
    return shlex.join([*program, *map(str, argv[1:])])


def is_number(value: object) -> bool:
    """Whether a cell holds a number to show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def count(value: Any) -> str:
    """An integer with separators."""
    return f"{int(value):,}" if is_number(value) else MISSING


def short_count(value: Any) -> str:
    """A rounded count: `655k`, `1.3M`, `82M`."""
    if not is_number(value):
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 100 or unit == "k" else f"{scaled:.3g}{unit}"
    return f"{value:.0f}"


def share(value: Any) -> str:
    """A ratio in per cent."""
    return f"{100 * value:.1f} %" if is_number(value) else MISSING


def exponential(value: float | None) -> float | None:
    """A loss as a perplexity; infinite where it has no number."""
    if value is None:
        return None
    return math.exp(value) if value < 700 else math.inf


def quantity(value: Any, metric: str) -> str:
    """A measurement: accuracy in per cent, perplexity with two decimals as long as they say something."""
    if not is_number(value):
        return MISSING
    if metric == "accuracy":
        return share(value)
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def probability(value: float | None) -> str:
    """A p-value as far as resampling knows it."""
    if not is_number(value) or value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def gap(value: Any, metric: str) -> str:
    """A difference with its sign: nats per token, or points of accuracy."""
    if not is_number(value):
        return MISSING
    if metric == "accuracy":
        return f"{100 * value:+.2f} pt"
    return f"{value:+.4f}" if abs(value) < 0.1 else f"{value:+.3f}"
