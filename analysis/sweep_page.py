"""The page of one sweep: who won and how sure that is, what the axes do, what ended early, the best recipe.

Self-contained like the page of a store, in HTML and Markdown, from the same parts. What a claim rests on
stands beside it; the best recipe is on the page as it is in `best.toml`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis import names
from analysis.comparison import Table
from analysis.effects import Effect, before_stops, main_effects
from analysis.page import Figure, render
from analysis.ranking import VALIDATION, Arm, Ranking
from analysis.sweep_plots import effects as draw_effects
from analysis.sweep_plots import pareto, rungs, scatter
from analysis.sweep_tables import effects_table, endings_table, ranking_table
from analysis.sweeps import Sweep, Trial


@dataclass(frozen=True, slots=True)
class Section:
    """Main effects of one moment of the sweep."""

    key: str
    title: str
    about: str
    table: Table
    figure: Figure | None
    notes: tuple[str, ...]
    """Axes of which nothing can be said, and why."""


@dataclass(frozen=True, slots=True)
class SweepPage:
    """All parts of the page, before they have a format."""

    name: str
    address: str
    summary: tuple[str, ...]
    table: Table
    wide: Table
    """The ranking with small figures in its cells."""

    figures: tuple[Figure, ...]
    flat: tuple[str, ...]
    """Sizes in which the arms do not differ, so that there is no front."""

    effects: tuple[Section, ...]
    endings: Table
    best: Arm | None
    recipe: str
    """The best recipe as TOML; empty if there is none."""

    arms: tuple[Arm, ...]
    problems: tuple[str, ...]
    store: str
    written: str
    commit: str
    command: str

    def html(self) -> str:
        """The page, self-contained."""
        return render("sweep.html.j2", self)

    def markdown(self) -> str:
        """The page in Markdown; figures lie beside it as `figures/*.svg`."""
        return f"{render('sweep.md.j2', self)}\n"

    @property
    def every_figure(self) -> tuple[Figure, ...]:
        """Figures of all sections."""
        return (*self.figures, *(each.figure for each in self.effects if each.figure))


def build_sweep_page(sweep: Sweep, ranking: Ranking, *, recipe: str, store: str) -> SweepPage:
    """Everything a report says about a sweep."""
    at_end = main_effects(sweep, ranking.ranked)
    sections = [_section("effects", "Main effects", "", at_end)]
    tokens, arms = before_stops(sweep)
    if tokens:
        about = (
            f"The same for all trials as they stood at {tokens:,} tokens, before anyone was stopped "
            "(validation in training). What leads early need not lead at the end."
        )
        title = f"Main effects at {names.short_count(tokens)} tokens"
        sections.append(_section("effects-early", title, about, main_effects(sweep, arms)))
    fronts = {size: pareto(sweep, ranking, size=size) for size in ("parameters", "macs_per_token")}
    words = {"parameters": "parameters", "macs_per_token": "MACs per token"}
    drawn = [
        Figure(
            f"front-{size.partition('_')[0]}",
            f"Loss against {words[size]}; filled: no other arm is better in both. Bars: 95 % over seeds",
            f"Scatter plot of {words[size]} against the loss of every arm, with the Pareto front.",
            svg,
        )
        for size, svg in fronts.items()
    ]
    all_finished = len(sweep.finished) == len(sweep.trials)
    drawn += [
        Figure(
            "curves",
            "Validation loss on the way" + ("" if all_finished else "; grey: stopped (|) or failed (x)"),
            "Validation loss of every trial against its training tokens.",
            rungs(sweep, ranking),
        ),
        Figure(
            "drawn",
            "Loss against each number that was drawn from a range",
            "Scatter plots of drawn values against the loss of the arms.",
            scatter(sweep, ranking),
        ),
    ]
    provenance = sweep.record.provenance
    return SweepPage(
        name=sweep.name,
        address=sweep.record.address,
        summary=sweep_summary(sweep, ranking, at_end),
        table=ranking_table(ranking),
        wide=ranking_table(ranking, layout="page"),
        figures=tuple(figure for figure in drawn if figure.svg),
        flat=tuple(words[size] for size, svg in fronts.items() if not svg and len(ranking.ranked) > 1),
        effects=tuple(each for each in sections if each.table.rows or each.notes),
        endings=endings_table(sweep),
        best=ranking.best,
        recipe=recipe,
        arms=ranking.arms,
        problems=(*sweep.problems, *ranking.problems),
        store=store,
        written=sweep.record.finished,
        commit=str(provenance.get("commit", ""))[:12],
        command=names.command(provenance.get("argv", ())),
    )


def best_trial(ranking: Ranking) -> Trial | None:
    """The trial whose config is the best recipe: the first finished seed of the best arm."""
    if ranking.best is None:
        return None
    return next(trial for trial in ranking.best.trials if trial.state == "finished")


def sweep_summary(sweep: Sweep, ranking: Ranking, effects: Sequence[Effect]) -> tuple[str, ...]:
    """What was found, in a few sentences; the first says what was tried."""
    states = [trial.state for trial in sweep.trials]
    parts = [f"{states.count('finished')} finished"]
    parts += [f"{states.count('stopped')} stopped early"] if "stopped" in states else []
    parts += [f"{states.count('failed')} failed"] if "failed" in states else []
    seeds = len({trial.seed for trial in sweep.trials})
    teacher = sweep.record.inputs.get("teacher")
    of = f" of {teacher.address.partition('/')[2].rpartition('-')[0]}" if teacher else ""
    arms = f"{len(sweep.arms)} arm{'s' * (len(sweep.arms) != 1)}{of} with {seeds} seed{'s' * (seeds != 1)}"
    sentences = [f"{arms}: {len(states)} trials, {', '.join(parts)}."]
    sentences += _winner(ranking)
    sentences += [_effect(effect) for effect in effects if effect.levels]
    spent = sweep.record.metrics
    if names.is_number(spent.get("wall_s")) and names.is_number(spent.get("train_s")):
        slots = int(spent.get("slots", 1))
        cost = f"{_duration(spent['train_s'])} of training took {_duration(spent['wall_s'])}"
        cost += f" with {slots} trials at once" if slots > 1 else " with one trial at a time"
        if names.is_number(spent.get("efficiency")):
            cost += f": {names.share(spent['efficiency'])} of the time was training"
        sentences.append(f"{cost}.")
    return tuple(sentences)


def _winner(ranking: Ranking) -> list[str]:
    best = ranking.best
    if best is None:
        return ["No trial finished, so there is nothing to rank."]
    where = "at the last validation" if ranking.measure == VALIDATION else f"under {ranking.measure}"
    around = f" ± {(best.interval.high - best.interval.low) / 2:.4f}" if best.interval else ""
    seeds = f" over {len(best.losses)} seeds" if len(best.losses) > 1 else ", one seed"
    first = f"Best: {best.name}, loss {best.loss:.4f}{around}{seeds} {where}"
    if not best.is_whole:
        return [f"{first}; but no arm finished all of its seeds, so nothing is compared."]
    judged = [arm for arm in ranking.ranked if arm.p_adjusted is not None]
    others = [arm.name for arm in judged if arm.is_best]
    if not judged:
        return [f"{first}; one seed each and no losses per window, so how sure that is is not known."]
    if not others:
        return [f"{first}; every other whole arm is significantly worse."]
    shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    if len(others) == len(judged):
        return [f"{first}; but no other arm is significantly worse ({shown})."]
    return [f"{first}; not significantly worse: {shown}."]


def _effect(effect: Effect) -> str:
    ordered = sorted(effect.levels, key=lambda level: level.loss)
    best, second = ordered[:2]
    over = f"{effect.blocks} combination{'s' * (effect.blocks != 1)} of the other axes"
    gap = f"{second.loss - best.loss:.4f}"
    if second.gap is None or second.p_adjusted is None:
        return f"{effect.axis}: {best.text} leads {second.text} by {gap} over {over}, seed noise not known."
    if second.is_best:
        ties = [level.text for level in ordered[1:] if level.is_best]
        return f"{effect.axis}: {best.text} leads over {over}, but {', '.join(ties)} not significantly worse."
    half = (second.gap.high - second.gap.low) / 2
    return (
        f"{effect.axis}: {best.text} is best over {over}, {second.text} worse by {gap} ± {half:.4f} "
        f"(p {names.probability(second.p_adjusted)})."
    )


def _section(key: str, title: str, about: str, effects: Sequence[Effect]) -> Section:
    svg = draw_effects(effects)
    figure = Figure(
        key,
        f"{title}: mean loss of each value, 95 % over seeds; blue: not significantly worse than the best",
        f"{title}: the mean loss of each value of each axis.",
        svg,
    )
    table = effects_table(effects)
    silent = tuple(f"{each.axis}: {each.note}." for each in effects if not each.levels)
    return Section(key, title, about, table, figure if svg else None, silent if not table.rows else ())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
