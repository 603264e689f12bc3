"""What is not there: cells that others have, and finished work that no score reaches."""

import pandas as pd

from analysis.lineage import Graph


def gaps(table: pd.DataFrame) -> list[str]:
    """Models that lack a measure which others of the same teacher have."""
    found = []
    for _, family in table.groupby("teacher"):
        for measure, column in family.groupby("measure"):
            absent = set(family["subject"]) - set(column["subject"])
            protocol = column["protocol"].iloc[0]
            rows = family[family["subject"].isin(absent)].drop_duplicates("subject")
            found += [f"{row.subject}: not scored under {protocol}" for row in rows.itertuples()]
            if not column["is_dense"].any():
                found.append(f"{measure}: no dense reference, so no recovery")
    return sorted(found)


def unscored(graph: Graph, table: pd.DataFrame) -> list[str]:
    """Finished runs and models that no score reaches; another export of a scored run is no gap."""
    reached = {*table["subject"], *table["run"]}
    models = [
        record
        for record in graph.of_kind("model")
        if not reached & {record.address, *(ref.address for ref in record.inputs.values())}
    ]
    runs = [record for record in graph.of_kind("run") if record.address not in reached]
    exported = {ref.address for record in models for ref in record.inputs.values()}
    return [f"{record.address}: exported, not scored" for record in models] + [
        f"{record.address}: trained, not exported" for record in runs if record.address not in exported
    ]
