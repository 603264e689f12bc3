"""The checks of `krony doctor`: each says what it looked at, and what to do where something is not ready."""

import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from pipeline.cluster import connect
from pipeline.config.schema import RunConfig
from pipeline.errors import KronyError, PreflightError, hide_passwords
from pipeline.room import can_grow, node_resources, processes_that_fit
from pipeline.store.artifacts import Store
from pipeline.store.location import Location
from pipeline.store.provenance import PROJECT
from pipeline.tracking.tracker import artifact_root, resolve_uri


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and what it found."""

    check: str
    ok: bool
    text: str


def checkup(config: RunConfig, *, with_ray: bool, verify: bool) -> list[Finding]:
    """All checks for a config, in order; none of them changes anything but a probe file that it removes."""
    store = Store(config.store)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("project", _project),
        ("lock", _lock),
        ("torch", _torch),
        ("store", lambda: _store(store)),
        ("artifacts", lambda: _artifacts(store, verify=verify)),
        ("tracking", lambda: _tracking(config)),
    ]
    if with_ray:
        checks.append(("ray", lambda: _ray(config)))
    return [_checked(name, check) for name, check in checks]


def _checked(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except KronyError as err:
        return Finding(name, False, err.line)


def _python() -> str:
    return f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"


def _project() -> str:
    import model

    found = Path(str(model.__file__)).resolve().parents[1]
    if found != PROJECT:
        raise PreflightError(
            f"package `model` comes from {found}, expected {PROJECT}; start from the project's root"
        )
    return str(PROJECT)


def _lock() -> str:
    lock = PROJECT / "constraints.txt"
    if not lock.is_file():
        return "no constraints.txt here: versions are not compared"
    wrong = list(_differences([line for line in lock.read_text().splitlines() if line.strip()]))
    if wrong:
        raise PreflightError(
            f"installed packages differ from the lock: {', '.join(wrong[:5])}; run `make bootstrap`"
        )
    return "installed packages are those of constraints.txt"


def _differences(lines: list[str]) -> Iterator[str]:
    for line in lines:
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate():
            continue  # a line for another platform or another Python
        with suppress(metadata.PackageNotFoundError):  # of an extra that is not installed
            found = metadata.version(pin.name)
            if not pin.specifier.contains(found, prereleases=True):
                yield f"{pin.name} {found} (lock: {pin.specifier})"


def _torch() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{torch.__version__}, {device}, {torch.get_num_threads()} threads"


def _store(store: Store) -> str:
    key = f"doctor-{uuid.uuid4().hex}.txt"
    store.root.put_bytes(key, b"probe")
    ok = store.root.read_bytes(key) == b"probe"
    store.root.delete(key)
    if not ok:
        raise PreflightError(f"{store.root.uri}: what was written is not what is read")
    free = ""
    if store.root.is_local:
        free = f", {shutil.disk_usage(store.root.uri).free / 1e9:,.0f} GB free"
    return f"{store.root.uri}: writable{free}"


def _artifacts(store: Store, *, verify: bool) -> str:
    records = store.records()
    for record in records:
        artifact = store.open(record.address)
        if verify:
            artifact.verify()
    leftovers = store.unfinished()
    words = f"{len(records)} complete{', every file hashed' if verify else ''}"
    if leftovers and store.root.is_local:
        example = Location(store.root.uri).child(leftovers[0]).uri
        return f"{words}; {len(leftovers)} unfinished or superseded attempts, such as `rm -r {example}`"
    return words


def _tracking(config: RunConfig) -> str:
    uri = resolve_uri(config.tracking.uri, store=config.store)
    if not uri:
        return "off"
    from pipeline.tracking.mlflow_writer import connect as connect_mlflow

    connect_mlflow(uri, config.tracking.experiment, artifact_root=artifact_root(uri, store=config.store))
    return f"MLflow at {hide_passwords(uri)}"


def _ray(config: RunConfig) -> str:
    with connect(config.ray, quiet=True) as ray:
        total = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
        cpus, gpus = config.ray.cpus_per_worker, config.ray.gpus_per_worker
        grows, fit = can_grow(ray), processes_that_fit(node_resources(ray), cpus=cpus, gpus=gpus)
        if config.ray.workers > fit and not grows:
            raise PreflightError(
                f"ray.workers={config.ray.workers}, each with {cpus:g} CPU and {gpus:g} GPU: {fit} fit on "
                "the nodes; lower ray.workers or ray.cpus_per_worker, or add nodes"
            )
        return (
            f"{ray.__version__}: {nodes} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
            f"{', more when asked for' if grows else ''}"
        )
