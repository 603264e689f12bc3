"""A sweep from one file to one artifact: shared work, then trials, then the list of what came out.

Nothing is repeated: a trial whose artifacts are in the store is finished, whoever built them, and one that
was under way goes on from its checkpoint. The same command goes on after any interruption; what failed stays
failed until it is asked for again. The artifact is published once every trial is over.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from pipeline.chain import Chains
from pipeline.cluster import connect, session
from pipeline.config.load import to_json
from pipeline.config.schema import RunConfig
from pipeline.config.sweep import SweepStudy
from pipeline.errors import ConfigError, Interrupted, PreflightError, TrainError
from pipeline.interrupt import stop_on_signal
from pipeline.progress import Progress, say
from pipeline.room import can_grow, node_resources, require_resources
from pipeline.store.alone import alone
from pipeline.store.artifacts import Artifact, Attempt, Store
from pipeline.store.provenance import redact
from pipeline.sweep.campaign import Campaign
from pipeline.sweep.identity import sweep_identity
from pipeline.sweep.job import Outcome, found, validations
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.shared import Task, build_base, build_inits
from pipeline.sweep.slots import held, trial_slots
from pipeline.sweep.space import space_of
from pipeline.sweep.window import Window
from pipeline.tracking.tracker import Status
from pipeline.train.request import ShouldStop
from pipeline.work import Work

GUIDED = ("tpe", "pareto")
TRIALS, CONFIGS = "trials.json", "configs.json"


def run_sweep(study: SweepStudy, *, retry_failed: bool = False, quiet: bool = False) -> Artifact:
    """Run all trials of a sweep, or what is left of them, and publish the list.

    Raises Interrupted, states saved, when asked to stop. Failed trials are part of the result.
    """
    store, identity = Store(study.first.store), sweep_identity(study)
    done = store.find(identity)
    if done and not (retry_failed and done.record.metrics["failed"]):
        if not quiet:
            say("sweep", f"done already · {identity.address}")
        return done
    with (
        store.attempt(identity, resume=True) as attempt,
        alone(attempt, label="sweep", should_stop=lambda: False) as made,
    ):
        if made:
            return made
        ledger = Ledger(attempt.location)
        if done:
            ledger.begin_with(done.location)
        campaign, bases = _campaign(study, ledger)
        if retry_failed:
            campaign.retry_failed()
        _Session(study, attempt, campaign, bases, quiet=quiet).run()
        if not quiet:
            _note_few(study, campaign)
        return _publish(study, attempt, campaign)


def _campaign(study: SweepStudy, ledger: Ledger) -> tuple[Campaign, Mapping[str, RunConfig]]:
    """The trials, and configs that need the same tokens and teachers as those which are not drawn yet."""
    sweep, argv = study.sweep, redact(sys.argv)
    ray = held(study.first, has_gpu=False)
    if sweep.search not in GUIDED:
        return Campaign(sweep, ledger, space_of(study).trials, ray=ray, argv=argv), {}
    if sweep.stop and sweep.stop.name == "halving":
        raise ConfigError(
            f"sweep.stop.name='halving' compares all arms at once, sweep.search={sweep.search!r} draws them "
            "one after the other; choose 'asha' or 'median'"
        )
    from pipeline.sweep.guided import Guide

    guide = Guide(study)
    known = guide.known(ledger.book)
    return Campaign(sweep, ledger, known, ray=ray, proposer=guide, argv=argv), guide.bases


class _Session:
    """One driver's work on a sweep."""

    def __init__(
        self,
        study: SweepStudy,
        attempt: Attempt,
        campaign: Campaign,
        bases: Mapping[str, RunConfig],
        *,
        quiet: bool,
    ) -> None:
        self._study, self._attempt, self._campaign, self._quiet = study, attempt, campaign, quiet
        self._bases = bases
        self._chains = Chains()

    def run(self) -> None:
        """Everything that is left; returns once every trial is over."""
        self._take_what_is_done()
        if self._campaign.is_complete:
            return
        config = self._study.first
        with session(), connect(config.ray, quiet=self._quiet) as ray:
            slots = self._slots(ray)
            self._share()
            with stop_on_signal("sweep") as should_stop:
                self._try(slots, should_stop)
            if not self._campaign.is_complete:
                book = self._campaign.book
                over = book.count("finished", "stopped", "failed")
                where = f"{self._attempt.identity.address}: {over} of {len(book.entries)} trials are over"
                if not self._campaign.is_stopping:
                    raise TrainError(f"{where}, and Ray Tune ended; the same command goes on from there")
                raise Interrupted(
                    f"{where}, the others have saved their state; the same command goes on from there"
                )

    def _take_what_is_done(self) -> None:
        """Trials whose artifacts lie in the store, whoever built them."""
        campaign = self._campaign
        for entry in list(campaign.book.entries.values()):
            if entry.is_over:
                continue
            config = campaign.configs[entry.key]
            work = Work(config, self._chains.of(config), self._attempt.store, quiet=True)
            if outcome := found(work):
                campaign.note_validations(entry.key, validations(work))
                campaign.ended(entry.key, outcome)
        if (over := campaign.book.count("finished", "stopped", "failed")) and not self._quiet:
            say("sweep", f"{over} of {len(campaign.book.entries)} trials are over already")

    def _slots(self, ray: ModuleType) -> int:
        nodes = node_resources(ray)
        config = held(self._study.first, has_gpu=any(node.get("GPU", 0) for node in nodes))
        self._campaign.ray = config
        wanted, grows = self._study.sweep.concurrent or 1, can_grow(ray)
        if grows and not config.gpus_per_worker and self._study.first.train.device == "auto":
            say("sweep", "trials train on CPUs: ray.gpus_per_worker is 0, and no GPU is there yet")
        if trial_slots(nodes, config) < wanted and grows:
            workers = wanted * max(1, config.workers)
            cpus, gpus = workers * config.cpus_per_worker, workers * config.gpus_per_worker
            what = f"a sweep of {wanted} trials at once"
            try:
                require_resources(ray, cpus=cpus, gpus=gpus, what=what, workers=workers)
            except PreflightError as err:
                if trial_slots(node_resources(ray), config) < 1:
                    raise
                say("sweep", f"{err.line}; goes on with what there is")
        fit = trial_slots(node_resources(ray), config)
        if fit < 1:
            raise PreflightError(
                f"not one trial fits on the cluster: it holds {config.workers or 1} × "
                f"{config.cpus_per_worker:g} CPU and {config.gpus_per_worker:g} GPU; lower ray.workers or "
                "ray.cpus_per_worker, or add nodes"
            )
        return min(fit, self._study.sweep.concurrent or fit)

    def _share(self) -> None:
        from pipeline.sweep.trial import spread

        def spread_tasks(tasks: Sequence[Task]) -> Sequence[str]:
            return spread(tasks, retries=self._study.sweep.retries)

        campaign = self._campaign
        left = {e.key: campaign.configs[e.key] for e in campaign.book.entries.values() if not e.is_over}
        needed = {**self._bases, **left} or {"": self._study.first}
        failed = build_base(needed, chains=self._chains, quiet=self._quiet)
        rest = {key: config for key, config in left.items() if key not in failed}
        failed |= build_inits(rest, spread_tasks, chains=self._chains, quiet=self._quiet)
        for key, reason in failed.items():
            if key in left:
                campaign.ended(key, Outcome(state="failed", reason=reason))

    def _try(self, slots: int, should_stop: ShouldStop) -> None:
        """The trials themselves, on Tune."""
        from pipeline.sweep.tuning import run_jobs

        campaign, study, attempt = self._campaign, self._study, self._attempt
        window = Window(
            study.first.tracking,
            attempt.store,
            run_id=f"{attempt.identity.address}/{attempt.name}",
            name=study.name,
            asks={"search": study.sweep.search, "axes": list(study.sweep.axes), "seeds": study.sweep.seeds},
        )
        campaign.ledger.tell("session", slots=slots)
        total = sum(entry.total_tokens for entry in campaign.book.entries.values())
        status: Status = "KILLED"
        try:
            with Progress("sweep", total, unit="tokens", quiet=self._quiet) as progress:
                run_jobs(
                    campaign,
                    window,
                    progress,
                    slots=slots,
                    should_stop=should_stop,
                    silence_s=study.sweep.silence_s,
                )
            status = "FINISHED" if campaign.is_complete else "KILLED"
        finally:
            campaign.ledger.tell("end")
            campaign.ledger.flush()
            window.close(status)


def _note_few(study: SweepStudy, campaign: Campaign) -> None:
    arms = len({entry.arm for entry in campaign.book.entries.values()})
    if arms < study.sweep.samples:
        say("sweep", f"sweep.samples = {study.sweep.samples}, but no more than {arms} arms could be drawn")


def _publish(study: SweepStudy, attempt: Attempt, campaign: Campaign) -> Artifact:
    book = campaign.book
    rows = [entry.to_json() for entry in book.entries.values()]
    attempt.location.put_bytes(TRIALS, (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())
    configs = {key: to_json(spec.config) for key, spec in campaign.specs.items()}
    attempt.location.put_bytes(CONFIGS, (json.dumps(configs, indent=1) + "\n").encode())
    busy = book.wall_s * book.slots
    return attempt.publish(
        metrics={
            "trials": len(rows),
            "finished": book.count("finished"),
            "stopped": book.count("stopped"),
            "failed": book.count("failed"),
            "wall_s": round(book.wall_s, 3),
            "train_s": round(book.train_s, 3),
            "slots": book.slots,
            "efficiency": round(book.train_s / busy, 4) if busy else 0.0,
        },
        settings={"name": study.name, "source": study.source},
    )


def scores_of(artifact: Artifact) -> list[str]:
    """Addresses of the scores of all trials of a published sweep that ran to their end."""
    trials = json.loads(artifact.location.read_bytes(TRIALS))
    return [address for trial in trials for address in trial["scores"].values()]
