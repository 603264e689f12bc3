"""cluster.yaml by `ray up` on one host: a head, autoscaled machines, a job, and a machine that dies under it.

    python -m benchmarks.cluster_rehearsal [--kill] [--compare] [--config configs/rehearsal.toml] [--out FILE]

The provider is replaced (`benchmarks/local_machines.py`: a machine is a folder), as are ports, temp folder
and sizes; file mounts, token, set-up, head and worker start commands are those of cluster.yaml. It checks
who is let in and who listens where, submits the main job with `krony submit`, waits until the autoscaler has
given its machines back, and ends everything by pid. `--kill` sends SIGKILL to the raylet of a machine
while it trains; `--compare` then trains the same without a fault and compares the weights. Minutes.
"""

import argparse
import copy
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.local_machines import MARK, LocalMachines, end, free_port, processes
from pipeline.errors import KronyError
from pipeline.store.artifacts import Store
from pipeline.tracking.jsonl import read_history

PROJECT = Path(__file__).resolve().parents[1]
SMALL = {"head": {"CPU": 0}, "cpu": {"CPU": 1}, "gpu": {"CPU": 1, "GPU": 1}}
IDLE_S = 20


@dataclass
class Rehearsal:
    """Where it happens, and what was measured."""

    root: Path
    ports: dict[str, int] = field(default_factory=lambda: {n: free_port() for n in ("gcs", "dash", "flow")})
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """URL of the dashboard."""
        return f"http://127.0.0.1:{self.ports['dash']}"

    @property
    def environment(self) -> dict[str, str]:
        """Of the person at the keyboard, whose home holds the token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KRONY_"))}
        own = {"HOME": str(self.root / "user"), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        paths = {"PYTHONPATH": str(PROJECT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return kept | own | paths | {MARK: str(self.root / "user"), "OMP_NUM_THREADS": "1"}

    def say(self, text: str, **values: Any) -> None:
        """One line with the time, and the values kept."""
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
        self.measured |= values


def derived(config: dict[str, Any], here: Rehearsal) -> dict[str, Any]:
    """`cluster.yaml` with provider, ports and sizes of this host; raises where a line is gone."""
    config = copy.deepcopy(config)
    module = "benchmarks.local_machines.LocalMachines"
    config["provider"] = {"type": "external", "module": module, "root": str(here.root)}
    config["idle_timeout_minutes"] = IDLE_S / 60
    for name, resources in SMALL.items():
        config["available_node_types"][name]["resources"] = resources
    config["available_node_types"]["cpu"]["max_workers"] = 2
    config["available_node_types"]["gpu"]["max_workers"] = 0
    config |= {"cluster_synced_files": [], "file_mounts_sync_continuously": False, "docker": {}}
    mounts = {to: str(PROJECT / path) for to, path in config["file_mounts"].items()}
    mounts["~/.ray/auth_token"] = str(here.root / "user" / ".ray" / "auth_token")
    config["file_mounts"] = mounts
    own = " --dashboard-agent-listen-port=$M_AGENT --min-worker-port=$M_LOW --max-worker-port=$M_HIGH"
    own += " --temp-dir=$M_TEMP --object-store-memory=200000000"
    gcs, dash, flow = here.ports["gcs"], here.ports["dash"], here.ports["flow"]
    replaced = {
        "head_start_ray_commands": {
            "--port=6379": f"--port={gcs} --ray-client-server-port={free_port()}{own}",
            "--dashboard-port=8265": f"--dashboard-port={dash}",
            "--port 5000": f"--port {flow}",
            "127.0.0.1/5000": f"127.0.0.1/{flow}",
        },
        "worker_start_ray_commands": {":6379": f":{gcs}{own}"},
    }
    for key, words in replaced.items():
        text = json.dumps(config[key])
        for old, new in words.items():
            if text.count(old) != 1:
                raise SystemExit(f"cluster.yaml: {key} holds {old!r} {text.count(old)} times, expected once")
            text = text.replace(old, new)
        config[key] = json.loads(text)
    return config


@contextmanager
def cluster(here: Rehearsal) -> Iterator[None]:
    """`ray up`; at the end everything that carries the mark of this rehearsal is ended."""
    token = here.root / "user" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    config = derived(yaml.safe_load((PROJECT / "cluster.yaml").read_text()), here)
    file = here.root / "cluster.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    begin = time.monotonic()
    try:
        with (here.root / "up.log").open("w") as log:
            command = [str(Path(sys.executable).with_name("ray")), "up", "-y", "--no-config-cache", str(file)]
            done = subprocess.run(
                command, env=here.environment, cwd=here.root, stdout=log, stderr=log, timeout=300, check=False
            )
        if done.returncode:
            logs = [here.root / "up.log", *here.root.glob("m*.log")]
            raise SystemExit("\n".join(log.read_text()[-6000:] for log in logs))
        wait(lambda: status_of(here, "") == 401, 60, "the dashboard asks for a token")
        here.say("ray up", up_s=round(time.monotonic() - begin, 1))
        yield
    finally:
        end(str(here.root))


def status_of(here: Rehearsal, token: str) -> int:
    """HTTP status of the dashboard's list of jobs; 0 while nobody answers."""
    request = urllib.request.Request(f"{here.address}/api/jobs/")  # noqa: S310  (loopback)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as err:
        return err.code
    except OSError:
        return 0


def wait(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `condition` returns once it is true; ends the rehearsal where it never is."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            raise SystemExit(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.3)
    return found


def check_doors(here: Rehearsal) -> None:
    """Nobody without the token; dashboard and MLflow on loopback alone."""
    token = (here.root / "user" / ".ray" / "auth_token").read_text()
    seen = {"none": status_of(here, ""), "wrong": status_of(here, "0" * 64), "right": status_of(here, token)}
    assert seen["right"] == 200, seen
    assert seen["none"] in (401, 403), seen
    assert seen["wrong"] in (401, 403), seen

    def bound(port: int) -> set[str]:
        sockets = [each for each in psutil.net_connections("inet") if each.status == psutil.CONN_LISTEN]
        return {each.laddr.ip for each in sockets if each.laddr.port == port}

    wait(lambda: bound(here.ports["flow"]), 90, "MLflow listens")
    for name in ("dash", "flow"):
        assert bound(here.ports[name]) == {"127.0.0.1"}, (name, bound(here.ports[name]))
    here.say(f"token: {seen}; dashboard and MLflow on 127.0.0.1 alone", auth=seen)


def raylets(here: Rehearsal) -> dict[str, psutil.Process]:
    """The raylet of each machine that has one."""
    found: dict[str, psutil.Process] = {}
    for process in processes(str(here.root)):
        try:
            if process.name() == "raylet":
                found[Path(process.environ()[MARK]).name] = process
        except psutil.Error:
            continue
    return found


def history(store: Store) -> list[dict[str, float]]:
    """All rows of all runs so far, read as a stranger would: from the folders."""
    rows: list[dict[str, float]] = []
    for name in store.root.folders("run"):
        for attempt in store.root.folders(f"run/{name}"):
            rows += read_history(store.root.child(f"run/{name}/{attempt}"))
    return rows


def newest_step(store: Store) -> int:
    """The last step of the newest row; -1 before the first."""
    try:
        return max((int(row["step"]) for row in history(store)), default=-1)
    except (KronyError, OSError):  # a file is being written
        return -1


def kill_one(here: Rehearsal, store: Store, ended: Callable[[], bool]) -> None:
    """SIGKILL to the raylet of a machine that trains; how long until the training logs a new step."""
    wait(lambda: newest_step(store) >= 60 or ended(), 400, "the training has logged step 60")
    if ended():
        return
    workers = {name: each for name, each in raylets(here).items() if name != "m0"}
    victim = max(workers)
    before = newest_step(store)
    workers[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    here.say(f"SIGKILL to the raylet of {victim} at step {before}", killed=victim, killed_at=before)
    time.sleep(3)  # rows on their way arrive
    last = newest_step(store)
    wait(lambda: newest_step(store) > last or ended(), 400, "the training goes on")
    recovery = round(time.monotonic() - begin, 1)
    here.say(
        f"step {newest_step(store)} after {recovery} s on {', '.join(raylets(here))}", recovery_s=recovery
    )


def job(here: Rehearsal, store: Path, options: argparse.Namespace) -> None:
    """`krony submit --follow run`, and what happens meanwhile."""
    words = ["submit", "--follow", "run", options.config, "--store", str(store)]
    words += ["--tracking.uri", f"http://127.0.0.1:{here.ports['flow']}"]
    command = [sys.executable, "-m", "jobs.cli", *words]
    begin = time.monotonic()
    with (here.root / "job.log").open("w+") as log:
        process = subprocess.Popen(
            command,
            env=here.environment | {"RAY_ADDRESS": here.address},
            cwd=PROJECT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        wait(
            lambda: len(raylets(here)) > 1 or process.poll() is not None, 240, "the autoscaler adds a machine"
        )
        here.say(f"machines: {', '.join(raylets(here))}", first_machine_s=round(time.monotonic() - begin, 1))
        if options.kill and process.poll() is None:
            kill_one(here, Store(store), lambda: process.poll() is not None)
        code = process.wait(600)
    text = (here.root / "job.log").read_text()
    print(text[-2500:])
    if code:
        raise SystemExit(f"the job ended with exit code {code}")
    here.say("job done", job_s=round(time.monotonic() - begin, 1))
    begin = time.monotonic()
    wait(lambda: set(raylets(here)) == {"m0"}, IDLE_S + 120, "idle machines are given back")
    left = LocalMachines({"root": str(here.root)}, "krony").non_terminated_nodes({})
    here.say(f"machines left: {', '.join(left)}", given_back_s=round(time.monotonic() - begin, 1))


def weights(store: Path) -> dict[str, str]:
    """sha256 of the weights of every run, by address."""
    return {each.address: each.files["model.safetensors"].sha256 for each in Store(store).records("run")}


def compare(here: Rehearsal, store: Path, options: argparse.Namespace) -> None:
    """The same study on a private local Ray without a fault; the weights must be the same bytes."""
    calm = here.root / "calm"
    words = ["run", options.config, "--store", str(calm), "--tracking.uri", "off", "--quiet"]
    environment = {name: value for name, value in here.environment.items() if name != "RAY_ADDRESS"}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words],
        env=environment | {"RAY_TMPDIR": str(here.root)},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    seconds = round(time.monotonic() - begin, 1)
    same = weights(store) == weights(calm)
    here.say(f"weights equal those of an undisturbed run: {same}", weights_equal=same, undisturbed_s=seconds)
    repeated = len(history(Store(store))) - len(
        {(row["step"], row["tokens"]) for row in history(Store(store))}
    )
    assert same, (weights(store), weights(calm), repeated)


def main() -> None:
    """Print what happens, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kill", action="store_true", help="SIGKILL the raylet of a machine that trains")
    parser.add_argument("--compare", action="store_true", help="train the same undisturbed, compare weights")
    parser.add_argument("--config", default="configs/rehearsal.toml")
    parser.add_argument("--keep", action="store_true", help="leave the folder with all logs")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    here = Rehearsal(Path(tempfile.mkdtemp(prefix="kc-", dir=os.environ.get("RAY_TMPDIR"))))
    store = here.root / "store"
    print(f"{here.root}", flush=True)
    try:
        with cluster(here):
            check_doors(here)
            job(here, store, options)
        here.say(f"processes left: {len(processes(str(here.root)))}")
        if options.compare:
            compare(here, store, options)
    finally:
        if not options.keep:
            shutil.rmtree(here.root, ignore_errors=True)
    here.measured |= {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(here.measured))
    if options.out:
        options.out.write_text(json.dumps(here.measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
