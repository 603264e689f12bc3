"""One trial as Ray Tune sees it: a class that lets the run end instead of killing it.

The run is a thread of this actor (`pipeline.sweep.job`). Tune asks for a result and gets what was said in the
meantime; each time, the actor looks at the `Board` whether its trial should leave. So nothing is ever stopped
from outside: a trial saves, says how it ended, and its process is free for the next one. Training on several
workers is started from here and holds its own resources.
"""

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.schema import RunConfig
from pipeline.errors import Interrupted, KronyError
from pipeline.room import GROW_S, node_resources, processes_that_fit
from pipeline.sweep.job import Channel, Job, Outcome, Why, perform
from pipeline.sweep.shared import Task, build
from pipeline.work import Work

BEAT_S = 2.0
"""Longest time between two results of a trial, in seconds."""

CLOSE_S = 300.0
"""Longest wait for a run that is asked to leave when its actor ends, in seconds."""


class Board:
    """Where the driver says who should leave; an actor without CPUs."""

    def __init__(self) -> None:
        """Nobody."""
        self._asked: dict[str, Why] = {}
        self._all: Why = ""

    def ask(self, key: str, why: Why) -> None:
        """One trial should leave."""
        self._asked[key] = why

    def ask_all(self, why: Why) -> None:
        """Every trial should."""
        self._all = why

    def forget(self, key: str) -> None:
        """A trial left."""
        self._asked.pop(key, None)

    def why(self, key: str) -> Why:
        """Why a trial should leave; empty if it may go on."""
        return self._asked.get(key, self._all)


class BoardClerk:
    """The driver's end of the board: one actor without CPUs on this node."""

    def __init__(self) -> None:
        """Start it."""
        # Firmly: a soft wish leads to a worker where the head has no CPUs.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, max_restarts=3, max_task_retries=3)(Board)
        self.handle = actor.options(scheduling_strategy=here).remote()

    def ask(self, key: str, why: Why) -> None:
        """A trial should leave; it is on the board when this returns."""
        ray.get(self.handle.ask.remote(key, why))

    def ask_all(self, why: Why) -> None:
        """All trials should."""
        ray.get(self.handle.ask_all.remote(why))

    def forget(self, key: str) -> None:
        """A trial left."""
        ray.get(self.handle.forget.remote(key))


class Trial(tune.Trainable):  # type: ignore[misc]
    """A job at a time; config: `job` and `board`."""

    @staticmethod
    def do(job: Job, channel: Channel) -> Outcome:
        """What the thread does with a job."""
        return do_job(job, channel)

    def setup(self, config: Mapping[str, Any]) -> None:
        """Start the first job."""
        self._pool = ThreadPool(1)
        self._begin(config["job"], config["board"])

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """The job before has ended; start the next one in this process, with its libraries loaded."""
        self._close()
        gc.collect()
        self._begin(new_config["job"], new_config["board"])
        return True

    def step(self) -> dict[str, Any]:
        """What the run said since the last result; `outcome` with the last one. A bug of ours is raised."""
        if why := ray.get(self._board.why.remote(self._job.key)):
            self._channel.ask_stop(why)
        told = self._channel.listen(BEAT_S)
        outcome: Outcome | None = None
        if self._run.ready():
            outcome = self._run.get()
            late = self._channel.listen(0.0)
            told = replace(told, rows=told.rows + late.rows)
        result = {
            "told": told,
            "cpu_s": time.process_time(),
            "outcome": outcome,
            "done": outcome is not None,
        }
        return result | _last_validation(told.rows)

    def cleanup(self) -> None:
        """Tune lets the actor go."""
        self._close()
        self._pool.terminate()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: checkpoints are the run's own."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the run finds its own."""

    def _begin(self, job: Job, board: Any) -> None:
        sys.argv = list(job.argv) or sys.argv
        self._job, self._board, self._channel = job, board, Channel()
        self._run: AsyncResult[Outcome] = self._pool.apply_async(self.do, (job, self._channel))

    def _close(self) -> None:
        self._channel.ask_stop("shutdown")
        self._run.wait(CLOSE_S)


def _last_validation(rows: tuple[Mapping[str, float], ...]) -> dict[str, float]:
    for row in reversed(rows):
        if "val_loss" in row:
            return {"tokens": row["tokens"], "val_loss": row["val_loss"]}
    return {}


def do_job(job: Job, channel: Channel) -> Outcome:
    """Train here on the cores that this actor holds, or on workers; then export and score."""
    import torch

    config = job.config.ray
    if config.workers < 2:
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
        return perform(job, channel)

    def finish(config: RunConfig) -> None:
        _finish_elsewhere(config, channel)

    return perform(job, channel, finish=finish)


def _finish_elsewhere(config: RunConfig, channel: Channel) -> None:
    """Export and score with what one training worker holds; this actor holds next to nothing.

    Raises Interrupted if the sweep ends meanwhile, KronyError if no node has so much for `GROW_S`.
    """
    task = ray.remote(_finish).options(
        num_cpus=config.ray.cpus_per_worker,
        num_gpus=config.ray.gpus_per_worker,
        max_retries=1,
        scheduling_strategy="DEFAULT",  # else it would have to fit into what this actor holds
    )
    answer = task.remote(config)
    cpus, gpus, had_room = config.ray.cpus_per_worker, config.ray.gpus_per_worker, time.monotonic()
    while not ray.wait([answer], timeout=BEAT_S)[0]:
        channel.enter("score")  # Ray watches the task: it is alive, or waits for a node
        if processes_that_fit(node_resources(ray), cpus=cpus, gpus=gpus):
            had_room = time.monotonic()
        if channel.why == "shutdown":
            ray.cancel(answer)
            raise Interrupted("the sweep ended before the trained model was exported and scored")
        if time.monotonic() - had_room > GROW_S:
            ray.cancel(answer)
            raise KronyError(f"trained, but no node has {cpus:g} CPU and {gpus:g} GPU to export and score")
    if reason := _answer(answer):
        raise KronyError(f"trained, but not exported and scored: {reason}")


def _finish(config: RunConfig) -> str:
    """Export and score in this process; the reason in one line if that cannot be done."""
    from pipeline import stages

    try:
        stages.scores(Work.on(config, quiet=True))
    except KronyError as err:  # over Ray it would arrive with a traceback
        return err.line
    return ""


def spread(tasks: Sequence[Task], *, retries: int) -> list[str]:
    """Build shared things at the same time as Ray tasks; for each the reason of its failure, or nothing."""
    answers = []
    for task in tasks:
        config = task[1].ray
        remote = ray.remote(build).options(
            num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, max_retries=retries
        )
        answers.append(remote.remote(task))
    return [_answer(answer) for answer in answers]


def _answer(answer: Any) -> str:
    try:
        return str(ray.get(answer))
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as err:
        first = next(iter(str(err).strip().splitlines()), "")
        return f"its process was lost ({type(err).__name__}: {first})"
