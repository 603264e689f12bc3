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


def test_a_method_that_gives_another_result_gets_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.compress.low_rank_recipe import SVD

    flags = ("--method.name", "svd", "--method.rank", "3")
    before = links(*flags)
    assert "version" not in before.init.config  # the first version leaves old addresses as they are
    monkeypatch.setattr(SVD, "version", 2)
    after = links(*flags)
    assert before.init.address != after.init.address
    assert before.teacher.address == after.teacher.address


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


def needing(method: str, *flags: str) -> Chain:
    return links("--method.name", method, *flags)


def test_methods_with_equal_needs_share_their_statistics() -> None:
    assert links().stats is None
    assert all(i.kind != "stats" for i in links().identities())
    stats = {name: needing(name).stats for name in ("svdllm", "svdllm_bc", "kron_act", "asvd", "kfac_svd")}
    assert stats["svdllm"] == stats["svdllm_bc"] == stats["kron_act"]
    assert len({each.address for each in stats.values()}) == 3
    assert stats["kfac_svd"].name == "delta_gram-gram"
    built = [i.address for i in needing("svdllm").identities()]
    assert built.index(needing("svdllm").stats.address) == built.index(needing("svdllm").init.address) - 1
    two_sided = needing("fwsvd", "--method.weights", "row_col")
    assert two_sided.stats.config["needs"] == ["col_fisher", "row_fisher"]


@pytest.mark.parametrize(
    ("setting", "value", "forked"),
    [
        ("seed", "1", {"svdllm", "fwsvd", "kfac_svd"}),
        ("skip-first-tokens", "1", {"svdllm", "fwsvd", "kfac_svd"}),
        ("labels", "sampled", {"fwsvd", "kfac_svd"}),
        ("fisher", "token", {"fwsvd"}),
        ("delta-clip", "3.0", {"kfac_svd"}),
        ("device", "cpu", set()),
    ],
)
def test_a_calibration_setting_forks_only_what_it_can_change(
    setting: str, value: str, forked: set[str]
) -> None:
    for name in ("svd", "svdllm", "fwsvd", "kfac_svd"):
        base, other = needing(name), needing(name, f"--calibration.{setting}", value)
        assert (base.init.address != other.init.address) == (name in forked)
        assert base.teacher.address == other.teacher.address


def test_a_method_without_needs_keeps_the_address_it_had_before_statistics() -> None:
    from model.compress.low_rank_recipe import SVD
    from pipeline.config.identity import identity_fields
    from pipeline.store.artifacts import Identity

    found = needing("svd", "--method.rank", "3", "--calibration.seed", "9")
    config = load_study(None).first
    fields = {"method": identity_fields(SVD(rank=3)), "budget": identity_fields(config.budget)}
    assert found.init == Identity("init", "svd", fields, {"teacher": found.teacher}, 1)


def test_sequences_longer_than_the_context_are_refused_where_they_matter() -> None:
    from pipeline.errors import ConfigError

    long = ("--calibration.length", "512")
    assert links(*long).stats is None
    with pytest.raises(
        ConfigError, match=r"calibration\.length=512 is longer than the teacher's context, 256"
    ):
        needing("svdllm", *long)
    for flags in (("--calibration.sequences", "0"), ("--calibration.skip-first-tokens", "255")):
        with pytest.raises(ConfigError, match=r"calibration\.sequences="):
            needing("svdllm", *flags)
    with pytest.raises(ConfigError, match=r"delta_trim=0\.5 must lie in \[0, 0\.5\)"):
        links("--calibration.delta-trim", "0.5")


def test_a_plan_is_exact_or_says_that_it_is_a_cap(tmp_path: Path) -> None:
    import json

    from pipeline.plan import describe

    text = """
budget = { params = 1_000_000, tolerance = 0.05 }
[[variants]]
name = "even"
method = { name = "svdllm" }
[[variants]]
name = "gain"
method = { name = "svdllm" }
budget = { allocate = "greedy_gain" }
"""
    (tmp_path / "study.toml").write_text(f'store = "{tmp_path}/store"\n' + text)
    study = load_study(tmp_path / "study.toml")
    even, gain = json.loads(describe(study, as_json=True))["variants"]
    assert (even["exact"], gain["exact"]) == (True, False)
    assert even["parameters"] <= gain["parameters"] == 1_000_000
    assert gain["macs_per_token"] is None
    shown = describe(study)
    assert "≤ 1,000,000" in shown
    assert "stats/gram-" in shown


def test_a_setting_that_came_later_forks_only_where_it_is_used() -> None:
    config = load_study(None).first
    from pipeline.config.identity import identity_fields

    assert set(identity_fields(config.budget)) == {"params", "convention", "tolerance", "allocate"}
    base, other = links(), links("--budget.macs", "900000", "--budget.tolerance", "0.002")
    assert base.init.address != other.init.address
    assert base.init.address == links("--budget.macs", "0").init.address
