"""What the trials of a sweep share, built once before the first of them starts.

Tokens, teachers and their scores are built by this process, which may spread them over Ray as it always does.
Statistics and inits are many small things: each distinct one is built once, at the same time where there are
several. What cannot be built costs the trials that need it; the sweep goes on with the others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from pipeline import stages
from pipeline.chain import Chain, Chains
from pipeline.config.schema import RunConfig
from pipeline.errors import Interrupted, KronyError
from pipeline.progress import say
from pipeline.store.artifacts import Artifact, Identity, Store
from pipeline.work import Work

Task = tuple[str, RunConfig]
"""A stage, `stats` or `init`, of a config."""

Spread = Callable[[Sequence[Task]], Sequence[str]]
"""Builds many tasks at the same time; for each the reason of its failure, or nothing."""

STAGES: Mapping[str, Callable[[Work], Artifact | None]] = {"stats": stages.stats, "init": stages.init}


def build_base(configs: Mapping[str, RunConfig], *, chains: Chains, quiet: bool) -> dict[str, str]:
    """Build tokens, teachers and their scores; for each trial that has to do without, the reason in one line.

    Raises KronyError if that is so for all of them.
    """
    chained = {key: chains.of(config) for key, config in configs.items()}

    def base(key: str) -> str:
        shared = (chained[key].tokens, *chained[key].teacher_scores.values())  # scores name their teacher
        return " ".join(identity.fingerprint for identity in shared)

    reasons: dict[str, str] = {}
    firsts = _distinct(configs, base)
    for key in firsts:
        work = Work(configs[key], chained[key], Store(configs[key].store), quiet=quiet)
        try:
            stages.tokens(work)
            stages.teacher(work)
            stages.scores(work, of_teacher=True)
        except Interrupted:
            raise
        except KronyError as err:
            if len(reasons) == len(firsts) - 1:
                raise
            reasons[base(key)] = err.line
    return {key: reasons[base(key)] for key in configs if base(key) in reasons}


def build_inits(
    configs: Mapping[str, RunConfig], spread: Spread, *, chains: Chains, quiet: bool
) -> dict[str, str]:
    """Build statistics and inits of trials by key; for each that cannot start, the reason in one line."""
    chained = {key: chains.of(config) for key, config in configs.items()}
    failed: dict[str, str] = {}
    for stage in ("stats", "init"):
        left = {key: config for key, config in configs.items() if key not in failed}
        failed |= _build(stage, left, chained, spread, quiet=quiet)
    return failed


def build(task: Task) -> str:
    """Build one task in this process; the reason in one line if that cannot be done."""
    stage, config = task
    try:
        STAGES[stage](Work.on(config, quiet=True))
    except KronyError as err:
        return err.line
    return ""


def _build(
    stage: str, configs: Mapping[str, RunConfig], chained: Mapping[str, Chain], spread: Spread, *, quiet: bool
) -> dict[str, str]:
    def identity(key: str) -> Identity | None:
        return chained[key].stats if stage == "stats" else chained[key].init

    def fingerprint(key: str) -> str:
        found = identity(key)
        return found.fingerprint if found else ""

    missing = [
        key
        for key in _distinct(configs, fingerprint)
        if (wanted := identity(key)) and Store(configs[key].store).find(wanted) is None
    ]
    if not missing:
        return {}
    if not quiet:
        say(stage, f"{len(missing)} to build")
    tasks = [(stage, configs[key]) for key in missing]
    # Training workers, where a config has them, spread the statistics of one config by themselves.
    is_spread = len(tasks) > 1 and not (stage == "stats" and tasks[0][1].ray.workers)
    answers = spread(tasks) if is_spread else [build(task) for task in tasks]
    reasons = {fingerprint(key): reason for key, reason in zip(missing, answers, strict=True) if reason}
    return {key: reasons[fingerprint(key)] for key in configs if fingerprint(key) in reasons}


def _distinct(keys: Iterable[str], fingerprint: Callable[[str], str]) -> list[str]:
    """The first key of each fingerprint."""
    first: dict[str, str] = {}
    for key in keys:
        first.setdefault(fingerprint(key), key)
    return list(first.values())
