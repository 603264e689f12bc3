"""Room for work on a cluster: what fits on its nodes as they are, and machines that an autoscaler brings.

Work is so many equal processes, and none of them spans two nodes. Whether machines can come is not read off a
name: every head runs something that calls itself an autoscaler, and where the size is fixed it only watches.
So its own reports are asked: which groups it keeps, and whether it says of a request that it is beyond it.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import Interrupted, PreflightError
from pipeline.progress import say

if TYPE_CHECKING:
    from types import ModuleType

NODE_GROUP = "ray.io/node-group"
"""Label of a node that belongs to a group, of fixed size or not."""

GROW_S = 1200.0
"""How long an autoscaler may take to bring machines: they are started, and build their environment."""

VERDICT_S = 30.0
"""How long an autoscaler has to stay with it that a request is beyond it: some rounds of five seconds."""

EPSILON = 1e-9


def processes_that_fit(nodes: Sequence[Mapping[str, float]], *, cpus: float, gpus: float) -> int:
    """Processes, each with so many CPUs and GPUs, that `nodes` (resources by name) hold at the same time."""
    return sum(_fit(node, cpus, gpus) for node in nodes)


def node_resources(ray: "ModuleType") -> list[dict[str, float]]:
    """Resources by name, of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def can_grow(ray: "ModuleType") -> bool:
    """Whether an autoscaler may add nodes, as far as that is known before it is asked for any.

    False for heads that were started by hand. True for all that KubeRay manages: where it keeps a fixed size,
    only the answer to a request shows it (`require_resources`).
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    client = _gcs(ray)
    try:
        if any(NODE_GROUP in node["Labels"] for node in nodes) and _state(client) is not None:
            return True
        return _keeps_groups(_first_report(client), {str(node["NodeID"]) for node in ray.nodes()})
    except ray.exceptions.RayError as err:
        first = next(iter(str(err).strip().splitlines()), type(err).__name__)
        raise PreflightError(f"the head of Ray does not answer ({first}); the same command goes on") from err


def require_resources(
    ray: "ModuleType",
    *,
    cpus: float,
    gpus: float,
    what: str,
    workers: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Return once the cluster can hold this much, by so many equal workers; an autoscaler is asked for it.

    `on_wait` is called about once a second meanwhile. Raises PreflightError if the cluster cannot grow so
    far, or has not within `GROW_S`; Interrupted if `should_stop`.
    """
    if not (short := _short(ray, cpus=cpus, gpus=gpus, workers=workers)):
        return
    if not can_grow(ray):
        raise PreflightError(f"{what} {short}; lower ray.workers or ray.cpus_per_worker, or add nodes")
    from ray.util.placement_group import placement_group, remove_placement_group

    say("ray", f"{what} {short}: waiting for machines")
    client, began = _gcs(ray), time.monotonic()
    beyond_since = began
    bundle = {name: count / workers for name, count in (("CPU", cpus), ("GPU", gpus)) if count}
    # Not `request_resources`: there is one request per cluster, and Ray Data takes back that of others.
    group = placement_group([bundle] * workers)
    try:
        while not group.wait(1):
            on_wait()
            if should_stop():
                raise Interrupted(f"{what}: stopped while waiting for machines; the same command goes on")
            now = time.monotonic()
            try:
                is_beyond = _is_beyond(_state(client), group.id.hex())
            except ray.exceptions.RayError:  # a head that restarts has no verdict
                is_beyond = False
            if not is_beyond:
                beyond_since = now
            if now - beyond_since >= VERDICT_S:
                raise PreflightError(
                    f"{what} {short}, and its autoscaler says that it cannot bring so much: lower "
                    "ray.workers or ray.cpus_per_worker, raise the groups of the cluster, or wait for "
                    "other work"
                )
            if now - began > GROW_S:
                raise PreflightError(
                    f"{what} {short} after {GROW_S / 60:.0f} minutes; `ray status` says why no machine came: "
                    "lower ray.workers, or raise the groups of the cluster"
                )
    finally:
        remove_placement_group(group)


def _short(ray: "ModuleType", *, cpus: float, gpus: float, workers: int) -> str:
    """What the cluster lacks, in words; empty if nothing."""
    total = ray.cluster_resources()
    for name, count in (("CPU", cpus), ("GPU", gpus)):
        if count > total.get(name, 0.0) + EPSILON:
            return f"asks for {count:g} {name}, the cluster has {total.get(name, 0.0):g}"
    each = {"CPU": cpus / workers, "GPU": gpus / workers}
    if not any(each.values()):
        return ""
    fit = processes_that_fit(node_resources(ray), cpus=each["CPU"], gpus=each["GPU"])
    if fit >= workers:
        return ""
    words = " and ".join(f"{count:g} {name}" for name, count in each.items() if count)
    return f"asks for {words} on one node, {workers} times, the nodes of the cluster hold that {fit} times"


def _fit(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Processes on one node; a share of a GPU never spans two devices."""
    counts = []
    if cpus > 0:
        counts.append(math.floor(node.get("CPU", 0.0) / cpus + EPSILON))
    if gpus > 0:
        devices = math.floor(node.get("GPU", 0.0) + EPSILON)
        counts.append(
            devices * math.floor(1.0 / gpus + EPSILON) if gpus < 1 else math.floor(devices / gpus + EPSILON)
        )
    return min(counts, default=0)


# --- what an autoscaler reports: to tables of the GCS, in Ray 2.60 by no public call ------------------------


def _gcs(ray: "ModuleType") -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=ray.get_runtime_context().gcs_address)


def _first_report(client: Any) -> bytes:
    """The last report of an autoscaler of the first kind, as JSON; empty if none ever came."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS

    return client.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), namespace=None) or b""


def _state(client: Any) -> Any:
    """The last report of one of the second kind; None if none ever came."""
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status())
    return reply.autoscaling_state if reply.HasField("autoscaling_state") else None


def _keeps_groups(report: bytes, node_ids: set[str]) -> bool:
    """Whether the author of such a report has groups; who only watches names each node as one of its own."""
    said = (json.loads(report) if report else {}).get("autoscaler_report") or {}
    counts = [said.get(key) or {} for key in ("active_nodes", "idle_nodes", "pending_launches")]
    return bool({kind for count in counts for kind in count} - {f"node_{node_id}" for node_id in node_ids})


def _is_beyond(state: Any, group_id: str) -> bool:
    """Whether an autoscaler says of a placement group that none of what it may start would hold it."""
    requests = state.infeasible_gang_resource_requests if state is not None else ()
    return any(request.details.startswith(group_id) for request in requests)
