"""The group of workers as its driver sees it: does it wait for its place, and how does it end.

Ray Train's controller places the workers, and while it waits for machines it answers nobody. So it tells the
line each time what it turns to, and who it is; whoever must not wait any longer ends it, and then the
placement group that it leaves behind. Imported only after `pipeline.cluster.connect`.
"""

from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

import ray
from ray._private.state import state as tables
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipeline.train.blame import blame
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
        if isinstance(current_state, RestartingState):
            self._line.note.remote(f"lost {blame(current_state.training_failed_error)}: starting again")


class Grip:
    """What a driver holds of a group, to end it."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._leader: Any = None
        self._waits = True

    @property
    def holds(self) -> bool:
        """Whether there is something that could be ended."""
        return self._leader is not None

    def note(self, told: Told) -> None:
        """Keep what the line told last."""
        self._leader = told.leader or self._leader
        self._waits = told.waits

    def end(self, running: "AsyncResult[Any]", *, pool: ThreadPool, leaves: bool) -> None:
        """End the group that `running` waits for; if it `leaves` by itself it has `LEAVE_S` for that."""
        if leaves and not self._waits:
            running.wait(LEAVE_S)
        if not running.ready():
            killed = pool.apply_async(self._kill)  # in a thread: without its cluster Ray may keep it
            killed.wait(FREE_S)
            running.wait(FREE_S)
            if killed.ready():  # once more: in its last moment the controller may have asked for another
                pool.apply_async(self._free).wait(FREE_S)

    def _kill(self) -> None:
        if self._leader is not None:
            ray.kill(self._leader)  # its workers end with it
            self._free()

    def _free(self) -> None:
        for group in groups_of(id_of(self._leader)) if self._leader is not None else ():
            remove_placement_group(group)


def id_of(actor: Any) -> bytes:
    """The id of an actor; who keeps that does not keep the actor."""
    return bytes(actor._actor_id.binary())  # noqa: SLF001


def groups_of(actor_id: bytes) -> list[PlacementGroup]:
    """The placement groups that an actor made and that are there, those that wait for their place too.

    Ray frees them by itself only where a dashboard runs, and its public table does not say who made which.
    """
    rows = tables._connect_and_get_accessor().get_placement_group_table()  # noqa: SLF001
    return [
        PlacementGroup(ray.PlacementGroupID(each.placement_group_id))
        for each in map(PlacementGroupTableData.FromString, rows)
        if each.creator_actor_id == actor_id and each.state != PlacementGroupTableData.REMOVED
    ]
