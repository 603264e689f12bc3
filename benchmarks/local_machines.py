"""A cloud whose machines are folders: a node provider for Ray's autoscaler that starts all on this host.

Each machine has a home of its own, and everything that runs on it carries its name in the environment: that
is how it is found and ended, by pid. `ray up` and the autoscaler on the head treat it like any cloud: files
are copied, set-up and start commands run in a shell. Two of them are left out, because they would reach
beyond a machine: `ray stop` ends every Ray of the host, and the locked environment is shared, not built.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.command_runner import ProcessRunnerError, _with_environment_variables
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider
from ray.util import get_node_ip_address

PROJECT = Path(__file__).resolve().parents[1]
MARK = "KRONY_MACHINE"
SHARED = {"sh .ci/bootstrap": "true", "$HOME/krony/.venv": sys.prefix}
"""One environment for all machines, that of this process."""

PORTS = 400
"""Ports that the workers of one machine may take."""


class LocalMachines(NodeProvider):
    """Machines below the folder `root` of the provider's config."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.root = Path(provider_config["root"])

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Names of the machines with these tags."""
        with self._machines() as machines:
            return [name for name, tags in machines.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        """Whether it was created and not given back."""
        with self._machines() as machines:
            return node_id in machines

    def is_terminated(self, node_id: str) -> bool:
        """Whether it was given back."""
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """What the autoscaler noted about it."""
        with self._machines() as machines:
            return dict(machines.get(node_id, {}))

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Note something about it."""
        with self._machines() as machines:
            if node_id in machines:
                machines[node_id] |= tags

    def external_ip(self, node_id: str) -> str:
        """All machines share this host's address."""
        return str(get_node_ip_address())

    def internal_ip(self, node_id: str) -> str:
        """All machines share this host's address."""
        return str(get_node_ip_address())

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Make `count` homes."""
        created: dict[str, Any] = {}
        with self._machines() as machines:
            for _ in range(count):
                number = int((self.root / "count").read_text() if (self.root / "count").exists() else "0")
                (self.root / "count").write_text(str(number + 1))
                name = f"m{number}"
                home = self.root / name
                (home / "bin").mkdir(parents=True)
                (home / "bin" / "python3").symlink_to(sys.executable)
                machines[name] = dict(tags)
                created[name] = {}
        return created

    def terminate_node(self, node_id: str) -> dict[str, Any]:
        """End what runs on it and forget it; its folder stays for whoever wants to read logs."""
        with self._machines() as machines:
            machines.pop(node_id, None)
        end(str(self.root / node_id))
        return {}

    def get_command_runner(
        self, log_prefix: str, node_id: str, *where: Any, **how: Any
    ) -> CommandRunnerInterface:
        """A shell on the machine."""
        return Shell(self.root, node_id)

    @contextmanager
    def _machines(self) -> Iterator[dict[str, dict[str, str]]]:
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / "machines.json"
        with locked(self.root / "machines.lock"):
            machines = json.loads(file.read_text()) if file.exists() else {}
            before = json.dumps(machines)
            yield machines
            if (after := json.dumps(machines)) != before:
                file.write_text(after)


class Shell(CommandRunnerInterface):
    """Runs commands with the home, the name and the ports of one machine."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.home = root, root / name
        self.number = int(name[1:])

    def run(self, cmd: str | None = None, timeout: int = 120, **how: Any) -> str:
        """Run `cmd` as a login over SSH would; raises ProcessRunnerError if it fails."""
        words = cmd or "true"
        for built, shared in SHARED.items():
            words = words.replace(built, shared)
        if "ray stop" in words:
            return ""
        if how.get("environment_variables"):
            words = _with_environment_variables(words, how["environment_variables"])
        with (
            (self.root / f"{self.home.name}.log").open("a") as log,
            locked(self.root / "start.lock", when="ray start" in words),  # two at a time race for ports
        ):
            log.write(f"$ {words}\n")
            log.flush()
            done = subprocess.run(
                ["bash", "-c", f"source ~/.bashrc 2>/dev/null; {words}"],
                env=self.environment(),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if how.get("with_output") else log,
                stderr=log,
                text=True,
                timeout=600,
                start_new_session=True,
                check=False,
            )
        if done.returncode:
            raise ProcessRunnerError("Command failed", "ssh_command_failed", done.returncode, words)
        return done.stdout or ""

    def environment(self) -> dict[str, str]:
        """What a login finds, and where this machine's ports are."""
        low = 21_000 + PORTS * (self.number % 50)
        return {
            "HOME": str(self.home),
            "PATH": f"{self.home}/bin:/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PROJECT),  # the autoscaler on the head imports this file
            MARK: str(self.home),
            "M_LOW": str(low),
            "M_HIGH": str(low + PORTS - 1),
            "M_AGENT": str(free_port()),
            "M_TEMP": str(self.home / "r"),  # shared, one machine's clean-up would delete the jobs of another
        }

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy a file, or what a folder holds, as rsync does for a path that ends in a slash."""
        to = Path(target.replace("~", str(self.home), 1))
        to.parent.mkdir(parents=True, exist_ok=True)
        if Path(source).is_dir():
            left_out = shutil.ignore_patterns(*((options or {}).get("rsync_exclude") or ()))
            shutil.copytree(source, to, ignore=left_out, dirs_exist_ok=True)
        else:
            shutil.copy(source, to)

    def run_rsync_down(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy a file from the machine."""
        shutil.copy(source.replace("~", str(self.home), 1), target)

    def remote_shell_command_str(self) -> str:
        """How a person would log in."""
        return f"HOME={self.home} bash"

    def run_init(self, *, as_head: bool, file_mounts: dict[str, str], sync_run_yet: bool) -> bool | None:
        """Nothing to do."""
        return None


def processes(home: str) -> list[psutil.Process]:
    """All processes of the machine with this home, or of all machines below it."""
    found = []
    for process in psutil.process_iter():
        try:
            where = process.environ().get(MARK, "")
        except (psutil.Error, OSError):
            continue
        if where == home or where.startswith(f"{home}/"):
            found.append(process)
    return found


def end(home: str) -> None:
    """End them: asked first, killed after five seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        alive = [process for process in processes(home) if process.pid != os.getpid()]
        for process in alive:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=5)


@contextmanager
def locked(path: Path, *, when: bool = True) -> Iterator[None]:
    """Hold a lock between processes and threads, if `when`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if when:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    """A port of loopback that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
