"""Published numbers, carried over as data: value, source, and what is wrong with it.

Their protocol is `as-published/…`: they were measured by others, partly under rules nobody knows any more,
so they stand in a block of their own and never share a column with a number of ours.
"""

from importlib.resources import files

import pandas as pd

from pipeline.errors import KronyError

MARK = "as-published/"
COLUMNS = (
    "model",
    "params",
    "params_convention",
    "wikitext103",
    "wikitext2",
    "lambada",
    "protocol",
    "source",
    "note",
)
CONVENTIONS = {
    "tied_with_wpe": "all, tied",
    "total_untied_recounted": "all, untied head",
    "as_printed_total": "as printed",
    "as_printed_without_output_embedding": "as printed, without head",
}


def published() -> pd.DataFrame:
    """Every published row, sources and conflicts included; raises KronyError for damaged data."""
    with files("analysis").joinpath("published.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file)
    if tuple(table.columns) != COLUMNS:
        raise KronyError(f"published.csv has columns {list(table.columns)}, expected {list(COLUMNS)}")
    if not table["protocol"].str.startswith(MARK).all() or table["source"].isna().any():
        raise KronyError(f"published.csv: every row needs a source and a protocol that starts with {MARK!r}")
    return table


def comparable() -> pd.DataFrame:
    """The rows with a number that claim Krony-PT's protocol: what stands beside a table of `krony/*`."""
    table = published()
    numbers = table[["wikitext103", "wikitext2", "lambada"]].notna().any(axis=1)
    return table[(table["protocol"] == f"{MARK}krony") & numbers].reset_index(drop=True)
