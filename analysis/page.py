"""One page that holds all of it: HTML that needs no network, and the same in Markdown.

It opens with what was found, then the table, the plots, what others published, where each number comes
from, and how to get it again. Everything is one file; figures are inside.
"""

import base64
from dataclasses import dataclass
from importlib.resources import files

import jinja2
from markupsafe import Markup, escape

from analysis.comparison import Table, comparison, measure_titles
from analysis.findings import summary
from analysis.frames import Frames
from analysis.plots import layer_errors, loss_curves, size_quality
from analysis.tables import markdown, published_table


@dataclass(frozen=True, slots=True)
class Figure:
    """One picture of the page."""

    key: str
    """File name without ending."""

    title: str
    alt: str
    svg: str

    @property
    def data_uri(self) -> str:
        """The picture inside the page."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the numbers of one row come from."""

    label: str
    scores: tuple[tuple[str, str], ...]
    """Protocol and address of each score."""

    path: tuple[str, ...]
    """Addresses of model, run, init and teacher; each of every seed."""

    commits: tuple[str, ...]
    commands: tuple[str, ...]
    finished: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """All parts of a report, before they have a format."""

    summary: tuple[str, ...]
    """Sentences, the first on what was compared."""
    table: Table
    wide: Table
    """The same table with small figures in its cells."""
    published: Table
    figures: tuple[Figure, ...]
    origins: tuple[Origin, ...]
    problems: tuple[str, ...]
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


def build_page(frames: Frames, *, store: str, written: str) -> Page:
    """Everything a report says about these frames; `written` is the time of the newest record."""
    commands = frames.scores["command"].dropna()
    return Page(
        summary=summary(frames.arms),
        table=comparison(frames.arms),
        wide=comparison(frames.arms, layout="page"),
        published=published_table(),
        figures=figures(frames),
        origins=tuple(_origins(frames)),
        problems=frames.problems,
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
    drawn += [
        Figure(
            "loss-curves",
            "Recovery training",
            "Validation loss of each run against training tokens; training loss behind it.",
            loss_curves(students),
        ),
        Figure(
            "layer-errors",
            "Error of each replaced matrix, before training",
            "Error of each replaced weight matrix relative to its norm, by layer.",
            layer_errors(frames.modules),
        ),
    ]
    return tuple(figure for figure in drawn if figure.svg)


def _origins(frames: Frames) -> list[Origin]:
    """Of each row of the table, with every seed behind it."""
    found = []
    for subject, arm in frames.arms.groupby("subject", sort=False):
        cells = frames.scores[frames.scores["subject"].isin(str(subject).split())]
        rows = cells.to_dict("records")
        path = [row[key] for key in ("subject", "run", "init", "teacher") for row in rows if row[key]]
        warnings = [f"changed after use: {row['drifted']}" for row in rows if row["drifted"]]
        warnings += [f"no record any more: {row['missing']}" for row in rows if row["missing"]]
        warnings += ["made from uncommitted code"] if any(row["dirty"] is True for row in rows) else []
        found.append(
            Origin(
                label=arm["label"].iloc[0],
                scores=tuple((row["protocol"], row["address"]) for row in rows),
                path=tuple(dict.fromkeys(path)),
                commits=tuple(dict.fromkeys(row["commit"][:12] for row in rows if row["commit"])),
                commands=tuple(dict.fromkeys(row["command"] for row in rows if row["command"])),
                finished=max(row["finished"] for row in rows),
                warnings=tuple(dict.fromkeys(warnings)),
            )
        )
    return found


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
    )
    environment.filters["table"] = markdown
    environment.filters["breakable"] = lambda text: Markup("/<wbr>").join(
        escape(part) for part in text.split("/")
    )
    return environment.get_template(name).render(page=page)
