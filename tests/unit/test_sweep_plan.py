"""The plan of a sweep: exact where it can be, measured where it must be, and silent about nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from model.export import load_native, save_native
from model.gpt2 import GPT2
from pipeline.chain import chain
from pipeline.compress.outlook import dense_spec, outlook
from pipeline.config.load import validate
from pipeline.config.sweep import StopRule, SweepStudy, load_sweep
from pipeline.config.training import DistillConfig, TrainConfig
from pipeline.store.artifacts import Store
from pipeline.sweep import plan as planning
from pipeline.sweep.plan import expected_tokens, plan, validations
from pipeline.sweep.plan_text import as_json, text
from pipeline.sweep.probe import Question, measure, probe
from pipeline.sweep.space import grid

TINY = """
name    = "tiny"
corpus  = { name = "files", paths = ["text.txt"] }
tokenizer = { name = "bpe", vocab_size = 300 }
teacher = { name = "scratch", n_layer = 2, n_head = 2, n_embd = 16, n_ctx = 32, train = { seq_len = 32 } }
train   = { seq_len = 32, batch_tokens = 64, max_steps = 4, val_tokens = 64, val_every = 2, device = "cpu" }
calibration = { length = 32 }
tracking = { uri = "off" }
method  = { name = "kron_vl", shape = [8, 8] }
store   = "store"
"""
AXES = """
[sweep]
seeds = [0, 1]
[sweep.axes]
"method" = ["kron_vl", "random_init", "kron_act", "dense"]
"method.shape" = [[8, 8], [4, 16], [5, 5]]
"""


def sweep(folder: Path, more: str = AXES) -> SweepStudy:
    (folder / "text.txt").write_text("words and words\n")
    (folder / "sweep.toml").write_text(TINY + more)
    return load_sweep(folder / "sweep.toml")


def put_teacher(study: SweepStudy, scratch: Path, *, broken: bool = False) -> GPT2:
    """A teacher in the store, as if it had been trained."""
    config = study.first
    model = GPT2(dense_spec(config)).init_weights(seed=3)
    if broken:
        model.get_parameter("h.0.mlp.c_fc.weight").data.fill_(float("nan"))
    save_native(model, scratch)
    with Store(config.store).attempt(chain(config).teacher) as attempt:
        attempt.location.put_folder(scratch)
        attempt.publish(metrics={})
    return model


def test_before_there_is_anything_a_plan_knows_sizes_and_says_what_comes_first(tmp_path: Path):
    study = sweep(tmp_path)
    planned = plan(study, grid(study), probe=False)
    assert not (tmp_path / "store").exists(), "a plan without a teacher writes nothing"
    assert len(planned.trials) == 2 * (2 + 2 + 2 + 1)
    for row in planned.trials:
        assert row.size.parameters == outlook(row.trial.config).parameters
        assert row.size.macs_per_token == outlook(row.trial.config).macs_per_token
        assert (row.start.error, row.start.note) == (None, "after the teacher")
        assert (row.train_s, row.state, row.tokens) == (None, "missing", 256)
    assert planned.train_s is None
    assert planned.shared["teacher"] == (1, 0)
    assert planned.shared["stats"] == (2, 0), "one calibration per seed"
    shown = text(planned)
    assert all(row.trial.name in shown for row in planned.trials)
    assert all(reason in shown for reason in planned.space.removed)
    assert "first factor 5x5 does not fit a 16x64 weight" in shown


def test_with_a_teacher_the_start_is_that_of_a_decomposition(tmp_path: Path):
    study = sweep(tmp_path)
    teacher = put_teacher(study, tmp_path / "scratch")
    planned = {row.trial.name: row for row in plan(study, grid(study), probe=False).trials}
    for name, (m1, n1) in {"kron_vl 8x8 s0": (8, 8), "kron_vl 4x16 s1": (4, 16)}.items():
        lost = []
        for block in teacher.h:
            for layer, rows, cols in ((block.mlp.c_fc, m1, n1), (block.mlp.c_proj, n1, m1)):
                weight = layer.weight_matrix().detach().double().numpy()
                m, n = weight.shape
                blocks = weight.reshape(rows, m // rows, cols, n // cols).transpose(0, 2, 1, 3)
                values = np.linalg.svd(blocks.reshape(rows * cols, -1), compute_uv=False) ** 2
                lost.append(values[1:].sum() / values.sum())
        assert planned[name].start.error == pytest.approx(np.mean(lost), abs=1e-6)
        assert planned[name].start.metric == "frobenius"
    assert planned["kron_act 8x8 s0"].start.note == "after calibration"
    assert planned["dense s0"].start.error == 0.0
    assert planned["random_init 8x8 s0"].start.error == pytest.approx(2.0, abs=0.3)
    assert planned["random_init 8x8 s1"].start.note == "of another seed"
    store = Store(study.first.store)
    assert {record.kind for record in store.records()} == {"teacher", "init"}, "nothing else is built"
    made = len(store.records("init"))
    assert made == 2 + 2 + 1, "an init for every arm that needs the teacher alone"
    again = plan(study, grid(study), probe=False)
    assert len(store.records("init")) == made
    assert again.shared["init"] == (2 + 4 + 4 + 1, made)
    assert {row.trial.name: row.start for row in again.trials} == {
        name: row.start for name, row in planned.items()
    }


def test_when_the_time_for_decompositions_is_over_a_plan_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(planning, "PREDICT_S", -1.0)
    study = sweep(tmp_path)
    put_teacher(study, tmp_path / "scratch")
    notes = {
        row.trial.config.method.name: row.start.note for row in plan(study, grid(study), probe=False).trials
    }
    assert notes["kron_vl"] == "not decomposed yet"
    assert not Store(study.first.store).records("init")


def test_a_trained_trial_is_left_out_of_the_totals(tmp_path: Path):
    study = sweep(tmp_path)
    space = grid(study)
    with Store(study.first.store).attempt(chain(space.trials[0].config).run) as attempt:
        attempt.location.put_bytes("config.json", b"{}")
        attempt.publish(metrics={})
    planned = plan(study, space, probe=False)
    assert [row.state for row in planned.trials[:2]] == ["trained", "missing"]
    assert len(planned.left) == len(planned.trials) - 1
    assert as_json(planned)["totals"]["left"] == len(planned.left)


def test_times_follow_from_what_was_measured(tmp_path: Path):
    study = sweep(tmp_path)
    planned = plan(study, grid(study), probe=True)
    assert all(row.train_s and row.train_s > 0 and row.memory_bytes > 0 for row in planned.trials)
    by_arm = {row.trial.arm: row.train_s for row in planned.trials}
    assert all(row.train_s == by_arm[row.trial.arm] for row in planned.trials), "seeds share a measurement"
    assert planned.train_s == pytest.approx(sum(row.train_s or 0 for row in planned.trials))
    assert planned.wall_s is not None
    assert planned.wall_s >= planned.train_s / planned.resources.slots - 1e-9
    assert planned.teacher_s
    assert planned.resources.slots >= 1
    assert "random tokens" in text(planned)


def test_nothing_is_measured_for_gpus_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "_gpus", lambda: 0)
    study = sweep(tmp_path, f"ray = {{ workers = 2, gpus_per_worker = 1.0 }}\n{AXES}")
    planned = plan(study, grid(study), probe=True)
    assert planned.train_s is None
    assert not planned.resources.fits
    shown = text(planned)
    assert "trials ask for GPUs" in shown
    assert "not even one trial fits" in shown


def test_a_start_that_cannot_be_made_is_told_beforehand(tmp_path: Path):
    study = sweep(tmp_path, "[sweep]")
    put_teacher(study, tmp_path / "scratch", broken=True)
    planned = plan(study, grid(study), probe=False)
    (note,) = (row.start.note for row in planned.trials)
    assert note.startswith("fails: ")
    assert "\nfails     tiny: " in text(planned)


def question(study: SweepStudy, method: object, **changes: object) -> Question:
    config = study.config({"method": method, **{f"train.{key}": value for key, value in changes.items()}}, 0)
    size = outlook(config)
    assert size.plan
    return Question.of(size.plan.spec, config.train, workers=0, cpus=1, dense=size.dense)


def test_what_cannot_change_the_speed_shares_a_measurement(tmp_path: Path):
    study = sweep(tmp_path)
    vl, act = {"name": "kron_vl", "shape": [8, 8]}, {"name": "kron_act", "shape": [8, 8]}
    assert question(study, vl, lr=1e-3, max_steps=9) == question(study, act, warmup_steps=1)
    assert question(study, vl) != question(study, {"name": "kron_vl", "shape": [4, 16]})
    assert question(study, vl) != question(study, vl, objective="kd")
    assert question(study, vl) != question(study, vl, batch_tokens=128)


def test_what_is_not_measured_is_scaled_by_its_work_and_says_so(tmp_path: Path):
    study = sweep(tmp_path)
    shapes = ([8, 8], [4, 16], [16, 16])
    asked = [question(study, {"name": "kron_vl", "shape": shape}) for shape in shapes]
    other = question(study, {"name": "kron_vl", "shape": [8, 8]}, batch_tokens=128)
    answers = probe([*asked, other], within_s=0.0)
    measured = [each for each in asked if answers[each].is_measured]
    assert len(measured) == 1, "one of each batch is always measured"
    assert answers[other].is_measured
    (near,) = measured
    for each in asked:
        ratio = each.macs / near.macs
        assert answers[each].step_s == pytest.approx(answers[near].step_s * ratio)
        assert answers[each].validation_s == pytest.approx(answers[near].validation_s * ratio)
    assert all(pace.is_measured for pace in probe(asked, within_s=60.0).values())


def test_memory_counts_state_activations_and_the_teacher(tmp_path: Path):
    study = sweep(tmp_path)
    dense = dense_spec(study.first)
    train = TrainConfig(seq_len=32, batch_tokens=256, micro_batch=1, val_tokens=64, device="cpu")
    small = measure(Question.of(dense, train, workers=0, cpus=1, dense=dense)).memory_bytes
    wide = TrainConfig(seq_len=32, batch_tokens=256, micro_batch=8, val_tokens=64, device="cpu")
    large = measure(Question.of(dense, wide, workers=0, cpus=1, dense=dense)).memory_bytes
    state = 16 * dense.num_parameters()
    assert small > state
    assert large - state == pytest.approx(8 * (small - state), rel=0.05)
    taught = TrainConfig(
        seq_len=32, batch_tokens=256, micro_batch=1, val_tokens=64, device="cpu", objective="kd",
        distill=DistillConfig(hidden=1.0),
    )  # fmt: skip
    both = measure(Question.of(dense, taught, workers=0, cpus=1, dense=dense)).memory_bytes
    assert both >= small + 4 * dense.num_parameters()


@pytest.mark.parametrize("name", ["asha", "halving", "median"])
def test_early_stopping_keeps_between_the_first_rung_and_everything(name):
    rule = StopRule(name=name, grace_tokens=10, reduction=3)
    assert expected_tokens(rule, 10) == 10
    assert expected_tokens(rule, 90) < 90
    assert expected_tokens(rule, 90) > 10
    if name != "median":
        assert expected_tokens(rule, 90) == pytest.approx(10 + 20 / 3 + 60 / 9)


@pytest.mark.parametrize(("steps", "every", "count"), [(4, 2, 3), (5, 2, 4), (1, 50, 2), (0, 5, 1)])
def test_validations_are_the_first_those_due_and_the_last(steps, every, count):
    assert validations(TrainConfig(max_steps=steps, val_every=every)) == count


def test_the_verb_prints_a_plan_for_people_and_for_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    study = sweep(tmp_path)
    path = str(tmp_path / "sweep.toml")
    assert cli.main(["sweep", path, "--plan", "--no-probe", "--sweep.seeds", "[4]"]) == 0
    shown = capsys.readouterr().out
    assert "7 arms × 1 seed = 7 trials" in shown
    assert "kron_vl 8x8 s4" in shown
    assert cli.main(["sweep", path, "--plan", "--no-probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in found["trials"]] == [trial.key for trial in grid(study).trials]
    for row, trial in zip(found["trials"], grid(study).trials, strict=True):
        assert validate(row["config"], source="plan") == trial.config
    assert sum(each["count"] for each in found["removed"]) == 3 * 4 - 7
    assert cli.main(["sweep", path, "--plan", "--sweep.axis", "[4]"]) == 2
    assert "did you mean 'axes'?" in capsys.readouterr().err
    assert cli.main(["sweep", "--plan"]) == 2
    assert cli.main(["sweep", str(tmp_path / "sweeep.toml"), "--plan"]) == 2
    assert "did you mean sweep.toml?" in capsys.readouterr().err


def test_a_planned_init_is_the_one_that_a_run_would_start_from(tmp_path: Path):
    study = sweep(tmp_path)
    put_teacher(study, tmp_path / "scratch")
    planned = plan(study, grid(study), probe=False)
    row = planned.trials[0]
    init = Store(study.first.store).require(chain(row.trial.config).init)
    assert load_native(init.folder()).spec == (row.size.plan and row.size.plan.spec)


@pytest.mark.parametrize(("device", "slots", "gpus"), [("auto", 1, 1.0), ("cpu", 8, 0.0)])
def test_a_plan_counts_the_gpu_that_a_trial_will_hold(tmp_path, monkeypatch, device, slots, gpus):
    monkeypatch.setattr(planning, "_gpus", lambda: 1)
    monkeypatch.setattr(planning, "_cpus", lambda: 8)
    (tmp_path / "text.txt").write_text("words and words\n")
    (tmp_path / "sweep.toml").write_text(TINY + '[sweep.axes]\n"train.lr" = [1, 2, 3, 4, 5, 6, 7, 8, 9]\n')
    study = load_sweep(tmp_path / "sweep.toml", overrides=["--train.device", device])
    resources = plan(study, grid(study), probe=False).resources
    assert (resources.slots, resources.gpus) == (slots, gpus)
