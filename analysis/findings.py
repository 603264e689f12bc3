"""What was found, in a few sentences: the first thing on a page, made from the table alone.

For each size and track the best model under the first measure, and how it stands against its dense teacher.
A tie is said to be one: where others are not significantly worse, the sentence counts them.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import pandas as pd

from analysis import names
from analysis.comparison import measure_titles
from analysis.leaders import SENTENCES, spread
from analysis.schema import rows_of
from analysis.tracks import TRACKS

Row = Mapping[str, Any]


def summary(scores: pd.DataFrame) -> tuple[str, ...]:
    """One sentence on what was compared, and one per size and track on who is best there, not too many."""
    if scores.empty:
        return ("There are no scores in this store yet.",)
    rows = rows_of(scores)
    measure, title = next(iter(measure_titles(scores).items()))
    column = [row for row in rows if row["measure"] == measure]
    sized = [row for row in column if not row["is_dense"] and names.is_number(row["group"])]
    compressed = [
        {**row, "lane": TRACKS.index(row["track"])}
        for row in sized
        if row["track"] in TRACKS and names.is_number(row["share"]) and row["share"] < 0.995
    ]
    contest = itemgetter("teacher", "group", "lane")
    sentences = [_scope(rows, [row for row in column if row["is_dense"]], title)]
    groups = [list(group) for _, group in groupby(sorted(compressed, key=contest), key=contest)]
    sentences += [_best(group) for group in spread(groups, SENTENCES)]
    if len(groups) > SENTENCES:
        sentences.append(f"These are {SENTENCES} of {len(groups):,} sizes and tracks, spread over the sizes.")
    return tuple(sentences)


def _scope(rows: Sequence[Row], dense: Sequence[Row], title: str) -> str:
    """What was compared: `7 models against gpt2, dense (124,439,808 parameters; perplexity 29.16 on …)`."""
    count = len({row["subject"] for row in rows if not row["is_dense"]})
    models = f"{count} model{'' if count == 1 else 's'}"
    if not dense:
        return f"{models} measured on {title}, without a dense reference."
    teachers = [
        f"{row['label']} ({names.count(row['parameters'])} parameters; {_measured(row)} on {title})"
        for row in dense
    ]
    return f"{models} against {' and '.join(teachers)}."


def _best(group: Sequence[Row]) -> str:
    """Who leads: `At 65.9 % of the parameters, track M: kron_vl … is best of 3: perplexity 35.97, …`."""
    accuracy = group[0]["metric"] == "accuracy"
    best = max(group, key=itemgetter("value")) if accuracy else min(group, key=itemgetter("value"))
    ties = [row for row in group if row["is_best"] is True and row is not best]
    place = "stands alone" if len(group) == 1 else f"is best of {len(group)}"
    if ties:
        others = "another is" if len(ties) == 1 else f"{len(ties)} others are"
        place += f" (but {others} not significantly worse)"
    kept = (
        f", {names.share(best['recovery'])} of the dense quality" if names.is_number(best["recovery"]) else ""
    )
    return (
        f"At {names.share(best['share'])} of the parameters, track {best['track']}: {best['label']} {place}, "
        f"{_measured(best)}{kept}."
    )


def _measured(row: Row) -> str:
    unit = "accuracy" if row["metric"] == "accuracy" else "perplexity"
    seeds = f" (mean of {row['seeds']} seeds)" if row["seeds"] > 1 else ""
    return f"{unit} {names.quantity(row['value'], row['metric'])}{seeds}"
