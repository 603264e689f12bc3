"""One table in four formats: terminal, Markdown, LaTeX, CSV. Pure functions from `Table` to text."""

from collections.abc import Sequence
from itertools import groupby

import pandas as pd

from analysis.baselines import CONVENTIONS, comparable
from analysis.comparison import Cell, Column, Table
from analysis.names import MISSING, count

WIDTH = 118
"""Columns of a terminal line; a wider table goes on below, with its first columns repeated."""


def terminal(table: Table, *, width: int = WIDTH) -> str:
    """Aligned text with two head lines; the best cells carry a star."""
    if not table.rows:
        return "no scores yet"
    fixed = [i for i, column in enumerate(table.columns) if not column.group]
    texts = [[_starred(cell, table) for cell in row] for row in table.rows]
    widths = [
        max(len(column.title), *(len(row[i]) for row in texts)) for i, column in enumerate(table.columns)
    ]
    groups = _members(table)
    for members in groups:
        room = sum(widths[i] for i in members) + 2 * (len(members) - 1)
        widths[members[-1]] += max(0, len(table.columns[members[0]].group) - room)
    blocks: list[list[int]] = [list(fixed)]
    for members in groups:
        if blocks[-1] != fixed and sum(widths[i] + 2 for i in blocks[-1] + members) > width:
            blocks.append(list(fixed))
        blocks[-1] += members
    parts = [_block(table, texts, widths, block) for block in blocks]
    return "\n\n".join([*parts, "\n".join(_wrapped(note, width) for note in table.notes)]).rstrip()


def _block(table: Table, texts: Sequence[Sequence[str]], widths: Sequence[int], block: Sequence[int]) -> str:
    over = []
    for name, members in groupby(block, key=lambda i: table.columns[i].group):
        span = list(members)
        over.append(name.ljust(sum(widths[i] for i in span) + 2 * (len(span) - 1)))
    lines = ["  ".join(over).rstrip()] if any(table.columns[i].group for i in block) else []
    lines.append("  ".join(_aligned(table.columns[i].title, table.columns[i], widths[i]) for i in block))
    lines.append("─" * len(lines[-1]))
    lines += ["  ".join(_aligned(row[i], table.columns[i], widths[i]) for i in block) for row in texts]
    return "\n".join(line.rstrip() for line in lines)


def _starred(cell: Cell, table: Table) -> str:
    if not table.marks_best or not cell.address:
        return cell.text
    return f"{cell.text}{'*' if cell.is_best else ' '}"


def _aligned(text: str, column: Column, width: int) -> str:
    return text.ljust(width) if column.is_text else text.rjust(width)


def _members(table: Table) -> list[list[int]]:
    """Indices of the columns under each named head."""
    found, first = [], 0
    for name, span in table.groups:
        found += [list(range(first, first + span))] if name else []
        first += span
    return found


def _wrapped(text: str, width: int) -> str:
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) + 1 > width:
            lines.append(line)
            line = "   "
        line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def markdown(table: Table) -> str:
    """A pipe table with its notes below; the best cells are bold."""
    head = [f"{column.group} {column.title}".strip() for column in table.columns]
    rule = [":--" if column.is_text else "--:" for column in table.columns]
    body = [[_bold(cell, "**", "**") for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(_pipe(cell) for cell in row)} |" for row in (head, rule, *body)]
    return "\n".join([*lines, "", *(f"{_pipe(note)}  " for note in table.notes)]) + "\n"


def _pipe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _bold(cell: Cell, before: str, after: str) -> str:
    text = f"{before}{cell.text}{after}" if cell.is_best else cell.text
    return f"{text} ({cell.detail})" if cell.detail else text


_LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%_#${}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"×": r"$\times$", "⊗": r"$\otimes$", "–": "--", "<": r"$<$", ">": r"$>$"}
    | {"†": r"$\dagger$", "‡": r"$\ddagger$", "§": r"\S{}"}
)


def latex(table: Table) -> str:
    """A booktabs tabular with its notes as a parbox; needs `booktabs`, nothing else."""
    over, rules, first = [], [], 1
    for name, span in table.groups:
        over.append(rf"\multicolumn{{{span}}}{{c}}{{{name.translate(_LATEX)}}}")
        rules += [rf"\cmidrule(lr){{{first}-{first + span - 1}}}"] if name else []
        first += span
    lines = [
        rf"\begin{{tabular}}{{{''.join('l' if c.is_text else 'r' for c in table.columns)}}}",
        r"\toprule",
    ]
    if rules:
        lines += [" & ".join(over) + r" \\", "".join(rules)]
    lines += [" & ".join(column.title.translate(_LATEX) for column in table.columns) + r" \\", r"\midrule"]
    for row in table.rows:
        cells = [cell.text.translate(_LATEX) for cell in row]
        bold = [
            rf"\textbf{{{text}}}" if cell.is_best else text for text, cell in zip(cells, row, strict=True)
        ]
        lines.append(" & ".join(bold) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        notes = r" \\ ".join(note.translate(_LATEX) for note in table.notes)
        lines += ["", rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {notes}}}"]
    return "\n".join(lines) + "\n"


def csv(frame: pd.DataFrame) -> str:
    """A tidy frame, every column of it; a text that a spreadsheet would read as a formula begins with `'`."""
    words = frame.select_dtypes(exclude=["number", "bool"]).columns
    safe = {name: frame[name].map(_no_formula, na_action="ignore") for name in words}
    return frame.assign(**safe).to_csv(index=False, lineterminator="\n")


def _no_formula(value: object) -> object:
    is_formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if is_formula else value


def published_table() -> Table:
    """Published numbers, in a table of their own."""
    heads = ("WikiText-103", "WikiText-2", "LAMBADA")
    columns = [Column("model", is_text=True), Column("parameters"), Column("counted", is_text=True)]
    columns += [*(Column(head, "as published, perplexity") for head in heads), Column("source", is_text=True)]
    columns += [Column("note", is_text=True)]
    rows = []
    for row in comparable().to_dict("records"):
        numbers = [row["wikitext103"], row["wikitext2"], row["lambada"]]
        cells = [row["model"], count(row["params"]), CONVENTIONS[row["params_convention"]]]
        cells += [MISSING if pd.isna(value) else f"{value:.2f}" for value in numbers]
        rows.append(tuple(Cell(str(text)) for text in [*cells, row["source"], row["note"]]))
    return Table(tuple(columns), tuple(rows))
