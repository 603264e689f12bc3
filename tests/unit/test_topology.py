"""Ranks agree on what they must agree on, and a rank that is gone is an error and not a hang."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import PreflightError
from pipeline.train.topology import Topology, _address, choose_device, from_environment, launched_rank

PROJECT = Path(__file__).resolve().parents[2]

RANK = """
import os, time, torch
from pipeline.train.topology import PeerLost, from_environment
for _ in range(2):  # one process trains a teacher, then a student
    with from_environment("cpu", timeout_s=60) as topology:
        rank = topology.rank
        assert (topology.world, topology.is_main) == (2, rank == 0)
        assert topology.maxima([rank, -rank, 2.5]) == [1, 0, 2.5]
        assert topology.any(rank == 1, False) == [True, False]
        assert topology.from_main(2**40 + 7 if rank == 0 else 3) == 2**40 + 7
        assert topology.are_equal(2**50 - 1) and not topology.are_equal(rank)
        values = torch.full((3,), float(rank + 1))
        topology.sum_(values)
        assert values.tolist() == [3.0, 3.0, 3.0]
        if rank == 0:
            time.sleep(0.5)  # the other is already on its way to the next group
with from_environment("cpu", timeout_s=60) as topology:
    topology.maxima([0.0])
    if topology.rank == 1:
        os._exit(7)
    try:
        topology.sum_(values)
    except PeerLost as err:
        print(err)
"""


def test_two_ranks_agree_and_the_death_of_one_is_noticed(free_port):
    def start(rank: int) -> subprocess.Popen[str]:
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = {"PATH": "", "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port)}
        return subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=env | where,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    ranks = [start(rank) for rank in range(2)]
    outputs = [process.communicate(timeout=240) for process in ranks]
    assert ranks[1].returncode == 7, outputs[1][1]
    assert ranks[0].returncode == 0, outputs[0][1]
    (line,) = outputs[0][0].splitlines()
    assert line.startswith("rank 0 of 2: another rank is gone or silent (")
    assert "continues from the last checkpoint" in line


def test_a_process_on_its_own_agrees_with_itself(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with from_environment("cpu") as topology:
        assert topology == Topology(rank=0, world=1, device=torch.device("cpu"))
        assert topology.maxima([3.0, -1.0]) == [3.0, -1.0]
        assert topology.from_main(5) == 5
        assert topology.are_equal(9)
        assert not torch.distributed.is_initialized()


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda", local_rank=0) == torch.device("cuda", 0)
    with pytest.raises(PreflightError, match="local rank 1 needs its own GPU, this machine has 1"):
        choose_device("cuda", local_rank=1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(PreflightError, match="no Metal device"):
        choose_device("mps")


def test_a_rank_that_does_not_know_where_to_meet_is_told(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with (
        pytest.raises(PreflightError, match="MASTER_PORT is not in the environment"),
        from_environment("cpu"),
    ):
        pass


@pytest.mark.parametrize(
    ("host", "address"), [("10.0.0.1", "10.0.0.1:29500"), ("fd00::1", "[fd00::1]:29500")]
)
def test_where_ranks_meet_may_be_of_either_kind(host, address, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert _address() == address


def test_an_environment_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(PreflightError, match="RANK='first' in the environment"):
        launched_rank()
