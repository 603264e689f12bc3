"""A sweep in MLflow: a parent, children named by what differs, nothing twice after a restart."""

from dataclasses import replace

import pytest

from pipeline.chain import Chains
from pipeline.config.schema import RayConfig, TrackingConfig
from pipeline.store.artifacts import Store
from pipeline.store.location import Location
from pipeline.sweep import window as window_module
from pipeline.sweep.campaign import Campaign
from pipeline.sweep.job import Outcome
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.space import space_of
from pipeline.sweep.window import Window, axes_of
from pipeline.tracking.tracker import NullTracker, open_tracker

ROWS = [{"step": 0, "tokens": 0, "val_loss": 5.0}, {"step": 4, "tokens": 512, "loss": 4.0, "val_loss": 4.1}]


@pytest.fixture
def study(sweep_lab, tmp_path):
    (tmp_path / "words.txt").write_text("one two")
    return sweep_lab.write(tmp_path, axes={"train.lr": [1e-3, 3e-3]}, seeds=[0, 1])


def runs(place):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place}")
    return client, client.search_runs([client.get_experiment_by_name("krony").experiment_id])


def test_a_sweep_is_a_parent_and_its_trials_are_children(study, tmp_path):
    store = Store(study.first.store)
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    specs = space_of(study).trials
    campaign = Campaign(study.sweep, Ledger(Location(str(tmp_path / "l"))), specs, ray=RayConfig())
    first, second, third, fourth = campaign.book.entries.values()
    alone = Chains().of(campaign.configs[fourth.key]).run  # this one was trained before, by itself
    open_tracker(
        tracking.uri, store=study.first.store, experiment="krony", run_id=f"{alone.address}/1", name="alone"
    ).close("FINISHED")

    def window() -> Window:
        return Window(tracking, store, run_id="sweep/toy-1/1", name="toy", asks={"axes": ["train.lr"]})

    def begin(shown: Window, entry) -> None:
        shown.begin(entry, campaign.configs[entry.key])

    killed = window()
    begin(killed, first)
    killed.rows(first.key, ROWS[:1])
    killed._thread.shutdown()  # the driver died here; nothing was closed

    shown = window()
    for entry in (first, second, third, fourth):
        begin(shown, entry)
        shown.rows(entry.key, ROWS)
    campaign.ended(
        first.key, Outcome(state="finished", parameters=77, macs_per_token=99, val_loss=4.1, tokens=512)
    )
    campaign.crashed(second.key, "lost", is_final=True)
    campaign.ended(third.key, Outcome(state="stopped", reason="asha: others are better", tokens=512))
    shown.end(first, Outcome(state="finished", parameters=77, macs_per_token=99), step=512)
    shown.end(second, None, step=512)
    shown.end(third, Outcome(state="stopped"), step=512)
    shown.counts(campaign.book)
    shown.close("FINISHED")

    client, found = runs(tmp_path / "mlflow.db")
    (parent,) = (run for run in found if run.data.tags.get("krony.kind") == "sweep")
    children = {run.info.run_name: run for run in found if "mlflow.parentRunId" in run.data.tags}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert set(children) == {first.name, second.name, third.name, "alone"}
    status = {name: run.info.status for name, run in children.items()}
    assert status == {first.name: "FINISHED", second.name: "FAILED", third.name: "KILLED", "alone": "KILLED"}
    assert children[third.name].data.tags["krony.reason"] == "asha: others are better"
    assert children[first.name].data.metrics["parameters"] == 77
    assert children[first.name].data.params["train.lr"] == "0.001"
    history = client.get_metric_history(children[first.name].info.run_id, "val_loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 5.0), (4, 4.1)]
    assert parent.data.metrics["trials_over"] == 3
    assert parent.data.metrics["best_val_loss"] == 4.1


def test_no_tracker_is_no_trouble(study, tmp_path):
    window = Window(
        TrackingConfig(uri="off"), Store(study.first.store), run_id="sweep/a/1", name="a", asks={}
    )
    spec = space_of(study).trials[0]
    campaign = Campaign(study.sweep, Ledger(Location(str(tmp_path / "l"))), [spec], ray=RayConfig())
    entry = campaign.book.entries[spec.key]
    window.begin(entry, replace(spec.config, name="x"))
    window.rows(spec.key, ROWS)
    window.end(entry, None, step=0)
    window.close("FINISHED")


def test_a_trial_that_was_trained_before_keeps_its_row(study, tmp_path, monkeypatch):
    opened: list[str] = []

    def remember(uri: str, *, run_id: str, **more: object) -> NullTracker:
        opened.append(run_id)
        return NullTracker()

    monkeypatch.setattr(window_module, "open_tracker", remember)
    store, spec = Store(study.first.store), space_of(study).trials[0]
    campaign = Campaign(study.sweep, Ledger(Location(str(tmp_path / "l"))), [spec], ray=RayConfig())
    run = Chains().of(spec.config).run
    with store.attempt(run, resume=True) as attempt:
        attempt.location.put_bytes("model.safetensors", b"trained")
        attempt.publish(metrics={})
    window = Window(study.first.tracking, store, run_id="sweep/toy-1/1", name="toy", asks={})
    window.begin(campaign.book.entries[spec.key], campaign.configs[spec.key])
    window.close("FINISHED")
    assert opened == ["sweep/toy-1/1", f"{run.address}/1"]


def test_axes_have_one_name_each_whatever_a_section_sets():
    choices = {"method": {"name": "kron_prune", "eps_init": 0.1}, "method.shape": [64, 256], "train.lr": 1e-3}
    assert axes_of(choices) == {
        "axis.method": "kron_prune",
        "axis.method.shape": "64x256",
        "axis.train.lr": 1e-3,
    }
    assert axes_of({"method": "kron_vl", "budget": {"params": 9}}) == {
        "axis.method": "kron_vl",
        "axis.budget.params": 9,
    }
