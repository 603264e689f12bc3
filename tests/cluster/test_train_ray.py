"""Training on Ray: two workers are one process, a killed worker costs only time, a stop is obeyed."""

import signal
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from cluster_lab import assert_all_given_back

from pipeline.config.schema import RayConfig
from pipeline.errors import DataError, Interrupted, PreflightError
from pipeline.train.distributed import fit

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TWO = RayConfig(workers=2)
STEPS = 60  # long enough that a driver that hears late on a busy machine still finds the workers alive
TRAIN = {"log_every": 1, "batch_tokens": 112, "max_steps": STEPS}  # 7 rows: three and four


def on_two_workers(request, *, watch=lambda row: None, should_stop=lambda: False):
    rows = []

    def on_log(row) -> None:
        rows.append(dict(row))
        watch(row)

    return fit(request, TWO, on_log=on_log, should_stop=should_stop), rows


def train_workers() -> list[psutil.Process]:
    """Worker processes of the Ray that this process started, by nobody else's name."""
    family = psutil.Process().children(recursive=True)
    return [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]


@pytest.fixture(scope="module")
def undisturbed(ray_local, lab, tmp_path_factory):
    run = tmp_path_factory.mktemp("store") / "run" / "undisturbed-12345678" / "1"
    return run, *on_two_workers(lab.request(run, **TRAIN))


def test_two_workers_are_the_plain_loop(lab, undisturbed, tmp_path):
    run, result, rows = undisturbed
    plain = lab.fit(lab.request(tmp_path / "plain", **TRAIN))
    assert [row["step"] for row in rows] == [row["step"] for row in plain.rows] == list(range(STEPS + 1))
    for name in ("loss", "val_loss"):
        found, expected = ([row[name] for row in r if name in row] for r in (rows, plain.rows))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert result.metrics == pytest.approx(plain.result.metrics, rel=1e-5)
    assert {path.name for path in run.parent.iterdir()} == {"1"}  # nothing of Ray's is left in the store
    assert {path.name for path in run.iterdir()} == {"config.json", "model.safetensors", "checkpoints"}


def test_a_killed_worker_costs_time_and_nothing_else(ray_local, lab, undisturbed, tmp_path, capsys):
    run, result, rows = undisturbed
    killed: list[int] = []

    def kill_one(row) -> None:
        if row["step"] >= 12 and not killed:
            victim = train_workers()[-1]
            killed.append(victim.pid)
            victim.send_signal(signal.SIGKILL)

    other = tmp_path / "run" / "killed-12345678" / "1"
    again, told = on_two_workers(lab.request(other, **TRAIN, checkpoint_every=5), watch=kill_one)
    assert killed
    assert again.resumed_from in range(10, STEPS, 5)  # where the kill fell depends on when the driver heard
    assert f"continues at step {again.resumed_from}" in capsys.readouterr().err
    assert [row["step"] for row in told] == list(range(STEPS + 1))
    for mine, theirs in zip(told, rows, strict=True):
        assert {k: v for k, v in mine.items() if k != "tokens_per_s"} == {
            k: v for k, v in theirs.items() if k != "tokens_per_s"
        }
    assert again.metrics == result.metrics
    expected = lab.weights(run)
    assert all(torch.equal(value, expected[name]) for name, value in lab.weights(other).items())


def test_a_stop_saves_the_state_and_one_process_continues(ray_local, lab, tmp_path):
    run = tmp_path / "run" / "stopped-12345678" / "1"
    steps: list[int] = []
    endless = lab.request(run, **TRAIN | {"max_steps": 10_000})
    stopped, _ = on_two_workers(
        endless,
        watch=lambda row: steps.append(row["step"]),
        should_stop=lambda: bool(steps) and steps[-1] > 7,
    )
    assert stopped.stopped
    assert 7 < stopped.step < 10_000
    assert stopped.step == steps[-1]
    alone = lab.fit(endless, stop_at=stopped.step + 3)
    assert alone.result.resumed_from == stopped.step
    assert alone.rows[0]["step"] == 0  # the checkpoint knows the history of the workers


def test_too_few_cpus_are_said_at_once(ray_local, lab, tmp_path):
    request = lab.request(tmp_path / "run" / "many-12345678" / "1")
    begin = time.monotonic()
    with pytest.raises(PreflightError, match=r"3 workers asks for 3 CPU, the cluster has 2"):
        fit(request, RayConfig(workers=3), on_log=print, should_stop=lambda: False)
    assert time.monotonic() - begin < 10


def test_cpus_that_other_work_holds_are_named(ray_local, lab, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.train.distributed.FREE_WAIT_S", 0.5)

    @ray_local.remote(num_cpus=1)
    class Holder:
        def ready(self) -> bool:
            return True

    holder = Holder.remote()
    assert ray_local.get(holder.ready.remote())
    try:
        with pytest.raises(PreflightError, match=r"asks for 2 CPU, free 1; other work holds the rest"):
            fit(
                lab.request(tmp_path / "run" / "busy-12345678" / "1"),
                TWO,
                on_log=print,
                should_stop=lambda: False,
            )
    finally:
        ray_local.kill(holder)


def test_an_error_in_a_worker_is_one_line_in_the_driver(ray_local, lab, tmp_path):
    request = lab.request(tmp_path / "run" / "broken-12345678" / "1")
    with pytest.raises(DataError, match=r"train-00009\.bin is missing") as caught:
        on_two_workers(replace(request, shards=("train-00009.bin",)))
    assert "\n" not in str(caught.value)


@pytest.mark.nightly
def test_no_worker_outlives_an_error_of_its_driver(ray_local, lab, tmp_path):
    endless = lab.request(tmp_path / "run" / "unheard-12345678" / "1", **TRAIN | {"max_steps": 10_000})

    def full(row) -> None:
        if row["step"] > 5:
            raise DataError("the history cannot be written")

    with pytest.raises(DataError, match="the history cannot be written"):
        on_two_workers(endless, watch=full)
    assert_all_given_back(ray_local)
    assert not train_workers()
    steps: list[int] = []
    continued, _ = on_two_workers(
        endless, watch=lambda row: steps.append(row["step"]), should_stop=lambda: len(steps) > 3
    )
    assert continued.resumed_from > 5  # they saved before they left


@pytest.mark.nightly
def test_a_stop_is_answered_while_the_workers_wait_for_their_place(ray_local, lab, tmp_path):
    request = lab.request(tmp_path / "run" / "waits-12345678" / "1", **TRAIN | {"max_steps": 10_000})
    seats: list = []
    asked: list[float] = []

    @ray_local.remote(num_cpus=1)
    class Guest:
        def ready(self) -> bool:
            return True

    def take_a_seat(row) -> None:
        if row["step"] > 5 and not seats:
            seats.extend([guest := Guest.remote(), guest.ready.remote()])  # it gets what is free next
            train_workers()[-1].send_signal(signal.SIGKILL)

    def should_stop() -> bool:
        if len(seats) > 1 and not asked and ray_local.wait([seats[1]], timeout=0)[0]:
            asked.append(time.monotonic() + 3.0)
        return bool(asked) and time.monotonic() > asked[0]

    try:
        with pytest.raises(Interrupted, match="waited for their place"):
            on_two_workers(request, watch=take_a_seat, should_stop=should_stop)
    finally:
        ray_local.kill(seats[0])
    assert_all_given_back(ray_local)
