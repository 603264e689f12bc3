"""Where one number comes from: the scores behind a cell, what they measured, and every record on the way.

A cell is named `ROW:COLUMN`: the name of the run as the table shows it (`teacher` for the dense one), and the
protocol or its number in brackets. Of a cell that stands for several seeds every seed is shown; settings that
they share are shown once.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from analysis import names
from analysis.comparison import column_names, interval_text, measure_titles, row_names
from analysis.frames import Frames
from analysis.schema import rows_of
from pipeline.errors import ConfigError
from pipeline.store.records import KINDS, Record

_SHOWN = 8
_LONG = 90


@dataclass(frozen=True, slots=True)
class Step:
    """One artifact on the way to a number."""

    kind: str
    address: str
    digest: str
    """Of its payload as it lies there."""

    finished: str
    commit: str
    is_dirty: bool
    command: str


@dataclass(frozen=True, slots=True)
class Source:
    """One seed of a cell: a scores record, and what it was made from, nearest first."""

    value: float
    seed: int | None
    calibration_seed: int | None
    steps: tuple[Step, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """All that the records say about one cell."""

    cell: str
    label: str
    value: str
    protocol: str
    counts: str
    digests: tuple[tuple[str, str], ...]
    """What the text and the tokens must hash to."""

    settings: tuple[tuple[str, str], ...]
    """Configurations on the path, as dotted paths with values; of several seeds one value each."""

    sources: tuple[Source, ...]
    repeat: tuple[str, ...]
    """What to type."""

    def json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)

    def text(self) -> str:
        """For a terminal."""
        head = [("cell", self.cell), ("model", self.label), ("value", self.value)]
        head += [("protocol", self.protocol), ("", self.counts), *self.digests]
        width = max(len(key) for key, _ in head) + 2
        lines = [f"{key:<{width}}{value}" for key, value in head]
        for source in self.sources:
            lines += ["", *_source_lines(source)]
        wide = max(len(path) for path, _ in self.settings) + 2
        lines += ["", "settings", *(f"  {path:<{wide}}{_cut(value)}" for path, value in self.settings)]
        return "\n".join([*lines, "", "repeat", *(f"  {command}" for command in self.repeat)])


@dataclass(frozen=True, eq=False, slots=True)
class Index:
    """What the names of cells mean in some frames, read once however many are explained."""

    titles: Mapping[str, str]
    """Of columns, by measure."""

    columns: Mapping[str, str]
    """Names of columns, by measure."""

    subjects: Mapping[str, str]
    """Subjects, by the name of their row."""

    cells: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Rows of `arms`, by subject and measure."""

    scores: Mapping[str, Mapping[str, Any]]
    """Rows of `scores`, by address."""

    @staticmethod
    def of(frames: Frames) -> "Index":
        """The index of these frames."""
        rows, titles = rows_of(frames.arms), measure_titles(frames.arms)
        cells: dict[str, dict[str, Mapping[str, Any]]] = {}
        for row in rows:
            cells.setdefault(row["subject"], {})[row["measure"]] = row
        return Index(
            titles=titles,
            columns=column_names(titles, rows),
            subjects={name: subject for subject, name in row_names(rows).items()},
            cells=cells,
            scores={row["address"]: row for row in rows_of(frames.scores)},
        )


def explain(frames: Frames, text: str, *, store: str, index: Index | None = None) -> Provenance:
    """The provenance of the cell `ROW:COLUMN`; raises ConfigError listing what there is.

    `index` is that of the frames, for who explains many cells.
    """
    index = index or Index.of(frames)
    cell = find_cell(index, text)
    addresses = str(cell["address"]).split()
    records = [frames.graph.records[address] for address in addresses]
    paths = [(record, *frames.graph.path(_input(frames, record))) for record in records]
    return Provenance(
        cell=text,
        label=str(cell["label"]),
        value=_value(cell),
        protocol=f"{cell['protocol']} v{cell['version']}: {cell['description']}",
        counts=(
            f"{names.count(cell['scored'])} of {names.count(cell['tokens'])} tokens scored in "
            f"{names.count(cell['windows'])} windows, mean over {cell['weighting']}"
        ),
        digests=(
            (f"text {cell['text']}", f"sha256 {cell['text_sha256']}"),
            ("its tokens", f"sha256 {cell['tokens_sha256']}"),
        ),
        settings=tuple(settings_of(paths)),
        sources=tuple(_source(index.scores[path[0].address], path) for path in paths),
        repeat=tuple(commands_of(records, store)),
    )


def find_cell(index: Index, text: str) -> Mapping[str, Any]:
    """The row of `arms` that a name means; raises ConfigError listing rows or columns."""
    titles, columns, subjects = index.titles, index.columns, index.subjects
    numbers = {str(number): measure for number, measure in enumerate(titles, start=1)}
    wanted = {name: measure for measure, name in columns.items()} | numbers
    shown = ", ".join(f"[{number}] {titles[measure]}" for number, measure in numbers.items()) or "none"
    row, colon, column = text.rpartition(":")
    if not colon:
        raise ConfigError(
            f"--explain {text!r}: a cell is ROW:COLUMN; rows: {_some(list(subjects))}; columns: {shown}"
        )
    if row not in subjects:
        near = difflib.get_close_matches(row, subjects, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {_some(list(subjects))}"
        raise ConfigError(f"--explain {text!r}: no row is called {row!r}; {hint}")
    measure = wanted.get(column.strip("[]"))
    if measure is None:
        raise ConfigError(f"--explain {text!r}: no column is called {column!r}; there are: {shown}")
    cells = index.cells[subjects[row]]
    if measure not in cells:
        there = ", ".join(columns[each] for each in cells)
        raise ConfigError(f"--explain {text!r}: {row} was not measured there; it has: {there}")
    return cells[measure]


def _input(frames: Frames, scores: Record) -> Record:
    return frames.graph.records[scores.inputs["model"].address]


def _value(cell: Mapping[str, Any]) -> str:
    unit = "accuracy" if cell["metric"] == "accuracy" else "perplexity"
    parts = [f"{unit} {names.quantity(cell['value'], cell['metric'])}"]
    if ends := interval_text(dict(cell)):
        parts.append(f"95 % {ends}")
    if cell["seeds"] > 1:
        parts.append(f"mean of {cell['seeds']} seeds")
    if names.is_number(cell["loss"]):
        parts.append(f"loss {cell['loss']:.6f} nats")
    parts.append(f"{names.count(cell['parameters'])} parameters")
    if names.is_number(cell["worse_by"]):
        worse = names.gap(cell["worse_by"], cell["metric"])
        parts.append(
            f"worse than the best of its size on track {cell['track']} by {worse} "
            f"(p {names.probability(cell['p_adjusted'])})"
        )
    return ", ".join(parts)


def _source(row: Mapping[str, Any], path: Sequence[Record]) -> Source:
    warnings = [f"changed after use: {row['drifted']}"] if row["drifted"] else []
    warnings += [f"no record any more: {row['missing']}"] if row["missing"] else []
    return Source(
        value=float(row["value"]),
        seed=int(row["seed"]) if names.is_number(row["seed"]) else None,
        calibration_seed=int(row["calibration_seed"]) if names.is_number(row["calibration_seed"]) else None,
        steps=steps_of(path),
        warnings=tuple(warnings),
    )


def steps_of(path: Sequence[Record]) -> tuple[Step, ...]:
    """The records of a path, the last that was made first."""
    ordered = sorted(path, key=lambda record: KINDS.index(record.kind), reverse=True)
    return tuple(_step(record) for record in ordered)


def _step(record: Record) -> Step:
    known = record.provenance
    return Step(
        kind=record.kind,
        address=record.address,
        digest=record.digest,
        finished=record.finished,
        commit=str(known.get("commit", "")),
        is_dirty=bool(known.get("dirty")),
        command=names.command(known.get("argv", ())),
    )


def settings_of(paths: Sequence[Sequence[Record]]) -> Iterator[tuple[str, str]]:
    """Every leaf of every configuration; one value where all seeds share it."""
    found: dict[str, dict[str, None]] = {}
    for path in paths:
        for record in path:
            for key, value in _leaves(record.config, record.kind):
                found.setdefault(key, {})[value] = None
    yield from ((key, ", ".join(values)) for key, values in found.items())


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _leaves(value[key], f"{path}.{key}")
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def commands_of(records: Sequence[Record], store: str) -> Iterator[str]:
    """A checkout and a command for each of them; equal ones once."""
    done: dict[str, None] = {}
    for record in records:
        command = names.command(record.provenance.get("argv", ()))
        commit = str(record.provenance.get("commit", ""))
        if command:
            done[f"git checkout {commit[:12]} && {command}" if commit else command] = None
    yield from done
    yield f"krony report --store {store}"


def _source_lines(source: Source) -> Iterator[str]:
    seeds = [f"seed {source.seed}"] if source.seed is not None else []
    seeds += [f"calibration {source.calibration_seed}"] if source.calibration_seed is not None else []
    yield f"{', '.join(seeds) or 'no seed'}: {source.value:,.4f}"
    for step in source.steps:
        code = f"{step.commit[:12] or 'no commit'}{' with changes' if step.is_dirty else ''}"
        yield f"  {step.kind:<10}{step.address:<56}  {step.digest[:16]}  {step.finished}  {code}"
    yield from (f"  note      {warning}" for warning in source.warnings)


def _cut(value: str) -> str:
    """A long list of files is in its record, and in `--json`."""
    return value if len(value) <= _LONG else f"{value[:_LONG]}… ({len(value):,} characters)"


def _some(values: Sequence[str]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(values[:_SHOWN]) + more if values else "none"
