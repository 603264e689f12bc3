"""A private Ray cluster of several raylets on this machine, and ways to break it.

One head without CPUs, where drivers sit, and workers of one CPU each; loopback, token auth, a temp dir of its
own. Faults are real: signals to real processes. Nothing is found by name among foreign processes: everything
carries the mark of its cluster in its environment, and is ended by pid.
"""

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self

import psutil

MARK = "KRONY_LAB_CLUSTER"
STORE_BYTES = 100 * 2**20
QUICK: Mapping[str, int] = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
    "health_check_initial_delay_ms": 1000,
}
"""A silent node is dead after about four seconds, not after some fifteen."""


class Raylets:
    """A head and `workers` raylets; `durable` keeps the head's tables in RocksDB, so that it may restart."""

    def __init__(self, *, workers: int = 2, durable: bool = False) -> None:
        """Start all of them, one after the other."""
        self.folder = Path(tempfile.mkdtemp(prefix="ks-"))
        self.durable = durable
        self._mark = secrets.token_hex(8)
        self._token = process_token()
        self._saved = {name: os.environ.get(name) for name in self._environment()}
        os.environ.update(self._environment())
        self._count = 0
        self.nodes: list[Any] = []
        """Workers."""
        self.leaving: list[Any] = []
        """Those among them that were given up and must end by themselves."""
        try:
            self._start(workers)
        except BaseException:
            self.close()
            raise

    def _start(self, workers: int) -> None:
        from ray.cluster_utils import Cluster

        config: dict[str, Any] = dict(QUICK)
        if self.durable:
            config |= {"gcs_storage": "rocksdb", "gcs_storage_path": str(self.folder / "gcs")}
        (self.folder / "ray").mkdir()  # where it writes its address
        self._cluster = Cluster(shutdown_at_exit=True)
        self._add_node(num_cpus=0, include_dashboard=False, _system_config=config)
        for _ in range(workers):
            self.add()

    def _add_node(self, **how: Any) -> Any:
        # Without ports a raylet waits, at most 15 s, until its agents have written down which they took.
        names = ("dashboard_agent_listen_port", "metrics_agent_port", "metrics_export_port")
        ports = dict(zip((*names, "runtime_env_agent_port"), free_ports(4), strict=True))
        # Machines share no disk but the store: what a lost one had unpacked must not be missed by another.
        self._count += 1
        temp = str(self.folder / f"n{self._count}")
        return self._cluster.add_node(object_store_memory=STORE_BYTES, temp_dir=temp, **ports, **how)

    @property
    def address(self) -> str:
        """What a driver joins."""
        return str(self._cluster.address)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a driver."""
        return os.environ | self._environment() | {"RAY_ADDRESS": self.address}

    def add(self) -> Any:
        """One more worker node; returns once it has joined."""
        node = self._add_node(num_cpus=1)
        self.nodes.append(node)
        return node

    # --- faults ---------------------------------------------------------------------------------------------

    def kill_raylet(self, node: Any) -> None:
        """SIGKILL the raylet alone; what it started finds out by itself."""
        _raylet(node).process.kill()
        self._forget(node)

    def kill_node(self, node: Any) -> None:
        """SIGKILL everything on a node at once, as if its machine were gone."""
        _end(_family(node))
        self._forget(node)

    def hang(self, node: Any) -> Callable[[], None]:
        """SIGSTOP a raylet; call the answer to let it go on."""
        process = psutil.Process(_raylet(node).process.pid)
        process.suspend()
        return process.resume

    @property
    def is_whole(self) -> bool:
        """Whether the head lives."""
        processes = self._cluster.head_node.all_processes
        names = ("gcs_server", "raylet")
        return all(name in processes and processes[name][0].process.poll() is None for name in names)

    def settle(self, *, timeout_s: float = 15.0) -> None:
        """Drop workers that have ended, and wait for those that must; raises TimeoutError if one does not."""
        until = time.monotonic() + timeout_s
        for node in list(self.nodes):
            while node in self.leaving and _raylet(node).process.poll() is None:
                if time.monotonic() > until:
                    raise TimeoutError(f"a raylet that was given up still runs after {timeout_s:.0f} s")
                time.sleep(0.1)
            if _raylet(node).process.poll() is not None:
                self._forget(node)
        self.leaving.clear()

    def kill_gcs(self) -> None:
        """SIGKILL the head's table server; raylet and driver of the head live on."""
        self._cluster.head_node.kill_gcs_server()

    def start_gcs(self) -> None:
        """Start it again on its old port."""
        self._cluster.head_node.start_gcs_server()

    def kill_head(self) -> None:
        """SIGKILL everything on the head at once; of the drivers there, only the connection is cut."""
        _end(_family(self._cluster.head_node))

    # --- processes ------------------------------------------------------------------------------------------

    def processes(self, *words: str) -> list[psutil.Process]:
        """All processes of this cluster and its drivers whose command line holds all `words`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    line = " ".join(process.cmdline())
                    found += [process] if all(word in line for word in words) else []
        return [process for process in found if process.pid != os.getpid()]

    def close(self) -> None:
        """End everything by pid, and leave no file."""
        _end(self.processes())
        for name, value in self._saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _environment(self) -> dict[str, str]:
        return {
            MARK: self._mark,
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def _forget(self, node: Any) -> None:
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self._cluster.worker_nodes.discard(node)
        self.nodes.remove(node)


@cache
def process_token() -> Path:
    """The token file of this process, which reads it once: all its clusters must have the same."""
    if given := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return Path(given)
    handle, name = tempfile.mkstemp(prefix="ks-token-")
    os.write(handle, secrets.token_hex(32).encode())
    os.close(handle)
    atexit.register(Path(name).unlink, missing_ok=True)
    return Path(name)


def assert_all_given_back(ray: Any) -> None:
    """Within half a minute no placement group is left and every CPU is free."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        if not groups and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.5)
    raise AssertionError(f"held: {groups}, free {ray.available_resources()}")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on just now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _raylet(node: Any) -> Any:
    return node.all_processes["raylet"][0]


def _family(node: Any) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for infos in node.all_processes.values():
        for info in infos:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(info.process.pid)
                found += [process, *process.children(recursive=True)]
    return found


def _end(processes: list[psutil.Process]) -> None:
    """SIGKILL, also of those that are stopped; returns when they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)
    time.sleep(0.2)
