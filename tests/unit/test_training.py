"""A run from its first row to its last: history, validation, stopping, continuing to the bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.batches import TokenStream
from pipeline.errors import TrainError
from pipeline.tracking.jsonl import HistoryWriter, read_history
from pipeline.train.local import fit

TIMES = ("tokens_per_s",)


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(lab, tmp_path_factory):
    """The run that the others are held against: its folder and outcome."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    return run, lab.fit(lab.request(run))


def assert_same_run(lab, run: Path, other: Path) -> None:
    mine, theirs = lab.weights(run), lab.weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    last = "checkpoints/step-00000020.{}.safetensors"
    for part in ("model", "optimizer"):
        assert (run / last.format(part)).read_bytes() == (other / last.format(part)).read_bytes()


def test_a_run_logs_learns_and_leaves_a_native_folder(undisturbed):
    run, outcome = undisturbed
    steps = [row["step"] for row in outcome.rows]
    assert steps == [0, 5, 10, 15, 20]
    assert [row["step"] for row in outcome.rows if "val_loss" in row] == [0, 10, 20]
    assert all(row["tokens"] == row["step"] * 96 for row in outcome.rows)
    assert all(isinstance(row["step"], int) for row in outcome.rows)
    first, last = outcome.rows[1], outcome.rows[-1]
    assert set(last) == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "val_loss"}
    assert last["loss"] < first["loss"] < outcome.rows[0]["val_loss"] + 0.2
    result = outcome.result
    assert (result.step, result.tokens, result.stopped, result.resumed_from) == (20, 1920, False, None)
    assert result.metrics == {
        "train_loss": last["loss"],
        "val_loss_initial": outcome.rows[0]["val_loss"],
        "val_loss": last["val_loss"],
    }
    assert {path.name for path in run.iterdir()} == {"config.json", "model.safetensors", "checkpoints"}


@torch.no_grad()
def test_validation_is_the_mean_over_every_token_once(lab, undisturbed):
    from model.export import load_native

    run, outcome = undisturbed
    model = load_native(run).eval()
    tokens = TokenStream([lab.folder / "tokens" / "val-00000.bin"]).read(0, 121).astype(np.int64)
    losses = []
    for start in range(0, 120, 16):  # 7 windows of 16 and one of 8
        window = torch.from_numpy(tokens[start : min(start + 17, 121)])[None]
        logits = model(window[:, :-1])
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="none"))
    everything = torch.cat(losses)
    assert len(everything) == 120
    assert outcome.result.metrics["val_loss"] == pytest.approx(float(everything.double().mean()), rel=1e-6)


def test_ten_steps_and_ten_more_are_twenty_to_the_bit(lab, undisturbed, tmp_path, capsys):
    run, whole = undisturbed
    half = tmp_path / "run"
    first = lab.fit(lab.request(half), stop_at=10)
    assert (first.result.step, first.result.stopped) == (10, True)
    assert not (half / "model.safetensors").exists()
    second = lab.fit(lab.request(half))
    assert second.result.resumed_from == 10
    assert second.result.metrics == whole.result.metrics
    assert without_times(second.rows) == without_times(whole.rows)  # the checkpoint knew the first half
    assert_same_run(lab, half, run)
    line = next(line for line in capsys.readouterr().err.splitlines() if "continues at step 10" in line)
    before, now = (float(part.split()[0].rstrip(",")) for part in line.split("probe loss ")[1].split(", "))
    assert before == now


def test_a_stop_between_two_checkpoints_saves_where_it_is(lab, undisturbed, tmp_path):
    run, whole = undisturbed
    other = tmp_path / "run"
    stopped = lab.fit(lab.request(other, log_every=1), stop_at=13)
    assert stopped.result.step == 13
    assert json.loads((other / "checkpoints/step-00000013.json").read_text())["step"] == 13
    assert lab.fit(lab.request(other)).result.metrics == whole.result.metrics
    assert_same_run(lab, other, run)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(lab, undisturbed, tmp_path, capsys):
    run, whole = undisturbed
    other = tmp_path / "run"
    lab.fit(lab.request(other, checkpoint_every=5), stop_at=10)
    weights = other / "checkpoints/step-00000010.model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    again = lab.fit(lab.request(other))
    assert again.result.resumed_from == 5
    assert again.result.metrics == whole.result.metrics
    assert_same_run(lab, other, run)
    assert "step-00000010.model.safetensors" in capsys.readouterr().err


def test_a_finished_run_that_was_not_published_is_finished_again_without_a_step(lab, undisturbed, tmp_path):
    run, whole = undisturbed
    other = tmp_path / "run"
    lab.fit(lab.request(other))
    (other / "model.safetensors").unlink()
    again = lab.fit(lab.request(other))
    assert (again.result.resumed_from, again.result.step) == (20, 20)
    assert again.result.metrics == whole.result.metrics
    assert_same_run(lab, other, run)


def test_rows_that_are_on_record_are_not_told_again(lab, undisturbed, tmp_path):
    _, whole = undisturbed
    run = tmp_path / "run"
    request = lab.request(run, checkpoint_every=5)

    def train(stop_at: int | None, lose_after: int = 99) -> list[int]:
        told = []
        with HistoryWriter(request.run) as history:

            def on_log(row) -> None:
                told.append(row["step"])
                if row["step"] <= lose_after:  # a driver that dies before it has written
                    history.append(row)

            fit(request, on_log=on_log, should_stop=lambda: bool(told) and told[-1] >= (stop_at or 99))
        return told

    assert train(15, lose_after=10) == [0, 5, 10, 15]
    assert train(None) == [15, 20]
    assert without_times(read_history(request.run)) == without_times(whole.rows)


def test_no_steps_leave_the_initial_weights(lab, tmp_path):
    outcome = lab.fit(lab.request(tmp_path / "run", max_steps=0))
    assert [row["step"] for row in outcome.rows] == [0]
    assert outcome.result.metrics.keys() == {"val_loss_initial", "val_loss"}
    before, after = lab.weights(lab.folder / "init"), lab.weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_intervals_do_not_change_the_weights(lab, undisturbed, tmp_path):
    run, _ = undisturbed
    lab.fit(lab.request(tmp_path / "run", log_every=3, val_every=7, checkpoint_every=6))
    assert_same_run(lab, tmp_path / "run", run)


def test_bf16_learns_and_keeps_fp32_weights(lab, undisturbed, tmp_path):
    _, whole = undisturbed
    outcome = lab.fit(lab.request(tmp_path / "run", precision="bf16"))
    assert outcome.result.metrics["val_loss"] == pytest.approx(whole.result.metrics["val_loss"], rel=0.02)
    assert {value.dtype for value in lab.weights(tmp_path / "run").values()} == {torch.float32}


def test_a_wish_for_a_checkpoint_is_met_and_training_goes_on(lab, undisturbed, tmp_path):
    from pipeline.train.loop import Hooks, run
    from pipeline.train.topology import Topology

    whole_run, whole = undisturbed
    other = tmp_path / "run"
    steps: list[float] = []
    hooks = Hooks(
        on_log=lambda row: steps.append(row["step"]),
        on_history=steps.extend,
        on_note=print,
        should_stop=lambda: False,
        should_save=lambda: steps[-1] == 12,  # a notice that this node will be taken away
    )
    request = lab.request(other, log_every=3, keep_checkpoints=9)
    result = run(request, Topology(rank=0, world=1, device=torch.device("cpu")), hooks)
    assert result.metrics == whole.result.metrics
    assert (other / "checkpoints/step-00000012.json").exists()
    assert not (other / "checkpoints/step-00000009.json").exists()
    assert_same_run(lab, other, whole_run)


def test_a_compiler_that_fails_is_said_in_one_line(lab, tmp_path, monkeypatch):
    def broken(model):
        def forward(inputs, targets):
            raise RuntimeError("C++ compile error\nand a long story")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        TrainError, match=r"the compiler failed .*\(C\+\+ compile error\); set train.compile=false"
    ):
        lab.fit(lab.request(tmp_path / "run", compile=True))
