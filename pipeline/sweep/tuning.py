"""The driver's side of Ray Tune: where jobs come from, who is told to leave, and what is heard.

Three small hooks on one `Campaign`. The searcher hands out its jobs, one Tune trial each. The scheduler asks
Tune's own rule for a verdict on each validation, and writes a verdict to stop on the board instead of handing
it to Tune, which would kill. The callback puts what comes back into the ledger and the trackers, and holds a
watch: a trial that gives no sign of life loses its process, which counts as a crash. Imported only after
`pipeline.cluster.connect` has set what Ray reads at its import.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.sweep import StopRule
from pipeline.errors import Interrupted, KronyError, PreflightError, TrainError
from pipeline.progress import Progress
from pipeline.room import GROW_S, can_grow
from pipeline.sweep.campaign import Campaign
from pipeline.sweep.job import Job, Told
from pipeline.sweep.reasons import error_text, reason_of
from pipeline.sweep.slots import trial_resources
from pipeline.sweep.window import Window

SWITCHES: Mapping[str, str] = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative places in a config stay what they are
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # nobody will ever read Tune's own state
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
}
"""What Tune reads from the environment of the driver."""

for _name, _value in SWITCHES.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.schedulers import (  # noqa: E402
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher  # noqa: E402
from ray.util.placement_group import remove_placement_group  # noqa: E402

from pipeline.sweep.trial import BoardClerk, Trial  # noqa: E402
from pipeline.train.group import groups_of  # noqa: E402

WATCH_S = 1.0
"""Seconds between two looks of the watch."""

START_S = 600.0
"""Seconds without any running process after which what a trial holds counts as not to be had, at least.

An autoscaler has `GROW_S`."""

LOST_S = 10.0
"""Seconds without any running process after which it is asked whether a node is left."""

LIVELY = 0.05
"""Share of a core that a process must use to count as alive in a stage that tells nothing."""

MEDIAN_SAMPLES = 3
"""Trials that a median is taken of, at least."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A trial as the rules of Tune know it: by our key, the same over restarts."""

    trial_id: str


@dataclass(frozen=True, slots=True)
class Sign:
    """The last sign of life of a trial."""

    beats: int
    cpu_s: float
    at: float


class JobQueue(Searcher):  # type: ignore[misc]
    """Jobs of a campaign as suggestions: never more than `slots` at a time."""

    def __init__(self, campaign: Campaign, board: BoardClerk, *, slots: int) -> None:
        """`slots` jobs run at once."""
        super().__init__(metric="val_loss", mode="min")
        self._campaign, self._board, self._slots = campaign, board, slots

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next job, nothing for now, or the end."""
        if len(self._campaign.running) >= self._slots:
            return None
        job = self._campaign.next()
        if job is None:
            return str(Searcher.FINISHED) if self._campaign.is_over else None
        return {"job": job, "board": self._board.handle}

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        """The callback has told the campaign."""

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """Nothing can be set."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "") -> None:
        """Nothing, likewise."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class Verdicts(FIFOScheduler):  # type: ignore[misc]
    """A rule of Tune as a judge without force."""

    def __init__(self, campaign: Campaign, board: BoardClerk, rule: StopRule | None) -> None:
        """Tell the rule all validations that are on record, in their order."""
        super().__init__()
        self._campaign, self._board = campaign, board
        self._rule, self._known = _make_rule(rule, campaign), set[str]()
        self.reasons: dict[str, str] = {}
        for key, tokens, loss in campaign.book.validated:
            self._hear(key, tokens, loss)  # a driver may have died between a verdict and the stop

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Always `CONTINUE`; who should stop finds it on the board."""
        job: Job = trial.config["job"]
        known = self._campaign.book.entries[job.key].rungs
        for row in result["told"].rows:
            tokens = int(row["tokens"])
            if "val_loss" in row and tokens not in known:
                self._hear(job.key, tokens, float(row["val_loss"]))
        return str(TrialScheduler.CONTINUE)

    def _hear(self, key: str, tokens: int, loss: float) -> None:
        """A validation; who lost goes on the board. `asha` takes no later loss for that at a rung."""
        rule, entry = self._campaign.rule, self._campaign.book.entries[key]
        if rule is None or not 0 < tokens < entry.total_tokens:
            return
        train = self._campaign.configs[key].train
        rungs = {train.step_at(rung) * train.batch_tokens for rung in rule.rungs(entry.total_tokens)}
        if rule.name == "asha" and tokens not in rungs:
            return
        if self._judge(key, tokens, loss) and not entry.is_over:
            why = f"{rule.name}: validation loss {loss:.4f} at {tokens:,} tokens, others are better"
            self.reasons[key] = why
            self._board.ask(key, "rule")

    def _judge(self, key: str, tokens: int, loss: float) -> bool:
        """Whether the rule would stop the trial."""
        if self._rule is None:
            return False
        seat = Seat(key)
        if key not in self._known:
            self._known.add(key)
            self._rule.on_trial_add(None, seat)
        answer = self._rule.on_trial_result(None, seat, {"tokens": tokens, "val_loss": loss})
        return bool(answer == TrialScheduler.STOP)


def _make_rule(rule: StopRule | None, campaign: Campaign) -> Any:
    if rule is None or rule.name == "halving":  # that one is the campaign's own
        return None
    longest = max((entry.total_tokens for entry in campaign.book.entries.values()), default=0)
    common = {"time_attr": "tokens", "metric": "val_loss", "mode": "min", "grace_period": rule.grace_tokens}
    if rule.name == "median":
        return MedianStoppingRule(**common, min_samples_required=MEDIAN_SAMPLES, min_time_slice=float("inf"))
    if longest < rule.grace_tokens:
        return None
    return AsyncHyperBandScheduler(
        **common, max_t=longest, reduction_factor=rule.reduction, stop_last_trials=False
    )


class Ears(tune.Callback):  # type: ignore[misc]
    """What comes back from trials, and the watch over them."""

    def __init__(
        self,
        campaign: Campaign,
        board: BoardClerk,
        verdicts: Verdicts,
        window: Window,
        progress: Progress,
        *,
        should_stop: Callable[[], bool],
        silence_s: float,
    ) -> None:
        """`should_stop` is asked about once a second; one yes lets every trial save and leave."""
        self.failure: KronyError | None = None
        self.is_alone = False
        self._campaign, self._board, self._verdicts = campaign, board, verdicts
        self._window, self._progress = window, progress
        self._should_stop, self._silence_s = should_stop, silence_s
        self._signs: dict[str, Sign] = {}
        self._silent: set[str] = set()
        self._leaders: dict[str, bytes] = {}
        self._looked = self._heard_at = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of a job stands."""
        key = trial.config["job"].key
        self._signs[key] = Sign(0, 0.0, time.monotonic())
        self._window.begin(self._campaign.book.entries[key], self._campaign.configs[key])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial spoke, perhaps for the last time."""
        job, told, outcome = trial.config["job"], result["told"], result["outcome"]
        self._note_sign(job.key, told, result["cpu_s"])
        if told.leader:
            self._leaders[job.key] = told.leader
        with self._guarded():
            self._campaign.note_validations(job.key, told.rows)
            self._window.rows(job.key, told.rows)
            if outcome is not None:
                if outcome.state == "stopped":
                    outcome = replace(outcome, reason=self._verdicts.reasons.get(job.key, ""))
                self._campaign.ended(job.key, outcome)
                self._over(job.key, outcome)
            self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial lost its process, or met a bug of ours."""
        key = trial.config["job"].key
        reason, is_bug = reason_of(error_text(trial))
        if key in self._silent:
            self._silent.discard(key)
            reason = f"no sign of life for {self._silence_s:,.0f} s (sweep.silence_s)"
        if leader := self._leaders.pop(key, b""):
            for group in groups_of(leader):  # Ray frees them itself only with a dashboard
                remove_placement_group(group)
        with self._guarded():
            self._campaign.crashed(key, reason, is_final=is_bug)
            self._over(key, None)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """The watch looks around."""
        now = time.monotonic()
        if now - self._looked < WATCH_S:
            return
        self._looked = now
        if self._should_stop() and not self._campaign.is_stopping:
            self._stop_all()
        running = [trial for trial in trials if trial.status == "RUNNING"]
        if self._campaign.is_stopping and self._campaign.running and not running:
            self.is_alone = True
            raise Interrupted("all trials wait for machines, none could hear that it should end")
        for trial in running:
            key = trial.config["job"].key
            sign = self._signs.get(key)
            if sign and now - sign.at > self._silence_s and key not in self._silent:
                self._silent.add(key)
                ray.kill(trial.temporary_state.ray_actor)
        if running or not self._campaign.running:
            self._heard_at = now
        elif now - self._heard_at > LOST_S and not any(node["Alive"] for node in ray.nodes()):
            self.failure = TrainError("Ray lost its last node; the same command goes on")
            raise self.failure
        elif now - self._heard_at > max(self._silence_s, START_S) and self._is_overdue(now):
            self.failure = PreflightError(
                f"no trial could start for {now - self._heard_at:,.0f} s: what one holds "
                f"({trial_resources(self._campaign.ray)}) is not free"
            )
            raise self.failure

    def _is_overdue(self, now: float) -> bool:
        return self.failure is None and (now - self._heard_at > GROW_S or not can_grow(ray))

    def _note_sign(self, key: str, told: Told, cpu_s: float) -> None:
        # While training only new rows count; other stages tell nothing, but they use the processor.
        last, now = self._signs[key], time.monotonic()
        used = told.stage != "train" and cpu_s - last.cpu_s > LIVELY * (now - last.at)
        if told.beats != last.beats or used:
            self._signs[key] = Sign(told.beats, cpu_s, now)

    def _over(self, key: str, outcome: Any) -> None:
        self._signs.pop(key, None)
        self._leaders.pop(key, None)
        self._board.forget(key)
        entry = self._campaign.book.entries[key]
        self._window.end(entry, outcome, step=entry.tokens)
        self._window.counts(self._campaign.book)

    def _stop_all(self) -> None:
        self._campaign.is_stopping = True
        self._board.ask_all("shutdown")

    def _show(self) -> None:
        book = self._campaign.book
        entries = book.entries.values()
        left = sum(e.total_tokens - e.tokens for e in entries if not e.is_over)
        total = sum(e.total_tokens for e in entries)
        over = book.count("finished", "stopped", "failed")
        losses = [e.val_loss for e in entries if e.state == "finished" and e.val_loss is not None]
        failed = {"failed": book.count("failed")} if book.count("failed") else {}
        best = {"best": min(losses)} if losses else {}
        self._progress.update(total - left, trials=f"{over:,}/{len(book.entries):,}", **failed, **best)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Tune would bury an error of ours in a traceback: keep it, let trials leave, raise it at the end."""
        try:
            yield
        except KronyError as err:
            self.failure = self.failure or err
            self._stop_all()


def run_jobs(
    campaign: Campaign,
    window: Window,
    progress: Progress,
    *,
    slots: int,
    should_stop: Callable[[], bool],
    silence_s: float,
    trainable: type[Trial] = Trial,
) -> None:
    """Run all jobs that the campaign has, `slots` at a time; raises what the driver could not do."""
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    board = BoardClerk()
    verdicts = Verdicts(campaign, board, campaign.rule)
    ears = Ears(campaign, board, verdicts, window, progress, should_stop=should_stop, silence_s=silence_s)
    scratch = tempfile.mkdtemp(prefix="krony-tune-")
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123
            tune.run(  # not a Tuner: that one pickles all hooks, for a restart of its own that nobody wants
                tune.with_resources(trainable, trial_resources(campaign.ray)),
                name="sweep",
                storage_path=scratch,
                search_alg=JobQueue(campaign, board, slots=slots),
                scheduler=verdicts,
                callbacks=[ears],
                num_samples=-1,
                reuse_actors=True,
                max_failures=0,  # a crash ends a job; a trial counts its own
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                raise_on_failed_trial=False,
                trial_name_creator=lambda trial: str(trial.config["job"].key),
                trial_dirname_creator=lambda trial: str(trial.trial_id),
                verbose=0,
            )
    except Exception as err:  # Tune wraps what is raised in its hooks
        if (lost := _find_ray_error(err)) is not None:
            first = next(iter(str(lost).strip().splitlines()), type(lost).__name__)
            raise TrainError(f"the connection to Ray was lost ({first}); the same command goes on") from err
        if ears.failure is None and not ears.is_alone:
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if ray.is_initialized():
            ray.kill(board.handle)
    if ears.failure is not None:
        raise ears.failure


def _find_ray_error(err: BaseException | None) -> ray.exceptions.RayError | None:
    while err is not None and not isinstance(err, ray.exceptions.RayError):
        err = err.__cause__ or err.__context__
    return err
