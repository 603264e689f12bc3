"""A trial as work of a thread: the numbers of the plain chain, an exact pause, a stop at the judged step."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline import stages
from pipeline.config.schema import RunConfig, TrackingConfig
from pipeline.errors import Interrupted
from pipeline.store.records import Record
from pipeline.sweep.job import Channel, Job, Outcome, found, perform, validations
from pipeline.sweep.space import space_of
from pipeline.work import Work


@pytest.fixture(scope="module")
def base(sweep_lab, tmp_path_factory):
    study = sweep_lab.build(tmp_path_factory.mktemp("sweep"))
    stages.teacher(Work.on(study.first, quiet=True))
    return study


@pytest.fixture
def trial(base, tmp_path) -> Callable[..., RunConfig]:
    """A trial of the study, on a store of its own in which no trial was run."""

    def config(number: int = 0, place: str = "own", **train: object) -> RunConfig:
        config = space_of(base).trials[number].config
        store = tmp_path / place
        if not store.exists():
            shutil.copytree(config.store, store)
        return replace(config, store=str(store), train=replace(config.train, **train))

    return config


def job(config: RunConfig, **more: object) -> Job:
    return Job(key="k", config=replace(config, tracking=TrackingConfig(uri="off")), **more)


def listen_while(job: Job, channel: Channel, *, stop_at: int = 0) -> tuple[Outcome, list[dict]]:
    """Perform a job in a thread and listen as its actor does; ask it to stop at `stop_at` tokens."""
    ended: list[Outcome] = []
    thread = threading.Thread(target=lambda: ended.append(perform(job, channel)))
    thread.start()
    rows: list[dict] = []
    while thread.is_alive():
        told = channel.listen(0.5)
        rows += told.rows
        if stop_at and any(row["tokens"] >= stop_at and "val_loss" in row for row in told.rows):
            channel.ask_stop("rule")
    thread.join()
    return ended[0], rows + list(channel.listen(0.0).rows)


def losses(rows) -> list[tuple[int, float]]:
    return [(int(row["tokens"]), row["val_loss"]) for row in rows if "val_loss" in row]


def record_of(config: RunConfig) -> Record:
    work = Work.on(config, quiet=True)
    return work.store.require(work.chain.run).record


def test_a_trial_is_the_plain_chain(trial):
    config = trial()
    outcome, rows = listen_while(job(config), Channel())
    work = Work.on(config, quiet=True)
    assert outcome.state == "finished"
    assert outcome.scores == {p: identity.address for p, identity in work.chain.scores.items()}
    assert all(work.store.find(identity) for identity in (work.chain.model, *work.chain.scores.values()))
    assert found(work) == replace(outcome, train_s=0.0)
    assert losses(validations(work)) == losses(rows)

    plain = Work.on(trial(place="plain"), quiet=True)
    stages.scores(plain)
    mine, theirs = record_of(config), record_of(plain.config)
    assert mine.address == theirs.address
    assert mine.metrics == theirs.metrics
    assert mine.files["model.safetensors"] == theirs.files["model.safetensors"]
    for protocol, score in plain.chain.scores.items():
        assert (
            plain.store.require(score).record.metrics
            == work.store.open(outcome.scores[protocol]).record.metrics
        )


def test_a_pause_at_a_rung_costs_no_digit(trial):
    config, whole = trial(1), trial(1, "whole")
    rungs, end = (128 * 3, 128 * 8), 128 * 16  # the first lies between two validations of train.val_every
    told: list[tuple[int, float]] = []
    for until, state in ((rungs[0], "paused"), (rungs[0], "paused"), (rungs[1], "paused"), (0, "finished")):
        outcome, rows = listen_while(job(config, rungs=rungs, until=until), Channel())
        told += [point for point in losses(rows) if point not in told]
        assert (outcome.state, outcome.tokens) == (state, until or end)
    stages.run(Work.on(whole, quiet=True))
    mine, theirs = record_of(config), record_of(whole)
    assert mine.metrics == theirs.metrics
    assert mine.files["model.safetensors"] == theirs.files["model.safetensors"]
    assert [tokens for tokens, _ in told] == sorted({0, *rungs, *range(512, end + 1, 512)})


def test_a_judged_trial_ends_at_the_step_that_was_judged(trial):
    config = trial(2, log_every=16)  # without waiting it would run on to the next poll
    outcome, rows = listen_while(job(config, waits=True), Channel(), stop_at=512)
    assert (outcome.state, outcome.tokens) == ("stopped", 512)
    assert losses(rows)[-1][0] == 512
    work = Work.on(config, quiet=True)
    assert work.store.find(work.chain.run) is None
    assert outcome.run == work.chain.run.address  # where `krony train` goes on
    assert outcome.init == work.chain.init.address


def test_a_trial_that_diverges_is_a_result(trial):
    outcome, _ = listen_while(job(trial(lr=1e30, grad_clip=0.0)), Channel())
    assert outcome.state == "failed"
    assert "not a finite number" in outcome.reason
    assert "\n" not in outcome.reason


def test_a_trial_whose_input_is_bad_is_a_result(trial):
    config = trial()
    work = Work.on(config, quiet=True)
    work.store.require(work.chain.tokens).path("train-00000.bin").unlink()
    outcome, _ = listen_while(job(config), Channel())
    assert outcome.state == "failed"
    assert "train-00000.bin" in outcome.reason


def test_a_trial_that_ends_before_it_is_scored_is_scored_the_next_time(trial):
    config, channel = trial(), Channel()

    def finish(config: RunConfig) -> None:
        channel.ask_stop("shutdown")
        raise Interrupted("the sweep ended")

    outcome = perform(job(config), channel, finish=finish)
    work = Work.on(config, quiet=True)
    assert outcome.state == "interrupted"
    assert outcome.run == work.store.require(work.chain.run).record.address
    assert outcome.tokens == config.train.max_steps * config.train.batch_tokens
    again = perform(job(config), Channel())
    assert (again.state, again.run, again.tokens) == ("finished", outcome.run, outcome.tokens)


def test_a_bug_is_raised_and_the_listener_does_not_hang(trial, monkeypatch):
    def broken(work: Work) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(stages, "run", broken)
    channel = Channel()
    with pytest.raises(ZeroDivisionError):
        perform(job(trial()), channel)
    assert channel.listen(60.0).stage == "train"


def test_a_stop_during_a_wait_lets_the_trial_go():
    channel = Channel()
    thread = threading.Thread(
        target=lambda: channel.row({"step": 1, "tokens": 8, "val_loss": 1.0}, wait=True)
    )
    thread.start()
    assert len(channel.listen(10.0).rows) == 1  # waits for an answer
    assert thread.is_alive()
    channel.ask_stop("rule")
    thread.join(10.0)
    assert not thread.is_alive()
    channel.ask_stop("shutdown")
    assert channel.why == "rule"


def test_a_trial_that_waits_before_anyone_listens_is_heard_before_it_goes_on():
    channel = Channel()
    row = {"step": 1, "tokens": 8, "val_loss": 1.0}
    thread = threading.Thread(target=lambda: channel.row(row, wait=True))
    thread.start()
    while not channel._is_waiting:
        time.sleep(0.001)
    assert channel.listen(10.0).rows == (row,)
    thread.join(0.2)
    assert thread.is_alive()  # nobody has judged the row yet
    channel.leave()
    assert channel.listen(10.0).rows == ()  # the answer
    thread.join(10.0)
    assert not thread.is_alive()
