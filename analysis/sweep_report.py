"""From a published sweep to its report: the verb behind `krony report --sweep`."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from analysis.ranking import Ranking, rank
from analysis.recipe import recipe
from analysis.sweep_page import best_trial, build_sweep_page
from analysis.sweep_tables import ranking_table
from analysis.sweeps import Sweep, open_sweep, tidy
from analysis.tables import csv, terminal
from analysis.traces import losses
from pipeline.errors import KronyError
from pipeline.store.artifacts import Store
from pipeline.store.location import Location

BEST = "best.toml"


@dataclass(frozen=True, eq=False)
class SweepReport:
    """What was written, and the ranking for a terminal."""

    html: Path
    markdown: Path
    best: Path | None
    """The best recipe; None where no trial finished or the sweep kept no configs."""

    table: str
    sweep: Sweep
    ranking: Ranking

    def json(self) -> str:
        """The ranking as a JSON array, one object per arm."""
        rows = [
            {
                "rank": arm.rank or None,
                "arm": arm.name,
                "choices": arm.choices,
                "seeds": len(arm.trials),
                "finished": len(arm.losses),
                "parameters": arm.parameters,
                "macs_per_token": arm.macs_per_token,
                "loss": arm.loss,
                "low": arm.interval.low if arm.interval else None,
                "high": arm.interval.high if arm.interval else None,
                "worse_by": arm.gap.estimate if arm.gap else None,
                "p_adjusted": arm.p_adjusted,
                "is_best": arm.is_best,
                "fronts": arm.fronts,
                "runs": [trial.run for trial in arm.trials if trial.state == "finished"],
            }
            for arm in self.ranking.arms
        ]
        return json.dumps(rows, indent=1)


def write_sweep_report(store: Store | str, name: str, out: Path) -> SweepReport:
    """Write page, tables, figures and best recipe of the sweep `name` (or at that address) into `out`.

    Raises StoreError if there is no such sweep. The same sweep gives the same bytes.
    """
    opened = store if isinstance(store, Store) else Store(store)
    sweep = open_sweep(opened, name)
    ranking = rank(sweep, partial(losses, opened))
    toml, problems = _recipe(sweep, ranking)
    sweep = Sweep(sweep.record, sweep.trials, sweep.configs, sweep.scores, (*sweep.problems, *problems))
    page = build_sweep_page(sweep, ranking, recipe=toml, store=opened.root.uri)
    contents = {
        "sweep.html": page.html(),
        "sweep.md": page.markdown(),
        "sweep.csv": csv(tidy(sweep)),
        **({BEST: toml} if toml else {}),
        **{f"figures/{figure.key}.svg": figure.svg for figure in page.every_figure},
    }
    place = Location.of(out)
    for key, text in contents.items():
        place.put_bytes(key, text.encode())
    shown = [*page.summary, "", terminal(ranking_table(ranking, layout="brief"))]
    shown += [f"missing   {problem}" for problem in page.problems]
    best = out / BEST if toml else None
    return SweepReport(out / "sweep.html", out / "sweep.md", best, "\n".join(shown), sweep, ranking)


def _recipe(sweep: Sweep, ranking: Ranking) -> tuple[str, list[str]]:
    """The config of the best arm's first finished seed as TOML, and why there is none."""
    trial = best_trial(ranking)
    if trial is None or not sweep.configs:
        return "", []
    arm = ranking.best
    assert arm is not None
    seeds = [f"seed {each.seed}" for each in arm.trials if each.state == "finished"]
    about = (
        f"The best recipe of sweep {sweep.name} ({sweep.record.address}): {arm.name},\n"
        f"loss {arm.loss:.4f} over {', '.join(seeds)} ({ranking.measure}).\n\n    krony train {BEST}"
    )
    try:
        return recipe(sweep.configs[trial.key], about=about), []
    except KeyError:
        return "", [f"{sweep.record.address}: holds no config of {trial.name}, so there is no best recipe"]
    except KronyError as err:
        return "", [f"no best recipe: {err}"]
