"""The group of workers as its driver sees it: does it wait for its place, and how does it end.

Ray Train's controller places the workers, and while it waits for machines it answers nobody. So it tells the
line each time what it turns to, and who it is; whoever must not wait any longer ends it, and then the
placement group that it leaves behind. Imported only after `pipeline.cluster.connect`.
"""

from collections.abc import Callable
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
)
from ray.util.placement_group import remove_placement_group

from pipeline.train.line import Told

WAITING = (InitializingState, RestartingState, ReschedulingState, SchedulingState)
"""What the controller does while no worker trains."""

LEAVE_S = 30.0
"""How long workers have to save and leave when their driver cannot go on, in seconds."""

FREE_S = 5.0
"""Longest wait for Ray to take a group away, in seconds; a cluster that is gone never answers."""


class Watch(ControllerCallback):  # type: ignore[misc]
    """Tells the line, from within the controller, what becomes of the workers; there is no public hook."""

    def __init__(self, line: Any) -> None:
        """`line` is the actor."""
        self._line = line

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller stands."""
        self._line.lead.remote(ray.get_runtime_context().current_actor)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """It turns to something else."""
        self._line.place.remote(isinstance(current_state, WAITING))


class Grip:
    """What a driver holds of a group, to end it."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._leader: Any = None
        self._group: Any = None
        self._waits = True

    def note(self, told: Told) -> None:
        """Keep what the line told last."""
        self._leader = told.leader or self._leader
        self._group = told.group or self._group
        self._waits = told.waits

    def end(self, running: "AsyncResult[Any]", *, pool: ThreadPool, leaves: bool) -> None:
        """End the group that `running` waits for; if it `leaves` by itself it has `LEAVE_S` for that."""
        if leaves and not self._waits:
            running.wait(LEAVE_S)
        if not running.ready():
            pool.apply_async(self._free).wait(FREE_S)  # in a thread: without its cluster Ray may keep it
            running.wait(FREE_S)

    def _free(self) -> None:
        steps: list[tuple[Callable[[Any], None], Any]] = [
            (ray.kill, self._leader),  # the workers are its own and end with it
            (remove_placement_group, self._group),  # Ray frees it by itself only where a dashboard runs
        ]
        for step, what in steps:
            if what is not None:
                step(what)
