"""A real head with token auth, started by hand: who may submit, and what a second submit does."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_lab import free_ports

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120
LEFT = """
import json, sys, time
from pipeline.cluster import connect
from pipeline.config.schema import RayConfig
with connect(RayConfig(address=sys.argv[1]), quiet=True) as ray:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        groups = [g["state"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        cpus = ray.available_resources().get("CPU"), ray.cluster_resources()["CPU"]
        if not groups and cpus[0] == cpus[1]:
            break
        time.sleep(0.5)
    print(json.dumps([groups, *cpus]))
"""

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class Head:
    """A running head and what it takes to be let in."""

    address: str
    cluster: str
    folder: Path
    secrets: dict[str, str]


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError as err:
        return err.code == 401
    except OSError:
        return False
    raise AssertionError("the dashboard let somebody in without a token")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One head for the module, in a process group of its own that is ended as a whole."""
    folder = Path(tempfile.mkdtemp(prefix="h-", dir=os.environ["RAY_TMPDIR"]))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    keys = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, dashboard, agent, client = free_ports(4)
    places = ["--port", gcs, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
    places += ["--dashboard-host", "127.0.0.1", "--ray-client-server-port", client, "--temp-dir", folder]
    places += ["--min-worker-port", 22000, "--max-worker-port", 22999]
    size = ["--num-cpus", 2, "--object-store-memory", 150 * 2**20]
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", *places, *size]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=os.environ | keys,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + PATIENCE_S
        while not answers(address):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
        yield Head(address, f"127.0.0.1:{gcs}", folder, keys)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def krony_submit(python, head: Head, *, keys: dict[str, str]) -> subprocess.CompletedProcess[str]:
    own = ["--address", head.address, "--python", sys.executable, "--json"]
    job = ["status", "configs/smoke.toml", "--store", str(head.folder / "store")]
    return python("-m", "jobs.submit", *own, *job, cwd=PROJECT, env=keys)


def krony_job(python, head: Head, *words: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "jobs.job", *words, "--address", head.address, cwd=PROJECT, env=head.secrets)


def test_nobody_submits_without_the_token(python, head: Head, tmp_path: Path):
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    empty = {"RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}
    for keys in ({"RAY_AUTH_MODE": "disabled"}, empty, {"RAY_AUTH_TOKEN_PATH": str(wrong)}):
        done = krony_submit(python, head, keys=keys)
        assert done.returncode == 3, done.stderr
        assert "RAY_AUTH_TOKEN_PATH" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=10)


def test_a_job_runs_once_at_a_time_under_its_own_name(python, head: Head):
    first, second = (krony_submit(python, head, keys=head.secrets) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    assert (one["is_new"], two["is_new"]) == (True, False)
    assert one["id"] == two["id"]
    watched = krony_job(python, head, "follow", one["id"])
    assert watched.returncode == 0, watched.stdout + watched.stderr
    assert watched.stdout.count("corpus/pydocs-") == 1
    assert watched.stdout.endswith(f"{one['id']} succeeded\n")
    third = json.loads(krony_submit(python, head, keys=head.secrets).stdout)
    assert third["is_new"]
    assert third["id"] == f"{one['id']}-r2"


@pytest.mark.nightly
def test_a_job_that_fails_or_is_stopped_says_so_by_its_exit_code(python, head: Head):
    own = ["--address", head.address, "--python", sys.executable]
    store = ["--store", str(head.folder / "other")]
    words = ["report", "configs/smoke.toml", *store, "--explain", "nothing"]
    failed = python("-m", "jobs.submit", *own, "--follow", *words, cwd=PROJECT, env=head.secrets)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert failed.stdout.splitlines()[-1].endswith("failed")
    words = ["prepare", "configs/smoke.toml", *store]
    began = python("-m", "jobs.submit", *own, "--json", *words, cwd=PROJECT, env=head.secrets)
    name = json.loads(began.stdout)["id"]
    stopped = krony_job(python, head, "stop", name)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert stopped.stdout == f"job       {name} stopped\n"
    assert krony_job(python, head, "follow", name).returncode == 130
    listed = json.loads(krony_job(python, head, "list", "--json").stdout)
    assert [job["status"] for job in listed if job["id"] == name] == ["STOPPED"]
    unknown = krony_job(python, head, "follow", "krony-run-00000000")
    assert unknown.returncode == 3
    assert name in unknown.stderr


@pytest.mark.nightly
def test_trials_stopped_early_give_all_back_where_a_dashboard_runs(python, head: Head, sweep_lab, tmp_path):
    sweep_lab.build(
        tmp_path,
        axes={"train.lr": [1e-2, 1e-7]},
        extra="[ray]\nworkers = 2\ncpus_per_worker = 0.5",
        concurrent=1,
        stop={"name": "asha", "grace_tokens": 1024, "reduction": 2},
    )
    keys = head.secrets | {"RAY_ADDRESS": head.cluster}
    done = python("-m", "jobs.sweep", str(tmp_path / "sweep.toml"), "--out", str(tmp_path / "out"), env=keys)
    assert done.returncode == 0, done.stdout + done.stderr
    (trials,) = (tmp_path / "store").glob("sweep/*/*/trials.json")
    assert [row["state"] for row in json.loads(trials.read_text())] == ["finished", "stopped"]
    left = python("-c", LEFT, head.cluster, env=head.secrets)
    assert left.returncode == 0, left.stderr
    assert json.loads(left.stdout.splitlines()[-1]) == [[], 2.0, 2.0]
