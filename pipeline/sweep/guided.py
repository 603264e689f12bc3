"""Searches that learn from what they saw: Optuna draws the next arm from the arms so far.

Optuna keeps nothing. Each time it is asked, it is told all arms of the ledger anew, and its randomness
follows from the search seed and the number of the arm. So a sweep that is resumed goes on as if it had never
stopped, and the library is needed only where such a search is asked for.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from types import ModuleType
from typing import Any

from pipeline.config.sweep import SweepStudy
from pipeline.errors import PreflightError
from pipeline.sweep.axes import Range
from pipeline.sweep.campaign import Proposal
from pipeline.sweep.ledger import Book, Entry
from pipeline.sweep.space import Refused, Sampler, TrialSpec, distributions

TRIES = 200
"""Suggestions in a row that are no new trial, after which the space counts as exhausted."""


class Guide:
    """A `tpe` or `pareto` search of one study."""

    def __init__(self, study: SweepStudy) -> None:
        """Raises PreflightError if Optuna is not installed."""
        self._sweep = study.sweep
        self._optuna = _load(study.sweep.search)
        self._sampler = Sampler(study)
        self._space = {path: self._distribution(what) for path, what in distributions(study).items()}

    def known(self, book: Book) -> list[TrialSpec]:
        """The trials that were drawn in earlier sessions."""
        specs: dict[str, TrialSpec] = {}
        for entries in arms(book).values():
            specs |= {spec.key: spec for spec in self._sampler.arm(entries[0].picks)}
        return [specs[key] for key in book.entries]

    def propose(self, book: Book) -> Proposal | None:
        """One more arm; None once all samples are drawn, or nothing new is found."""
        drawn = arms(book)
        if len(drawn) >= self._sweep.samples:
            return None
        study = self._study(len(drawn))
        for entries in drawn.values():
            study.add_trial(self._told(entries))
        taken = {self._sampler.run_fingerprint(self._sampler.arm(e[0].picks)[0]) for e in drawn.values()}
        for picks in self._suggestions(study):
            try:
                specs = self._sampler.arm(picks)
            except Refused:
                continue
            if self._sampler.run_fingerprint(specs[0]) not in taken:
                return Proposal(specs, picks)
        return None

    def _suggestions(self, study: Any) -> Iterator[Mapping[str, Any]]:
        """What Optuna suggests, one after the other; each but the last is told to be a failure."""
        for _ in range(TRIES):
            trial = study.ask(fixed_distributions=self._space)
            yield dict(trial.params)
            study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def _study(self, number: int) -> Any:
        directions = ["minimize", "minimize"] if self._sweep.search == "pareto" else ["minimize"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar: arms that run now count as bad, not as unknown
            sampler = self._optuna.samplers.TPESampler(
                seed=self._sweep.search_seed * 100_003 + number, constant_liar=True
            )
        return self._optuna.create_study(directions=directions, sampler=sampler)

    def _told(self, entries: Sequence[Entry]) -> Any:
        """An arm as Optuna knows it: its objectives are means over its seeds."""
        states = {entry.state for entry in entries}
        losses = [entry.val_loss for entry in entries if entry.val_loss is not None]
        kind = self._optuna.trial.TrialState
        known: dict[str, Any] = {"state": kind.RUNNING}
        if states == {"finished"}:
            known = {"state": kind.COMPLETE, "values": [fmean(losses), *self._second(entries)]}
        elif "failed" in states and all(entry.is_over for entry in entries):
            known = {"state": kind.FAIL}
        elif all(entry.is_over for entry in entries):
            several = self._sweep.search == "pareto"  # where there is no pruning
            steps = {entry.reach: fmean(losses) for entry in entries}
            known = {"state": kind.FAIL} if several else {"state": kind.PRUNED, "intermediate_values": steps}
        return self._optuna.trial.create_trial(
            params=dict(entries[0].picks), distributions=self._space, **known
        )

    def _second(self, entries: Sequence[Entry]) -> list[float]:
        if self._sweep.search != "pareto":
            return []
        return [fmean(float(getattr(entry, self._sweep.second_objective)) for entry in entries)]

    def _distribution(self, what: "tuple[str, ...] | Range") -> Any:
        kinds = self._optuna.distributions
        if not isinstance(what, Range):
            return kinds.CategoricalDistribution(what)
        if what.integer:
            return kinds.IntDistribution(int(what.low), int(what.high), log=what.log)
        return kinds.FloatDistribution(what.low, what.high, log=what.log)


def arms(book: Book) -> dict[str, list[Entry]]:
    """The trials of each arm, in the order in which they were drawn."""
    found: dict[str, list[Entry]] = {}
    for entry in book.entries.values():
        found.setdefault(entry.arm, []).append(entry)
    return found


def _load(search: str) -> ModuleType:
    try:
        import optuna
    except ImportError as err:
        raise PreflightError(
            f"sweep.search={search!r} needs Optuna, which is not installed: pip install optuna; or choose "
            "'grid' or 'random'"
        ) from err
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    module: ModuleType = optuna
    return module
