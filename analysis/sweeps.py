"""A published sweep as a tidy table: one row per trial, its choices as columns, read from records alone.

A sweep is an artifact whose `trials.json` says what was tried and how it ended, and whose `configs.json`
holds what each trial ran. Scores are read from the records that a trial names; what cannot be read is a line
for the reader, not an end of the report.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import pandas as pd

from analysis import names
from pipeline.errors import StoreError
from pipeline.store.artifacts import Store
from pipeline.store.location import Location
from pipeline.store.records import Record

KIND = "sweep"
TRIALS, CONFIGS = "trials.json", "configs.json"
State = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial as the sweep left it."""

    key: str
    name: str
    arm: str
    """Its name without the seed."""

    choices: Mapping[str, Any]
    """Config path to value."""

    seed: int
    state: State
    reason: str = ""
    """Why it stopped or failed, in one line."""

    run: str = ""
    """Of a trial that was stopped, the address at which `krony train` goes on with its config."""

    init: str = ""
    model: str = ""
    scores: Mapping[str, str] = field(default_factory=dict)
    """Address by protocol id."""

    parameters: int = 0
    macs_per_token: int = 0
    tokens: int = 0
    """Training tokens that it has seen."""

    val_loss: float | None = None
    """Nats per token at its last validation; None if there was none."""

    val_loss_initial: float | None = None
    rungs: Sequence[Sequence[float]] = ()
    """(tokens, validation loss) of every validation."""

    train_s: float = 0.0
    wall_s: float = 0.0

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> "Trial":
        """Read one entry of `trials.json`; raises ValueError for what is none."""
        known = {each.name for each in fields(Trial)}
        trial = Trial(**{key: value for key, value in row.items() if key in known})
        if trial.state not in get_args(State):
            raise ValueError(f"{trial.name}: state {trial.state!r}")
        return trial


@dataclass(frozen=True, eq=False)
class Sweep:
    """A published sweep and all that its trials measured."""

    record: Record
    trials: tuple[Trial, ...]
    configs: Mapping[str, Mapping[str, Any]]
    """Resolved config by trial key; empty where the sweep kept none."""

    scores: Mapping[str, Record]
    """Records of scores by address: of the trials, and of their teacher."""

    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the study."""
        return str(self.record.settings.get("name") or self.record.name)

    @property
    def choices(self) -> tuple[str, ...]:
        """Config paths that the trials set, in the order in which they are laid over the base.

        A path that the first trials lack has its place after the one that it follows where it is set.
        """
        found: list[str] = []
        for trial in self.trials:
            place = 0
            for path in trial.choices:
                if path not in found:
                    found.insert(place, path)
                place = found.index(path) + 1
        return tuple(found)

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Axes of the sweep, each with the paths that a condition on it sets too: a shape its terms."""
        declared = {str(axis[0]) for axis in self.record.config.get("sweep", {}).get("axes", ())}
        found: dict[str, tuple[str, ...]] = {}
        for path in self.choices:
            if not found or not declared or path in declared:
                found[path] = ()
            else:
                last = next(reversed(found))
                found[last] = (*found[last], path)
        return found

    @property
    def arms(self) -> Mapping[str, tuple[Trial, ...]]:
        """Trials by arm, in their order."""
        found: dict[str, tuple[Trial, ...]] = {}
        for trial in self.trials:
            found[trial.arm] = (*found.get(trial.arm, ()), trial)
        return found

    @property
    def finished(self) -> tuple[Trial, ...]:
        """Trials that ran to their end."""
        return tuple(trial for trial in self.trials if trial.state == "finished")

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols under which any trial was scored, in their order."""
        return tuple(dict.fromkeys(protocol for trial in self.finished for protocol in trial.scores))

    def measured(self, trial: Trial, protocol: str) -> Mapping[str, Any]:
        """What a trial's scores record says under a protocol; empty if there is none."""
        record = self.scores.get(trial.scores.get(protocol, ""))
        return record.metrics if record else {}

    def teacher(self, protocol: str) -> Mapping[str, Any]:
        """The same of the dense teacher, on the same tokens."""
        asked = {self.measured(trial, protocol).get("tokens_sha256") for trial in self.finished}
        teacher = self.record.inputs.get("teacher")
        for record in self.scores.values():
            is_dense = teacher is not None and record.inputs["model"].address == teacher.address
            same = record.config.get("protocol") == protocol and record.metrics.get("tokens_sha256") in asked
            if is_dense and same:
                return record.metrics
        return {}


def open_sweep(store: Store, name: str) -> Sweep:
    """The sweep of a study's name, or at an address `sweep/…`; of several namesakes the newest.

    Raises StoreError if there is none, saying which there are and which are still on their way.
    """
    record, problems = _find(store, name.strip("/"))
    location = store.open(record.address).location
    trials = _trials(location, where=f"{record.address}/{TRIALS}")
    configs = _configs(location, record, problems)
    wanted = {address for trial in trials for address in trial.scores.values()}
    scores = _scores(store, wanted, record)
    lost = [(trial.name, a) for trial in trials for a in trial.scores.values() if a not in scores]
    problems += [f"{trial}: {address} has no readable record" for trial, address in lost]
    return Sweep(record, trials, configs, scores, tuple(dict.fromkeys(problems)))


def tidy(sweep: Sweep) -> pd.DataFrame:
    """One row per trial: who, how it ended, what was chosen, what it cost, what was measured."""
    chosen = {path: _values(sweep, path) for path in sweep.choices}
    rows = []
    for trial in sweep.trials:
        row = {key: getattr(trial, key) for key in ("key", "name", "arm", "seed", "state", "reason")}
        row |= {path: values[trial.key] for path, values in chosen.items()}
        sizes = ("parameters", "macs_per_token", "tokens", "val_loss_initial", "val_loss")
        row |= {key: getattr(trial, key) for key in sizes}
        for protocol in sweep.protocols:
            measured = sweep.measured(trial, protocol)
            row |= {f"{protocol} {key}": measured.get(key) for key in ("loss", "value")}
        row |= {key: getattr(trial, key) for key in ("train_s", "wall_s", "init", "run", "model")}
        rows.append(row)
    return pd.DataFrame(rows).convert_dtypes()


def axis_values(sweep: Sweep, axis: str) -> Mapping[str, Any]:
    """What each trial chose on an axis, by trial key: a number, or a text; None where it does not apply."""
    found = dict(_values(sweep, axis))
    for path in sweep.axes[axis]:
        more = _values(sweep, path)
        if len({_frozen(value) for value in more.values()} - {"null"}) > 1:
            last = path.rpartition(".")[2]
            for key, value in found.items():
                if value is not None and more[key] is not None:
                    found[key] = f"{names.leaf(value)} {last}={names.leaf(more[key])}"
    return found


def _values(sweep: Sweep, path: str) -> Mapping[str, Any]:
    raw = {trial.key: trial.choices.get(path) for trial in sweep.trials}
    texts = _texts(list(raw.values()))
    return {key: texts.get(_frozen(value), value) for key, value in raw.items()}


def _texts(values: Sequence[Any]) -> Mapping[str, str]:
    """A text for every value that is neither a number nor nothing; different values, different texts."""
    kinds = {_frozen(value): value for value in values if value is not None and not names.is_number(value)}
    plain, configs = [], []
    for value in kinds.values():
        is_table = isinstance(value, Mapping)
        plain.append(names.method_label(value, n_embd=None) if is_table else names.leaf(value))
        configs.append(value if is_table else {})
    return dict(zip(kinds, names.distinct(plain, configs), strict=True))


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _find(store: Store, name: str) -> tuple[Record, list[str]]:
    records, problems, begun = [], [], []
    for folder in store.root.folders(KIND):
        address = f"{KIND}/{folder}"
        try:
            records.append(store.record(address))
        except FileNotFoundError:
            begun.append(address)
        except StoreError as err:
            problems.append(str(err))
    found = [each for each in records if name in (each.address, each.settings.get("name"), each.name)]
    if found:
        newest = max(found, key=lambda record: (record.finished, record.address))
        others = ", ".join(record.address for record in found if record is not newest)
        if others:
            problems.append(
                f"{len(found)} sweeps are named {name}: this is the newest, {newest.address}; not {others}"
            )
        return newest, problems
    where = f"{store.root.uri}: no finished sweep {name!r}"
    going = [address for address in begun if address.startswith(f"{KIND}/{name}-") or address == name]
    if going:
        raise StoreError(
            f"{where}; {going[0]} was begun: the same `krony sweep` goes on from there and ends it"
        )
    there = ", ".join(f"{record.settings.get('name', record.name)} ({record.address})" for record in records)
    raise StoreError(f"{where}; there are: {there or 'none'}")


def _trials(location: Location, *, where: str) -> tuple[Trial, ...]:
    try:
        return tuple(Trial.from_json(row) for row in json.loads(location.read_bytes(TRIALS)))
    except (OSError, ValueError, TypeError, AttributeError) as err:
        raise StoreError(
            f"{where}: not a list of trials ({err}); publish it again with `krony sweep`"
        ) from err


def _configs(location: Location, record: Record, problems: list[str]) -> Mapping[str, Mapping[str, Any]]:
    if CONFIGS not in record.files:
        problems.append(f"{record.address}: holds no {CONFIGS}, so there is no best recipe")
        return {}
    try:
        found = json.loads(location.read_bytes(CONFIGS))
    except (OSError, ValueError) as err:
        problems.append(f"{record.address}/{CONFIGS}: cannot be read ({err})")
        return {}
    return dict(found)


def _scores(store: Store, wanted: set[str], sweep: Record) -> Mapping[str, Record]:
    """Scores of the trials, and all of their teacher."""
    teacher = sweep.inputs.get("teacher")
    if teacher is not None:
        stem = teacher.address.partition("/")[2].rpartition("-")[0]
        names_there = store.root.folders("scores")
        wanted = wanted | {f"scores/{name}" for name in names_there if name.startswith(f"{stem}-")}
    found = {}
    for address in sorted(wanted):
        try:
            found[address] = store.record(address)
        except (FileNotFoundError, StoreError):
            continue  # named by whoever misses it
    return found
