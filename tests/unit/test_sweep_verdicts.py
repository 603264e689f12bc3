"""Verdicts of early stopping: the same after a restart, and only on points that can be compared."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.schema import RayConfig
from pipeline.errors import Interrupted
from pipeline.store.location import Location
from pipeline.sweep.campaign import Campaign
from pipeline.sweep.job import Outcome, Told
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.space import space_of

RULES = {"asha": {"name": "asha", "grace_tokens": 500, "reduction": 2}}
RULES["median"] = {**RULES["asha"], "name": "median"}


class Asked:
    """A board that only remembers."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def ask(self, key: str, why: str) -> None:
        assert why == "rule"
        self.keys.append(key)


class Driver:
    """One session of a sweep of four trials of 2,048 tokens, in batches of 128."""

    def __init__(self, study, place) -> None:
        from pipeline.sweep.tuning import Verdicts

        ledger = Ledger(Location(str(place)), clock=itertools.count(0.0).__next__)
        self.campaign = Campaign(study.sweep, ledger, space_of(study).trials, ray=RayConfig())
        self.board = Asked()
        self.verdicts = Verdicts(self.campaign, self.board, self.campaign.rule)

    def hear(self, number: int, tokens: int, loss: float) -> None:
        job = SimpleNamespace(key=self.keys[number])
        row = {"tokens": tokens, "val_loss": loss}
        trial = SimpleNamespace(config={"job": job})
        assert self.verdicts.on_trial_result(None, trial, {"told": Told("train", (row,), 1)}) == "CONTINUE"
        self.campaign.note_validations(job.key, [row])

    @property
    def keys(self) -> list[str]:
        return list(self.campaign.book.entries)

    @property
    def asked(self) -> list[int]:
        return [self.keys.index(key) for key in self.board.keys]


@pytest.fixture
def study(sweep_lab, tmp_path, request):
    (tmp_path / "words.txt").write_text("one two")
    axes = {"train.lr": [1e-3, 2e-3, 3e-3, 4e-3]}
    return sweep_lab.write(tmp_path, axes=axes, stop=RULES[getattr(request, "param", "asha")])


@pytest.mark.parametrize("study", ["asha", "median"], indirect=True)
def test_a_verdict_that_a_dead_driver_did_not_see_through_stands(study, tmp_path):
    first = Driver(study, tmp_path / "ledger")
    for number, loss in enumerate((3.0, 3.1, 3.2, 9.0)):
        first.hear(number, 512, loss)
    assert 3 in first.asked
    again = Driver(study, tmp_path / "ledger")
    assert again.asked == first.asked
    assert again.verdicts.reasons == first.verdicts.reasons
    rule = study.sweep.stop.name
    assert again.verdicts.reasons[again.keys[3]] == (
        f"{rule}: validation loss 9.0000 at 512 tokens, others are better"
    )
    for number in first.asked:
        again.campaign.ended(again.keys[number], Outcome(state="stopped", tokens=512))
    assert Driver(study, tmp_path / "ledger").asked == []


def test_a_later_loss_does_not_stand_for_an_earlier_one(study, tmp_path):
    driver = Driver(study, tmp_path / "ledger")
    for number in (0, 1):
        driver.hear(number, 1536, 1.0)  # trained before, and not validated at 512 tokens
        driver.hear(number, 2048, 1.0)
    driver.hear(2, 512, 3.0)
    assert driver.asked == []
    driver.hear(3, 512, 3.1)
    assert driver.asked == [3]


@pytest.mark.parametrize("statuses", [["PENDING"], ["TERMINATED", "PENDING"], ["RUNNING", "PENDING"]])
def test_a_sweep_that_is_told_to_end_does_not_wait_for_trials_that_wait_for_machines(statuses: list[str]):
    from pipeline.sweep.tuning import Ears

    told: list[str] = []
    nothing: Any = SimpleNamespace(ask_all=told.append)
    campaign: Any = SimpleNamespace(is_stopping=False, running={"a": "job"})
    ears = Ears(campaign, nothing, nothing, nothing, nothing, should_stop=lambda: True, silence_s=900.0)
    ears._looked = -math.inf
    trials = [SimpleNamespace(status=status, config={"job": SimpleNamespace(key="b")}) for status in statuses]
    if "RUNNING" in statuses:  # it hears, saves and leaves
        ears.on_step_begin(1, trials)
    else:
        with pytest.raises(Interrupted):
            ears.on_step_begin(1, trials)
    assert told == ["shutdown"]
    assert ears.is_alone is ("RUNNING" not in statuses)
