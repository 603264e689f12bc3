"""The trials of a sweep: every combination of its axes, or a sample, without those that make no sense.

An arm is one combination; a trial is an arm with a seed, and an ordinary `RunConfig`. What cannot be built,
cannot keep its budget, was asked to be skipped, or would train the very same model as another trial, is
removed and counted by reason; so are settings that a method does not have, for which one trial is enough.
Nothing is built and no weight is read.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.algebra.shapes import ShapeError
from model.compress.budget import BudgetError
from model.config import ModelError
from pipeline.chain import Chains, earlier
from pipeline.compress.outlook import try_outlook
from pipeline.config.identity import identity_fields
from pipeline.config.load import to_json
from pipeline.config.paths import value_at
from pipeline.config.schema import RunConfig
from pipeline.config.sweep import SweepStudy
from pipeline.errors import ConfigError
from pipeline.sweep.axes import Axis, Option, Range, Removed, label_values, resolve

_TRIES = 50  # draws per wanted arm before a small space counts as exhausted


class Refused(ValueError):
    """A combination that is no trial; `reason` is what is counted, the message says it in full."""

    def __init__(self, reason: str, message: str = "", *, is_mistake: bool = False) -> None:
        super().__init__(message or reason)
        self.reason, self.is_mistake = reason, is_mistake


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """One trial: an arm with a seed."""

    key: str
    """10 hex digits of the hash of choices and seed: the same on every machine."""

    name: str
    """What differs among the trials, short and unique: `256x256 kron_vl s0`."""

    arm: str
    """The name without the seed: what is compared over seeds."""

    choices: Mapping[str, Any]
    """Config path to value, in the order in which they are laid over the base."""

    seed: int
    """Seed of compression and training, and of calibration if the sweep says so."""

    config: RunConfig
    """What the trial runs: `krony train` takes the same."""


@dataclass(frozen=True, slots=True)
class Space:
    """The trials of a sweep and what was left out of them."""

    trials: tuple[TrialSpec, ...]
    """Arms in the order of the axes, seeds innermost."""

    removed: Mapping[str, int]
    """Combinations that were left out, by reason."""

    axes: tuple[str, ...]
    """Config paths of the axes."""

    examples: Mapping[str, str]
    """The first case of each reason in full."""

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms, each once."""
        return tuple(dict.fromkeys(trial.arm for trial in self.trials))


class Sampler:
    """The axes of one study, resolved once, and the trials that can be made from them one by one."""

    def __init__(self, study: SweepStudy) -> None:
        """Resolve the axes; raises ConfigError for one that is written wrong or has no option left."""
        self.study, self.removed = study, Removed()
        self.axes = resolve(study, self.removed)
        self._chains = Chains()
        self._names: dict[str, str] = {}
        self._obstacles: dict[str, tuple[str, str] | None] = {}

    def choices(self, picks: Mapping[str, Any]) -> dict[str, Any]:
        """What a searcher picked (axis to label, or to number) as config choices, in axis order."""
        found: dict[str, Any] = {}
        for axis in self.axes:
            picked = picks[axis.path]
            for path, value in axis.option(picked).choices.items() if isinstance(axis, Axis) else ():
                found.pop(path, None)  # laid again, on top
                found[path] = value
            if isinstance(axis, Range):
                found.pop(axis.path, None)
                found[axis.path] = picked
        return found

    def draw(self, generator: random.Random) -> dict[str, Any]:
        """A random combination, as picks."""
        return {axis.path: axis.draw(generator) for axis in self.axes}

    def arm(self, picks: Mapping[str, Any]) -> tuple[TrialSpec, ...]:
        """The trials of one combination, one per seed; raises Refused, with the reason, if it is none."""
        effective = self._landed(picks)
        name = self._name(picks, effective)
        trials = tuple(self._trial(name, effective, seed) for seed in self.study.sweep.seeds)
        config = trials[0].config
        table = to_json(config)
        for skip in self.study.sweep.skip:
            if all(_is_at(table, path, value) for path, value in skip.items()):
                raise Refused("skipped by sweep.skip", f"{name}: skipped by sweep.skip")
        self._require_buildable(config)
        return trials

    def run_fingerprint(self, trial: TrialSpec) -> str:
        """Identity of the trained model: two trials with the same one are one."""
        return self._chains.of(trial.config).run.fingerprint

    def why_twins(self, picks: Mapping[str, Any]) -> str:
        """Why a combination may train the same model as another one: something does not apply to it."""
        asked = self.choices(picks)
        kept = self.study.effective(asked)
        lost = [path for path in asked if path not in kept]
        if not lost:
            return "trains the same model as another trial"
        sections = dict.fromkeys(path.partition(".")[0] for path in lost)
        table = self.study.table(kept)
        names = [str(table.get(section, {}).get("name", section)) for section in sections]
        verb = "has" if len(names) == 1 else "have"
        return f"{' and '.join(names)} {verb} no {', '.join(lost)}; one trial is enough"

    def _landed(self, picks: Mapping[str, Any]) -> dict[str, Any]:
        """The choices that the chosen method and sections have; Refused if a condition lands in part."""
        asked = self.choices(picks)
        effective = self.study.effective(asked)
        for axis in self.axes:
            sets = axis.option(picks[axis.path]).choices if isinstance(axis, Axis) else {}
            lost = [path for path in sets if path not in effective]
            if 0 < len(lost) < len(sets) and any(asked[path] not in (0, 1) for path in lost):
                raise Refused(f"{self._method(asked)} has no {lost[0]}, it is one term")
        return effective

    def _method(self, asked: Mapping[str, Any]) -> str:
        return str(self.study.table(self.study.effective(asked))["method"]["name"])

    def _require_buildable(self, config: RunConfig) -> None:
        """Raise Refused unless the method has a plan for this teacher and budget."""
        asked = identity_fields((config.method, config.budget, config.teacher, config.tokenizer))
        key = json.dumps(asked, sort_keys=True)
        if key not in self._obstacles:
            self._obstacles[key] = _obstacle(config)
        if obstacle := self._obstacles[key]:
            raise Refused(*obstacle)

    def _trial(self, arm: str, choices: Mapping[str, Any], seed: int) -> TrialSpec:
        try:
            config = self.study.config(choices, seed)
        except ConfigError as err:
            text = str(err).removeprefix(f"{self.study.source}: ")
            raise Refused(f"not a valid config: {text}", text, is_mistake=True) from err
        slug = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{arm} s{seed}").strip("-.")
        key = trial_key(choices, seed)
        return TrialSpec(key, f"{arm} s{seed}", arm, dict(choices), seed, replace(config, name=slug))

    def _name(self, picks: Mapping[str, Any], effective: Mapping[str, Any]) -> str:
        """What sets the arm apart; a name that another arm has already gets the arm's own digits."""
        words = []
        for axis in self.axes:
            if isinstance(axis, Range):
                words += label_values(axis.path, [picks[axis.path]]) if axis.path in effective else []
            elif len(axis.options) > 1 and set(effective) & set(axis.option(picks[axis.path]).choices):
                words.append(picks[axis.path])
        name, digits = " ".join(words) or self.study.name, trial_key(effective, 0)
        if self._names.setdefault(name, digits) != digits:
            name = f"{name} #{digits[:4]}"
        return name


def _is_at(table: Mapping[str, Any], path: str, value: Any) -> bool:
    """Whether a complete config has `value` at `path`; a word for a section is its name."""
    found = value_at(table, path)
    return bool(found == value or (isinstance(found, Mapping) and found.get("name", ...) == value))


def trial_key(choices: Mapping[str, Any], seed: int) -> str:
    """10 hex digits of the hash of choices and seed."""
    text = json.dumps({"choices": choices, "seed": seed}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def grid(study: SweepStudy) -> Space:
    """Every combination of a study's axes, once per seed.

    Raises ConfigError if nothing is left, or if a value makes no valid config with any other: that is a
    mistake, not a combination to leave out.
    """
    sampler = Sampler(study)
    options = [_options(axis) for axis in sampler.axes]
    picks = (
        {axis.path: option.label for axis, option in zip(sampler.axes, chosen, strict=True)}
        for chosen in itertools.product(*options)
    )
    return _collect(sampler, picks)


def draw(study: SweepStudy, generator: random.Random, count: int) -> Space:
    """Up to `count` different arms, drawn at random, each once per seed."""
    sampler = Sampler(study)
    picks = (sampler.draw(generator) for _ in range(count * _TRIES))
    return _collect(sampler, picks, count=count)


def space_of(study: SweepStudy) -> Space:
    """What is known of a study's trials beforehand: its grid, or what its seed draws.

    A guided search draws its own; for it this is a sample of equal size, good for a plan.
    """
    if study.sweep.search == "grid":
        return grid(study)
    generator = random.Random(study.sweep.search_seed)  # noqa: S311  (a sample, not a secret)
    return draw(study, generator, study.sweep.samples)


def distributions(study: SweepStudy) -> Mapping[str, tuple[str, ...] | Range]:
    """What a searcher may suggest for each axis: one of these labels, or a number in a range.

    `Sampler(study).arm(picks)` makes trials of what it suggests, or raises Refused.
    """
    found = resolve(study, Removed())
    return {
        axis.path: axis if isinstance(axis, Range) else tuple(option.label for option in axis.options)
        for axis in found
    }


def _options(axis: Axis | Range) -> tuple[Option, ...]:
    assert isinstance(axis, Axis), "a range is refused where a grid is asked for"
    return axis.options


def _collect(sampler: Sampler, picks: Iterable[Mapping[str, Any]], *, count: int = 0) -> Space:
    """Make trials of picks, leave out what is none or there already; stop at `count` arms."""
    removed, source = sampler.removed, sampler.study.source
    arms: dict[str, tuple[TrialSpec, ...]] = {}
    good: set[tuple[str, Any]] = set()
    mistakes: dict[tuple[str, Any], str] = {}
    for each in picks:
        try:
            arm = sampler.arm(each)
        except Refused as err:
            removed.add(err.reason, example=str(err))
            mistakes |= {item: str(err) for item in each.items() if err.is_mistake and item not in mistakes}
            continue
        good |= set(each.items())
        twin = arms.setdefault(sampler.run_fingerprint(arm[0]), arm)
        if twin is not arm and (not count or twin[0].arm != arm[0].arm):
            removed.add(sampler.why_twins(each), example=f"{arm[0].arm} is {twin[0].arm}")
        if len(arms) == count:
            break
    useless = [(path, why) for (path, label), why in mistakes.items() if (path, label) not in good]
    if useless and not count:
        path, why = max(useless, key=lambda case: (case[0] in case[1], len(case[0])))  # what the line names
        raise ConfigError(f"{source}: sweep.axes.{path}: {why}")
    if not arms:
        reasons = "; ".join(f"{number:,} × {reason}" for reason, number in removed.counts.items())
        raise ConfigError(f"{source}: no trial is left: {reasons}")
    trials = tuple(trial for arm in arms.values() for trial in arm)
    return Space(
        trials, dict(removed.counts), tuple(axis.path for axis in sampler.axes), dict(removed.examples)
    )


def _obstacle(config: RunConfig) -> tuple[str, str] | None:
    """Why no such model can be built, in short and in full; None if it can."""
    name = config.method.name
    if earlier(config):
        short = f"{name} in stages is no trial of a sweep"
        return short, f"{short}: it starts from another run; train it with `krony train`"
    try:
        try_outlook(config)
    except BudgetError as err:
        return f"{name} does not keep {config.budget.params:,} parameters", str(err)
    except ShapeError as err:
        return f"a factor shape or its terms do not fit the weights ({name})", str(err)
    except ModelError as err:
        return f"{name}: {str(err).removeprefix(f'{name}: ')}", str(err)
    return None
