"""Searches that learn from what they saw: Optuna draws the next arm from the arms so far.

Optuna keeps nothing. Each time it is asked, it is told all arms of the ledger anew, and its randomness
follows from the search seed and the number of the arm. So a sweep that is resumed goes on as if it had never
stopped, and the library is needed only where such a search is asked for. Where Optuna only repeats what was
drawn already, the next arm is drawn at random.
"""

import itertools
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from statistics import fmean
from types import ModuleType
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.config.sweep import SweepStudy
from pipeline.errors import ConfigError, PreflightError
from pipeline.sweep.axes import Range
from pipeline.sweep.campaign import Proposal
from pipeline.sweep.ledger import Book, Entry
from pipeline.sweep.space import Refused, Sampler, TrialSpec, distributions

_SHARED = ("corpus", "tokenizer", "data", "teacher")
"""Sections that decide what is built before the first trial starts."""

TRIES = 20
"""Suggestions in a row that are no new trial, after which the next arm is drawn at random."""

DRAWS = 200
"""Random draws in a row that are no new trial, after which the space counts as exhausted."""

SMALL = 4096
"""Combinations up to which all are tried before a space counts as exhausted."""


class Guide:
    """A `tpe` or `pareto` search of one study."""

    def __init__(self, study: SweepStudy) -> None:
        """Raises PreflightError without Optuna, and ConfigError for a range over what trials share."""
        self._sweep = study.sweep
        self._optuna = _load(study.sweep.search)
        self._sampler = Sampler(study)
        self._space = {path: self._distribution(what) for path, what in distributions(study).items()}
        self.bases = _bases(study, self._sampler)
        """A config for each combination of what decides corpus, tokens and teacher, by a name of its own."""
        self._prints: dict[str, str] = {}
        self._is_exhausted = False

    def known(self, book: Book) -> list[TrialSpec]:
        """The trials that were drawn in earlier sessions."""
        specs: dict[str, TrialSpec] = {}
        for entries in arms(book).values():
            specs |= {spec.key: spec for spec in self._sampler.arm(entries[0].picks)}
        return [specs[key] for key in book.entries]

    def propose(self, book: Book) -> Proposal | None:
        """One more arm; None once all samples are drawn, or nothing new is found."""
        drawn = arms(book)
        if self._is_exhausted or len(drawn) >= self._sweep.samples:
            return None
        study = self._study(len(drawn))
        for entries in drawn.values():
            study.add_trial(self._told(entries))
        taken = {self._print(arm, entries[0].picks) for arm, entries in drawn.items()}
        for picks in itertools.chain(self._suggestions(study), self._at_random(len(drawn))):
            try:
                specs = self._sampler.arm(picks)
            except Refused:
                continue
            if self._sampler.run_fingerprint(specs[0]) not in taken:
                return Proposal(specs, picks)
        self._is_exhausted = True
        return None

    def _print(self, arm: str, picks: Mapping[str, Any]) -> str:
        """What the first trial of an arm that was drawn would train."""
        if arm not in self._prints:
            self._prints[arm] = self._sampler.run_fingerprint(self._sampler.arm(picks)[0])
        return self._prints[arm]

    def _suggestions(self, study: Any) -> Iterator[Mapping[str, Any]]:
        """What Optuna suggests, one after the other; each but the last is told to be a failure."""
        for _ in range(TRIES):
            trial = study.ask(fixed_distributions=self._space)
            yield dict(trial.params)
            study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def _at_random(self, number: int) -> Iterator[Mapping[str, Any]]:
        """Where Optuna only repeats itself: everything in random order if that is little, else draws."""
        generator = random.Random(self._sweep.search_seed * 100_003 + number)  # noqa: S311  (no secret)
        axes = self._sampler.axes
        labels = [[each.label for each in axis.options] for axis in axes if not isinstance(axis, Range)]
        if len(labels) == len(axes) and math.prod(map(len, labels)) <= SMALL:
            paths = [axis.path for axis in axes]
            every = [dict(zip(paths, picks, strict=True)) for picks in itertools.product(*labels)]
            yield from generator.sample(every, len(every))
            return
        for _ in range(DRAWS):
            yield self._sampler.draw(generator)

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


def _bases(study: SweepStudy, sampler: Sampler) -> dict[str, RunConfig]:
    axes = [axis for axis in sampler.axes if axis.path.partition(".")[0] in _SHARED]
    options = []
    for axis in axes:
        if isinstance(axis, Range):
            raise ConfigError(
                f"{study.source}: sweep.axes.{axis.path}: trials share what it decides, so it cannot be a "
                f"range for {study.sweep.search!r}; list its values"
            )
        options.append(axis.options)
    found = {}
    for chosen in itertools.product(*options):
        choices = {path: value for option in chosen for path, value in option.choices.items()}
        with suppress(ConfigError):  # no config by itself: perhaps with what other axes choose
            name = " ".join(option.label for option in chosen)
            found[name] = study.config(study.effective(choices), study.sweep.seeds[0])
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
