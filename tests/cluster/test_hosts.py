"""The main job on hosts of a network, each with its own address, processes and disk; a cable is pulled.

Nothing is refused when a host is cut off: everything is silent. Either another host takes its place, or the
command ends by itself with one line; what comes out in the end is what comes out undisturbed, bit for bit.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import hosts_lab
import psutil
import pytest
from hosts_lab import SHARED, Host, Hosts
from small_study import DETERMINISTIC, STUDY

from pipeline.store.artifacts import Store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(hosts_lab.missing()), reason=hosts_lab.missing()),
]
STEPS, EVERY, CUT_AT = 400, 8, 40
FLAGS = (
    *("--ray.workers", "2", "--tracking.uri", "off", "--train.max-steps", str(STEPS)),
    *("--train.checkpoint-every", str(EVERY), "--train.log-every", "1"),
)
RANK = """
import torch
from pipeline.train.topology import from_environment

with from_environment("cpu", timeout_s=20) as here:
    values = torch.ones(3) * (here.rank + 1)
    here.sum_(values)
    print("sum", values.tolist())
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Hosts]:
    """A head and three workers."""
    with Hosts(workers=3) as hosts:
        (hosts.shared / "study.toml").write_text(STUDY)
        hosts.start()
        yield hosts


@pytest.fixture(scope="module")
def plain(lab: Hosts) -> dict[str, Any]:
    """What the job leaves where nobody disturbs it."""
    job = Job(lab, "plain")
    assert job.wait(400) == 0, job.said
    return job.outcome()


class Job:
    """The main job with a store of its own, from the host of the head."""

    def __init__(self, lab: Hosts, name: str) -> None:
        """Start it, or start it again."""
        self.folder = lab.shared / name
        self._log = lab.shared / f"{name}.log"
        words = [sys.executable, "-m", "jobs.cli", "run", str(SHARED / "study.toml")]
        where = ["--store", str(SHARED / name), "--out", str(SHARED / f"{name}-out")]
        self._process = lab.head.start([*words, *where, *FLAGS], log=self._log, RAY_ADDRESS=lab.address)

    @property
    def said(self) -> str:
        """Its output."""
        return self._log.read_text()

    def wait(self, timeout_s: float) -> int:
        """Its exit code; a failure if it goes on."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"goes on after {timeout_s:.0f} s: {self.said[-3000:]}")

    def reach(self, step: int, *, timeout_s: float = 300.0) -> None:
        """Wait until this step of the student is on record."""
        until = time.monotonic() + timeout_s
        while max((row["step"] for row in self.rows()), default=-1) < step:
            assert self._process.poll() is None, self.said
            assert time.monotonic() < until, f"step {step} not reached: {self.said[-3000:]}"
            time.sleep(0.05)

    def rows(self) -> list[dict[str, Any]]:
        """The history of the student, as it was written."""
        parts = sorted((self.folder / "run").glob("*/*/metrics-*.jsonl"))
        lines = [line for part in parts for line in part.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.endswith("}")]

    def outcome(self) -> dict[str, Any]:
        """Digests and numbers that a disturbance must not change; every step once."""
        store, found = Store(self.folder), {}
        for record in store.records():
            store.open(record.address).verify()
            if record.kind in DETERMINISTIC:
                found[record.address] = record.digest
            elif record.kind in ("teacher", "run"):
                found[record.address] = record.files["model.safetensors"].sha256
        rows = [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in self.rows()]
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
        return found | {"history": rows}


def training(lab: Hosts) -> list[Host]:
    """Hosts on which a worker trains."""
    return [host for host in lab.workers if host.processes("ray::", "RayTrainWorker")]


def test_ranks_of_two_hosts_meet_although_their_names_lead_to_loopback() -> None:
    with Hosts(workers=2) as hosts:
        logs = [host.folder / "rank.log" for host in hosts.workers]
        meeting = {"MASTER_ADDR": hosts.workers[0].address, "MASTER_PORT": "29400", "WORLD_SIZE": "2"}
        ranks = [
            host.start([sys.executable, "-c", RANK], log=log, RANK=str(number), **meeting)
            for number, (host, log) in enumerate(zip(hosts.workers, logs, strict=True))
        ]
        assert [rank.wait(60) for rank in ranks] == [0, 0], [log.read_text() for log in logs]
        assert all("sum [3.0, 3.0, 3.0]" in log.read_text() for log in logs)


def test_another_host_takes_the_place_of_one_that_is_cut_off(lab: Hosts, plain: dict[str, Any]) -> None:
    job = Job(lab, "cut")
    job.reach(CUT_AT)
    used = training(lab)
    assert len(used) == 2
    lab.cut(used[1])
    at, step = time.monotonic(), job.rows()[-1]["step"]
    job.reach(step + 2 * EVERY)
    print(f"cut off at step {step}, trained on {time.monotonic() - at:.1f} s later")
    try:
        assert job.wait(300) == 0, job.said
        assert job.outcome() == plain
        gone = ended(used[1])
        print(f"what ran on the host had ended {time.monotonic() - at:.1f} s after the cut: {gone}")
        assert gone
    finally:
        lab.restart([used[1]])


def test_without_another_host_the_command_ends_by_itself_and_goes_on_later(
    lab: Hosts, plain: dict[str, Any]
) -> None:
    spare = lab.workers[0]
    for process in spare.processes():
        process.kill()
    time.sleep(5)
    job = Job(lab, "alone")
    job.reach(CUT_AT)
    used = training(lab)
    assert len(used) == 2
    lab.cut(used[0])
    at = time.monotonic()
    code = job.wait(900)
    print(f"ended {time.monotonic() - at:.1f} s after the cut, exit code {code}: {job.said.splitlines()[-1]}")
    assert code in (1, 3), job.said
    assert "Traceback" not in job.said
    assert [line for line in job.said.splitlines() if line.startswith("krony run: ")] == [
        job.said.splitlines()[-1]
    ]
    lab.restart([spare, used[0]])
    again = Job(lab, "alone")
    assert again.wait(400) == 0, again.said
    assert "continues at step" in again.said
    assert again.outcome() == plain


def ended(host: Host, *, timeout_s: float = 180.0) -> bool:
    """Whether all of Ray ends by itself on a host that nobody reaches."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        alive = [process for process in host.processes("ray::") if process.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(1)
    return False
