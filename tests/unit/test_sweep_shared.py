"""What trials share: one that cannot be built costs those that need it, and nobody else."""

import pytest

from pipeline import stages
from pipeline.chain import Chains
from pipeline.errors import DataError, Interrupted
from pipeline.sweep.shared import build_base
from pipeline.sweep.space import space_of
from pipeline.work import Work


@pytest.fixture
def study(sweep_lab, tmp_path):
    (tmp_path / "words.txt").write_text("one two")
    return sweep_lab.write(tmp_path, axes={"teacher.n_layer": [1, 2, 3], "train.lr": [1e-3, 3e-3]})


def build(study, monkeypatch, *, lost: dict[int, Exception]) -> tuple[dict[str, str], list[int]]:
    """Build the bases where teachers of some depths raise; the failed trials, and what was built."""
    built: list[int] = []

    def teacher(work: Work) -> None:
        if err := lost.get(work.config.teacher.n_layer):
            raise err
        built.append(work.config.teacher.n_layer)

    monkeypatch.setattr(stages, "tokens", lambda work: None)
    monkeypatch.setattr(stages, "teacher", teacher)
    monkeypatch.setattr(stages, "scores", lambda work, of_teacher: None)
    configs = {trial.name: trial.config for trial in space_of(study).trials}
    return build_base(configs, chains=Chains(), quiet=True), built


def test_each_is_built_once(study, monkeypatch):
    assert build(study, monkeypatch, lost={}) == ({}, [1, 2, 3])


def test_one_that_cannot_be_built_costs_its_trials(study, monkeypatch):
    failed, built = build(study, monkeypatch, lost={2: DataError("no\n such file")})
    assert built == [1, 3]
    assert len(failed) == 2
    assert all("n_layer=2" in name and reason == "no such file" for name, reason in failed.items())


def test_where_none_can_be_built_there_is_no_sweep(study, monkeypatch):
    with pytest.raises(DataError, match="third"):
        build(
            study,
            monkeypatch,
            lost={n: DataError(name) for n, name in enumerate(("", "first", "second", "third"))},
        )


def test_a_stop_is_no_failure(study, monkeypatch):
    with pytest.raises(Interrupted):
        build(study, monkeypatch, lost={1: Interrupted("stop")})
