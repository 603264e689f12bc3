"""MLflow on a real SQLite file: one row per run, each number once, a failure that costs one warning."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import PreflightError
from pipeline.tracking.mlflow_writer import MlflowTracker, connect, open_mlflow
from pipeline.tracking.tracker import NullTracker, open_tracker

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a database that is initialised once."""
    folder = tmp_path_factory.mktemp("tracking")
    connect(uri(folder), "krony", artifact_root=str(folder / "files"))
    return folder


def uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def start(folder: Path, run_id: str, *, parent: str | None = None) -> MlflowTracker:
    root = str(folder / "files")
    tracker = open_mlflow(uri(folder), "krony", run_id, run_id.upper(), parent=parent, artifact_root=root)
    assert isinstance(tracker, MlflowTracker)
    return tracker


def stored(folder: Path, tracker: MlflowTracker):
    return connect(uri(folder), "krony", artifact_root="").client.get_run(tracker.mlflow_id)


def history(folder: Path, tracker: MlflowTracker, key: str) -> list[tuple[int, float]]:
    client = connect(uri(folder), "krony", artifact_root="").client
    return [(metric.step, metric.value) for metric in client.get_metric_history(tracker.mlflow_id, key)]


def test_everything_of_a_run_arrives(place: Path):
    tracker = start(place, "run/all-1/1")
    tracker.params({"method.name": "kron_vl", "train.lr": 6e-4, "method.scales": False})
    tracker.tags({"krony.address": "run/all-1"})
    tracker.link("init", "/store/init/a-2", digest="a" * 64)
    tracker.dataset("tokens/pydocs-12345678", digest="d" * 64, source="/store/tokens/pydocs-12345678")
    for step in (10, 20):
        tracker.metrics(
            {"loss": 5.0 - step / 10, "tokens": 100 * step, "note": "words are no metric"}, step=step
        )
    tracker.close("FINISHED")
    run = stored(place, tracker)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "RUN/ALL-1/1"
    assert run.data.params == {"method.name": "kron_vl", "train.lr": "0.0006", "method.scales": "False"}
    assert run.data.metrics == {"loss": 3.0, "tokens": 2000.0}
    assert run.data.tags["link.init"] == "/store/init/a-2"
    assert "mlflow.source.git.commit" in run.data.tags
    assert run.data.tags["sha256.init"] == "a" * 64
    (table,) = run.inputs.dataset_inputs
    assert table.dataset.name == "tokens/pydocs-12345678"
    assert table.dataset.digest == "d" * 36
    assert "d" * 64 in table.dataset.source
    assert history(place, tracker, "loss") == [(10, 4.0), (20, 3.0)]


def test_a_restart_finds_its_row_and_repeats_no_step(place: Path):
    first = start(place, "run/again-1/1")
    first.params({"seed": 1})
    for step in (10, 20, 30):
        first.metrics({"loss": 100.0 + step}, step=step)
    first.close("KILLED")
    second = start(place, "run/again-1/1")
    assert second.mlflow_id == first.mlflow_id
    assert stored(place, second).info.status == "RUNNING"
    second.params({"seed": 1})
    for step in (20, 30, 40):
        second.metrics({"loss": 200.0 + step, "val_loss": 1.0}, step=step)
    second.close("FINISHED")
    assert history(place, second, "loss") == [(10, 110.0), (20, 120.0), (30, 130.0), (40, 240.0)]
    assert [step for step, _ in history(place, second, "val_loss")] == [20, 30, 40]
    assert stored(place, second).info.status == "FINISHED"


def test_another_attempt_is_another_row(place: Path):
    assert start(place, "run/two-1/1").mlflow_id != start(place, "run/two-1/2").mlflow_id


def test_a_changed_parameter_is_named_and_the_first_value_stays(place: Path, capsys):
    start(place, "run/changed-1/1").params({"seed": 1, "train.lr": 0.1})
    capsys.readouterr()
    tracker = start(place, "run/changed-1/1")
    tracker.params({"seed": 1, "train.lr": 0.2, "new": "yes"})
    warning = capsys.readouterr().err
    assert "train.lr" in warning
    assert "seed" not in warning
    run = stored(place, tracker)
    assert run.data.params == {"seed": "1", "train.lr": "0.1", "new": "yes"}
    assert "train.lr" in run.data.tags["krony.params_differ"]
    tracker.metrics({"loss": 1.0}, step=1)  # and it goes on
    tracker.close("FINISHED")
    assert history(place, tracker, "loss") == [(1, 1.0)]


def test_what_is_not_finite_becomes_a_tag(place: Path):
    tracker = start(place, "run/nan-1/1")
    tracker.metrics({"loss": 2.0, "grad_norm": math.inf}, step=1)
    tracker.metrics({"loss": math.nan, "grad_norm": math.nan}, step=2)
    tracker.close("FAILED")
    run = stored(place, tracker)
    assert history(place, tracker, "loss") == [(1, 2.0)]
    assert history(place, tracker, "grad_norm") == []
    assert run.data.tags["nonfinite.loss"] == "nan at step 2"
    assert run.data.tags["nonfinite.grad_norm"] == "inf at step 1"
    assert run.info.status == "FAILED"


def test_more_than_fits_one_request_arrives(place: Path):
    tracker = start(place, "run/many-1/1")
    tracker.params({f"p{i}": i for i in range(230)})
    tracker.tags({f"t{i}": "v" * 9000 for i in range(130)})
    for step in range(450):
        tracker.metrics({"loss": 1.0, "lr": 0.1, "tokens": step}, step=step)
    tracker.close("FINISHED")
    assert len(stored(place, tracker).data.params) == 230
    assert [step for step, _ in history(place, tracker, "tokens")] == list(range(450))


def test_trials_are_children_of_their_sweep(place: Path):
    one = start(place, "run/trial-a/1", parent="sweep/shapes")
    two = start(place, "run/trial-b/1", parent="sweep/shapes")
    parents = {stored(place, trial).data.tags["mlflow.parentRunId"] for trial in (one, two)}
    assert len(parents) == 1
    client = connect(uri(place), "krony", artifact_root="").client
    assert client.get_run(parents.pop()).data.tags["krony.run_id"] == "sweep/shapes"


def test_files_of_mlflow_never_land_in_the_current_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker("auto", store="runs/store", experiment="krony", run_id="run/x-1/1", name="x")
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.close("FINISHED")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    found = connect(
        f"sqlite:///{tmp_path}/runs/mlflow.db", "krony", artifact_root=""
    ).client.get_experiment_by_name("krony")
    assert found.artifact_location == f"{tmp_path}/runs/mlflow"


FIRST = """
import os, sys
import mlflow.store.tracking.sqlalchemy_store  # once for both, and nothing is left between them and the race
from pipeline.tracking.mlflow_writer import open_mlflow
uri, root = sys.argv[1:]
gate, key = os.pipe()
children = []
for number in range(2):
    if child := os.fork():
        children.append(child)
        continue
    os.close(key)
    os.read(gate, 1)
    tracker = open_mlflow(uri, "krony", f"run/race-{number}/1", "race", parent=None, artifact_root=root)
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.close("FINISHED")
    sys.stderr.flush()
    os._exit(0)
os.close(key)  # both read its end at once
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_two_processes_may_be_the_first_at_once(tmp_path: Path):
    command = [sys.executable, "-c", FIRST, uri(tmp_path), str(tmp_path / "files")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["[0, 0]"], done.stderr
    assert "warning" not in done.stderr
    opened = connect(uri(tmp_path), "krony", artifact_root="")
    assert len(opened.client.search_runs([opened.experiment_id])) == 2


def test_no_server_costs_one_warning(free_port: int, capsys):
    address = f"http://127.0.0.1:{free_port}"
    tracker = open_mlflow(address, "krony", "run/a-1/1", "a", parent=None, artifact_root="")
    assert isinstance(tracker, NullTracker)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert address in lines[0]


def test_a_file_that_is_no_database_is_named(tmp_path: Path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(PreflightError, match=r"mlflow\.db"):
        connect(uri(tmp_path), "krony", artifact_root=str(tmp_path))


def test_a_database_that_breaks_in_mid_run_costs_one_warning(tmp_path: Path, capsys):
    tracker = start(tmp_path, "run/breaks-1/1")
    tracker.metrics({"loss": 1.0}, step=1)
    capsys.readouterr()
    (tmp_path / "mlflow.db").write_bytes(b"overwritten by something else" * 100)
    for step in range(2, 5):
        tracker.metrics({"loss": 1.0, f"new_{step}": 1.0}, step=step)
        tracker.tags({"still": "running"})
    tracker.close("FINISHED")
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "krony report --sync" in lines[0]
