"""What every test stands on: a home, a cache and a Ray of its own; nothing of the machine leaks in or out.

The environment is set before a test module is imported, because libraries read it when they load. Ray starts
once per test run, on loopback, with two CPUs and its own token, and only for tests that ask for `ray_local`.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

PROJECT = Path(__file__).resolve().parents[1]
# Sockets below it may have paths of about 100 characters, so it is short and not pytest's own.
SCRATCH = Path(tempfile.mkdtemp(prefix="kt-"))

FOREIGN = ("AWS_", "HF_", "KRONY_", "MLFLOW_", "RAY_", "TIKTOKEN_", "TUNE_")
KEPT = ("KRONY_SHARED", "TIKTOKEN_CACHE_DIR")
OWN = {
    "HOME": str(SCRATCH / "home"),
    "KRONY_CACHE": str(SCRATCH / "cache"),
    "RAY_TMPDIR": str(SCRATCH),
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(SCRATCH / "hf"),
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
}


def pytest_configure() -> None:
    """Swap the environment of whoever runs the tests for that of the tests, which import from here."""
    sys.path.append(str(PROJECT / "tests"))
    for name in list(os.environ):
        if name.startswith(FOREIGN) and name not in KEPT:
            del os.environ[name]
    os.environ.update(OWN)
    (SCRATCH / "home").mkdir()
    settings.register_profile("patient", deadline=None)  # a busy machine is no error
    settings.load_profile("patient")


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[ModuleType]:
    """The `ray` module, connected to a private local Ray with two CPUs."""
    from pipeline.cluster import connect
    from pipeline.config.schema import RayConfig

    with connect(RayConfig(), quiet=True, num_cpus=2) as ray:
        yield ray


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text beside the project; the test is skipped where there is none."""
    folder = Path(os.environ.get("KRONY_SHARED", str(PROJECT.parent / "shared"))) / "data"
    if not folder.is_dir():
        pytest.skip("no folder of real text: set KRONY_SHARED to a folder that holds data/")
    return folder


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """Slow NumPy references for the algebra, no part of the project; skipped where there are none."""
    shared = Path(os.environ.get("KRONY_SHARED", str(PROJECT.parent / "shared")))
    file = shared / "oracles" / "kron_oracles.py"
    if not file.is_file():
        pytest.skip("no references: set KRONY_SHARED to a folder that holds oracles/kron_oracles.py")
    spec = importlib.util.spec_from_file_location("kron_oracles", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kron_oracles"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def free_port() -> int:
    """A TCP port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run this interpreter with arguments in an empty folder, the project on its path and no Ray to join."""

    def run(
        *arguments: str, cwd: Path = tmp_path, env: Mapping[str, str] = {}, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        surroundings = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")
        }
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=surroundings | {"PYTHONPATH": str(PROJECT)} | dict(env),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model with shards, and training runs on them: `Lab` of `train_lab.py`."""
    return import_module("train_lab").Lab.build(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def data_lab() -> ModuleType:
    """A small corpus to prepare, with Ray and without: the module `data_lab.py`."""
    return import_module("data_lab")


@pytest.fixture(scope="session")
def crash_lab() -> ModuleType:
    """Writers of the store that can be made to die anywhere: the module `crash_lab.py`."""
    return import_module("crash_lab")


@pytest.fixture(scope="session")
def s3_lab() -> ModuleType:
    """An S3 server on loopback with a bad network in front of it: the module `s3_lab.py`."""
    return import_module("s3_lab")


@pytest.fixture(scope="session")
def s3_port(s3_lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of the one S3 server of a test run; put a network in front, and keep to a prefix of your own."""
    with s3_lab.server(tmp_path_factory.mktemp("s3") / "moto.log") as port:
        yield port


@pytest.fixture(scope="session")
def sweep_lab() -> ModuleType:
    """A tiny study to sweep over, without Ray: the module `sweep_lab.py`."""
    return import_module("sweep_lab")


@pytest.fixture(scope="session")
def study_store() -> ModuleType:
    """The writer of stores as studies leave them: the module `study_store.py`."""
    return import_module("study_store")


@pytest.fixture(scope="session")
def sweep_store() -> ModuleType:
    """The writer of stores as sweeps leave them: the module `sweep_store.py`."""
    return import_module("sweep_store")


@pytest.fixture(scope="session")
def toy() -> Callable[..., Any]:
    """A random model of a spec in which nothing is trivial: no zero bias, no LayerNorm that does nothing."""
    import torch

    from model.gpt2 import GPT2

    def build(spec: Any, *, seed: int = 0, dtype: Any = torch.float32) -> GPT2:
        model, generator = GPT2(spec).init_weights(seed=seed).to(dtype), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            for name, buffer in model.named_buffers():
                if "gather" in name:
                    buffer.copy_(torch.randperm(len(buffer), generator=generator))
        return model.eval()

    return build
