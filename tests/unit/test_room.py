"""Room for work: what fits on nodes, who waits for machines and who is refused, and what is asked for."""

import json
import math
from collections.abc import Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GangResourceRequest, GetClusterStatusReply

from pipeline import room
from pipeline.errors import Interrupted, PreflightError

TRAINING = {"cpus": 4.0, "gpus": 2.0, "what": "training with 2 workers", "workers": 2}
WHOLE = [{"CPU": 2.0, "GPU": 1.0}] * 2
NODE = {"CPU": 2.0, "GPU": 1.0}
GROUP, SINGLE = {room.NODE_GROUP: "gpu"}, dict[str, str]()


def report(*kinds: str) -> bytes:
    """What an autoscaler of the first kind writes down."""
    return json.dumps({"autoscaler_report": {"active_nodes": dict.fromkeys(kinds, 1)}}).encode()


class Cluster:
    """What `ray` and the GCS say: nodes of one making, one dead, and the last reports of an autoscaler."""

    exceptions = exceptions

    def __init__(
        self,
        *resources: dict[str, float],
        labels: dict[str, str] = SINGLE,
        first: bytes = report("node_a", "node_gone"),
        beyond: Sequence[str] | None = None,
    ) -> None:
        self.resources, self.labels, self.first = resources, labels, first
        self.reply = GetClusterStatusReply()
        if beyond is not None:
            gangs = [GangResourceRequest(details=f"{group}:PACK|PENDING") for group in beyond]
            state = AutoscalingState(autoscaler_state_version=3, infeasible_gang_resource_requests=gangs)
            self.reply.autoscaling_state.CopyFrom(state)

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Labels": GROUP, "Resources": {"CPU": 64.0}, "NodeID": "gone"}
        alive = [{"Alive": True, "Labels": self.labels, "Resources": each} for each in self.resources]
        return [*({**node, "NodeID": name} for name, node in zip("abcdefgh", alive, strict=False)), gone]

    def cluster_resources(self) -> dict[str, float]:
        return {name: sum(each.get(name, 0.0) for each in self.resources) for name in ("CPU", "GPU")}

    def internal_kv_get(self, key: bytes, namespace: bytes | None) -> bytes:
        return self.first if key == b"__autoscaling_status" else b""

    def get_cluster_status(self) -> bytes:
        return self.reply.SerializeToString()


@pytest.fixture(autouse=True)
def gcs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_gcs", lambda ray: ray)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What was asked for and what is asked for still; machines are there after `after` seconds."""
    seen = SimpleNamespace(asked=[], held=[], after=5.0, now=0.0)

    class Group:
        id = b"\xab\xcd"

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
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: seen.now))
    return seen


@pytest.mark.parametrize(
    ("cluster", "grows"),
    [
        (Cluster(NODE), False),  # started by hand: its autoscaler names each node as a kind of its own
        (Cluster(NODE, first=b""), False),  # or has not reported yet
        (Cluster(NODE, labels=GROUP), False),  # a group of fixed size
        (Cluster(NODE, labels=GROUP, first=b""), False),
        (Cluster(NODE, first=report("head", "node_a")), True),
        (Cluster(NODE, labels=GROUP, first=report("head")), True),
        (Cluster(NODE, labels=GROUP, first=b"", beyond=()), True),
        (Cluster(NODE, beyond=()), False),  # watches nodes that belong to no group
    ],
)
def test_a_cluster_grows_where_an_autoscaler_keeps_its_groups(cluster: Cluster, grows: bool):
    assert room.can_grow(cluster) is grows


@pytest.mark.parametrize("labels", [SINGLE, GROUP])
def test_a_cluster_of_fixed_size_refuses_at_once(groups: SimpleNamespace, labels: dict[str, str]):
    with pytest.raises(PreflightError, match="2 workers asks for 4 CPU, the cluster has 2; lower"):
        room.require_resources(Cluster(NODE, labels=labels), **TRAINING)
    assert not groups.asked


def test_workers_have_to_fit_on_nodes_and_not_only_in_their_sum(groups: SimpleNamespace):
    narrow = [{"CPU": 1.0, "GPU": 1.0}] * 4
    with pytest.raises(
        PreflightError, match=r"for 2 CPU and 1 GPU on one node, 2 times, .* hold that 0 times"
    ):
        room.require_resources(Cluster(*narrow), **TRAINING)
    room.require_resources(Cluster(*narrow), **TRAINING | {"workers": 4})
    assert not groups.asked
    room.require_resources(Cluster(*narrow, first=report("gpu")), **TRAINING)
    assert groups.asked == [WHOLE]


def test_machines_are_asked_for_by_worker_and_the_request_ends_when_they_are_there(groups: SimpleNamespace):
    waits: list[float] = []
    cluster = Cluster(first=report("head"))
    room.require_resources(cluster, **TRAINING, on_wait=lambda: waits.append(groups.now))
    assert (groups.asked, groups.held, groups.now) == ([WHOLE], [], 5.0)
    assert waits == [1.0, 2.0, 3.0, 4.0]


def test_what_never_comes_is_one_line_after_a_while_and_not_asked_for_any_more(groups: SimpleNamespace):
    groups.after = math.inf
    with pytest.raises(PreflightError, match=r"asks for 4 CPU, the cluster has 2 after 20 minutes.*status"):
        room.require_resources(Cluster(NODE, labels=GROUP, beyond=("ef01",)), **TRAINING)
    assert (groups.asked, groups.held) == ([WHOLE], [])


def test_what_an_autoscaler_says_it_cannot_bring_is_refused_soon(groups: SimpleNamespace):
    groups.after = math.inf
    with pytest.raises(PreflightError, match=r"the cluster has 2, and its autoscaler says that it cannot"):
        room.require_resources(Cluster(NODE, labels=GROUP, beyond=("ef01", "abcd")), **TRAINING)
    assert room.VERDICT_S <= groups.now <= room.VERDICT_S + 1
    assert not groups.held


def test_a_head_that_restarts_has_no_verdict_and_one_that_is_gone_is_a_line(
    groups: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    cluster = Cluster(NODE, first=report("gpu"))

    def gone() -> bytes:
        raise exceptions.RpcError("failed to connect to all addresses")

    monkeypatch.setattr(cluster, "get_cluster_status", gone)
    room.require_resources(cluster, **TRAINING)  # type: ignore[arg-type]
    assert groups.now >= groups.after
    cluster.labels = GROUP
    with pytest.raises(PreflightError, match=r"the head of Ray does not answer \(failed to connect"):
        room.can_grow(cluster)  # type: ignore[arg-type]


def test_who_waits_can_be_stopped(groups: SimpleNamespace):
    with pytest.raises(Interrupted, match="waiting for machines"):
        room.require_resources(Cluster(first=report("head")), **TRAINING, should_stop=lambda: True)
    assert not groups.held


def test_what_is_there_is_not_asked_for(groups: SimpleNamespace):
    room.require_resources(Cluster(NODE, NODE), **TRAINING)
    assert not groups.asked
