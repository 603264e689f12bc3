"""Room for work where an autoscaler may add nodes: who waits, who is refused, and what is asked for."""

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import cluster
from pipeline.errors import Interrupted, PreflightError

TRAINING = {"cpus": 4.0, "gpus": 2.0, "what": "training with 2 workers", "workers": 2}
GROWING = {cluster.NODE_GROUP: "head"}
WHOLE = [{"CPU": 2.0, "GPU": 1.0}] * 2


class Nodes:
    """What `ray` says about its nodes, which have `count` times two CPUs and a GPU."""

    def __init__(self, *, labels: dict[str, str], count: int = 0) -> None:
        self.labels, self.count = labels, count

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Labels": {cluster.NODE_GROUP: "gone"}}
        return [{"Alive": True, "Labels": self.labels}, gone]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0 * self.count, "GPU": float(self.count)}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What was asked for and what is asked for still; machines are there after `after` seconds."""
    seen = SimpleNamespace(asked=[], held=[], after=5.0, now=0.0)

    class Group:
        def wait(self, seconds: float) -> bool:
            seen.now += seconds
            return seen.now >= seen.after

    def placement_group(bundles: list[dict[str, float]]) -> Group:
        seen.asked.append(bundles)
        seen.held.append(Group())
        return seen.held[-1]

    module = import_module("ray.util.placement_group")  # `ray.util` has a function of the same name
    monkeypatch.setattr(module, "placement_group", placement_group)
    monkeypatch.setattr(module, "remove_placement_group", seen.held.remove)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: seen.now))
    return seen


def test_a_cluster_of_fixed_size_refuses_at_once(groups: SimpleNamespace):
    with pytest.raises(PreflightError, match="2 workers asks for 4 CPU, the cluster has 0; lower"):
        cluster.require_resources(Nodes(labels={}), **TRAINING)
    assert not groups.asked


def test_machines_are_asked_for_by_worker_and_the_request_ends_when_they_are_there(groups: SimpleNamespace):
    cluster.require_resources(Nodes(labels=GROWING), **TRAINING)
    assert (groups.asked, groups.held, groups.now) == ([WHOLE], [], 5.0)


def test_what_never_comes_is_one_line_after_a_while_and_not_asked_for_any_more(groups: SimpleNamespace):
    groups.after = math.inf
    with pytest.raises(PreflightError, match=r"asks for 4 CPU, the cluster has 2 after 20 minutes.*status"):
        cluster.require_resources(Nodes(labels=GROWING, count=1), **TRAINING)
    assert (groups.asked, groups.held) == ([WHOLE], [])


def test_who_waits_can_be_stopped(groups: SimpleNamespace):
    with pytest.raises(Interrupted, match="waiting for machines"):
        cluster.require_resources(Nodes(labels=GROWING), **TRAINING, should_stop=lambda: True)
    assert not groups.held


def test_what_is_there_is_not_asked_for(groups: SimpleNamespace):
    cluster.require_resources(Nodes(labels=GROWING, count=2), **TRAINING)
    assert not groups.asked
