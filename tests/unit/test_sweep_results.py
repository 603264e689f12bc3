"""Results of a sweep: the tidy table, the ranking and what may be said of it, effects, the best recipe."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats

from analysis.effects import before_stops, main_effects
from analysis.ranking import VALIDATION, Ranking, rank
from analysis.recipe import recipe
from analysis.stats import seeded_difference
from analysis.sweep_tables import endings_table, ranking_table
from analysis.sweeps import Sweep, axis_values, open_sweep, tidy
from analysis.tables import markdown, terminal
from analysis.traces import losses
from pipeline.chain import chain
from pipeline.config.load import load_study, to_json
from pipeline.errors import StoreError
from pipeline.store.artifacts import Store


@pytest.fixture(scope="module")
def store(sweep_store, tmp_path_factory) -> Store:
    """Nine arms of three seeds; two arms were stopped, one trial failed. Read only."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep_store.write_sweep(folder)
    return Store(folder)


@pytest.fixture(scope="module")
def sweep(store) -> Sweep:
    return open_sweep(store, "shapes")


@pytest.fixture(scope="module")
def ranking(store, sweep) -> Ranking:
    return ranked(store, sweep)


def ranked(store: Store, sweep: Sweep) -> Ranking:
    return rank(sweep, partial(losses, store), resamples=2000)


def invented(sweep_store: ModuleType, folder: Path, **settings) -> tuple[Store, Sweep]:
    """A sweep of its own."""
    sweep_store.write_sweep(folder, **settings)
    return Store(folder), open_sweep(Store(folder), settings.get("name", "shapes"))


def test_a_path_that_only_some_arms_have_belongs_to_the_axis_that_set_it(sweep_store, tmp_path):
    rows = []
    chosen = (
        {"method": {"name": "one"}, "method.shape": [8, 8], "train.lr": 1e-3},  # a method without terms
        {"method": {"name": "two"}, "method.shape": [8, 8], "method.terms": 1, "train.lr": 1e-3},
        {"method": {"name": "two"}, "method.shape": [8, 8], "method.terms": 2, "train.lr": 1e-3},
    )
    for number, choices in enumerate(chosen):
        row, _ = sweep_store.trial(tmp_path, "kron_vl", (256, 256), number, noise=0.1, unhappy=False)
        rows.append({**row, "key": f"k{number}", "arm": f"arm {number}", "choices": choices})
    axes = [["method", []], ["method.shape", {}], ["train.lr", []]]
    _, sweep = invented(sweep_store, tmp_path, methods=[], more=rows, name="terms")
    sweep = replace(sweep, record=replace(sweep.record, config={"sweep": {"axes": axes}}))
    assert sweep.axes == {"method": (), "method.shape": ("method.terms",), "train.lr": ()}
    assert list(axis_values(sweep, "train.lr").values()) == [1e-3] * 3


# --- the tidy table -----------------------------------------------------------------------------------------


def test_one_row_per_trial_with_its_choices_as_columns(sweep):
    table = tidy(sweep)
    assert len(table) == 27
    assert table["key"].is_unique
    assert set(table["method"]) == {"kron_vl", "kron_prune", "random_init"}
    assert set(table["method.shape"]) == {"256×256", "128×512", "64×1024"}
    assert dict(table["state"].value_counts()) == {"finished": 20, "stopped": 6, "failed": 1}
    finished = table[table["state"] == "finished"]
    assert finished["krony/wt103@ctx256 loss"].notna().all()
    assert table[table["state"] != "finished"]["reason"].str.len().gt(0).all()
    assert table[table["state"] == "failed"]["reason"].item().startswith("the loss is nan at step 90")


def test_what_did_not_finish_is_listed_with_its_reason(sweep):
    rows = [[cell.text for cell in row] for row in endings_table(sweep).rows]
    assert [row[:3] for row in rows] == [
        ["kron_vl 64x1024", "2", "failed"],
        ["random_init 128x512", "0, 1, 2", "stopped"],
        ["random_init 64x1024", "0, 1, 2", "stopped"],
    ]
    assert all("rung 196,608 tokens" in row[4] for row in rows[1:])


# --- the ranking --------------------------------------------------------------------------------------------


def test_arms_are_ranked_by_the_mean_of_their_seeds(sweep, ranking):
    assert ranking.measure == "krony/wt103@ctx256"
    whole = [arm for arm in ranking.arms if arm.rank and arm.is_whole]
    assert [arm.loss for arm in whole] == sorted(arm.loss for arm in whole)
    assert ranking.best.name == "kron_prune 256x256"
    table = tidy(sweep)
    for arm in whole:
        measured = table[table["arm"] == arm.name]["krony/wt103@ctx256 loss"].astype(float)
        known = scipy.stats.t.interval(0.95, 2, measured.mean(), scipy.stats.sem(measured))
        assert (arm.interval.low, arm.interval.high) == pytest.approx(known, abs=1e-8)


def test_an_arm_without_all_its_seeds_is_behind_and_never_best(ranking):
    order = [arm.name for arm in ranking.arms]
    part = next(arm for arm in ranking.arms if arm.name == "kron_vl 64x1024")
    assert part.loss < next(arm for arm in ranking.arms if arm.name == "random_init 256x256").loss
    assert order.index(part.name) == 6  # behind every whole arm, before those that never finished
    assert part.gap is None
    assert not part.is_best
    assert [arm.rank for arm in ranking.arms] == [1, 2, 3, 4, 5, 6, 7, 0, 0]


def test_a_gap_is_the_difference_of_seeds_and_text(store, sweep, ranking):
    best, other = ranking.arms[0], ranking.arms[2]
    read = [[losses(store, t.scores[ranking.measure]) for t in arm.trials] for arm in (best, other)]
    weights = np.ones(len(read[0][0]))
    units = [np.stack([each["nll"] / each["tokens"] for each in seeds]) for seeds in read]
    known = seeded_difference(units[1], units[0], weights, rng=np.random.default_rng(0), resamples=20_000)
    assert other.gap.estimate == pytest.approx(known.estimate)
    assert other.gap.low == pytest.approx(known.low, abs=2e-3)
    assert other.gap.high == pytest.approx(known.high, abs=2e-3)


def test_a_difference_that_seeds_do_not_carry_is_marked_nowhere(sweep_store, tmp_path):
    store, sweep = invented(
        sweep_store, tmp_path, methods=["kron_vl", "kron_prune"], noise=0.3, unhappy=False
    )
    found = ranked(store, sweep)
    assert all(arm.is_best for arm in found.arms)
    assert not found.tells_apart
    table = ranking_table(found)
    assert not any(cell.is_best for row in table.rows for cell in row)
    assert "**" not in markdown(table)
    assert "*" not in terminal(table).replace("best (*, bold)", "")


def test_only_what_is_not_worse_is_marked(ranking):
    assert ranking.tells_apart
    marked = {row[1].text for row in ranking_table(ranking).rows if any(cell.is_best for cell in row)}
    assert marked == {arm.name for arm in ranking.arms if arm.is_best} == {"kron_prune 256x256"}
    for arm in ranking.arms:
        assert arm.p_adjusted is None or (arm.p_adjusted < 0.05) == (not arm.is_best)


def test_nobody_beats_the_front(ranking):
    whole = [arm for arm in ranking.arms if arm.rank and arm.is_whole]
    for size in ("parameters", "macs_per_token"):
        front = [arm for arm in whole if size in arm.fronts]
        assert front
        for arm in whole:
            beaten = any(
                getattr(one, size) <= getattr(arm, size) and one.loss < arm.loss
                for one in front
                if one != arm
            )
            assert beaten == (arm not in front)


def test_equal_sizes_have_no_front(sweep_store, tmp_path):
    store, sweep = invented(sweep_store, tmp_path, shapes=[(256, 256)], unhappy=False)
    assert all(arm.fronts == () for arm in ranked(store, sweep).arms)


def test_without_scores_the_last_validation_ranks(sweep_store, tmp_path):
    store, sweep = invented(sweep_store, tmp_path, scored=False)
    found = ranked(store, sweep)
    assert found.measure == VALIDATION
    assert not found.knows_text
    assert found.best.name == "kron_prune 256x256"
    assert found.arms[0].loss == pytest.approx(np.mean([t.val_loss for t in found.arms[0].trials]))
    assert found.arms[2].gap is not None  # seeds alone carry it
    assert found.teacher_loss is None


def test_one_seed_without_windows_says_nothing_of_significance(sweep_store, tmp_path):
    store, sweep = invented(sweep_store, tmp_path, seeds=[0], unhappy=False, scored=False)
    found = ranked(store, sweep)
    assert all(arm.interval is None and arm.gap is None for arm in found.arms)
    assert [arm.is_best for arm in found.arms] == [True] + [False] * 8
    assert not any(cell.is_best for row in ranking_table(found).rows for cell in row)


def test_one_seed_with_windows_knows_the_text_and_says_what_it_does_not(sweep_store, tmp_path):
    store, sweep = invented(sweep_store, tmp_path, seeds=[0], unhappy=False)
    found = ranked(store, sweep)
    assert found.knows_text
    assert not found.knows_seeds
    assert found.arms[-1].p_adjusted < 0.05
    assert any("another seed may turn the order round" in note for note in ranking_table(found).notes)


def test_lost_windows_cost_the_text_alone(store, tmp_path):
    shutil.copytree(store.root.uri, tmp_path / "store")
    broken = Store(tmp_path / "store")
    record = next(r for r in broken.records("scores") if "kron_prune" in r.name)
    (tmp_path / "store" / record.address / record.attempt / "losses.parquet").write_bytes(b"no parquet")
    found = ranked(broken, open_sweep(broken, "shapes"))
    assert any("no losses per window" in problem for problem in found.problems)
    assert not found.knows_text
    assert found.arms[2].gap is not None


def test_a_lost_score_is_named_and_the_rest_is_ranked_by_validation(store, tmp_path):
    shutil.copytree(store.root.uri, tmp_path / "store")
    broken = Store(tmp_path / "store")
    record = next(r for r in broken.records("scores") if "kron_prune" in r.name)
    shutil.rmtree(tmp_path / "store" / record.address)
    sweep = open_sweep(broken, "shapes")
    assert any(record.address in problem for problem in sweep.problems)
    assert ranked(broken, sweep).measure == VALIDATION


# --- main effects -------------------------------------------------------------------------------------------


def test_effects_of_a_balanced_design_are_means_over_the_other_axes(sweep_store, tmp_path):
    store, sweep = invented(sweep_store, tmp_path, unhappy=False)
    arms = ranked(store, sweep).arms
    effects = {effect.axis: effect for effect in main_effects(sweep, arms)}
    assert set(effects) == {"method", "method.shape"}
    for axis, word in (("method", 0), ("method.shape", 1)):
        assert effects[axis].blocks == 3
        assert effects[axis].note == ""
        for level in effects[axis].levels:
            own = [arm for arm in arms if arm.name.split()[word] == level.text.replace("×", "x")]
            assert len(own) == 3
            assert level.loss == pytest.approx(np.mean([arm.loss for arm in own]))
            error = math.sqrt(sum(np.var(arm.losses, ddof=1) / 3 for arm in own)) / 3
            assert level.interval.high - level.loss > 1.96 * error
    method = {level.text: level for level in effects["method"].levels}
    assert method["kron_prune"].is_best
    assert method["random_init"].p_adjusted < 0.001
    assert method["kron_vl"].gap.estimate == pytest.approx(0.05, abs=0.02)


def test_an_unbalanced_design_compares_on_equal_ground_and_says_so(sweep, ranking):
    effects = {effect.axis: effect for effect in main_effects(sweep, ranking.ranked)}
    method = effects["method"]
    assert method.blocks == 1  # of 256×256 alone all three methods finished
    assert "unbalanced: 3 of 6 arms" in method.note
    by_name = {arm.name: arm for arm in ranking.arms}
    for level in method.levels:
        assert level.loss == by_name[f"{level.text} 256x256"].loss


def test_effects_before_anyone_was_stopped_are_balanced(sweep_store, sweep):
    tokens, arms = before_stops(sweep)
    assert tokens == sweep_store.RUNGS[0]
    assert all(arm.is_whole for arm in arms)
    assert all(effect.note == "" for effect in main_effects(sweep, arms))


def test_nobody_stopped_has_no_early_effects(sweep_store, tmp_path):
    _, sweep = invented(sweep_store, tmp_path, unhappy=False, scored=False)
    assert before_stops(sweep) == (0, ())


def test_a_value_without_the_other_axis_is_left_out_by_name(sweep_store, tmp_path):
    row, _ = sweep_store.trial(tmp_path, "kron_vl", (256, 256), 0, noise=0.01, unhappy=False)
    extra = [
        {**row, "key": f"svd{s}", "name": f"svd s{s}", "arm": "svd", "seed": s, "choices": {"method": "svd"}}
        for s in range(3)
    ]
    store, sweep = invented(sweep_store, tmp_path, unhappy=False, scored=False, more=extra)
    effects = {effect.axis: effect for effect in main_effects(sweep, ranked(store, sweep).arms)}
    assert {level.text for level in effects["method"].levels} == {"kron_vl", "kron_prune", "random_init"}
    assert "left out, as no combination has it and all others: svd" in effects["method"].note


def test_arms_that_share_nothing_have_no_effects(sweep_store, tmp_path):
    drawn = []
    for number, lr in enumerate((1e-4, 3e-4, 9e-4)):
        row, _ = sweep_store.trial(tmp_path, "kron_vl", (256, 256), 0, noise=0.01, unhappy=False)
        choices = {"train.lr": lr, "train.warmup_steps": number}
        drawn.append(
            {**row, "key": f"k{number}", "name": f"lr={lr} s0", "arm": f"lr={lr}", "choices": choices}
        )
    sweep_store.write_sweep(tmp_path, methods=[], more=drawn, name="drawn")
    record = tmp_path / open_sweep(Store(tmp_path), "drawn").record.address / "record.json"
    table = json.loads(record.read_text())
    del table["seal"]
    table["config"]["sweep"]["axes"] = [["train.lr", {}], ["train.warmup_steps", {}]]
    record.write_text(json.dumps(table))
    sweep = open_sweep(Store(tmp_path), "drawn")
    found = main_effects(sweep, ranked(Store(tmp_path), sweep).arms)
    assert all(effect.levels == () for effect in found)
    assert all("no effect of its own" in effect.note for effect in found)


def test_a_shape_and_its_terms_are_one_axis(sweep_store, tmp_path):
    rows = []
    for terms, seed in ((1, 0), (1, 1), (2, 0), (2, 1)):
        row, _ = sweep_store.trial(tmp_path, "kron_vl", (256, 256), seed, noise=0.01, unhappy=False)
        choices = {"method.shape": [256, 256], "method.terms": terms}
        arm = f"256x256 r={terms}"
        loss = row["val_loss"] - terms / 10
        extra = {"key": f"{terms}{seed}", "name": f"{arm} s{seed}", "arm": arm, "choices": choices}
        rows.append({**row, **extra, "val_loss": loss})
    sweep_store.write_sweep(tmp_path, methods=[], more=rows, name="terms")
    sweep = open_sweep(Store(tmp_path), "terms")
    assert sweep.axes == {"method.shape": ("method.terms",)}
    (effect,) = main_effects(sweep, ranked(Store(tmp_path), sweep).arms)
    assert [level.text for level in effect.levels] == ["256×256 terms=1", "256×256 terms=2"]
    assert list(tidy(sweep)["method.terms"]) == [1, 1, 2, 2]


# --- finding a sweep ----------------------------------------------------------------------------------------


def test_a_sweep_is_found_by_name_and_by_address(store, sweep):
    assert open_sweep(store, sweep.record.address).record == sweep.record
    with pytest.raises(StoreError, match=r"no finished sweep 'shape'; there are: shapes \(sweep/shapes-"):
        open_sweep(store, "shape")


def test_of_namesakes_the_newest_is_taken_and_the_others_are_named(sweep_store, tmp_path):
    first = sweep_store.write_sweep(tmp_path, scored=False, seeds=[0])
    second = sweep_store.write_sweep(tmp_path, scored=False, seeds=[0, 1])
    path = tmp_path / first.record.address / "record.json"
    table = json.loads(path.read_text()) | {"finished": "2001-01-01T00:00:00+00:00"}
    del table["seal"]
    path.write_text(json.dumps(table))
    sweep = open_sweep(Store(tmp_path), "shapes")
    assert sweep.record.address == second.record.address
    assert any(first.record.address in problem for problem in sweep.problems)


def test_a_sweep_on_its_way_says_how_to_end_it(sweep_store, tmp_path):
    artifact = sweep_store.write_sweep(tmp_path, scored=False)
    (tmp_path / artifact.record.address / "record.json").unlink()
    with pytest.raises(StoreError, match="was begun: the same `krony sweep` goes on from there"):
        open_sweep(Store(tmp_path), "shapes")


def test_a_damaged_list_of_trials_is_one_line(sweep_store, tmp_path):
    artifact = sweep_store.write_sweep(tmp_path, scored=False, more=[{"key": "0", "state": "lost"}])
    with pytest.raises(StoreError, match=rf"{artifact.record.address}/trials.json: not a list of trials"):
        open_sweep(Store(tmp_path), "shapes")


# --- the best recipe ----------------------------------------------------------------------------------------


def test_the_best_recipe_is_the_config_of_the_best_trial(sweep, ranking, tmp_path):
    trial = ranking.best.trials[0]
    path = tmp_path / "best.toml"
    path.write_text(recipe(sweep.configs[trial.key], about="why\nand how"))
    assert path.read_text().startswith("# why\n# and how\n\nname = ")
    (config,) = load_study(path).configs
    assert to_json(config) == sweep.configs[trial.key]
    assert config.method.name == "kron_prune"
    assert chain(config).run.address.startswith("run/kron_prune-s0-")
