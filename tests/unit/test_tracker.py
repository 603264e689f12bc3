"""Trackers: names, places, and what a composite and a replay tell."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.tracking.tracker import (
    CompositeTracker,
    NullTracker,
    Scalar,
    Status,
    artifact_root,
    flatten,
    open_tracker,
    replay,
    resolve_uri,
    ui_command,
)


class Listener:
    """Remembers what it is told, in order."""

    def __init__(self):
        self.heard: list[tuple[object, ...]] = []

    def params(self, values: Mapping[str, Scalar]) -> None:
        self.heard.append(("params", dict(values)))

    def metrics(self, values: Mapping[str, Scalar], *, step: int) -> None:
        self.heard.append(("metrics", dict(values), step))

    def tags(self, values: Mapping[str, Scalar]) -> None:
        self.heard.append(("tags", dict(values)))

    def link(self, name: str, uri: str, *, digest: str) -> None:
        self.heard.append(("link", name, uri, digest))

    def dataset(self, name: str, *, digest: str, source: str) -> None:
        self.heard.append(("dataset", name, digest, source))

    def close(self, status: Status) -> None:
        self.heard.append(("close", status))


def test_a_composite_tells_everyone_everything():
    one, two = Listener(), Listener()
    both = CompositeTracker([one, two])
    both.params({"lr": 1e-3})
    both.metrics({"loss": 2.0}, step=4)
    both.tags({"method": "kron_vl"})
    both.link("init", "/store/init/a-1", digest="ab")
    both.dataset("tokens", digest="cd", source="/store/tokens/b-2")
    both.close("FINISHED")
    assert one.heard == two.heard
    assert [what for what, *_ in one.heard] == ["params", "metrics", "tags", "link", "dataset", "close"]
    assert one.heard[1] == ("metrics", {"loss": 2.0}, 4)


def test_a_replay_tells_rows_by_step():
    listener = Listener()
    replay(listener, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "val_loss": 2.5}])
    assert listener.heard == [
        ("metrics", {"loss": 3.0}, 1),
        ("metrics", {"loss": 2.0, "val_loss": 2.5}, 2),
    ]


def test_a_nested_configuration_reads_as_dotted_names():
    config = {
        "seed": 1,
        "train": {"lr": 6e-4, "lr_multipliers": {"dense": 1.0}},
        "shape": (384, 1536),
        "layers": (),
    }
    assert flatten(config) == {
        "seed": 1,
        "train.lr": 6e-4,
        "train.lr_multipliers.dense": 1.0,
        "shape": "384x1536",
        "layers": "",
    }
    assert flatten({"packages": ["python", "numpy"], "none": None}) == {
        "packages": "python, numpy",
        "none": "None",
    }


def test_auto_is_a_file_beside_the_store_and_never_in_the_current_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("auto", store="runs/store") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri("auto", store="s3://bucket/krony") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (
        artifact_root(resolve_uri("auto", store="runs/store"), store="runs/store")
        == f"{tmp_path}/runs/mlflow"
    )


def test_a_server_keeps_its_own_places():
    assert resolve_uri("http://127.0.0.1:5000", store="runs/store") == "http://127.0.0.1:5000"
    assert artifact_root("http://127.0.0.1:5000", store="runs/store") == ""
    assert ui_command("http://127.0.0.1:5000") == "http://127.0.0.1:5000"


def test_off_opens_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker("off", store="runs/store", experiment="krony", run_id="run/a-1", name="a")
    assert isinstance(tracker, NullTracker)
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.close("FINISHED")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["auto", "sqlite:///somewhere/else.db"])
def test_the_command_for_the_pages_names_the_database(uri: str):
    assert resolve_uri(uri, store="runs/store") in ui_command(resolve_uri(uri, store="runs/store"))
