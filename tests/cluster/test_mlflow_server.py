"""A real MLflow server on loopback: runs arrive through it, and its death costs one warning."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking.mlflow_writer import MlflowTracker, connect
from pipeline.tracking.tracker import open_tracker, replay

PATIENCE_S = 120

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path, free_port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of a server, in a process group of its own."""
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    connect(
        database, "krony", artifact_root=str(tmp_path / "files")
    )  # the server starts faster on one that exists
    address = f"http://127.0.0.1:{free_port}"
    command = [
        Path(sys.executable).with_name("mlflow"),
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(free_port),
    ]
    command += [
        "--workers",
        "1",
        "--backend-store-uri",
        database,
        "--artifacts-destination",
        tmp_path / "files",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not is_healthy(address):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield address, process
    finally:
        end(process)


def is_healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=2).status == 200
    except OSError:
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_run_arrives_through_the_server_and_survives_its_death(server, tmp_path: Path, capsys):
    address, process = server

    def start() -> MlflowTracker:
        place = {"store": str(tmp_path / "store"), "experiment": "krony"}
        tracker = open_tracker(address, run_id="run/served-1/1", name="served", **place)
        assert isinstance(tracker, MlflowTracker)
        return tracker

    rows = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(30)]
    first = start()
    first.params({"seed": 1})
    first.dataset("tokens/x-1", digest="d" * 64, source="/store/tokens/x-1")
    replay(first, rows[:10])
    first.close("KILLED")
    second = start()
    assert second.mlflow_id == first.mlflow_id
    replay(second, rows)
    second.close("FINISHED")
    client = connect(address, "krony", artifact_root="").client
    assert [(m.step, m.value) for m in client.get_metric_history(second.mlflow_id, "loss")] == [
        (row["step"], row["loss"]) for row in rows
    ]
    third = start()
    capsys.readouterr()
    end(process)
    for step in range(30, 33):
        third.metrics({"loss": 1.0}, step=step)
        third.tags({"still": "running"})
    third.close("FINISHED")
    assert capsys.readouterr().err.count("warning") == 1
