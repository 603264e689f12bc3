"""Two models side by side, for a terminal: five short tables, each only if it has a row."""

from collections.abc import Sequence

from analysis import names
from analysis.comparison import Cell, Column, Table, interval_text
from analysis.differences import Row
from analysis.speed import ratio_cell
from analysis.tables import terminal
from analysis.versus import SIDES, Measure, Pair, Versus
from analysis.versus_speed import Abreast

_TITLES = {
    "parameters": "parameters",
    "krony_parameters": "without wpe",
    "non_embedding_parameters": "without embeddings",
    "macs_per_token": "MACs/token",
}


def versus_text(found: Versus) -> str:
    """Who the two are, what differs, how large and how good they are, and how well each matrix was met."""
    head = "\n".join(
        f"{side}  {address}  {label}"
        for side, address, label in zip(SIDES, found.addresses, found.labels, strict=True)
    )
    tables = [
        _settings(found.settings),
        _sizes(found.sizes),
        _measures(found.measures),
        _speeds(found.speeds),
        _errors(found.errors),
    ]
    missing = "\n".join(f"missing   {problem}" for problem in found.problems)
    shown = [terminal(table) for table in tables if table.rows]
    same = [] if found.settings else ["Nothing differs in how they were made."]
    return "\n\n".join([head, *same, *shown, *([missing] if missing else [])])


def _table(title: str, rows: Sequence[tuple[str, ...]], *more: str, notes: tuple[str, ...] = ()) -> Table:
    columns = (Column(title, is_text=True), *(Column(name) for name in (*SIDES, *more)))
    return Table(columns, tuple(tuple(Cell(text) for text in row) for row in rows), notes)


def _settings(pairs: Sequence[Pair]) -> Table:
    return _table(
        "differs in",
        [
            (pair.name, names.leaf(pair.a) or names.MISSING, names.leaf(pair.b) or names.MISSING)
            for pair in pairs
        ],
    )


def _sizes(pairs: Sequence[Pair]) -> Table:
    rows = [
        (_TITLES[pair.name], names.count(pair.a), names.count(pair.b), names.share(_ratio(pair)))
        for pair in pairs
    ]
    return _table("size", rows, "A / B")


def _measures(measures: Sequence[Measure]) -> Table:
    rows = []
    for each in measures:
        a, b = (
            f"{names.quantity(row['value'], row['metric'])} {_ends(row)}".strip() for row in (each.a, each.b)
        )
        rows.append((each.protocol, a, b, *_verdict(each)))
    note = (
        "A − B: paired difference over the text with its 95 % interval, in nats per token, or in points of "
        "accuracy; p after Holm; detectable: the difference that would be found four times in five. One "
        "seed each: what seeds do is in no interval."
    )
    return _table("measured", rows, "A − B", "p", "detectable", notes=(note,))


def _ends(row: Row) -> str:
    ends = interval_text(row)
    return f"({ends})" if ends else ""


def _verdict(measure: Measure) -> tuple[str, str, str]:
    found = measure.difference
    if found is None or measure.p_adjusted is None:
        return names.MISSING, names.MISSING, names.MISSING
    points = measure.a["metric"] == "accuracy"
    ends = (found.gap.estimate, found.gap.low, found.gap.high)
    signed = (-ends[0], -ends[2], -ends[1]) if points else ends  # of accuracy, where the test knows errors
    estimate, low, high = (names.gap(value, measure.a["metric"]) for value in signed)
    smallest = names.gap(found.detectable, measure.a["metric"]).removeprefix("+")
    return f"{estimate} ({low} to {high})", names.probability(measure.p_adjusted), smallest


def _errors(pairs: Sequence[Pair]) -> Table:
    known = [pair for pair in pairs if names.is_number(pair.a) and names.is_number(pair.b)]
    rows = [(pair.name, f"{pair.a:.3f}", f"{pair.b:.3f}", f"{pair.a - pair.b:+.3f}") for pair in known]
    return _table("relative error", rows, "A − B")


def _speeds(figures: Sequence[Abreast]) -> Table:
    rows = []
    for each in figures:
        cells = [ratio_cell(row) for row in (each.a, each.b)]
        rows.append((each.name, *(f"{c.text} ({c.detail})" if c.detail else c.text for c in cells)))
    places = dict.fromkeys(f"{each.a['place']}; {each.a['protocol']}." for each in figures)
    return _table("over dense", rows, notes=tuple(places))


def _ratio(pair: Pair) -> float | None:
    return pair.a / pair.b if names.is_number(pair.a) and names.is_number(pair.b) and pair.b else None
