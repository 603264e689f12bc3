"""Plots as SVG text: size against quality, loss curves, error per layer.

The palette is Okabe and Ito's, which colour-blind readers can tell apart, and every series has a marker or
a dash of its own, so that print in grey works too. The same frames give the same bytes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

from analysis.names import is_number, short_count
from analysis.stats import pareto_front
from analysis.tracks import TRACKS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
INK, FAINT = "#1a1a1a", "#d0d0d0"
NAME_PLACES = (
    *(((9, 0), "left"), ((-9, 0), "right"), ((0, -14), "center"), ((0, 14), "center")),
    *(((8, -12), "left"), ((-8, -12), "right"), ((8, 12), "left"), ((-8, 12), "right")),
    *(((8, -24), "left"), ((-8, -24), "right"), ((8, 24), "left"), ((-8, 24), "right")),
)
"""Where a name may stand: points to the right and up, and its alignment; the first that is free."""

CROWD = 12
"""Models above which a plot names, or draws in colour, only those that lead."""

MANY = 200
"""Grey curves above which they are drawn as pixels."""

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "krony",
    "text.parse_math": False,  # names are names, also where one holds a dollar
}


@dataclass(frozen=True, slots=True)
class Point:
    """One model in a size–quality plot."""

    size: float
    value: float
    interval: tuple[float, float] | None
    name: str
    method: str
    is_dense: bool
    track: str

    @staticmethod
    def of(row: Mapping[str, Any]) -> "Point":
        """From a row of `scores` that knows its size."""
        ends = row["low"], row["high"]
        return Point(
            size=float(row["parameters"]),
            value=float(row["value"]),
            interval=(float(ends[0]), float(ends[1])) if all(map(is_number, ends)) else None,
            name="teacher" if row["is_dense"] else row["variant"] or row["method"],
            method="dense teacher" if row["is_dense"] else row["method"],
            is_dense=bool(row["is_dense"]),
            track=row["track"],
        )


def size_quality(scores: pd.DataFrame) -> str:
    """One measure: parameters against value, with intervals and the Pareto front; `scores` are its rows."""
    rows = [row for row in scores.to_dict("records") if is_number(row["parameters"])]
    if not rows:
        return ""
    points = [Point.of({str(key): value for key, value in row.items()}) for row in rows]
    accuracy = rows[0]["metric"] == "accuracy"
    methods = sorted({point.method for point in points if not point.is_dense})
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        for method in dict.fromkeys(point.method for point in points):
            members = [point for point in points if point.method == method]
            is_dense = members[0].is_dense
            number = 0 if is_dense else methods.index(method)
            colour = INK if is_dense else COLOURS[number % len(COLOURS)]
            marker = "*" if is_dense else MARKERS[number % len(MARKERS)]
            _draw(axes, members, colour=colour, marker=marker)
        leading = _fronts(axes, points, accuracy=accuracy)
        axes.set_xlabel("parameters, tied, position table included")
        axes.set_ylabel("accuracy (higher is better)" if accuracy else "perplexity (lower is better)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        _value_scale(axes, [point.value for point in points], accuracy=accuracy)
        axes.margins(x=0.16, y=0.14)
        axes.grid(visible=True, which="major")
        legend(axes)
        best_first = sorted(points, key=lambda point: -point.value if accuracy else point.value)
        named = [point for point in best_first if point.is_dense or point in leading]
        _names(axes, best_first if len(points) <= CROWD else named, points)
        return svg(figure)


def loss_curves(history: pd.DataFrame) -> str:
    """Validation loss of every run against the tokens it was trained on; training loss behind it, faint.

    Seeds of one arm share their colour. Of a crowd the arms that end lowest have one; the others are grey.
    """
    runs = list(history.groupby(["run", "arm"], sort=False))
    if not runs:
        return ""
    arms = _lowest(history) if history["arm"].nunique() > CROWD else list(history["arm"].unique())
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        others: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = []
        for (_, label), points in runs:
            validated = points.dropna(subset=["val_loss"])
            x, y = floats(validated["tokens"]), floats(validated["val_loss"])
            if label not in arms:
                others.append(np.column_stack([x, y]))
                continue
            number = arms.index(label)
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
            marker = MARKERS[number % len(MARKERS)]
            trained = points.dropna(subset=["loss"])
            axes.plot(
                floats(trained["tokens"]), floats(trained["loss"]), color=colour, alpha=0.25, linewidth=0.8
            )
            every = max(1, len(x) // 8)
            axes.plot(
                x, y, dash, color=colour, marker=marker, markersize=5, markevery=every, label=str(label)
            )
        if others:  # thousands of curves are a picture of a bounded size in the picture
            grey = LineCollection(others, colors=FAINT, linewidths=0.9, label="others", zorder=1)
            grey.set_rasterized(len(others) > MANY)
            axes.add_collection(grey)
            axes.autoscale_view()
        axes.set_xlabel("tokens of recovery training")
        axes.set_ylabel("loss (nats per token)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value) if value else "0"))
        axes.grid(visible=True)
        legend(axes)
        return svg(figure)


def _lowest(history: pd.DataFrame) -> list[Any]:
    """As many arms as there are colours, by their last validation loss."""
    last = history.dropna(subset=["val_loss"]).groupby("arm", sort=False)["val_loss"].last()
    return list(last.sort_values(kind="stable").index[: len(COLOURS)])


def layer_errors(modules: pd.DataFrame) -> str:
    """Relative error of every replaced matrix: one map per model, a row per matrix, a column per layer.

    Of a crowd one map of all: a row per model, a column per matrix and layer.
    """
    known = modules.dropna(subset=["error"])
    if known.empty:
        return ""
    together = known["init"].nunique() > CROWD
    key = "model" if together else "matrix"
    places = known.assign(
        model=known["label"], place=_places(known) if together else known["layer"].astype(int)
    )
    maps = [("", places)] if together else [(str(label), rows) for (_, label), rows in _by_init(places)]
    scale = Normalize(0.0, max(1.0, float(known["error"].max())))  # 0 exact, 1 as bad as nothing
    with rc_context(STYLE):
        height = sum(0.62 + (0.24 if together else 0.34) * rows[key].nunique() for _, rows in maps) + 0.3
        figure = Figure(figsize=(9.6 if together else 6.8, height), layout="constrained")
        panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
        for axes, (title, rows) in zip(panels, maps, strict=True):
            table = rows.pivot_table(
                index=key, columns="place", values="error", observed=True, sort=not together
            )
            grid = table.astype(float)[sorted(table.columns)]
            axes.imshow(grid.to_numpy(), cmap="cividis", norm=scale, aspect="auto")
            axes.set_title(title, fontsize=10, loc="left")
            turned = 90 if together else 0
            axes.set_xticks(range(grid.shape[1]), [str(each) for each in grid.columns], fontsize=9,
                            rotation=turned)  # fmt: skip
            axes.set_yticks(range(grid.shape[0]), [str(name) for name in grid.index], fontsize=9)
            _values(axes, grid.to_numpy(), middle=0.45)
        panels[-1].set_xlabel("matrix, layer" if together else "layer")
        bar = figure.colorbar(
            ScalarMappable(scale, "cividis"), ax=list(panels), shrink=min(1.0, 2.4 / height), pad=0.02
        )
        bar.set_label("relative error")
        return svg(figure)


def _by_init(modules: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    return list(modules.groupby(["init", "label"], sort=False))


def _places(modules: pd.DataFrame) -> list[str]:
    digits = len(str(int(modules["layer"].max())))
    pairs = zip(modules["matrix"], modules["layer"], strict=True)
    return [f"{matrix} {int(layer):>{digits}}" for matrix, layer in pairs]


def _draw(axes: Axes, points: Sequence[Point], *, colour: str, marker: str) -> None:
    """Points of one method."""
    first = points[0]
    x, y = [point.size for point in points], [point.value for point in points]
    axes.plot(
        x, y, marker, color=colour, markersize=14 if first.is_dense else 8, label=first.method, zorder=3
    )
    known = [(point.size, *point.interval) for point in points if point.interval]
    if known:
        axes.vlines(*zip(*known, strict=True), color=colour, linewidth=1.5, zorder=2)


def _fronts(axes: Axes, points: Sequence[Point], *, accuracy: bool) -> list[Point]:
    """One front per track, as tracks are never ranked together; the dense teacher is the end of each."""
    there = [track for track in TRACKS if any(point.track == track for point in points)]
    leading: list[Point] = []
    for track, dash in zip(there, ((0, (4, 3)), (0, (1, 2))), strict=False):
        members = [point for point in points if point.track == track or point.is_dense]
        label = "Pareto front" + (f", track {track}" if len(there) > 1 else "")
        leading += _front(axes, members, accuracy=accuracy, label=label, dash=dash)
    return leading


def _front(
    axes: Axes, points: Sequence[Point], *, accuracy: bool, label: str, dash: tuple[int, tuple[int, int]]
) -> list[Point]:
    """The models that no other beats in both size and quality, joined."""
    sizes = np.array([point.size for point in points])
    values = np.array([point.value for point in points])
    front = pareto_front(sizes, -values if accuracy else values)
    order = np.argsort(sizes[front])
    x, y = sizes[front][order], values[front][order]
    axes.plot(x, y, color=INK, linewidth=1.0, linestyle=dash, zorder=1, label=label)
    return [point for point, is_on in zip(points, front, strict=True) if is_on]


def _names(axes: Axes, points: Sequence[Point], everyone: Sequence[Point]) -> None:
    """Names beside the points, the best first, each where it hides least of points and names before."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes of a figure"
    figure.draw_without_rendering()  # the layout, and so what a point is in pixels
    centres = axes.transData.transform([(point.size, point.value) for point in everyone])
    taken = np.hstack([centres - 7, centres + 7])  # (boxes, 4) left, lower, right, upper
    for point in points:
        place = axes.transData.transform((point.size, point.value))
        others = taken[~np.all((taken[:, :2] <= place) & (place <= taken[:, 2:]), axis=1)]
        tried: list[tuple[float, Annotation]] = []
        for offset, side in NAME_PLACES:
            name = _name(axes, point, offset, side)
            box = name.get_window_extent()
            outside = max(0.0, axes.bbox.xmin - box.xmin) + max(0.0, box.xmax - axes.bbox.xmax)
            hidden = _shared(box, others) + outside * box.height
            tried.append((hidden, name))
            if not hidden:
                break
        _, best = min(tried, key=itemgetter(0))
        for _, name in tried:
            if name is not best:
                name.remove()
        taken = np.vstack([taken, best.get_window_extent().extents])


def _name(axes: Axes, point: Point, offset: tuple[int, int], side: str) -> Annotation:
    return axes.annotate(
        point.name,
        (point.size, point.value),
        xytext=offset,
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=9,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
        zorder=4,
    )


def _shared(box: Bbox, others: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Pixels that a box has in common with others (boxes, 4)."""
    sides = np.minimum(box.max, others[:, 2:]) - np.maximum(box.min, others[:, :2])
    return float(np.prod(np.maximum(sides, 0.0), axis=1).sum())


def _value_scale(axes: Axes, values: Sequence[float], *, accuracy: bool) -> None:
    if accuracy:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    elif max(values) > 2.5 * min(values):
        axes.set_yscale("log")
        low, high = 0.9 * min(values), 1.1 * max(values)
        wide = high > 30 * low
        steps = [
            step * 10.0**power for power in range(9) for step in ((1, 3) if wide else (1, 1.5, 2, 3, 4, 5, 7))
        ]
        ticks = [step for step in steps if low <= step <= high]
        axes.set_yticks(ticks, [f"{tick:,.6g}" for tick in ticks])
        axes.yaxis.set_minor_formatter(NullFormatter())


def _values(axes: Axes, grid: np.ndarray[tuple[int, ...], np.dtype[np.float64]], *, middle: float) -> None:
    """Numbers on a map that has room for them."""
    if grid.shape[1] > 16:
        return
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            ink = "white" if value < middle else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)


def legend(axes: Axes) -> None:
    """The series of one panel, each once, below it."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    longest = max(map(len, unique))
    columns = 1 if longest > 36 else 2 if longest > 20 else 4
    axes.figure.legend(unique.values(), unique.keys(), loc="outside lower left", ncols=columns, fontsize=9)


def floats(column: pd.Series) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """A column as numbers to draw."""
    return column.to_numpy(dtype=float)


def svg(figure: Figure) -> str:
    """The figure as one `<svg>` element, without date, creator and XML head."""
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = sink.getvalue()
    return re.sub(r"\s*\n\s*", "\n", text[text.index("<svg") :])
