"""Who am I among the processes of a run: rank, world, device, and the few things that ranks agree on.

Three ways to get one: nothing (a single process), the environment that `torchrun` sets, or a process group
that somebody else has made (Ray Train). The loop sees only the result. Every collective has a finite timeout;
a peer that is gone is a `PeerLost`, never a hang.
"""

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import PreflightError, TrainError
from pipeline.train.network import choose_network

TIMEOUT_S = 600.0
"""Longest wait for another rank, in seconds; rank 0 may be writing a large checkpoint meanwhile."""

_groups = itertools.count()
"""A process may train a teacher, then a student: each group has keys of its own in torchrun's store."""


class PeerLost(TrainError):
    """Another rank ended or fell silent; the checkpoint on disk is still good."""


@dataclass(frozen=True, slots=True)
class Topology:
    """One rank's place in the world."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and lines."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> None:
        """Replace `values` by their sum over all ranks."""
        self._all_reduce(values, dist.ReduceOp.SUM)

    def maxima(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all ranks; exact for integers up to 2^53."""
        if self.world == 1:
            return list(values)
        held = torch.tensor(values, dtype=torch.float64, device=self.device)
        self._all_reduce(held, dist.ReduceOp.MAX)
        return [float(value) for value in held.tolist()]

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether some rank raised it."""
        return [value > 0.5 for value in self.maxima([float(flag) for flag in flags])]

    def from_main(self, value: int) -> int:
        """Rank 0's `value` on every rank; not negative, at most 2^53."""
        return int(self.maxima([value if self.is_main else -1])[0])

    def are_equal(self, value: int) -> bool:
        """Whether all ranks hold the same `value`, an integer up to 2^53."""
        high, low = self.maxima([value, -value])
        return high == -low

    def _all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        if self.world == 1:
            return
        try:
            dist.all_reduce(values, op=op)
        except RuntimeError as err:  # torch has no narrower class for a closed connection and a timeout
            first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
            raise PeerLost(
                f"rank {self.rank} of {self.world}: another rank is gone or silent ({first}); "
                "run the same command again, it continues from the last checkpoint"
            ) from err


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device that a configuration names; `auto` takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise PreflightError(
                f"train.device='cuda': local rank {local_rank} needs its own GPU, this machine has {count}; "
                "start fewer processes or set train.device='cpu'"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise PreflightError("train.device='mps': this machine has no Metal device; set train.device='auto'")
    return torch.device(name)


@contextmanager
def from_environment(device: str, *, timeout_s: float = TIMEOUT_S) -> Iterator[Topology]:
    """A single process, or one rank of `torchrun`; the process group lives as long as the body."""
    world, rank = _integer("WORLD_SIZE", 1), _integer("RANK", 0)
    chosen = choose_device(device, local_rank=_integer("LOCAL_RANK", 0))
    if world == 1:
        yield Topology(rank=0, world=1, device=chosen)
        return
    if chosen.type == "mps":
        raise PreflightError(
            f"train.device='mps' cannot be shared by {world} processes; set train.device='cpu'"
        )
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    on_this_host = _integer("LOCAL_WORLD_SIZE", world)
    choose_network(os.environ.get("MASTER_ADDR", ""), leaves_host=world > on_this_host)
    store = _meeting_point(_address(), rank, world)
    store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"run-{next(_groups)}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield Topology(rank=rank, world=world, device=chosen)
    finally:
        dist.destroy_process_group()


@functools.cache
def _meeting_point(address: str, rank: int, world: int) -> TCPStore:
    """The store where the ranks find each other, held until this process ends; `address` is `host:port`.

    Without torchrun rank 0 serves it. A store for each group would end with the group, and a rank that is
    already asking for the next group, at the same port, would be cut off with it.
    """
    url = f"tcp://{address}?rank={rank}&world_size={world}"
    store, _, _ = next(rendezvous(url, timeout=timedelta(seconds=TIMEOUT_S)))
    return cast(TCPStore, store)


def _address() -> str:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise PreflightError(f"{name} is not in the environment of a rank; torchrun sets it")
    host = os.environ["MASTER_ADDR"]
    return f"{f'[{host}]' if ':' in host else host}:{_integer('MASTER_PORT', 0)}"


def joined(device: torch.device) -> Topology:
    """The rank of this process in a process group that somebody else made and will destroy."""
    if not dist.is_initialized():
        return Topology(rank=0, world=1, device=device)
    return Topology(rank=dist.get_rank(), world=dist.get_world_size(), device=device)


def launched_rank() -> int:
    """The rank that `torchrun` gave this process; 0 where it was started alone."""
    return _integer("RANK", 0)


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise PreflightError(f"{name}={text!r} in the environment must be a whole number; torchrun sets it")
    return int(text)
