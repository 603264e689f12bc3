"""A guided search goes on from the ledger alone, never draws twice, and finds what is good."""

import itertools
import sys
from dataclasses import replace

import pytest

from pipeline.config.schema import RayConfig
from pipeline.errors import ConfigError, PreflightError
from pipeline.store.location import Location
from pipeline.sweep.campaign import Campaign
from pipeline.sweep.guided import Guide, arms
from pipeline.sweep.job import Outcome
from pipeline.sweep.ledger import Ledger

AXES = {"method": ["kron_vl", "dense"], "train.lr": [1e-4, 1e-3, 1e-2], "train.weight_decay": [0.0, 0.1]}


def loss(config) -> float:
    return (
        3.0 + abs(config.train.lr - 1e-3) * 100 + (config.method.name == "dense") + config.train.weight_decay
    )


def advance(study, place: Location, *, steps: int, states=("finished",)) -> Campaign:
    """Do some jobs, one at a time, as one driver."""
    ledger = Ledger(place, clock=itertools.count(0.0).__next__)
    guide = Guide(study)
    campaign = Campaign(study.sweep, ledger, guide.known(ledger.book), ray=RayConfig(), proposer=guide)
    ledger.tell("session", slots=1)
    for _, state in zip(range(steps), itertools.cycle(states), strict=False):
        if (job := campaign.next()) is None:
            break
        value = loss(job.config)
        campaign.note_validations(job.key, [{"tokens": 64, "val_loss": value}])
        outcome = Outcome(state=state, tokens=64, val_loss=value, parameters=round(1e6 / value))
        campaign.ended(job.key, replace(outcome, val_loss=None) if state == "failed" else outcome)
    return campaign


@pytest.fixture
def study(sweep_lab, tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "words.txt").write_text("one two")
    return sweep_lab.write(tmp_path, axes=AXES, search="tpe", samples=7, seeds=[0, 1])


def picks(campaign: Campaign) -> list[tuple]:
    return [tuple(sorted(entries[0].picks.items())) for entries in arms(campaign.book).values()]


def test_it_draws_so_many_different_arms_each_with_all_seeds(study, tmp_path):
    campaign = advance(study, Location(str(tmp_path / "a")), steps=99)
    drawn = arms(campaign.book)
    assert len(drawn) == 7
    assert all([e.seed for e in entries] == [0, 1] for entries in drawn.values())
    assert len(set(picks(campaign))) == 7
    assert campaign.is_complete


@pytest.mark.parametrize("kill_at", [1, 4, 9])
def test_a_killed_search_draws_what_it_would_have_drawn(study, tmp_path, kill_at):
    states = ("finished", "finished", "stopped", "finished", "failed", "finished")
    whole = advance(study, Location(str(tmp_path / "whole")), steps=99, states=["finished"])
    place = Location(str(tmp_path / "killed"))
    advance(study, place, steps=kill_at)
    again = advance(study, place, steps=99)
    assert picks(again) == picks(whole)
    assert len(picks(advance(study, Location(str(tmp_path / "mixed")), steps=99, states=states))) == 7


def test_two_objectives(sweep_lab, tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "words.txt").write_text("one two")
    study = sweep_lab.write(tmp_path, axes=AXES, search="pareto", samples=5)
    campaign = advance(
        study, Location(str(tmp_path / "a")), steps=99, states=("finished", "stopped", "failed")
    )
    assert len(arms(campaign.book)) == 5


@pytest.mark.parametrize("search", ["tpe", "pareto"])
def test_a_search_that_has_found_the_best_goes_on_to_draw_all_that_was_asked_for(sweep_lab, tmp_path, search):
    pytest.importorskip("optuna")
    (tmp_path / "words.txt").write_text("one two")
    axes = AXES | {"train.lr": [1e-4, 3e-4, 1e-3, 1e-2], "train.warmup_steps": [0, 1]}
    study = sweep_lab.write(tmp_path, axes=axes, search=search, samples=30)
    campaign = advance(study, Location(str(tmp_path / "a")), steps=99)
    assert len(arms(campaign.book)) == 30


def test_a_space_that_is_used_up_ends_the_search(sweep_lab, tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "words.txt").write_text("one two")
    study = sweep_lab.write(tmp_path, axes={"train.lr": [1e-3, 1e-2]}, search="tpe", samples=9)
    campaign = advance(study, Location(str(tmp_path / "a")), steps=99)
    assert len(arms(campaign.book)) == 2
    assert campaign.is_complete


def test_what_trials_share_is_known_before_they_are_drawn(study):
    listed = {
        "teacher.n_layer": [1, 2],
        "data.shard_tokens": [10**7, 10**8],
        "train.lr": {"low": 1e-4, "high": 1e-2},
    }
    bases = Guide(replace(study, sweep=replace(study.sweep, axes=listed))).bases.values()
    found = {(config.teacher.n_layer, config.data.shard_tokens) for config in bases}
    assert found == {(1, 10**7), (1, 10**8), (2, 10**7), (2, 10**8)}
    ranged = {"teacher.n_layer": {"low": 1, "high": 9}}
    with pytest.raises(ConfigError, match=r"teacher\.n_layer: trials share .* list its values"):
        Guide(replace(study, sweep=replace(study.sweep, axes=ranged)))


def test_without_optuna_there_is_one_clear_line(sweep_lab, tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("one two")
    study = sweep_lab.write(tmp_path, axes=AXES, search="tpe", samples=7)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(PreflightError, match="pip install optuna"):
        Guide(study)
