"""Hosts with a network between them, on one machine: namespaces, pairs of veth, and a bridge as the switch.

A host has its own address, name, processes, `/tmp` and shared memory; all see one folder, as they would see
NFS. To cut a host off is to take its port of the switch down: nothing is refused, everything is silent. The
first process of each is ours: killed, it takes all of its host along, and nothing of it has a name outside.
Needs root and a Linux that knows veth.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Self

import psutil

PROJECT = Path(__file__).resolve().parents[1]
NETWORK = "10.77.0."
SHARED = Path("/mnt")
"""Where every host sees the shared folder."""

PORT = 6379
TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")
SPACES = ("--net", "--uts", "--mount", "--pid", "--ipc")
BOOT = """
set -e
hostname "$1"
ip link set lo up
mount --bind "$2" /mnt
mount -t tmpfs tmpfs /dev/shm
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$1" >"$3/hosts"
mount --bind "$3/hosts" /etc/hosts
[ "$4" = shared ] || mount --bind "$3/tmp" /tmp
echo up
while :; do sleep 600 & wait; done
"""
"""A host as Debian leaves it: its own name leads to loopback, and nobody knows the others by name."""


@cache
def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"no {' or '.join(absent)} on this machine"
    if not SHARED.is_dir():
        return f"no {SHARED} to mount at"
    pair = (
        "ip link add name h0 type veth peer name h1; ip link add name h2 type bridge; mount -t tmpfs h3 /mnt"
    )
    tried = subprocess.run(
        ["unshare", *SPACES, "--fork", "--mount-proc", "sh", "-ec", pair],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"the kernel refuses: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """One machine of the network."""

    def __init__(self, name: str, folder: Path, shared: Path) -> None:
        """Up, without a cable."""
        self.name, self.folder = name, folder
        self.address = ""
        self.ray: subprocess.Popen[bytes] | None = None
        """What `ray start --block` runs in."""
        self._started: list[subprocess.Popen[bytes]] = []
        self._disk = folder / "tmp"
        (self._disk / "home").mkdir(parents=True)
        self._log = (folder / "log").open("w")
        # A project below /tmp must stay to be seen.
        kept = any(str(path).startswith("/tmp/") for path in (PROJECT, sys.prefix))
        self.temp = self._disk if kept else Path("/tmp")
        """Where it finds its own disk."""
        self._holder = subprocess.Popen(
            ["unshare", *SPACES, "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", BOOT, "sh", name, shared, folder, "shared" if kept else "own"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        assert self._holder.stdout
        if self._holder.stdout.readline() != "up\n":
            self.close()
            raise OSError(f"host {name} did not come up: {(folder / 'log').read_text().strip()}")
        self.pid = psutil.Process(self._holder.pid).children()[0].pid
        """Its first process."""

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """What whoever logs in finds."""
        return {
            "HOME": str(self.temp / "home"),
            "TMPDIR": str(self.temp),
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(PROJECT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.temp / "home" / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            **more,
        }

    def start(self, words: Sequence[str], *, log: Path, **more: str) -> subprocess.Popen[bytes]:
        """Start a command on it, in the shared folder; `more` is environment."""
        with log.open("w") as file:
            process = subprocess.Popen(
                ["nsenter", "-t", str(self.pid), *SPACES, "--", "env", "-C", str(SHARED), *words],
                env=self.environment(more), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._started.append(process)
        return process

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those that run on it and whose command line holds all `words`; its first one left out."""
        found = []
        mine = Path(f"/proc/{self.pid}/ns/pid").readlink()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != self.pid and Path(f"/proc/{process.pid}/ns/pid").readlink() == mine:
                    line = " ".join(process.cmdline())
                    found += [process] if line and all(word in line for word in words) else []
        return found

    def put(self, name: str, text: str) -> None:
        """A file of its home that nobody else may read."""
        path = self._disk / "home" / name
        path.touch(mode=0o600)
        path.write_text(text)

    def close(self) -> None:
        """Pull the plug."""
        family = psutil.Process(self._holder.pid).children()
        self._holder.kill()
        self._holder.wait()
        if self._holder.stdout:
            self._holder.stdout.close()
        psutil.wait_procs(family, timeout=10)
        for process in self._started:
            process.wait()
        self._log.close()


class Hosts:
    """A head without CPUs, `workers` hosts of one CPU, and Ray with token auth on all of them."""

    def __init__(self, *, workers: int) -> None:
        """Build the network; `start` starts Ray."""
        self.folder = Path(tempfile.mkdtemp(prefix="kh-"))
        self.shared = self.folder / "shared"
        self.shared.mkdir()
        self._hosts: list[Host] = []
        self._token = secrets.token_hex(32)
        try:
            self._switch = self._host("switch")
            self._run("ip", "link", "add", "switch", "type", "bridge")
            self._run("ip", "link", "set", "switch", "up")
            self.head = self._wired("head")
            self.workers = [self._wired(f"worker{number}") for number in range(1, workers + 1)]
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Ray on all hosts; TimeoutError if one does not come up."""
        self._boot(self.head, "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")
        self.join(self.workers)

    def join(self, hosts: Sequence[Host]) -> None:
        """Start, or start again, Ray on hosts that work."""
        for host in hosts:
            self._boot(host, f"--address={self.address}", "--num-cpus=1", wait=False)
        for host in hosts:
            self._wait_for(host)

    @property
    def address(self) -> str:
        """What a driver joins."""
        return f"{self.head.address}:{PORT}"

    def cut(self, host: Host) -> None:
        """Nothing goes to it or comes from it any more."""
        self._run("ip", "link", "set", host.name, "down")

    def mend(self, host: Host) -> None:
        """The cable is back."""
        self._run("ip", "link", "set", host.name, "up")

    def restart(self, hosts: Sequence[Host]) -> None:
        """End what runs on hosts that were given up, and start Ray there again."""
        for host in hosts:
            for process in host.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(host.processes(), timeout=10)
            self.mend(host)
        self.join(hosts)

    def close(self) -> None:
        """End all hosts; nothing is left of them."""
        for host in reversed(self._hosts):
            host.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _host(self, name: str) -> Host:
        host = Host(name, self.folder / name, self.shared)
        self._hosts.append(host)
        return host

    def _wired(self, name: str) -> Host:
        """A host whose `eth0` leads to the port of its name at the switch."""
        host = self._host(name)
        host.address = f"{NETWORK}{len(self._hosts) - 1}"
        self._run(
            *("ip", "link", "add", name, "type", "veth"), *("peer", "name", "eth0", "netns", str(host.pid))
        )
        self._run("ip", "link", "set", name, "master", "switch", "up")
        self._run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0", on=host)
        self._run("ip", "link", "set", "eth0", "up", on=host)
        host.put("token", self._token)
        return host

    def _run(self, *words: str, on: Host | None = None) -> None:
        """A command in the network of a host, or of the switch."""
        subprocess.run(["nsenter", "-t", str((on or self._switch).pid), "--net", *words], check=True)

    def _boot(self, host: Host, *flags: str, wait: bool = True) -> None:
        host.ray = host.start(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *flags,
             f"--node-ip-address={host.address}", "--object-store-memory=100000000",
             f"--temp-dir={host.temp / 'r'}"],
            log=self._ray_log(host),
        )  # fmt: skip
        if wait:
            self._wait_for(host)

    def _ray_log(self, host: Host) -> Path:
        return host.folder / "ray.log"

    def _wait_for(self, host: Host, *, timeout_s: float = 90.0) -> None:
        until = time.monotonic() + timeout_s
        while "Ray runtime started" not in (said := self._ray_log(host).read_text()):
            assert host.ray
            if time.monotonic() > until or host.ray.poll() is not None:
                raise TimeoutError(f"no Ray on {host.name} within {timeout_s:.0f} s: {said[-2000:]}")
            time.sleep(0.2)
