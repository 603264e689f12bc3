"""Why a group of workers was lost, in one line, from what Ray tells of it.

Ray's own words are kept where they name the cause; where memory ran out they are a page, and ours say what to
do. A rank that lost its peer is a symptom: the others are nearer to the cause.
"""

import re
from collections.abc import Mapping

_PLACE = re.compile(r"node_ip='([^']+)'")
_BECAUSE = re.compile(r"[Tt]he actor (?:is dead|died) because (its [^.:\n]+)")
_USED = re.compile(r"\(IP: ([^,)]+).*?was ([\d.]+) ?GB used / ([\d.]+) ?GB")
LESS_MEMORY = (
    "lower train.micro_batch, or raise ray.cpus_per_worker so that fewer workers share a node; the result "
    "stays the same"
)


def blame(err: BaseException) -> str:
    """The worker to blame for a lost group, and what became of it."""
    failures: Mapping[int, BaseException] = getattr(err, "worker_failures", {})
    ordered = sorted(failures.items(), key=lambda item: ("PeerLost" in repr(item[1]), item[0]))
    starved = [(rank, failure) for rank, failure in ordered if is_memory(failure)]
    if not ordered:
        return _of_memory(err) or first_line(err)
    rank, failure = (starved or ordered)[0]
    place = _PLACE.search(str(failure))
    where = f" on {place[1]}" if place else ""
    return f"worker {rank}{where}: {_of_memory(failure) or _of_loss(failure) or first_line(failure)}"


def first_line(err: BaseException) -> str:
    """The kind of an error and its first line; of a remote one the last, above which its traceback stands."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[-1] if lines and 'Traceback' in str(err) else (lines or [''])[0]}"


def is_memory(err: BaseException) -> bool:
    """Whether Ray ended a process because its node ran low on memory."""
    return "low on memory" in str(err) or type(err).__name__ == "OutOfMemoryError"


def _of_loss(err: BaseException) -> str:
    """Of a process that is gone: `its node has died`."""
    found = _BECAUSE.search(str(err))
    return found[1] if found else ""


def _of_memory(err: BaseException) -> str:
    if not is_memory(err):
        return ""
    found = _USED.search(str(err))
    where = f"node {found[1]} ({found[2]} of {found[3]} GB in use)" if found else "its node"
    return f"the memory of {where} ran out, and Ray ended processes there; {LESS_MEMORY}"
