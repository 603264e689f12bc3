"""A driver and its group of workers: who is asked to leave, who is ended, and who is heard while it waits."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster import SWITCHES
from pipeline.config.schema import RayConfig
from pipeline.errors import DataError, Interrupted, PreflightError, TrainError
from pipeline.train.line import Line
from pipeline.train.request import FitResult

RELAY = SimpleNamespace(rows=lambda rows: None)


class LostError(Exception):
    """As `ray.exceptions.RayError`."""


class Afar:
    """An object whose methods are called as those of an actor; each answer is there at once."""

    def __init__(self, inside: Any) -> None:
        self._inside = inside

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._inside, name))


class Group:
    """Workers that train until they are asked to leave, if they hear it, or are killed."""

    def __init__(self) -> None:
        self.line, self.killed, self.freed = Line(), threading.Event(), list[Any]()
        self.hears, self.ended = True, threading.Event()

    def work(self) -> SimpleNamespace:
        while not self.killed.wait(0.01):
            if self.hears and self.line.is_stop_asked():
                break
        self.ended.set()
        return SimpleNamespace(return_value=FitResult(step=7, tokens=7, stopped=True))

    def kill(self, actor: Any) -> None:
        assert actor == "controller"
        self.killed.set()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    for name, value in SWITCHES.items():  # as `connect` does, before Ray Train is imported
        os.environ.setdefault(name, value)
    import ray

    from pipeline.train import group as module

    made = Group()
    made.line.lead("controller")
    monkeypatch.setattr(ray, "kill", made.kill)
    monkeypatch.setattr(module, "id_of", lambda actor: f"the {actor}".encode())
    monkeypatch.setattr(module, "groups_of", lambda actor_id: [f"place of {actor_id.decode()}"])
    monkeypatch.setattr(module, "remove_placement_group", made.freed.append)
    monkeypatch.setattr(module, "LEAVE_S", 0.5)
    yield made
    made.killed.set()


def drive(group: Group, *, relay: Any = RELAY, **more: Any) -> Any:
    from pipeline.train.distributed import _drive

    library: Any = SimpleNamespace(get=lambda answer: answer, exceptions=SimpleNamespace(RayError=LostError))
    wanted = {"on_leader": None, "on_queue": lambda: None, "should_stop": lambda: False} | more
    should_stop: Callable[[], bool] = wanted.pop("should_stop")
    return _drive(library, group.work, Afar(group.line), relay, should_stop, **wanted)


def broken(rows: Any) -> None:
    raise DataError("the history cannot be written")


def test_a_gpu_that_nobody_asks_ray_for_is_refused_before_anything_starts():
    from pipeline.train.distributed import fit

    request: Any = SimpleNamespace(train=SimpleNamespace(device="cuda"))
    with pytest.raises(PreflightError, match=r"needs ray\.gpus_per_worker above 0"):
        fit(request, RayConfig(workers=2), on_log=print, should_stop=lambda: False)


def test_workers_of_a_driver_that_cannot_go_on_are_asked_to_leave(group: Group):
    group.line.join()
    with pytest.raises(DataError, match="history"):
        drive(group, relay=SimpleNamespace(rows=broken))
    assert group.ended.is_set()
    assert not group.killed.is_set()
    assert not group.freed


def test_those_that_do_not_leave_are_ended_and_their_place_is_freed(group: Group):
    group.hears = False
    group.line.join()
    with pytest.raises(DataError, match="history"):
        drive(group, relay=SimpleNamespace(rows=broken))
    assert group.killed.is_set()
    assert group.freed == ["place of the controller"] * 2, "once before and once after its end"


def test_a_line_that_is_lost_ends_them_at_once(group: Group):
    def lost(rows: Any) -> None:
        raise LostError("the actor died")

    group.line.join()
    with pytest.raises(TrainError, match="connection to Ray was lost"):
        drive(group, relay=SimpleNamespace(rows=lost))
    assert set(group.freed) == {"place of the controller"}


def test_who_is_told_to_end_does_not_wait_for_machines(group: Group):
    began, signs = time.monotonic(), list[float]()
    group.line.join()
    group.line.place(waits=True)  # they were lost
    with pytest.raises(Interrupted, match="waited for their place"):
        drive(
            group,
            should_stop=lambda: time.monotonic() - began > 0.6,
            on_queue=lambda: signs.append(time.monotonic()),
        )
    assert len(signs) >= 2
    assert group.killed.is_set()


def test_workers_that_train_hear_it_and_give_no_sign_of_waiting(group: Group):
    group.line.join()
    result = drive(group, should_stop=lambda: True, on_queue=lambda: pytest.fail("nobody waits"))
    assert (result.step, result.stopped) == (7, True)
    assert not group.killed.is_set()


def test_memory_that_runs_out_again_while_workers_start_is_said_with_what_to_lower():
    from ray.train import ControllerError

    from pipeline.train.distributed import _answer

    def starved() -> Any:
        told = "5 worker(s) were killed due to the node running low on memory. Memory on the node "
        where = "(IP: 10.0.0.2, ID: 5049) was 5.30GB used / 23.54GB limit (0.225116)"
        raise ControllerError(RuntimeError(told + where))

    with pytest.raises(TrainError, match=r"memory of node 10\.0\.0\.2 .* lower train\.micro_batch") as caught:
        _answer(starved)
    assert "continues from the last checkpoint" in str(caught.value)
