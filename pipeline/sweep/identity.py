"""The identity of a sweep: what is varied and how it is searched, on which base. Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.chain import VERSIONS, Chains
from pipeline.config.identity import identity_fields
from pipeline.config.load import FILE_FIELDS, UNIONS
from pipeline.config.sweep import SweepStudy
from pipeline.errors import ConfigError
from pipeline.store.artifacts import Identity, Store
from pipeline.sweep.ledger import Book, Ledger

PLACES = frozenset(
    path for section, key in FILE_FIELDS if section in UNIONS for path in (section, f"{section}.{key}")
)
"""Axes whose values may lead to files of data or weights: what these hold is part of the sweep."""


def sweep_identity(study: SweepStudy) -> Identity:
    """Kind `sweep`; another axis, seed, stop rule or base is another sweep, workers and places are not.

    Raises DataError if a source of the base is not there.
    """
    base, chains = study.first, Chains()
    chain = chains.of(base)
    left_out = ("name", "seed")
    fields: Mapping[str, Any] = identity_fields(base)
    sweep = identity_fields(study.sweep) | {
        "axes": [list(axis) for axis in study.sweep.axes.items()]
    }  # in order
    config = {
        "sweep": sweep,
        "base": {name: value for name, value in fields.items() if name not in left_out},
    }
    if found := {path: _contents(study, path, chains) for path in study.sweep.axes if path in PLACES}:
        config["places"] = found
    return Identity(
        "sweep", study.name, config, {"teacher": chain.teacher, "tokens": chain.tokens}, VERSIONS["sweep"]
    )


def _contents(study: SweepStudy, path: str, chains: Chains) -> list[str]:
    """For each value of an axis what its files hold, as a fingerprint; empty where it is no config alone."""
    found = []
    values = study.sweep.axes[path]
    for value in values if isinstance(values, list) else ():
        try:
            config = study.config(study.effective({path: value}), study.sweep.seeds[0])
        except ConfigError:
            found.append("")
            continue
        chain = chains.of(config)
        found.append(f"{chain.tokens.fingerprint} {chain.teacher.fingerprint}")
    return found


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a sweep is, from its ledger alone."""

    address: str
    is_published: bool
    book: Book


def standing(study: SweepStudy) -> Standing:
    """Where the newest attempt at a sweep stands; an empty book before the first."""
    identity, store = sweep_identity(study), Store(study.first.store)
    artifact = store.find(identity)
    with store.attempt(identity, resume=True) as attempt:
        begun = Ledger(attempt.location)  # after a published attempt: `--retry-failed` is on its way
    if artifact and begun.is_empty:
        return Standing(identity.address, is_published=True, book=Ledger(artifact.location).book)
    return Standing(identity.address, is_published=False, book=begun.book)
