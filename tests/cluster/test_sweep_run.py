"""Sweeps on Ray: the numbers of plain trainings, resources given back, and no kill that changes the table."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from cluster_lab import assert_all_given_back

from pipeline import stages
from pipeline.config.schema import RayConfig
from pipeline.progress import Progress
from pipeline.store.artifacts import Artifact, Store
from pipeline.store.location import Location
from pipeline.sweep.campaign import Campaign
from pipeline.sweep.identity import sweep_identity
from pipeline.sweep.ledger import Ledger, read_events
from pipeline.sweep.run import run_sweep
from pipeline.sweep.space import space_of
from pipeline.sweep.window import Window
from pipeline.work import Work

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
MEASURED = ("key", "name", "arm", "choices", "seed", "state", "run", "init", "model", "scores", "parameters")
MEASURED += ("macs_per_token", "tokens", "val_loss", "val_loss_initial", "rungs")


@pytest.fixture(scope="module")
def base(sweep_lab, tmp_path_factory) -> Path:
    """A folder with a store that holds a teacher and its scores, and no trial."""
    folder = tmp_path_factory.mktemp("sweep")
    work = Work.on(sweep_lab.build(folder).first, quiet=True)
    stages.teacher(work)
    stages.scores(work, of_teacher=True)
    return folder


@pytest.fixture
def place(base, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(base, tmp_path / "here")
    return tmp_path / "here"


def trials(artifact: Artifact) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(artifact.path("trials.json").read_text())}


def measured(artifact: Artifact) -> dict[str, dict]:
    return {name: {key: row[key] for key in MEASURED} for name, row in trials(artifact).items()}


def trial_processes() -> list[psutil.Process]:
    """Processes of trials of the Ray that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with_name = process.cmdline() if process.is_running() else []
        if any(word.startswith("ray::") and "Trial" in word for word in with_name):
            found.append(process)
    return found


@contextmanager
def meanwhile(act: Callable[[], bool]) -> Iterator[list[float]]:
    """Call `act` in a thread every 50 ms until it says that it is done; yields when that was."""
    acted: list[float] = []
    end = threading.Event()

    def watch() -> None:
        while not acted and not end.wait(0.05):
            try:
                if act():
                    acted.append(time.monotonic())
            except psutil.NoSuchProcess:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield acted
    finally:
        end.set()
        thread.join()


@pytest.mark.nightly
def test_a_sweep_is_its_trainings_one_after_the_other(ray_local, sweep_lab, place, base):
    study = sweep_lab.write(place, origin=base, axes={"method.terms": [1, 2]}, seeds=[0, 1])
    artifact = run_sweep(study, quiet=True)
    metrics = artifact.record.metrics
    assert (metrics["trials"], metrics["finished"], metrics["slots"]) == (4, 4, 2)
    assert 0 < metrics["train_s"] < metrics["wall_s"] * metrics["slots"]
    assert_all_given_back(ray_local)

    store = Store(str(base / "store"))
    for spec in space_of(study).trials:
        plain = Work.on(replace(spec.config, store=str(base / "store")), quiet=True)
        scores = stages.scores(plain)
        row, run = trials(artifact)[spec.name], store.require(plain.chain.run)
        mine = Store(study.first.store).open(row["run"])
        assert row["run"] == run.record.address
        assert mine.record.metrics == run.record.metrics
        assert mine.record.files["model.safetensors"] == run.record.files["model.safetensors"]
        assert row["val_loss"] == run.record.metrics["val_loss"]
        assert {p: Store(study.first.store).open(a).record.metrics for p, a in row["scores"].items()} == {
            p: score.record.metrics for p, score in scores.items()
        }

    assert run_sweep(study, quiet=True).record == artifact.record  # done already
    wider = sweep_lab.write(place, origin=base, axes={"method.terms": [1, 2]}, seeds=[0, 1, 2])
    before = {r.address: r.attempt for r in Store(study.first.store).records("run")}
    wider_metrics = run_sweep(wider, quiet=True).record.metrics
    after = {r.address: r.attempt for r in Store(study.first.store).records("run")}
    assert wider_metrics["finished"] == 6
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2


def test_a_trial_stopped_early_gives_its_resources_back(ray_local, sweep_lab, place, base):
    study = sweep_lab.write(
        place,
        origin=base,
        axes={"train.lr": [1e-2, 1e-5, 1e-6, 1e-7]},
        concurrent=1,
        stop={"name": "asha", "grace_tokens": 1024, "reduction": 2},
    )
    artifact = run_sweep(study, quiet=True)
    rows = trials(artifact).values()
    assert [row["state"] for row in rows] == ["finished", "stopped", "stopped", "stopped"]
    for row in list(rows)[1:]:
        assert row["tokens"] == 1024  # at the very rung
        assert row["reason"].startswith("asha: validation loss")
        assert (row["run"][:4], row["model"], row["scores"]) == ("run/", "", {})
    assert_all_given_back(ray_local)


@pytest.mark.nightly
def test_trials_on_two_workers_are_killed_and_stopped_and_give_all_back(ray_local, sweep_lab, place, base):
    axes = {"train.lr": [1e-2, 1e-7], "train.max_steps": [60]}
    study = sweep_lab.write(
        place,
        origin=base,
        axes=axes,
        extra="[ray]\nworkers = 2\ncpus_per_worker = 0.5",
        concurrent=1,
        stop={"name": "asha", "grace_tokens": 1024, "reduction": 2},
    )
    location = Store(study.first.store).root.child(f"{sweep_identity(study).address}/1")

    def kill_one() -> bool:
        if sum(event["event"] == "validated" for event in read_events(location)) < 6:
            return False
        for process in trial_processes()[:1]:
            process.kill()
            return True
        return False

    with meanwhile(kill_one) as killed:
        artifact = run_sweep(study, quiet=True)
    good, bad = trials(artifact).values()
    assert killed
    reasons = [event["reason"] for event in read_events(artifact.location) if event["event"] == "crashed"]
    assert reasons == ["its process was lost: killed, or out of memory"]
    assert (good["state"], bad["state"]) == ("finished", "stopped")
    assert 1024 <= bad["tokens"] < 60 * 128
    assert_all_given_back(ray_local)
    alone = sweep_lab.write(base, axes=axes).first
    plain = Work.on(replace(alone, train=replace(alone.train, lr=1e-2, max_steps=60)), quiet=True)
    assert good["val_loss"] == pytest.approx(stages.run(plain).record.metrics["val_loss"], rel=1e-5)


@pytest.mark.nightly
def test_halving_pauses_and_goes_on_and_ends_with_the_winner_of_the_full_runs(
    ray_local, sweep_lab, place, base
):
    axes = {"train.lr": [1e-5, 2e-3, 1e-7]}  # none of which another test has trained
    stop = {"name": "halving", "grace_tokens": 1024, "reduction": 3}
    halved = trials(run_sweep(sweep_lab.write(place, origin=base, axes=axes, stop=stop), quiet=True))
    states = {row["name"]: (row["state"], row["tokens"]) for row in halved.values()}
    assert sorted(states.values()) == [("finished", 2048), ("stopped", 1024), ("stopped", 1024)]
    full = trials(run_sweep(sweep_lab.write(place, origin=base, axes=axes), quiet=True))
    best = min(full, key=lambda name: full[name]["val_loss"])
    assert states[best] == ("finished", 2048)
    assert halved[best]["val_loss"] == full[best]["val_loss"]
    assert_all_given_back(ray_local)


def test_failures_are_results_and_can_be_retried(ray_local, sweep_lab, place, base):
    axes = {"train.lr": [1e-3, 1e30], "train.grad_clip": [0.0]}
    study = sweep_lab.write(place, origin=base, axes=axes)
    artifact = run_sweep(study, quiet=True)
    good, bad = trials(artifact).values()
    assert (good["state"], bad["state"]) == ("finished", "failed")
    assert "not a finite number" in bad["reason"]
    again = run_sweep(study, retry_failed=True, quiet=True)
    assert again.record.attempt != artifact.record.attempt
    assert measured(again) == measured(artifact)
    assert len(read_events(again.location)) > len(read_events(artifact.location))
    assert_all_given_back(ray_local)


def test_a_bug_of_ours_is_no_crash_and_is_not_repeated(ray_local, sweep_lab, place, base):
    from pipeline.sweep.trial import Trial
    from pipeline.sweep.tuning import run_jobs

    class Broken(Trial):
        @staticmethod
        def do(job, channel):
            raise ZeroDivisionError("ours")

    study = sweep_lab.write(place, origin=base)
    spec, *_ = space_of(study).trials
    campaign = Campaign(study.sweep, Ledger(Location(str(place / "ledger"))), [spec], ray=RayConfig())
    window = Window(study.first.tracking, Store(study.first.store), run_id="sweep/x/1", name="x", asks={})
    run_jobs(
        campaign,
        window,
        Progress("sweep", 1, unit="tokens", quiet=True),
        slots=1,
        should_stop=lambda: False,
        silence_s=60.0,
        trainable=Broken,
    )
    window.close("FINISHED")
    (entry,) = campaign.book.entries.values()
    assert (entry.state, entry.crashes) == ("failed", 1)
    assert entry.reason == "ZeroDivisionError: ours (a bug: please report it)"
    assert_all_given_back(ray_local)


def long_study(sweep_lab, place: Path, origin: Path, **more):
    """Two trials of some seconds, with many validations and checkpoints."""
    return sweep_lab.write(place, origin=origin, axes={"train.max_steps": [400, 401]}, **more)


@pytest.fixture(scope="module")
def whole(ray_local, sweep_lab, base, tmp_path_factory) -> dict[str, dict]:
    """What comes of them if nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(base, folder / "undisturbed")
    return measured(run_sweep(long_study(sweep_lab, folder / "undisturbed", base), quiet=True))


@pytest.mark.nightly  # the soak does the same to sweeps over three raylets
def test_a_killed_and_a_silent_process_cost_time_and_nothing_else(ray_local, sweep_lab, place, base, whole):
    study = long_study(sweep_lab, place, base, silence_s=20.0)
    location = Store(study.first.store).root.child(f"{sweep_identity(study).address}/1")
    signals = iter((signal.SIGKILL, signal.SIGSTOP))
    hit: list[int] = []

    def disturb() -> bool:
        reached = sum(event["event"] == "validated" for event in read_events(location))
        fresh = [p for p in trial_processes() if p.pid not in hit]
        if reached > 10 * (len(hit) + 1) and fresh:
            hit.append(fresh[0].pid)
            fresh[0].send_signal(next(signals))
        return len(hit) == 2

    with meanwhile(disturb) as acted:
        artifact = run_sweep(study, quiet=True)
    assert acted
    assert measured(artifact) == whole
    reasons = [event["reason"] for event in read_events(artifact.location) if event["event"] == "crashed"]
    assert len(reasons) == 2
    assert any("no sign of life for 20 s" in reason for reason in reasons)
    assert any("its process was lost" in reason for reason in reasons)
    assert_all_given_back(ray_local)


@pytest.mark.nightly
def test_a_killed_raylet_and_a_killed_driver_change_nothing(sweep_lab, place, base, whole):
    study = long_study(sweep_lab, place, base)
    location = Store(study.first.store).root.child(f"{sweep_identity(study).address}/1")
    command = [sys.executable, "-m", "jobs.cli", "sweep", str(place / "sweep.toml")]
    command += ["--out", str(place / "report")]
    surroundings = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[str]:
        """A driver of its own, once it has put ten validations on record."""
        before = len(read_events(location))
        driver = subprocess.Popen(command, cwd=place, env=surroundings, stderr=subprocess.PIPE, text=True)
        while sum(event["event"] == "validated" for event in read_events(location)[before:]) < 10:
            assert driver.poll() is None
            time.sleep(0.05)
        return driver

    driver = start()
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "raylet" or process.name().startswith("ray::"):
                process.kill()
    _, said = driver.communicate(timeout=240)
    assert driver.returncode not in (0, 2)
    assert "Traceback" not in said
    assert "the same command goes on" in said.splitlines()[-1]

    driver = start()
    driver.kill()
    driver.communicate()
    events = read_events(location)
    assert not any(event["event"] == "ended" and event["state"] == "finished" for event in events)

    done = subprocess.run(command, cwd=place, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = Store(study.first.store).find(sweep_identity(study))
    assert found is not None
    assert measured(found) == whole
    assert (place / "report" / "sweep.html").exists()
    assert sum(event["event"] == "session" for event in read_events(found.location)) == 3
