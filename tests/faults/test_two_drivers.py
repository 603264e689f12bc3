"""Two drivers start one run at once: one trains, the other waits, and goes on where the first one died."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import stages
from pipeline.config.load import load_study
from pipeline.store.artifacts import Artifact, Store
from pipeline.work import Work

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 80
WORDS = ("--train.max-steps", str(STEPS), "--train.log-every", "1", "--train.checkpoint-every", "4")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(sweep_lab, tmp_path_factory) -> Path:
    """A store with all that a training starts from."""
    folder = tmp_path_factory.mktemp("two")
    stages.init(Work.on(sweep_lab.build(folder).first, quiet=True))
    (folder / "train.toml").write_text(sweep_lab.BASE.replace("WORDS", str(folder / "words.txt")))
    return folder


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    surroundings = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(PROJECT)}
    with (folder / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "jobs.cli", "train", "train.toml", *WORDS]
        return subprocess.Popen(command, cwd=folder, env=surroundings, stdout=log, stderr=log, text=True)


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()


def steps(folder: Path) -> list[int]:
    parts = sorted((folder / "store/run").glob("*/*/metrics-*.jsonl"))
    return [json.loads(row)["step"] for part in parts for row in part.read_text().splitlines()]


def wait_for(happened: Callable[[], object], *drivers: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        assert all(driver.poll() is None for driver in drivers), "a driver ended too early"
        time.sleep(0.02)


def trained(folder: Path) -> Artifact:
    store = Store(folder / "store")
    (record,) = store.records("run")
    artifact = store.open(record.address)
    artifact.verify()
    return artifact


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Artifact:
    folder = shutil.copytree(base, tmp_path_factory.mktemp("quiet") / "here")
    config = load_study(folder / "train.toml", overrides=WORDS).first
    return stages.run(Work.on(config, quiet=True))


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGCONT, marks=pytest.mark.nightly)])
def test_the_second_driver_waits_and_takes_over_or_finds_it_done(base, undisturbed, tmp_path, end):
    folder = shutil.copytree(base, tmp_path / "here")
    first = start(folder, "first")
    wait_for(lambda: len(steps(folder)) > 10, first)
    first.send_signal(signal.SIGSTOP)  # so that it is under way for as long as this takes
    before = steps(folder)
    second = start(folder, "second")
    wait_for(lambda: f"process {first.pid} on" in said(folder, "second"), second)
    assert "is at work on it; waits for its end" in said(folder, "second")
    assert steps(folder) == before
    first.send_signal(end)
    assert second.wait(120) == 0, said(folder, "second")
    assert first.wait(120) == (0 if end == signal.SIGCONT else -signal.SIGKILL)
    assert ("continues at step" in said(folder, "second")) == (end == signal.SIGKILL)
    assert steps(folder) == list(range(STEPS + 1))  # each written once, and in order
    artifact, weights = trained(folder), "model.safetensors"
    assert artifact.record.metrics == undisturbed.record.metrics
    assert artifact.record.files[weights] == undisturbed.record.files[weights]


@pytest.mark.nightly
def test_one_that_waits_can_be_told_to_end_and_a_notice_of_the_end_saves_the_state(
    base, undisturbed, tmp_path
):
    folder = shutil.copytree(base, tmp_path / "here")
    first = start(folder, "first")
    wait_for(lambda: len(steps(folder)) > 10, first)
    first.send_signal(signal.SIGSTOP)
    second = start(folder, "second")
    wait_for(lambda: "waits for its end" in said(folder, "second"), second)
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 130
    assert said(folder, "second").splitlines()[-1].startswith("krony train: interrupted")
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    assert first.wait(30) == 130  # as long as a machine gives notice that is taken away
    reached = steps(folder)[-1]
    assert f"stopped at step {reached}/{STEPS}, state saved" in said(folder, "first").splitlines()[-1]
    assert start(folder, "third").wait(120) == 0
    assert f"continues at step {reached}:" in said(folder, "third")  # nothing is done again
    assert trained(folder).record.metrics == undisturbed.record.metrics
