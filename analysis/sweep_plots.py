"""Plots of a sweep as SVG text: quality against size, effects of the axes, losses on the way.

The palette and the shapes are those of the other plots: series differ in colour and in marker or dash. The
same sweep gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from analysis.effects import Effect
from analysis.names import is_number, leaf, short_count
from analysis.plots import COLOURS, DASHES, INK, MARKERS, STYLE, legend, svg
from analysis.ranking import Arm, Ranking, differ
from analysis.sweeps import Sweep, Trial, axis_values

SIZES: Mapping[str, str] = {
    "parameters": "parameters, tied, position table included",
    "macs_per_token": "multiply-accumulates per token",
}
_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_DIM = "#9a9a9a"
_LEADERS = 5
"""Arms that have a colour of their own among the curves."""


def pareto(sweep: Sweep, ranking: Ranking, *, size: str) -> str:
    """Loss of every whole arm against a size, with intervals over seeds; empty if all are of one size."""
    arms = [arm for arm in ranking.ranked if arm.is_whole]
    sizes = np.array([getattr(arm, size) for arm in arms], dtype=float)
    if not differ(sizes):
        return ""
    groups = _groups(sweep, arms)
    names = list(dict.fromkeys(groups.values()))
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        for arm in arms:
            number = names.index(groups[arm.name])
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            x, y = float(getattr(arm, size)), _loss(arm)
            is_on = size in arm.fronts
            face = colour if is_on else "white"
            axes.plot(
                x, y, marker, color=colour, markerfacecolor=face, markersize=8, zorder=3,
                label=groups[arm.name], linestyle="none",
            )  # fmt: skip
            if arm.interval:
                axes.vlines(x, arm.interval.low, arm.interval.high, color=colour, linewidth=1.5, zorder=2)
        axes.margins(x=0.14, y=0.1)
        _front(axes, arms, size)
        if ranking.teacher_loss is not None:
            axes.axhline(ranking.teacher_loss, color=INK, linestyle=":", linewidth=1.2, label="dense teacher")
        axes.set_xlabel(SIZES[size])
        axes.set_ylabel("loss (nats per token, lower is better)")
        scale, unit = next(each for each in _UNITS if sizes.max() >= each[0])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:.4g}{unit}"))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(visible=True)
        legend(axes)
        return svg(figure)


def effects(found: Sequence[Effect]) -> str:
    """One panel per axis: mean loss of each value with its interval over seeds; empty without effects."""
    drawn = [effect for effect in found if effect.levels]
    if not drawn:
        return ""
    rows = [len(effect.levels) for effect in drawn]
    with rc_context(STYLE):
        height = sum(0.85 + 0.3 * count for count in rows) + 0.35
        figure = Figure(figsize=(6.4, height), layout="constrained")
        panels = figure.subplots(
            len(drawn), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [1 + n for n in rows]}
        )[:, 0]
        for axes, effect in zip(panels, drawn, strict=True):
            _effect(axes, effect)
        panels[-1].set_xlabel("loss (nats per token, lower is better)")
        return svg(figure)


def scatter(sweep: Sweep, ranking: Ranking) -> str:
    """Loss of every ranked arm against each number that was drawn from a range; empty if there is none."""
    arms = ranking.ranked
    values = {axis: axis_values(sweep, axis) for axis in sweep.axes}
    drawn = {}
    for axis, found in values.items():
        points = [(found[arm.trials[0].key], _loss(arm)) for arm in arms]
        numbers = [(float(x), y) for x, y in points if is_number(x)]
        if len({x for x, _ in numbers}) > max(6, len(arms) // 2):
            drawn[axis] = numbers
    if not drawn:
        return ""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.9 * len(drawn)), layout="constrained")
        panels = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
        for axes, (axis, numbers) in zip(panels, drawn.items(), strict=True):
            x, y = np.array(numbers).T
            axes.plot(x, y, "o", color=COLOURS[0], markersize=6, alpha=0.8)
            if x.min() > 0 and x.max() > 20 * x.min():
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(axis)
            axes.set_ylabel("loss (nats per token)")
            axes.grid(visible=True)
        return svg(figure)


def rungs(sweep: Sweep, ranking: Ranking) -> str:
    """Validation loss of every trial against its tokens; those that were stopped or failed are pale."""
    trials = [trial for trial in sweep.trials if len(trial.rungs) > 0]
    if not trials:
        return ""
    leaders = [arm.name for arm in ranking.ranked[:_LEADERS]]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.8, 4.6), layout="constrained")
        axes = figure.subplots()
        place = {name: number for number, name in enumerate(leaders, start=1)}
        for trial in sorted(trials, key=lambda trial: place.get(trial.arm, 0)):
            _curve(axes, trial, leaders)
        axes.set_ylim(*_reach(trials))
        axes.set_xlabel("tokens of training")
        axes.set_ylabel("validation loss (nats per token)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value) if value else "0"))
        axes.grid(visible=True)
        legend(axes)
        return svg(figure)


def _reach(trials: Sequence[Trial]) -> tuple[float, float]:
    """Losses to show: all ends and nearly all points, but neither the start nor what diverged."""
    points = [(tokens, loss) for trial in trials for tokens, loss in trial.rungs if np.isfinite(loss)]
    losses = np.array([loss for tokens, loss in points if tokens > 0] or [loss for _, loss in points] or [0])
    ends = [trial.rungs[-1][1] for trial in trials if np.isfinite(trial.rungs[-1][1])]
    low, high = float(losses.min()), float(np.quantile(losses, 0.98))
    high = max(high, min(max(ends, default=high), 2 * high - low))
    room = 0.06 * (high - low) or 0.1
    return low - room, high + room


def _curve(axes: Axes, trial: Trial, leaders: Sequence[str]) -> None:
    x, y = np.array([(tokens, loss) for tokens, loss in trial.rungs], dtype=float).T
    if trial.state != "finished":
        mark = "x" if trial.state == "failed" else "|"
        axes.plot(x, y, color=_DIM, linewidth=0.9, alpha=0.7, zorder=1)
        axes.plot(
            x[-1], y[-1], mark, color=INK if trial.state == "failed" else _DIM, markersize=7, zorder=2,
            linestyle="none", label=f"{trial.state}",
        )  # fmt: skip
    elif trial.arm in leaders:
        number = leaders.index(trial.arm)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(
            x, y, DASHES[0], color=colour, linewidth=1.1, marker=marker, markersize=4, zorder=4,
            markevery=max(1, len(x) // 6), label=f"{number + 1}. {trial.arm}",
        )  # fmt: skip
    else:
        axes.plot(x, y, color=INK, linewidth=0.8, alpha=0.55, zorder=3, label="other finished")


def _effect(axes: Axes, effect: Effect) -> None:
    levels = effect.levels
    for row, level in enumerate(levels):
        colour = COLOURS[0] if level.is_best or not effect.tells_apart else COLOURS[6]
        axes.plot(level.loss, row, "o" if level.is_best else "s", color=colour, markersize=7, zorder=3)
        if level.interval:
            axes.hlines(row, level.interval.low, level.interval.high, color=colour, linewidth=1.8, zorder=2)
    axes.set_yticks(range(len(levels)), [level.text for level in levels], fontsize=10)
    axes.set_ylim(len(levels) - 0.4, -0.6)
    axes.set_title(effect.axis, loc="left", fontsize=11, fontweight="bold")
    axes.grid(visible=True, axis="x")


def _front(axes: Axes, arms: Sequence[Arm], size: str) -> None:
    """The arms that no other beats in loss and size, joined and named."""
    front = sorted((float(getattr(arm, size)), _loss(arm), arm.name) for arm in arms if size in arm.fronts)
    right = axes.get_xlim()[1]
    x, y = [x for x, _, _ in front], [y for _, y, _ in front]
    axes.step(
        [*x, right], [*y, y[-1]], where="post", color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1,
        label="Pareto front",
    )  # fmt: skip
    axes.set_xlim(right=right)
    middle = (axes.get_xlim()[0] + axes.get_xlim()[1]) / 2
    for at, loss, name in front:
        side = 1 if at < middle else -1
        axes.annotate(
            name, (at, loss), xytext=(9 * side, 0), textcoords="offset points", va="center", fontsize=9,
            ha="left" if side > 0 else "right", color=INK, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
        )  # fmt: skip


def _groups(sweep: Sweep, arms: Sequence[Arm]) -> Mapping[str, str]:
    """What colours the arms: their method, or another choice about it that a palette can hold."""
    best: dict[str, Any] = {}
    for axis in sweep.axes:
        found = axis_values(sweep, axis)
        texts = {arm.name: found[arm.trials[0].key] for arm in arms}
        count = len(set(texts.values()))
        if axis.startswith("method") and 1 < count <= len(COLOURS) and (not best or axis == "method"):
            best = texts
    return {arm.name: leaf(best[arm.name]) if best else "arm" for arm in arms}


def _loss(arm: Arm) -> float:
    assert arm.loss is not None
    return arm.loss
