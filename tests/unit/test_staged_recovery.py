"""Compression in stages: each starts from the recovered model of the one before, as TQCompressor does it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.algebra.kron import nearest_kron
from model.algebra.permute_columns import halved_columns
from model.algebra.shapes import KronShape
from model.compress.budget import Budget
from model.compress.kron_recipe import TQCompressor
from model.compress.methods import make_method
from model.config import SIZES, Kron, ModelSpec
from model.export import load_native
from pipeline import stages
from pipeline.chain import chain, earlier, train_tokens
from pipeline.config.identity import identity_fields
from pipeline.config.load import load_study
from pipeline.config.schema import BudgetConfig
from pipeline.config.training import DistillConfig
from pipeline.sweep.space import space_of
from pipeline.work import Work

CONFIGS = Path(__file__).parents[2] / "configs" / "gpt2"
SIZES_OF_STAGES = {"table": 143_738_498, "mlp": 129_583_106, "inner": 119_933_764}


def test_every_stage_has_its_exact_size_from_the_teacher_and_from_the_stage_before() -> None:
    dense = before = ModelSpec.dense(SIZES["gpt2"])
    for stage, size in SIZES_OF_STAGES.items():
        method = make_method(TQCompressor(stage=stage))
        plan = method.plan(before, Budget())
        assert plan.spec == method.plan(dense, Budget()).spec
        assert plan.num_parameters == size
        assert bool(plan.changed()) == (stage == "mlp")
        before = plan.spec
    assert before == make_method(TQCompressor()).plan(dense, Budget()).spec


def test_a_product_is_halved_with_its_columns_left_together() -> None:
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    short = torch.tensor([[0.6, -1.7]], dtype=torch.float64)
    groups = torch.randperm(16, generator=generator).reshape(8, 2)
    weight = torch.empty(40, 16, dtype=torch.float64)
    weight[:, groups.reshape(-1)] = torch.kron(inner, short)
    found = halved_columns(weight, times=1, groups=groups, random_starts=2)
    alone = halved_columns(inner, times=1, random_starts=2)
    # the error of a product is that of its inner table, times the size of its short row
    assert found.fit.error == pytest.approx(alone.fit.error * float(short.square().sum()), rel=1e-9)
    pairs = {tuple(pair) for pair in groups.tolist()}
    assert {tuple(pair) for pair in found.order.reshape(-1, 2).tolist()} == pairs
    assert found.fit.error <= nearest_kron(inner, KronShape(40, 4, 1, 2), terms=1).error * 3.25 * (1 + 1e-9)


def test_only_a_later_stage_has_one_before_it_and_all_at_once_keeps_its_address() -> None:
    config = load_study(CONFIGS / "tqcompressor.toml").first
    assert earlier(config) is None
    assert earlier(replace(config, method=TQCompressor(stage="table"))) is None
    assert "stage" not in identity_fields(config.method)
    links = chain(config)
    assert links.before is None
    assert set(links.init.inputs) == {"teacher"}


def test_recipes_of_the_rivals_hold_their_losses_and_stages() -> None:
    kngpt2 = load_study(CONFIGS / "kngpt2-published.toml").first
    assert kngpt2.train.objective == "kd"
    assert kngpt2.train.distill == DistillConfig(alpha=1.0, hidden=1.0, attention=1.0, embedding=1.0)
    assert train_tokens(kngpt2) == pytest.approx(903_558_220, rel=1e-3)
    last = load_study(CONFIGS / "tqcompressor-published.toml").first
    assert (last.train.objective, last.train.distill) == ("kd", DistillConfig(alpha=0.5, temperature=2.0))
    assert train_tokens(last) == pytest.approx(280e6, rel=1e-2)
    found, config = [], last
    while config is not None:
        assert config.train == last.train
        assert config.train.warmup_steps < config.train.max_steps
        found.append((config.method.stage, config.budget))
        config = earlier(config)
    assert found == [("inner", last.budget), ("mlp", BudgetConfig()), ("table", BudgetConfig())]
    kinds = [identity.kind for identity in chain(last).identities()]
    assert [kind for kind in kinds if kind in ("init", "run", "model")] == [*("init", "run") * 3, "model"]
    links = chain(last)
    assert links.before is not None
    assert dict(links.init.inputs) == {"teacher": links.teacher, "before": links.before.run}


# --- the real chain, tiny -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(sweep_lab, tmp_path_factory):
    return sweep_lab.build(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def trained(study):
    """The three stages, four steps each, of a tiny teacher."""
    train = replace(study.first.train, max_steps=4, objective="kd", warmup_steps=1)
    work = Work.on(replace(study.first, method=TQCompressor(stage="inner"), train=train), quiet=True)
    stages.run(work)
    return work


def folder_of(work, identity) -> dict[str, torch.Tensor]:
    """The weights of a native folder in the store."""
    return load_native(work.store.require(identity).folder()).state_dict()


def test_a_stage_changes_what_it_is_for_and_keeps_all_that_was_recovered(trained) -> None:
    links = trained.chain
    second, first = links.before, links.before.before
    assert first.before is None
    for chain_of, before, touched in (
        (first, links.teacher, ("wte.", "lm_head.")),
        (second, first.run, ("h.1.mlp.",)),
        (links, second.run, ("wte.",)),
    ):
        old, new = folder_of(trained, before), folder_of(trained, chain_of.init)
        same = [name for name in new if name in old and torch.equal(new[name], old[name])]
        changed = sorted(set(new) - set(same))
        assert changed
        assert all(name.startswith(touched) for name in changed)
        recovered = folder_of(trained, chain_of.run)
        assert any(not torch.equal(recovered[name], new[name]) for name in same)  # it was trained


def test_the_last_stage_is_a_halving_of_the_recovered_table(trained) -> None:
    links = trained.chain
    old, new = (load_native(trained.store.require(i).folder()) for i in (links.before.run, links.init))
    assert isinstance(new.spec.embedding, Kron)
    assert (new.spec.embedding.n1, new.spec.embedding.n2) == (4, 4)
    table, left = (model.wte.table().detach().double() for model in (old, new))
    (row,) = json.loads(trained.store.require(links.init).path("report.json").read_text())
    assert row["name"] == "wte"
    assert row["predicted_error"] == pytest.approx(float((left - table).square().sum()), rel=1e-4)
    fixed = halved_columns(table, times=1, groups=old.wte.gather_out.argsort().reshape(8, 2), random_starts=0)
    assert row["predicted_error"] <= fixed.fit.error * (1 + 1e-6)


def test_records_count_the_steps_and_tokens_of_all_stages_and_name_where_they_start(trained) -> None:
    links = trained.chain
    run, init = (trained.store.require(identity).record for identity in (links.run, links.init))
    assert (run.metrics["steps"], run.metrics["tokens"]) == (12, 12 * 128)
    assert run.metrics["tokens"] == train_tokens(trained.config)
    assert (init.metrics["steps_before"], init.metrics["tokens_before"]) == (8, 8 * 128)
    assert init.inputs["before"].address == links.before.run.address
    assert init.inputs["teacher"].address == links.teacher.address
    teacher = trained.store.require(links.teacher).record
    assert init.metrics["dense_parameters"] == teacher.metrics["parameters"]


def test_a_sweep_refuses_a_later_stage(study, sweep_lab, tmp_path) -> None:
    axes = {"method": ["tqcompressor"], "method.stage": ["once", "inner"]}
    space = space_of(sweep_lab.write(tmp_path, axes=axes, origin=Path(study.source).parent))
    assert [trial.config.method.stage for trial in space.trials] == ["once"]
    assert space.removed == {"tqcompressor in stages is no trial of a sweep": 1}
