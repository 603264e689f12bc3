"""What is said of a group of workers that was lost: the cause, once, in one line."""

from typing import Any

from pipeline.train.blame import blame, first_line
from pipeline.train.topology import PeerLost

STARVED = """5 worker(s) were killed due to the node running low on memory. \
Memory on the node (IP: 10.77.0.3, ID: 8d4bfd) was 22.81GB used / 24.00GB limit (0.950417)
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/"""

CUT_OFF = """A worker health check failed.
Worker info: Worker(
  metadata=ActorMetadata(hostname='worker3', node_ip='10.77.0.4', pid=318),
)
The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
The actor is dead because its node has died. Node Id: 5b535ea4
\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"""


class ActorDiedError(Exception):
    """As Ray's."""


class OutOfMemoryError(Exception):
    """As Ray's."""


def lost(**failures: BaseException) -> Any:
    """As Ray Train's error of a group: failures by rank."""
    error: Any = Exception("a group failed")
    error.worker_failures = {int(rank[1:]): failure for rank, failure in failures.items()}
    return error


def test_a_rank_that_lost_its_peer_is_not_to_blame():
    found = blame(lost(r0=PeerLost("silent"), r1=ActorDiedError("The actor died.\nDetails follow.")))
    assert found == "worker 1: ActorDiedError: The actor died."
    assert blame(lost(r0=PeerLost("silent"))) == "worker 0: PeerLost: silent"


def test_of_a_remote_error_its_end_is_said():
    remote = ValueError("Traceback (most recent call last):\n  somewhere\nKeyError: 'x'")
    assert first_line(remote) == "ValueError: KeyError: 'x'"


def test_of_a_process_that_is_gone_host_and_reason_are_said():
    found = blame(lost(r0=PeerLost("silent"), r1=ActorDiedError(CUT_OFF)))
    assert found == "worker 1 on 10.77.0.4: its node has died"


def test_memory_that_ran_out_is_the_cause_whatever_else_was_lost():
    found = blame(lost(r0=ActorDiedError("The actor died."), r1=OutOfMemoryError(STARVED)))
    assert found.startswith("worker 1: the memory of node 10.77.0.3 (22.81 of 24.00 GB in use) ran out")
    assert "lower train.micro_batch" in found
    assert "\n" not in found
    assert "docs.ray.io" not in found
    bare = blame(OutOfMemoryError(""))
    assert bare.startswith("the memory of its node ran out")


def test_a_group_without_failures_of_workers_says_its_own():
    assert blame(Exception("no place")) == "Exception: no place"
