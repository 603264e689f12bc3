"""The plan of a sweep for people and for machines."""

from collections.abc import Sequence
from typing import Any

from pipeline.config.load import to_json
from pipeline.config.schema import RunConfig
from pipeline.errors import hide_passwords
from pipeline.progress import duration
from pipeline.sweep.plan import SweepPlan, TrialPlan
from pipeline.sweep.probe import REPEATS

BUSY = 1.5
"""Wall time over processor time above which a plan says so."""


def text(plan: SweepPlan) -> str:
    """Every trial in a line, then what was left out, what is shared, and what all of it takes."""
    sweep = plan.study.sweep
    arms, seeds = len(plan.space.arms), len(sweep.seeds)
    how = "a sample of what the search may draw" if sweep.search in ("tpe", "pareto") else sweep.search
    head = (
        f"{plan.study.source}: {how} over {', '.join(plan.space.axes) or 'nothing'} · "
        f"{arms} arms × {seeds} seed{'s' if seeds > 1 else ''} = {len(plan.trials)} trials"
    )
    return "\n".join([head, "", *_table(plan.trials), "", *_failing(plan), *_removed(plan), *_totals(plan)])


def as_json(plan: SweepPlan) -> dict[str, Any]:
    """The same as plain JSON: a trial's `config` is all that `krony train` needs."""
    resources, sweep = plan.resources, plan.study.sweep
    return {
        "sweep": plan.study.name,
        "source": plan.study.source,
        "search": sweep.search,
        "axes": list(plan.space.axes),
        "seeds": list(sweep.seeds),
        "trials": [_row(row) for row in plan.trials],
        "removed": [
            {"reason": reason, "count": count, "example": plan.space.examples[reason]}
            for reason, count in plan.space.removed.items()
        ],
        "shared": {kind: {"all": all_, "done": done} for kind, (all_, done) in plan.shared.items()},
        "totals": {
            "trials": len(plan.trials),
            "left": len(plan.left),
            "tokens": sum(row.tokens for row in plan.left),
            "train_s": plan.train_s,
            "wall_s": plan.wall_s,
            "teacher_s": plan.teacher_s,
            "busy": plan.busy,
            "kept_by_early_stopping": plan.kept,
        },
        "resources": {
            "slots": resources.slots,
            "scarce": resources.scarce,
            "fits": resources.fits,
            "cpus_per_trial": resources.cpus,
            "gpus_per_trial": resources.gpus,
            "peak_cpus": resources.cpus * resources.slots,
            "peak_gpus": resources.gpus * resources.slots,
            "peak_memory_bytes": resources.memory_bytes,
        },
    }


def _row(row: TrialPlan) -> dict[str, Any]:
    return {
        "key": row.trial.key,
        "name": row.trial.name,
        "arm": row.trial.arm,
        "seed": row.trial.seed,
        "choices": dict(row.trial.choices),
        "state": row.state,
        "parameters": row.size.parameters,
        "exact": row.size.plan is not None,
        "share": row.size.share,
        "macs_per_token": row.size.macs_per_token,
        "tokens": row.tokens,
        "initial_error": row.start.error,
        "metric": row.start.metric,
        "initial_error_note": row.start.note,
        "train_s": row.train_s,
        "measured": row.is_measured,
        "memory_bytes": row.memory_bytes,
        "config": _shown(row.trial.config),
    }


def _shown(config: RunConfig) -> dict[str, Any]:
    """All settings of a trial, without a password in the address of the tracker."""
    table = to_json(config)
    return table | {"tracking": {**table["tracking"], "uri": hide_passwords(table["tracking"]["uri"])}}


def _table(rows: Sequence[TrialPlan]) -> list[str]:
    width = max(len("trial"), *(len(row.trial.name) for row in rows)) + 2
    starts = [_start(row) for row in rows]
    wide = max(len("initial error"), *map(len, starts)) + 2
    times = [_time(row) for row in rows]
    long = max(len("time"), *map(len, times)) + 3
    head = f"{'trial':<{width}}{'parameters':>13}{'share':>8}{'MACs/token':>14}{'tokens':>16}"
    lines = [f"{head}{'initial error':>{wide}}{'time':>{long}}"]
    for row, start, time in zip(rows, starts, times, strict=True):
        size = f"{'' if row.size.plan else '≤ '}{row.size.parameters:,}"
        macs = f"{row.size.macs_per_token:,}" if row.size.macs_per_token else "–"
        state = {"trained": "  trained", "begun": "  begun", "missing": ""}[row.state]
        lines.append(
            f"{row.trial.name:<{width}}{size:>13}{row.size.share:>8.1%}{macs:>14}{row.tokens:>16,}"
            f"{start:>{wide}}{time:>{long}}{state}"
        )
    return lines


def _start(row: TrialPlan) -> str:
    if row.start.error is None:
        return row.start.note.partition(":")[0]
    # another metric than the weights' own norm cannot be compared with it: it is marked
    return f"{row.start.error:.4f}{'' if row.start.metric in ('frobenius', '') else ' *'}"


def _time(row: TrialPlan) -> str:
    if row.train_s is None:
        return "–"
    return ("" if row.is_measured else "~") + duration(row.train_s)


def _failing(plan: SweepPlan) -> list[str]:
    """Inits that were tried and cannot be made: those trials will fail."""
    notes = {row.trial.arm: row.start.note for row in plan.trials if row.start.note.startswith("fails")}
    return [f"fails     {arm}{note.removeprefix('fails')}" for arm, note in notes.items()]


def _removed(plan: SweepPlan) -> list[str]:
    if not plan.space.removed:
        return ["removed   nothing"]
    lines = [f"removed   {sum(plan.space.removed.values()):,}"]
    for reason, count in plan.space.removed.items():
        example = plan.space.examples[reason]
        lines.append(f"{count:>9,} {reason}" + (f" — {example}" if example != reason else ""))
    return lines


def _totals(plan: SweepPlan) -> list[str]:
    resources, stop = plan.resources, plan.study.sweep.stop
    shared = " · ".join(f"{done} of {all_} {kind}" for kind, (all_, done) in plan.shared.items())
    lines = [f"shared    {shared} in the store"]
    if plan.teacher_s:
        lines.append(f"first     the teacher: {duration(plan.teacher_s)} with one thread")
    total = f"total     {len(plan.left)} trials to train, {sum(row.tokens for row in plan.left):,} tokens"
    if plan.train_s is not None and plan.wall_s is not None:
        total += (
            f" · {duration(plan.train_s)} of training · {duration(plan.wall_s)} at {resources.slots} at once"
        )
        if stop:
            total += f" · about {duration(plan.wall_s * plan.kept)} with {stop.name} stopping"
    lines.append(f"{total} (limited by {resources.scarce})")
    peak = f"{resources.cpus * resources.slots:g} cores, {resources.gpus * resources.slots:g} GPUs"
    if resources.memory_bytes:
        peak += f", about {resources.memory_bytes / 1e9:.1f} GB"
    lines.append(f"peak      {peak}")
    if not resources.fits:
        lines.append("warning   not even one trial fits this machine: what is said here is for one at a time")
    elif resources.machine_bytes and resources.memory_bytes > resources.machine_bytes:
        lines.append(
            f"warning   this machine has {resources.machine_bytes / 1e9:.1f} GB; set sweep.concurrent lower"
        )
    return lines + _legend(plan)


def _legend(plan: SweepPlan) -> list[str]:
    lines, resources = [], plan.resources
    if any(row.start.metric not in ("frobenius", "") for row in plan.trials):
        lines.append("* in the metric of the method, not in the norm of the weights: compare within a method")
    if plan.train_s is not None:
        lines += [
            f"times     the best of {REPEATS} micro-batches of random tokens and one update, measured here",
            "          for each structure; ~ is scaled by MACs from the nearest. Training and validation",
            "          only: no start-up, no exports, no scores, nothing compiled",
        ]
    elif resources.gpus and not resources.fits:
        lines.append("times     are not measured here: trials ask for GPUs, and this machine has too few")
    if plan.busy > BUSY:
        lines.append(
            f"          the machine is busy: this took {plan.busy:.1f} times its processor time, which counts"
        )
    return lines
