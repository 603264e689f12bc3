"""The published student as a baseline: another teacher, nothing compressed, nothing trained."""

from dataclasses import replace
from pathlib import Path

import torch

from model.compress.budget import Budget
from model.compress.methods import make_method
from model.config import GPT2Config, ModelSpec
from pipeline.chain import chain
from pipeline.compress.build import build_init
from pipeline.compress.load import load_model
from pipeline.compress.teacher import import_teacher
from pipeline.config.load import load_study
from pipeline.config.schema import HubTeacher, RunConfig
from pipeline.store.artifacts import Store

CONFIG = Path(__file__).parents[2] / "configs" / "gpt2" / "distilgpt2.toml"
SIX = GPT2Config(n_layer=6)


def config_for(folder: Path) -> RunConfig:
    """The shipped config, on a local folder in the layout of the published weights."""
    config = load_study(CONFIG).first
    assert isinstance(config.teacher, HubTeacher)
    return replace(config, teacher=replace(config.teacher, id=str(folder)))


def test_six_blocks_count_what_was_published() -> None:
    spec = ModelSpec.dense(SIX)
    assert spec.num_parameters() == 81_912_576
    dropped = replace(
        ModelSpec.dense(GPT2Config()),
        blocks=tuple(ModelSpec.dense(GPT2Config()).blocks[i] for i in (0, 2, 4, 7, 9, 11)),
    )
    assert dropped.num_parameters() == 81_912_576


def test_the_config_trains_nothing_and_compresses_nothing() -> None:
    config = load_study(CONFIG).first
    assert config.teacher == HubTeacher(
        id="distilbert/distilgpt2", revision="2290a62682d06624634c1f46a6ad5be0f47f38aa"
    )
    assert config.train.max_steps == 0
    method = make_method(config.method)
    assert method.plan(ModelSpec.dense(SIX), Budget()).spec == ModelSpec.dense(SIX)


def test_a_folder_of_published_layout_is_the_baseline_bit_by_bit(tmp_path: Path) -> None:
    from transformers import GPT2Config as StockConfig
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = StockConfig(n_layer=6, n_head=2, n_embd=16, n_positions=32, vocab_size=67)
    stock = GPT2LMHeadModel(sizes).eval()
    stock.save_pretrained(tmp_path / "distilgpt2")
    config, store = config_for(tmp_path / "distilgpt2"), Store(str(tmp_path / "store"))
    assert isinstance(config.teacher, HubTeacher)
    identities = chain(config)
    assert identities.stats is None
    teacher = import_teacher(config.teacher, identities.teacher, store)
    init = build_init(config, identities.init, teacher, store)
    model = load_model(init)
    assert model.spec == ModelSpec.dense(replace(model.spec.arch, n_layer=6))
    idx = torch.randint(67, (3, 32))
    with torch.no_grad():
        assert torch.allclose(model(idx), stock(idx).logits, rtol=1e-5, atol=1e-5)
    assert init.record.metrics["parameters"] == sum(p.numel() for p in stock.parameters())
    assert init.record.metrics["replaced_matrices"] == 0


def test_distillation_forks_the_run_and_not_the_init() -> None:
    plain, taught = (
        chain(load_study(None, overrides=["--train.objective", objective]).first)
        for objective in ("ce", "kd")
    )
    assert plain.init.address == taught.init.address
    assert plain.run.address != taught.run.address
