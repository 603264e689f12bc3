"""A sweep: one TOML file that holds everything of a run config, and a section `[sweep]`.

Axes are dotted config paths with values; every combination, or a sample of them, is one arm, and every arm is
an ordinary `RunConfig` once per seed. So a trial, another sweep and `krony run` share whatever they have in
common. Here is only what was written; `pipeline.sweep.space` makes trials of it. Loads no torch.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from model.marks import NOT_IDENTITY
from pipeline.config.load import (
    UNIONS,
    explain,
    flag_table,
    merge,
    read_toml,
    require_finite,
    validate,
    with_name,
)
from pipeline.config.paths import known_paths, landing, lay, require_path
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError

CONDITIONS = frozenset({"shapes_of", "low", "high"})
"""Keys that make a table under `[sweep.axes]` a condition or a range, not a deeper path."""

SAMPLED = ("random", "tpe", "pareto")
"""Searches that draw arms; the others enumerate them."""

_OUTSIDE = ("eval", "ray", "store", "tracking", "name")


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRule:
    """When a trial that does badly is stopped, in tokens of training."""

    name: Literal["asha", "median", "halving", "none"] = "asha"
    """`asha`: successive halving as results come. `median`: below the median of the others. `halving`:
    successive halving that compares the arms of a rung once all are there, so it is deterministic. `none` is
    as if the section were not there: it lifts the rule of a file that is extended.
    """

    grace_tokens: int = 65_536
    """Nobody is stopped before; the first rung."""

    reduction: int = 3
    """Each rung is so many times the one before, and keeps one trial of so many."""

    def __post_init__(self) -> None:
        if self.grace_tokens < 1 or self.reduction < 2:
            raise ConfigError(
                f"sweep.stop.grace_tokens={self.grace_tokens:,} must be at least 1, sweep.stop.reduction="
                f"{self.reduction} at least 2"
            )

    def rungs(self, total_tokens: int) -> tuple[int, ...]:
        """Tokens at which trials are compared: grace x reduction^k, below the end of the trial."""
        found, rung = [], self.grace_tokens
        while rung < total_tokens:
            found.append(rung)
            rung *= self.reduction
        return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What is varied, how it is searched, and when it is stopped."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    seeds: tuple[int, ...] = (0,)
    """Every arm runs once per seed: `seed` of the run config."""

    seed_calibration: bool = True
    """Whether `calibration.seed` follows the seed; false shares statistics over seeds."""

    search: Literal["grid", "random", "tpe", "pareto"] = "grid"
    """`grid`: every combination. `random`: a seeded sample. `tpe`, `pareto`: Optuna, for the validation loss
    alone or against `second_objective`.
    """

    search_seed: int = 0
    """Seed of the search itself."""

    samples: int = 0
    """Arms that `random`, `tpe` and `pareto` draw."""

    second_objective: Literal["parameters", "macs_per_token"] = "parameters"
    """What `pareto` trades the validation loss against."""

    stop: StopRule | None = None
    """Early stopping; without it every trial runs to its end."""

    concurrent: int = field(default=0, metadata=NOT_IDENTITY)
    """Trials at once; 0 follows from the scarcest resource."""

    retries: int = field(default=2, metadata=NOT_IDENTITY)
    """Restarts of a trial after its process crashed; each goes on from the newest checkpoint."""

    silence_s: float = field(default=900.0, metadata=NOT_IDENTITY)
    """Seconds without a sign of life after which a trial counts as failed."""

    axes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted config path to a list of values, a range, or a condition; see docs/sweeps.md."""

    skip: tuple[Mapping[str, Any], ...] = ()
    """Combinations to leave out: all paths of a table have the given values."""

    def __post_init__(self) -> None:
        if self.stop and self.stop.name == "none":
            object.__setattr__(self, "stop", None)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"sweep.seeds={list(self.seeds)} must name at least one seed, and each once")
        if self.search in SAMPLED and self.samples < 1:
            raise ConfigError(f"sweep.search={self.search!r} draws arms; set sweep.samples to at least 1")
        if self.search == "grid" and self.samples:
            raise ConfigError(
                f"sweep.samples={self.samples} is for sweep.search = 'random', 'tpe' or 'pareto'; a grid "
                "runs every combination"
            )
        if self.concurrent < 0 or self.retries < 0 or self.silence_s <= 0:
            raise ConfigError(
                f"sweep.concurrent={self.concurrent} and sweep.retries={self.retries} must be 0 or more, "
                f"sweep.silence_s={self.silence_s:g} above 0"
            )


@dataclass(frozen=True, slots=True)
class SweepStudy:
    """One sweep as it was written: the config that all trials share, and what is varied."""

    name: str
    """A word for people: the `name` of the file."""

    base: Mapping[str, Any]
    """The merged raw table without `[sweep]`; sections with a `name` have theirs."""

    sweep: SweepConfig
    """What is varied."""

    source: str
    """Where it was read."""

    def config(self, choices: Mapping[str, Any], seed: int) -> RunConfig:
        """The run config of one trial; ConfigError if the choices make none.

        Choices are laid over the base in their order, as files would be: a `method` table of the same name
        merges, one of another name replaces.
        """
        table = self.table(choices) | {"seed": seed}
        if self.sweep.seed_calibration:
            table["calibration"] = {**table.get("calibration", {}), "seed": seed}
        return validate(table, source=self.source)

    def table(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """The base with choices laid over it, in their order; ConfigError for one that lands nowhere."""
        table: dict[str, Any] = copy.deepcopy(dict(self.base))
        for path, value in choices.items():
            table = lay(table, path, value)
        return table

    def effective(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """The choices that land somewhere: `method.shape` is dropped where the method has no shape."""
        table: dict[str, Any] = copy.deepcopy(dict(self.base))
        kept: dict[str, Any] = {}
        for path, value in choices.items():
            if landing(table, path) is not None:
                table = lay(table, path, value)
                kept[path] = value
        return kept

    @property
    def first(self) -> RunConfig:
        """The base alone with the first seed: it speaks for what all trials share."""
        return self.config({}, self.sweep.seeds[0])


def load_sweep(path: Path, *, overrides: Sequence[str] = ()) -> SweepStudy:
    """Read a sweep; flags of run fields change the base, `--sweep.seeds [0,1]` the sweep.

    Raises ConfigError with file, key, what was wrong and what was expected. `[[variants]]` and `sweeps` of a
    file that is extended have no meaning here and are left out.
    """
    source = str(path)
    raw, flags = read_toml(path), flag_table(overrides, base=Path.cwd())
    below, above = raw.pop("sweep", None), flags.pop("sweep", {})
    for key in ("variants", "sweeps", "comparisons"):
        raw.pop(key, None)
    if not isinstance(below, Mapping):
        raise ConfigError(f"{source}: has no [sweep] section; docs/sweeps.md shows one")
    if not isinstance(above, Mapping):
        raise ConfigError(f"command line: --sweep {above!r}: name one setting, such as --sweep.seeds [0,1]")
    table = {key: with_name(key, value) for key, value in merge(raw, flags).items()}
    for section in UNIONS:
        table.setdefault(section, {"name": getattr(RunConfig(), section).name})
    study = SweepStudy(
        name=str(table.get("name", RunConfig().name)),
        base=table,
        sweep=_sweep(_merged(below, above), source=source),
        source=source,
    )
    for axis in study.sweep.axes:
        _require_axis(axis, source=source)
    for skip in study.sweep.skip:
        for key in skip:
            require_path(key, where=f"{source}: sweep.skip")
    _ = study.first
    return study


def _sweep(table: Mapping[str, Any], *, source: str) -> SweepConfig:
    require_finite(table, source=source, path="sweep")
    try:
        return _ADAPTER.validate_json(json.dumps(table))
    except ValidationError as err:
        lines = [
            explain({**each, "loc": ("sweep", *each["loc"])}, source, root={"sweep": SweepConfig()})
            for each in err.errors(include_url=False)[:4]
        ]
        raise ConfigError("; ".join(lines)) from err
    except ConfigError as err:
        raise ConfigError(f"{source}: {err}") from err
    except OverflowError as err:
        raise ConfigError(f"{source}: sweep: a number is beyond all measure ({err}); correct it") from err
    except TypeError as err:
        raise ConfigError(f"{source}: sweep: {err}; dates have no use here") from err


_ADAPTER: TypeAdapter[SweepConfig] = TypeAdapter(SweepConfig)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`[sweep]` of the file under that of the flags, with axes and skips by dotted path."""
    table = merge(below, above)
    axes = [part.get("axes", {}) for part in (below, above)]
    if all(isinstance(part, Mapping) for part in axes):
        table["axes"] = _dotted(axes[0]) | _dotted(axes[1])
    skip = table.get("skip", [])
    if isinstance(skip, list):
        table["skip"] = [_dotted(each) if isinstance(each, Mapping) else each for each in skip]
    return table


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": [...]}}`, as TOML reads an unquoted dotted key, as `{"train.lr": [...]}`."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and not CONDITIONS & set(value):
            found |= _dotted(value, f"{path}.")
        else:
            found[path] = value
    return found


def _require_axis(path: str, *, source: str) -> None:
    """Raise ConfigError for an axis that is not there, or that cannot make two trials differ."""
    where = f"{source}: sweep.axes"
    require_path(path, where=where)
    if path == "seed":
        raise ConfigError(f"{where}: 'seed' is no axis; list the seeds in sweep.seeds")
    if path.partition(".")[0] in _OUTSIDE or not known_paths()[path]:
        raise ConfigError(
            f"{where}: {path!r} cannot change a trained model, so all its trials would be one; set it once, "
            "outside the axes"
        )
