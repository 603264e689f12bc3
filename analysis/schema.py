"""The columns of every table, and the one function that holds a table to them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pandas.api.extensions import ExtensionDtype

from pipeline.errors import KronyError

SCORES: Mapping[str, str] = {
    "address": "str",
    "measure": "str",
    "protocol": "str",
    "version": "int",
    "metric": "str",
    "value": "float",
    "loss": "float",
    "token_loss": "float",
    "bits_per_byte": "float",
    "perplexity": "float",
    "weighting": "str",
    "text": "str",
    "text_sha256": "str",
    "tokens_sha256": "str",
    "tokens": "int",
    "scored": "int",
    "windows": "int",
    "unit": "str",
    "label": "str",
    "plain_label": "str",
    "variant": "str",
    "method": "str",
    "track": "str",
    "is_dense": "bool",
    "seed": "int",
    "calibration_seed": "int",
    "seeds": "int",
    "arm": "str",
    "parameters": "int",
    "krony_parameters": "int",
    "non_embedding_parameters": "int",
    "share": "float",
    "macs_per_token": "int",
    "budget": "int",
    "steps": "int",
    "train_tokens": "int",
    "recovery": "float",
    "low": "float",
    "high": "float",
    "group": "int",
    "worse_by": "float",
    "worse_by_low": "float",
    "worse_by_high": "float",
    "detectable": "float",
    "test": "str",
    "p_adjusted": "float",
    "is_best": "bool",
    "subject": "str",
    "run": "str",
    "init": "str",
    "teacher": "str",
    "drifted": "str",
    "missing": "str",
    "dirty": "bool",
    "description": "str",
    "tokenizer": "str",
    "gate": "float",
    "gate_tolerance": "float",
    "commit": "str",
    "command": "str",
    "finished": "str",
}
HISTORY: Mapping[str, str] = {
    "run": "str",
    "label": "str",
    "arm": "str",
    "step": "int",
    "tokens": "int",
    "loss": "float",
    "val_loss": "float",
    "lr": "float",
}
MODULES: Mapping[str, str] = {
    "init": "str",
    "label": "str",
    "layer": "int",
    "matrix": "str",
    "error": "float",
}
SPEEDS: Mapping[str, str] = {
    "address": "str",
    "subject": "str",
    "run": "str",
    "teacher": "str",
    "variant": "str",
    "plain_label": "str",
    "seed": "int",
    "side": "str",
    "parameters": "int",
    "quantity": "str",
    "unit": "str",
    "value": "float",
    "low": "float",
    "high": "float",
    "ratio": "float",
    "ratio_low": "float",
    "ratio_high": "float",
    "rounds": "int",
    "held": "float",
    "device": "str",
    "place": "str",
    "protocol": "str",
    "drifted": "str",
    "missing": "str",
    "commit": "str",
    "command": "str",
    "finished": "str",
}

_KINDS: Mapping[str, Any] = {"str": str, "int": int | float, "float": int | float, "bool": bool}
_TYPES: Mapping[str, Any] = {"str": "string", "int": "Int64", "float": "Float64", "bool": "boolean"}


def checked(rows: Sequence[Mapping[str, Any]], schema: Mapping[str, str]) -> pd.DataFrame:
    """A frame with exactly the columns and types of `schema`; raises KronyError naming what does not fit."""
    frame = pd.DataFrame([{key: row.get(key) for key in schema} for row in rows], columns=list(schema))
    for column, kind in schema.items():
        try:
            frame[column] = frame[column].astype(_TYPES[kind])
        except (ValueError, TypeError, OverflowError) as err:
            raise KronyError(
                f"column {column!r} should be {kind}: {err}; the record that holds it is damaged"
            ) from err
    return frame


def fitting(row: dict[str, Any], schema: Mapping[str, str]) -> dict[str, Any]:
    """The row, if each value is of the kind that `schema` says; ValueError names the first that is not."""
    for key, kind in schema.items():
        value = row.get(key)
        if value is not None and (not isinstance(value, _KINDS[kind]) or (value is True and kind != "bool")):
            raise ValueError(f"{key} is {value!r:.60}, expected {kind}")
    return row


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame, by column; what is absent is None."""
    if not all(isinstance(kind, ExtensionDtype) for kind in frame.dtypes):
        return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
    arrays: dict[str, Any] = {str(name): column.array for name, column in frame.items()}
    columns = {name: array.to_numpy(object, na_value=None).tolist() for name, array in arrays.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
