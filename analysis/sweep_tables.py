"""The tables of a sweep: who won and by how much, what each axis does, what did not finish and why."""

from collections.abc import Sequence
from itertools import groupby

from analysis import names
from analysis.comparison import Cell, Column, Layout, Table
from analysis.effects import Effect
from analysis.ranking import VALIDATION, Arm, Ranking
from analysis.stats import Interval
from analysis.sweeps import Sweep, Trial

_FRONTS = {"parameters": "size", "macs_per_token": "MACs"}
_BEST = (
    "best (*, bold): not significantly worse than the first (Holm, 5 %). Where nothing is marked, no arm is "
    "significantly worse."
)


def ranking_table(ranking: Ranking, *, layout: Layout = "full") -> Table:
    """One row per arm, the best first."""
    brief = layout == "brief"
    is_text = ranking.measure != VALIDATION
    has_front = any(arm.fronts for arm in ranking.arms)
    is_partial = any(not arm.is_whole for arm in ranking.arms)
    columns = [Column("rank"), Column("arm", is_text=True), Column("loss"), Column("worse by"), Column("p")]
    columns += [Column("seeds"), Column("parameters")]
    columns += [] if brief else [Column("MACs/token")]
    columns += [Column("perplexity")] if is_text else []
    columns += [Column("recovery")] if ranking.teacher_loss is not None and not brief else []
    columns += [Column("front", is_text=True)] if has_front and not brief else []
    columns += [Column("not finished", is_text=True)] if is_partial else []
    titles = {column.title for column in columns}
    rows = tuple(_arm(arm, ranking, titles, inline=brief) for arm in ranking.arms)
    return Table(tuple(columns), rows, _notes(ranking, titles), ranking.tells_apart)


def _arm(arm: Arm, ranking: Ranking, titles: set[str], *, inline: bool) -> tuple[Cell, ...]:
    loss = arm.loss
    seeds = f"{len(arm.losses)}" if arm.is_whole else f"{len(arm.losses)} of {len(arm.trials)}"
    addresses = " ".join(trial.run for trial in arm.trials if trial.state == "finished")
    is_marked = ranking.tells_apart and arm.is_best
    cells = {
        "rank": Cell(str(arm.rank) if arm.rank else names.MISSING),
        "arm": Cell(arm.name),
        "loss": _number(loss, arm.interval, inline=inline, best=is_marked, address=addresses),
        "worse by": _number(arm.gap.estimate if arm.gap else None, arm.gap, inline=inline),
        "p": Cell(names.probability(arm.p_adjusted)),
        "seeds": Cell(seeds),
        "parameters": Cell(names.count(arm.parameters or None)),
        "MACs/token": Cell(names.count(arm.macs_per_token or None)),
        "perplexity": Cell(names.quantity(names.exponential(loss), "perplexity")),
        "recovery": Cell(names.share(_recovery(arm, ranking))),
        "front": Cell(", ".join(_FRONTS[size] for size in arm.fronts)),
        "not finished": Cell(_unfinished(arm, brief=inline)),
    }
    return tuple(cell for title, cell in cells.items() if title in titles)


def _unfinished(arm: Arm, *, brief: bool) -> str:
    states = [trial.state for trial in arm.trials if trial.state != "finished"]
    found = ", ".join(f"{len(list(group))} {state}" for state, group in groupby(sorted(states)))
    tokens = max((trial.tokens for trial in arm.trials if trial.state != "finished"), default=0)
    return found if brief or not found else f"{found} at {names.short_count(tokens)} tokens"


def _recovery(arm: Arm, ranking: Ranking) -> float | None:
    """Perplexity of the dense teacher over that of the arm."""
    if arm.loss is None or ranking.teacher_loss is None:
        return None
    return names.exponential(ranking.teacher_loss - arm.loss)


def _number(
    value: float | None,
    interval: Interval | None,
    *,
    inline: bool,
    best: bool = False,
    address: str = "",
) -> Cell:
    """A loss with half the width of its interval: beside it, or as a small figure below."""
    if value is None:
        return Cell(names.MISSING)
    around = f"± {(interval.high - interval.low) / 2:.4f}" if interval else ""
    if inline:
        return Cell(f"{value:.4f} {around}".strip(), is_best=best, address=address)
    return Cell(f"{value:.4f}", around, best, address)


def _notes(ranking: Ranking, titles: set[str]) -> tuple[str, ...]:
    where = "of the last validation" if ranking.measure == VALIDATION else f"under {ranking.measure}"
    mean = "mean over seeds, ± Student's 95 % interval over seeds on the same text"
    found = [f"loss: nats per token {where}, {mean if ranking.knows_seeds else 'of one seed'}."]
    if any(arm.gap for arm in ranking.arms):
        parts = ["the shared windows of the text (paired bootstrap)"] if ranking.knows_text else []
        parts += ["the seeds (Welch's t)"] if ranking.knows_seeds else []
        found.append(
            f"worse by: than the first; ± half of a 95 % interval that knows {' and '.join(parts)}; p is "
            "Holm's over all arms."
        )
    if not ranking.knows_seeds:
        found.append("One seed per arm: another seed may turn the order round; sweep.seeds names more.")
    if "recovery" in titles:
        found.append("recovery: perplexity of the dense teacher over that of the arm.")
    if "front" in titles:
        found.append("front: no other arm has less loss at no more size (parameters), or MACs.")
    if any(arm.rank and not arm.is_whole for arm in ranking.arms):
        found.append(
            "An arm with unfinished seeds stands behind the whole ones and is not compared: the seeds that "
            "are left may be the lucky ones."
        )
    if any(arm.p_adjusted is not None for arm in ranking.arms):
        found.append(_BEST)
    return tuple(found)


def effects_table(effects: Sequence[Effect]) -> Table:
    """One row per value of every axis; values of one axis are compared with its best."""
    columns = (
        Column("axis", is_text=True), Column("value", is_text=True), Column("loss"), Column("worse by"),
        Column("p"), Column("combinations"),
    )  # fmt: skip
    rows = []
    for effect in effects:
        for number, level in enumerate(effect.levels):
            gap = level.gap
            rows.append(
                (
                    Cell(effect.axis if number == 0 else ""),
                    Cell(level.text),
                    _number(
                        level.loss, level.interval, inline=False, best=effect.tells_apart and level.is_best
                    ),
                    _number(gap.estimate if gap else None, gap, inline=False),
                    Cell(names.probability(level.p_adjusted)),
                    Cell(str(effect.blocks)),
                )
            )
    notes = [f"{effect.axis}: {effect.note}." for effect in effects if effect.note]
    if rows:
        notes.append(
            "loss: mean over the combinations of the other axes that all values have; ± and p as Student and "
            "Welch have them over seeds, Holm's over the axis."
        )
    marks = any(cell.is_best for row in rows for cell in row)
    notes += ["bold: not significantly worse than the best value (5 %)."] if marks else []
    return Table(columns, tuple(rows), tuple(notes), marks)


def endings_table(sweep: Sweep) -> Table:
    """Trials that did not finish, with the reason; seeds of one arm with one fate are one row."""
    columns = (
        Column("arm", is_text=True), Column("seeds", is_text=True), Column("state", is_text=True),
        Column("tokens"), Column("reason", is_text=True),
    )  # fmt: skip
    fates: dict[tuple[str, str, int, str], list[Trial]] = {}
    for trial in sweep.trials:
        if trial.state != "finished":
            fates.setdefault((trial.state, trial.arm, trial.tokens, trial.reason), []).append(trial)
    rows = [
        (
            Cell(arm),
            Cell(", ".join(str(trial.seed) for trial in trials)),
            Cell(state),
            Cell(names.count(tokens)),
            Cell(reason or "no reason recorded"),
        )
        for (state, arm, tokens, reason), trials in sorted(fates.items(), key=lambda item: item[0][0])
    ]
    return Table(columns, tuple(rows))
