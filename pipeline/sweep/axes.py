"""The axes of a sweep, resolved: what each can be, as labelled options or as a range of numbers.

An option is a label and the config paths that it sets; a condition over shapes or over methods becomes
options here, and counts what it left out. Nothing is combined yet.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.sweep import SAMPLED, SweepStudy
from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Option:
    """One value of an axis."""

    label: str
    """Unique on its axis, short, for names and for a searcher."""

    choices: Mapping[str, Any]
    """Config path to value: one, or several that belong together."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A config path and the options that it has."""

    path: str
    options: tuple[Option, ...]

    def draw(self, generator: random.Random) -> str:
        """The label of an option, each as likely."""
        return generator.choice(self.options).label

    def option(self, label: str) -> Option:
        """The option of this label."""
        return next(each for each in self.options if each.label == label)


@dataclass(frozen=True, slots=True)
class Range:
    """A config path and an interval of numbers, for searches that draw."""

    path: str
    low: float
    high: float
    log: bool = False
    """Whether the logarithm is spread evenly."""
    integer: bool = False
    """Whether values are whole numbers; then `high` itself is one of them."""

    def draw(self, generator: random.Random) -> float:
        """A value, evenly distributed."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if self.integer and not self.log:
            return generator.randint(int(self.low), int(self.high))
        value = generator.uniform(low, high)
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return round(value) if self.integer else value


@dataclass(slots=True)
class Removed:
    """What was left out: how many for each reason, and the first case in full."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, count: int = 1, *, example: str = "") -> None:
        """Count one reason."""
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples.setdefault(reason, example or reason)


def resolve(study: SweepStudy, removed: Removed) -> tuple[Axis | Range, ...]:
    """The axes of a study in file order; raises ConfigError for one that is written wrong or empty."""
    return tuple(_axis(study, path, value, removed) for path, value in study.sweep.axes.items())


def _axis(study: SweepStudy, path: str, value: Any, removed: Removed) -> Axis | Range:
    where = f"{study.source}: sweep.axes.{path}"
    if isinstance(value, Mapping):
        if "shapes_of" in value:
            from pipeline.sweep.conditions import shape_options

            return Axis(path, shape_options(study, path, value, removed=removed, where=where))
        return _range(path, value, search=study.sweep.search, where=where)
    if not isinstance(value, list) or not value:
        raise ConfigError(
            f"{where}={json.dumps(value)} is wrong; expected a list of values, a range "
            "{ low = …, high = … } or a condition { shapes_of = … }"
        )
    values: list[tuple[Any, Mapping[str, Any]]] = []
    for each in value:
        if isinstance(each, Mapping) and "methods" in each:
            from pipeline.sweep.conditions import method_choices

            values += method_choices(study, path, each, removed=removed, where=where)
        else:
            values.append((each, {path: each}))
    labels = label_values(path, [each for each, _ in values])
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{where}: the value {label!r} is there {labels.count(label)} times")
    return Axis(path, tuple(Option(label, set_) for label, (_, set_) in zip(labels, values, strict=True)))


def _range(path: str, value: Mapping[str, Any], *, search: str, where: str) -> Range:
    if odd := sorted(set(value) - {"low", "high", "log"}):
        raise ConfigError(f"{where}: {odd[0]!r} is unknown; a range has low, high and log")
    low, high, log = value.get("low"), value.get("high"), value.get("log", False)
    numbers = [each for each in (low, high) if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) < 2 or not numbers[0] < numbers[1] or not isinstance(log, bool):
        raise ConfigError(f"{where}: a range needs numbers low < high, and log = true or false")
    if log and numbers[0] <= 0:
        raise ConfigError(f"{where}: low={low} must be above 0 for log = true")
    if search not in SAMPLED:
        raise ConfigError(
            f"{where}: a range has no grid; list its values, "
            "or set sweep.search to 'random', 'tpe' or 'pareto'"
        )
    whole = all(isinstance(each, int) for each in numbers)
    return Range(path, numbers[0], numbers[1], log=log, integer=whole)


def label_values(path: str, values: Sequence[Any]) -> list[str]:
    """A short label for each value of one axis: its name, its shape, or `leaf=value`.

    Of a file or folder its own name, unless another value has the same.
    """
    tables = [_without_folders(each) for each in values if isinstance(each, Mapping)]
    short = [_label(path, _without_folders(value), tables) for value in values]
    whole = [_label(path, value, [each for each in values if isinstance(each, Mapping)]) for value in values]
    return [each if short.count(each) == 1 else full for each, full in zip(short, whole, strict=True)]


def _without_folders(value: Any) -> Any:
    """A value in which absolute paths are the name of what they lead to."""
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() and Path(value).name else value
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    return value


def _label(path: str, value: Any, tables: Sequence[Mapping[str, Any]]) -> str:
    leaf = path.rpartition(".")[2]
    if isinstance(value, Mapping):
        name = value.get("name", leaf)
        alike = [each for each in tables if each.get("name", leaf) == name]
        varying = [
            key
            for key in dict.fromkeys(key for each in alike for key in each)
            if any(each.get(key) != value.get(key) for each in alike)
        ]
        inner = [_label(key, value[key], []) for key in varying if key in value]
        return " ".join([str(name), *inner])
    if isinstance(value, str):
        return value
    if leaf == "shape" and isinstance(value, list | tuple):
        return "x".join(str(side) for side in value)
    return f"{leaf}={value:g}" if isinstance(value, float) else f"{leaf}={json.dumps(value)}".replace(" ", "")
