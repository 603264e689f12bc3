"""Ray: join a cluster, or start a private local one, with the switches that our versions need.

Everything that must be set before `import ray` is set here and nowhere else. A local Ray is private to this
process: own temp dir, no dashboard, ports on loopback alone, token auth with a token of its own whatever the
environment says, shut down at the end. Joining never starts anything.
"""

import atexit
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]

from pipeline.allocator import for_workers
from pipeline.config.schema import RayConfig
from pipeline.errors import PreflightError
from pipeline.interrupt import is_abandoned
from pipeline.progress import say

if TYPE_CHECKING:
    from types import ModuleType

PROJECT = Path(__file__).resolve().parents[1]

SWITCHES: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` makes every worker install the project again
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # 2 by default; each report and each end waits for it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
START_ATTEMPTS = 3
LOOPBACK = "127.0.0.1"

WORKER_ENV = ("HF_HUB_OFFLINE", "TIKTOKEN_CACHE_DIR", "KRONY_CACHE", "KRONY_COMMIT", "AWS_ENDPOINT_URL")
"""Variables of the driver that workers must see too, if they are set."""


_sessions: list[ExitStack] = []


@contextmanager
def session() -> Iterator[None]:
    """Keep the first connection that is made inside open until the end of this block."""
    if _sessions:
        yield
        return
    with ExitStack() as stack:
        _sessions.append(stack)
        try:
            yield
        finally:
            _sessions.clear()


@contextmanager
def connect(config: RayConfig, *, quiet: bool = False, num_cpus: int | None = None) -> "Iterator[ModuleType]":
    """Yield the `ray` module, connected. An existing connection of this process is used and left alone."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    import ray  # only now: the switches above are read when it is imported

    if ray.is_initialized():
        yield ray
        return
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    join = bool(address) and address != "local"
    connection = _join(ray, address) if join else _local(ray, num_cpus, quiet=quiet)
    if _sessions:
        yield _sessions[0].enter_context(connection)
    else:
        with connection:
            yield ray


def runtime_env() -> dict[str, object]:
    """What a worker of ours needs beyond its interpreter: the driver's settings."""
    handed_on = {name: os.environ[name] for name in WORKER_ENV if name in os.environ}
    ours = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **for_workers()}
    return {"env_vars": ours | handed_on}


@contextmanager
def _join(ray: "ModuleType", address: str) -> "Iterator[ModuleType]":
    # A driver outside of a submitted job sends the project along; inside of one it is already there.
    env = runtime_env()
    if "RAY_JOB_ID" not in os.environ and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        env = env | {"working_dir": str(PROJECT)}
    # A job may name variables that we hand on too; without this Ray refuses to know one from two sides.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    target = os.environ.get("RAY_ADDRESS", address) if address.startswith("http") else address
    if target.startswith("http"):
        raise PreflightError(
            f"ray.address={address!r} is a dashboard; work joins a cluster by host:port, "
            "and `krony submit` takes the URL"
        )
    try:
        with _own_signals():
            ray.init(address=target, runtime_env=env, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as err:
        first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise PreflightError(
            f"ray.address={address!r}: cannot join ({first}); start a head there, hand on its token "
            "(RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS to work locally"
        ) from err
    with _open(ray):
        yield ray


@contextmanager
def _open(ray: "ModuleType") -> Iterator[None]:
    try:
        yield
    finally:
        if is_abandoned():
            atexit.unregister(ray.shutdown)
        else:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts, and then ends the process at once: take it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@cache
def _own_token() -> str:
    """One per process, because Ray reads its token once: a second private Ray has to know the same."""
    return secrets.token_hex(32)


@contextmanager
def _local(ray: "ModuleType", num_cpus: int | None, *, quiet: bool) -> "Iterator[ModuleType]":
    # Socket paths below this folder must stay under 107 characters, so it lies directly in the temp dir.
    temp = Path(tempfile.mkdtemp(prefix="kr-", dir=os.environ.get("RAY_TMPDIR")))
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "PYTHONPATH")
    saved = {name: os.environ.get(name) for name in names}
    _ask_for_tokens()
    if not os.environ.get("RAY_AUTH_TOKEN") and not saved["RAY_AUTH_TOKEN_PATH"]:
        token = temp / "token"
        token.touch(mode=0o600)
        token.write_text(_own_token())
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    # Workers of a local Ray are started by its raylet with this environment: our modules must be on their
    # path.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *filter(None, [saved["PYTHONPATH"]])])
    if not quiet:
        say("ray", "starting a private local Ray")
    try:
        for attempt in range(1, START_ATTEMPTS + 1):
            if _started(ray, temp / str(attempt), num_cpus):
                break
            say("ray", f"did not come up within 30 s (attempt {attempt} of {START_ATTEMPTS})")
        else:
            raise PreflightError(
                "a private local Ray did not come up; the machine is too busy: free some CPU or memory, or "
                "join a cluster with RAY_ADDRESS"
            )
        # Ray Train's clean-up reaches the cluster by this variable; without it an early stop can hang.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        with _open(ray):
            yield ray
    finally:
        _restore(saved)
        shutil.rmtree(temp, ignore_errors=True)


def _ask_for_tokens() -> None:
    """Token auth also where it is switched off, for another cluster; Ray read that when it was imported."""
    from ray._private.authentication.authentication_token_setup import _enable_token_auth

    _enable_token_auth()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray that starts inside takes 127.0.0.1 for the address of its node, and its ports listen there alone.

    It does so by itself on macOS, by a switch that says whether there may be a cluster of several machines.
    Ranks of a training meet over gloo, which would listen where the name of this host leads.
    """
    from ray._private import ray_constants

    found = {name: [each.address for each in several] for name, several in psutil.net_if_addrs().items()}
    interface = next((name for name, addresses in found.items() if LOOPBACK in addresses), "")
    switches = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        switches["GLOO_SOCKET_IFNAME"] = interface
    saved = {name: os.environ.get(name) for name in switches}
    read, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ.update(switches)
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = read
        _restore(saved)


def _restore(saved: Mapping[str, str | None]) -> None:
    for name, value in saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _started(ray: "ModuleType", temp: Path, num_cpus: int | None) -> bool:
    """Start a local Ray; False if it was too slow for the 30 seconds that Ray itself allows its raylet."""
    try:
        with _own_signals(), _on_loopback():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=300 * 2**20,
                runtime_env=runtime_env(),
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=str(temp),
            )
    except Exception as err:  # Ray raises a bare Exception here
        if "timed out during startup" not in str(err):
            raise
        ray.shutdown()
        return False
    return True
