"""The chain: addresses are known before anything is built, and fork only where a result can change."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.chain import Chain, chain
from pipeline.config.load import load_study

ROOT = Path(__file__).parents[2]


def links(*flags: str) -> Chain:
    return chain(load_study(None, overrides=flags).first)


def test_a_setting_forks_what_follows_it_and_nothing_before() -> None:
    base, other = links(), links("--train.lr", "1e-3")
    assert (base.init.address, base.teacher.address) == (other.init.address, other.teacher.address)
    assert base.run.address != other.run.address
    assert set(base.scores) == set(other.scores)
    assert all(base.scores[p].address != other.scores[p].address for p in base.scores)
    assert (
        base.teacher_scores["corpus/val@ctx256"].address == other.teacher_scores["corpus/val@ctx256"].address
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--ray.workers", "2"),
        ("--train.micro-batch", "1"),
        ("--train.log-every", "1"),
        ("--name", "another-word"),
        ("--tracking.uri", "off"),
        ("--data.tokenize-workers", "7"),
        ("--eval.batch", "1"),
    ],
)
def test_what_cannot_change_a_result_keeps_every_address(flags: tuple[str, str]) -> None:
    assert [i.address for i in links(*flags).identities()] == [i.address for i in links().identities()]


def test_the_seed_forks_an_init_only_where_it_is_used() -> None:
    assert links("--seed", "1").init.address == links().init.address
    assert links("--seed", "1").run.address != links().run.address
    random = ("--method.name", "random_init")
    assert links(*random, "--seed", "1").init.address != links(*random).init.address


def test_a_trained_tokenizer_depends_on_the_corpus_and_a_published_one_does_not() -> None:
    published = links("--tokenizer", "gpt2"), links("--tokenizer", "gpt2", "--corpus.packages", '["python"]')
    assert published[0].tokenizer.address == published[1].tokenizer.address
    assert published[0].tokens.address != published[1].tokens.address
    assert links().tokenizer.address != links("--corpus.packages", '["python"]').tokenizer.address


def test_protocols_follow_the_context_of_the_model() -> None:
    short = links("--eval.protocols", '["krony/wt103", "corpus/val"]')
    assert list(short.scores) == ["krony/wt103@ctx256", "corpus/val@ctx256"]
    full = links("--eval.protocols", '["krony/wt103"]', "--teacher", "hub")
    assert list(full.scores) == ["krony/wt103"]


def test_a_plan_loads_nothing_heavy() -> None:
    code = """
import sys
from pathlib import Path
from pipeline.chain import chain
from pipeline.config.load import load_study

for config in load_study(Path("configs/smoke.toml")).configs:
    chain(config)
heavy = {"torch", "ray", "mlflow", "transformers", "datasets", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
