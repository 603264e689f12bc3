"""`krony status` of a sweep: from the ledger alone, before, during and after."""

import json
from dataclasses import replace

import pytest

from jobs import status
from pipeline.config.schema import RayConfig
from pipeline.store.artifacts import Store
from pipeline.sweep.campaign import Campaign
from pipeline.sweep.identity import standing, sweep_identity
from pipeline.sweep.job import Outcome
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.space import space_of


@pytest.fixture
def study(sweep_lab, tmp_path):
    (tmp_path / "words.txt").write_text("one two")
    return sweep_lab.write(tmp_path, axes={"train.lr": [1e-3, 3e-3]}, seeds=[0, 1])


def begin(study) -> Campaign:
    with Store(study.first.store).attempt(sweep_identity(study), resume=True) as attempt:
        return Campaign(study.sweep, Ledger(attempt.location), space_of(study).trials, ray=RayConfig())


def test_every_trial_says_its_state_and_why(study, tmp_path, capsys):
    campaign = begin(study)
    assert status.main([study.source]) == 0
    assert "0 of 4 trials are over · none has started yet" in capsys.readouterr().out
    campaign.ledger.tell("session", slots=2)
    first, second, third, _ = campaign.book.entries.values()
    for _ in range(3):
        campaign.next()
    campaign.note_validations(first.key, [{"tokens": 512, "val_loss": 4.25}])
    campaign.ended(second.key, Outcome(state="failed", reason="step 3: the loss is not a finite number"))
    campaign.ended(third.key, Outcome(state="finished", val_loss=3.5, tokens=2048))
    assert status.main([study.source]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["running", "lr=0.001", "s0", "512/2,048", "tokens", "4.2500"]
    assert lines[1].endswith("step 3: the loss is not a finite number")
    assert lines[2].startswith("finished")
    assert lines[3].startswith("waiting")
    assert "2 of 4 trials are over · 1 failed (--retry-failed runs them again) · last heard of" in lines[4]
    assert status.main([study.source, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in shown["trials"]] == ["running", "failed", "finished", "waiting"]
    assert shown["published"] is False


def test_a_sweep_that_was_not_begun_says_so(study, capsys):
    assert status.main([study.source]) == 0
    assert "not begun" in capsys.readouterr().out
    assert standing(study).book.entries == {}


def test_another_axis_is_another_sweep_and_another_number_of_slots_is_not(study, sweep_lab, tmp_path):
    address = sweep_identity(study).address
    same = sweep_lab.write(tmp_path, axes={"train.lr": [1e-3, 3e-3]}, seeds=[0, 1], concurrent=1, retries=0)
    assert sweep_identity(same).address == address
    axes = {"train.lr": [1e-3, 3e-3], "train.weight_decay": [0.0, 0.1]}
    both = sweep_lab.write(tmp_path, axes=axes, seeds=[0, 1])
    turned = sweep_lab.write(tmp_path, axes=dict(reversed(axes.items())), seeds=[0, 1])
    stopped = sweep_lab.write(
        tmp_path, axes={"train.lr": [1e-3, 3e-3]}, seeds=[0, 1], stop={"name": "asha", "grace_tokens": 512}
    )
    assert len({address, *(sweep_identity(each).address for each in (both, turned, stopped))}) == 4


def test_trials_that_are_tried_again_are_shown_on_their_way(study, capsys):
    campaign = begin(study)
    with Store(study.first.store).attempt(sweep_identity(study), resume=True) as attempt:
        for key in list(campaign.book.entries):
            campaign.ended(key, Outcome(state="failed", reason="no luck"))
        attempt.location.put_bytes("trials.json", b"[]")
        attempt.publish(metrics={})
    assert standing(study).is_published
    begin(study).next()  # as `--retry-failed` does, in an attempt of its own
    now = standing(study)
    assert not now.is_published
    assert now.book.count("running") == 1


def test_other_words_in_a_file_of_an_axis_make_another_sweep(study, tmp_path):
    (tmp_path / "more.txt").write_text("three four")
    axes = {"corpus.paths": [[str(tmp_path / "words.txt")], [str(tmp_path / "more.txt")]]}
    both = replace(study, sweep=replace(study.sweep, axes=axes))
    before = sweep_identity(both).address
    assert sweep_identity(both).address == before
    (tmp_path / "more.txt").write_text("five six seven")
    assert sweep_identity(both).address != before
