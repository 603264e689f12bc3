"""MLflow is rebuilt from the store: what it never heard of, and the steps that it missed."""

from pathlib import Path

import pytest

from pipeline.errors import PreflightError
from pipeline.store.artifacts import Artifact, Identity, Store
from pipeline.tracking.jsonl import HistoryWriter
from pipeline.tracking.mlflow_writer import connect
from pipeline.tracking.sync import sync
from pipeline.tracking.tracker import open_tracker

TEACHER = Identity("teacher", "scratch", {"n_layer": 2, "seed": 3, "train": {"lr": 0.1}})
INIT = Identity("init", "kron_vl", {"method": {"name": "kron_vl", "shape": [4, 2]}}, {"teacher": TEACHER})
TOKENS = Identity("tokens", "words", {"split": "hash"})
RUN = Identity("run", "kron_vl-s1", {"train": {"lr": 0.01}, "seed": 1}, {"init": INIT, "tokens": TOKENS})
PUBLISHED = Identity("teacher", "gpt2", {"id": "gpt2"})


def build(store: Store, identity: Identity, *, steps: int) -> Artifact:
    with store.attempt(identity) as attempt:
        attempt.location.put_bytes("config.json", b"{}")
        if steps:
            with HistoryWriter(attempt.location) as history:
                for step in range(steps):
                    history.append({"step": step, "loss": 1.0 / (step + 1)})
        return attempt.publish(metrics={"parameters": 1234}, settings={"name": f"my-{identity.name}"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    filled = Store(str(tmp_path / "store"))
    for identity, steps in ((TEACHER, 4), (PUBLISHED, 0), (TOKENS, 0), (INIT, 0), (RUN, 6)):
        build(filled, identity, steps=steps)
    return filled


def runs(store: Store):
    opened = connect(f"sqlite:///{Path(store.root.uri).parent}/mlflow.db", "krony", artifact_root="")
    found = opened.client.search_runs([opened.experiment_id])
    return opened.client, {run.data.tags["krony.address"]: run for run in found}


def test_runs_that_mlflow_never_heard_of_arrive_whole(store: Store):
    assert sync(store, uri="auto", experiment="krony") == [TEACHER.address, RUN.address]
    client, found = runs(store)
    assert set(found) == {TEACHER.address, RUN.address}
    run = found[RUN.address]
    assert run.info.run_name == "my-kron_vl-s1"
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "method.name": "kron_vl",
        "method.shape": "4x2",
        "train.lr": "0.01",
        "seed": "1",
    }
    assert run.data.tags["sha256.run"] == store.require(RUN).record.digest
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 6
    assert run.data.metrics["parameters"] == 1234
    assert run.inputs.dataset_inputs[0].dataset.digest == store.require(TOKENS).record.digest[:36]
    assert found[TEACHER.address].data.params["teacher.train.lr"] == "0.1"


def test_steps_that_mlflow_missed_are_filled_once(store: Store):
    record = store.require(RUN).record
    tracker = open_tracker(
        "auto",
        store=store.root.uri,
        experiment="krony",
        run_id=f"{record.address}/{record.attempt}",
        name="my-kron_vl-s1",
    )
    tracker.metrics({"loss": 1.0}, step=0)
    tracker.metrics({"loss": 0.5}, step=1)
    tracker.close("FAILED")
    for _ in range(2):
        sync(store, uri="auto", experiment="krony")
    client, found = runs(store)
    history = client.get_metric_history(found[RUN.address].info.run_id, "loss")
    assert [point.step for point in history] == list(range(6))
    assert found[RUN.address].info.status == "FINISHED"


def test_nowhere_to_send_is_an_error(store: Store, free_port: int):
    with pytest.raises(PreflightError, match="off"):
        sync(store, uri="off", experiment="krony")
    with pytest.raises(PreflightError, match=str(free_port)):
        sync(store, uri=f"http://127.0.0.1:{free_port}", experiment="krony")
