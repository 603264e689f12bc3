"""One page that holds all of it: HTML that needs no network, and the same in Markdown.

It opens with what was found, then the table, the plots, what others published, where each number comes
from, and how to get it again. Everything is one file; figures are inside.
"""

import base64
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from operator import itemgetter

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from analysis.comparison import Table, column_names, comparison, measure_titles, row_names
from analysis.findings import summary
from analysis.frames import Frames
from analysis.leaders import MAPPED, ROWS, leaders
from analysis.plots import CROWD, layer_errors, loss_curves, size_quality
from analysis.provenance import Index, Provenance, Step, explain
from analysis.schema import rows_of
from analysis.speed import speed_table
from analysis.tables import markdown, published_table
from analysis.verdicts import Verdict, declared_table, differences_table

LINES = 100
"""Of what is missing, on a page."""

MISSING = "missing.txt"
"""The file beside the page that has all of them."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One picture of the page."""

    key: str
    """File name without ending."""

    title: str
    alt: str
    svg: str
    is_wide: bool = False
    """Drawn over the whole width of a page: its text is too small for half of it."""

    @property
    def data_uri(self) -> str:
        """The picture inside the page."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the numbers of one row come from."""

    label: str
    cells: tuple[Provenance, ...]
    """Of each number of the row."""

    @property
    def path(self) -> tuple[Step, ...]:
        """Model, run, init, teacher, data: of every seed, each once."""
        steps = {
            step.address: step for cell in self.cells for source in cell.sources for step in source.steps
        }
        return tuple(step for step in steps.values() if step.kind != "scores")

    @property
    def scores(self) -> tuple[Step, ...]:
        """The scores records of every seed and protocol."""
        steps = [step for cell in self.cells for source in cell.sources for step in source.steps]
        return tuple(step for step in steps if step.kind == "scores")

    @property
    def commits(self) -> tuple[str, ...]:
        """Code that measured them."""
        return tuple(dict.fromkeys(step.commit[:12] for step in self.scores if step.commit))

    @property
    def commands(self) -> tuple[str, ...]:
        """What measured them."""
        return tuple(dict.fromkeys(step.command for step in self.scores if step.command))

    @property
    def finished(self) -> str:
        """When the last of them was there."""
        return max(step.finished for step in self.scores)

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """Configurations on the path, those of the scores left out."""
        return tuple(pair for pair in self.cells[0].settings if not pair[0].startswith("scores."))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the path."""
        found = [warning for cell in self.cells for source in cell.sources for warning in source.warnings]
        dirty = any(step.is_dirty for step in (*self.scores, *self.path))
        return tuple(dict.fromkeys([*found, *(["made from uncommitted code"] if dirty else [])]))


@dataclass(frozen=True, slots=True)
class Page:
    """All parts of a report, before they have a format."""

    summary: tuple[str, ...]
    """Sentences, the first on what was compared."""
    table: Table
    wide: Table
    """The same table with small figures in its cells."""
    declared: Table
    """Comparisons that were declared before anything was run; without rows if there are none."""
    differences: Table
    """Every model against the best of its size and track."""
    speed: Table
    """Speed and memory over dense; without rows if nothing was measured."""
    published: Table
    figures: tuple[Figure, ...]
    origins: tuple[Origin, ...]
    problems: tuple[str, ...]
    """Not more than `LINES`, the last of which says how many there are."""
    left_out: str
    """What the tables leave out, as a sentence; empty if nothing."""
    commands: tuple[str, ...]
    store: str
    written: str

    @property
    def is_seeded(self) -> bool:
        """Whether any row stands for several seeds."""
        return any(column.title == "seeds" for column in self.wide.columns)

    def html(self) -> str:
        """The page, self-contained."""
        return render("page.html.j2", self)

    def markdown(self) -> str:
        """The page in Markdown; figures lie beside it as `figures/*.svg`."""
        return render("page.md.j2", self)


def build_page(
    frames: Frames,
    *,
    store: str,
    written: str,
    verdicts: Sequence[Verdict] = (),
    speeds: pd.DataFrame | None = None,
) -> Page:
    """Everything a report says about these frames; `written` is the time of the newest record."""
    rows = rows_of(frames.arms)
    shown = leaders(rows, ROWS)
    seeds = {each for subject in shown for each in subject.split()}
    commands = frames.scores["command"][frames.scores["subject"].isin(seeds)].dropna()
    return Page(
        summary=summary(frames.arms),
        table=comparison(frames.arms, only=shown),
        wide=comparison(frames.arms, layout="page", only=shown),
        declared=declared_table(verdicts),
        differences=differences_table(frames.arms, only=shown),
        speed=speed_table(speeds) if speeds is not None else Table((), ()),
        published=published_table(),
        figures=figures(frames),
        origins=tuple(_origins(frames, store, shown)),
        problems=_cut(frames.problems),
        left_out=_left_out(frames.arms["subject"].nunique(), len(shown)),
        commands=tuple(dict.fromkeys(str(command) for command in commands if command)),
        store=store,
        written=written,
    )


def figures(frames: Frames) -> tuple[Figure, ...]:
    """Every picture that the frames have data for."""
    drawn = [
        Figure(
            f"size-quality-{number}",
            f"Size and quality under {title}",
            f"Scatter plot of parameters against the value under {title}, with the Pareto front.",
            size_quality(frames.arms[frames.arms["measure"] == measure]),
        )
        for number, (measure, title) in enumerate(measure_titles(frames.scores).items(), start=1)
    ]
    students = frames.history[frames.history["run"].str.startswith("run/")]
    modules, mapped = frames.modules, ""
    if modules["init"].nunique() > MAPPED:
        known = frames.arms[frames.arms["label"].isin(modules["label"])]
        first = known["subject"].isin(leaders(rows_of(known), MAPPED))
        modules = modules[modules["label"].isin(known["label"][first])]
        counts = modules["init"].nunique(), frames.modules["init"].nunique()
        mapped = f"; {counts[0]:,} of {counts[1]:,} models, all are in modules.csv"
    drawn += [
        Figure(
            "loss-curves",
            "Recovery training",
            "Validation loss of each run against training tokens; training loss behind it.",
            loss_curves(students),
        ),
        Figure(
            "layer-errors",
            f"Error of each replaced matrix, before training{mapped}",
            "Error of each replaced weight matrix relative to its norm, by layer.",
            layer_errors(modules),
            is_wide=modules["init"].nunique() > CROWD,
        ),
    ]
    return tuple(figure for figure in drawn if figure.svg)


def _cut(problems: Sequence[str]) -> tuple[str, ...]:
    more = len(problems) - LINES
    return (*problems[:LINES], f"and {more:,} more: {MISSING}") if more > 0 else tuple(problems)


def _left_out(all_of_them: int, shown: int) -> str:
    if shown == all_of_them:
        return ""
    return (
        f"Shown are {shown:,} of {all_of_them:,} models: the first of each size and track, then the second, "
        "and so on. All of them are in comparison.md and comparison.tex, with every figure in arms.csv."
    )


def _origins(frames: Frames, store: str, shown: Collection[str]) -> Iterator[Origin]:
    """Of each row of the table, with every seed behind it."""
    rows = rows_of(frames.arms)
    heads, columns = row_names(rows), column_names(measure_titles(frames.arms), rows)
    index = Index.of(frames)
    for subject, members in groupby(rows, key=itemgetter("subject")):
        if subject not in shown:
            continue
        cells = list(members)
        named = [f"{heads[subject]}:{columns[cell['measure']]}" for cell in cells]
        yield Origin(
            cells[0]["label"], tuple(explain(frames, name, store=store, index=index) for name in named)
        )


def _no_tag(value: object) -> object:
    """What a Markdown page shows of a record: words, and no tag of somebody else's."""
    return value.replace("<", "&lt;") if isinstance(value, str) else value


def render(name: str, page: object) -> str:
    """A template of this package, filled in from `page`."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda each: files("analysis").joinpath(each).read_text(encoding="utf-8")
        ),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=None if name.endswith("html.j2") else _no_tag,
    )
    environment.filters["table"] = markdown
    environment.filters["breakable"] = lambda text: Markup("/<wbr>").join(
        escape(part) for part in text.split("/")
    )
    return environment.get_template(name).render(page=page)
