"""Configuration: strict, with one line per mistake that names the key and the nearest valid one."""

import dataclasses
from pathlib import Path

import pytest

from model.compress.kron_recipe import KronPrune, KronVL
from pipeline.config.arguments import parse
from pipeline.config.identity import identity_fields
from pipeline.config.load import flag_table, load_study, to_json
from pipeline.config.schema import RunConfig
from pipeline.config.sources import FilesCorpus
from pipeline.config.sweep import load_sweep
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder: Path, name: str, text: str) -> Path:
    """A TOML file."""
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.max-step", "3"], "unknown key 'train.max_step'; did you mean 'max_steps'?"),
        (["--train.max-steps", "x"], "train.max_steps='x' is wrong; expected a valid integer"),
        (["--train.lr=fast"], "train.lr='fast' is wrong; expected a valid number"),
        (["--train.lr=nan"], "train.lr=nan is wrong; expected a finite number"),
        (["--teacher.train.lr=-inf"], "teacher.train.lr=-inf is wrong; expected a finite number"),
        (["--teacher.n-layer", "true"], "teacher.n_layer=True is wrong; expected a valid integer"),
        (["--sed", "1"], "unknown key 'sed'"),
        (["--method.name", "kron_v"], "did you mean 'kron_vl'?"),
        (["--method.shapee", "[3, 4]"], "unknown key 'method.shapee'; did you mean 'shape'?"),
        (["--method.shape", "[3]"], "method.shape"),
        (["--train.precision", "fp8"], "expected 'fp32' or 'bf16'"),
        (["--data.shard-tokens", "3"], "data.shard_tokens=3 must be at least 1,024"),
        (["--train.batch-tokens", "1000"], "must be a multiple of train.seq_len=256"),
        (["--train.seq-len", "512"], "longer than teacher.n_ctx=256"),
        (["--corpus.name", "files"], "corpus.paths is empty"),
        (["--name", "../x"], "must be letters, digits"),
        (["--tokenizer.vocab-size", "70000"], "must lie between 258 and 65,536"),
        (["--seed"], "--seed needs a value"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(None, overrides=flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_base_toml_says_every_default() -> None:
    base = load_study(CONFIGS / "base.toml").first
    assert dataclasses.replace(base, store=RunConfig().store) == RunConfig()
    text = (CONFIGS / "base.toml").read_text()
    missing = [
        key for key in _leaves(to_json(RunConfig())) if f"{key} " not in text and f"{key}=" not in text
    ]
    assert not missing, f"base.toml does not show {missing}"


def _leaves(value: dict[str, object]) -> set[str]:
    inner = [_leaves(item) if isinstance(item, dict) else {key} for key, item in value.items()]
    return set().union(*inner)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRONY_SHARED", "/somewhere")
    if path.parent.name == "sweeps":
        assert load_sweep(path).first
    else:
        assert load_study(path).configs


def test_flags_beat_file_beats_extends_beats_defaults(tmp_path: Path) -> None:
    write(tmp_path, "below.toml", "seed = 1\n[train]\nlr = 0.1\nmax_steps = 1\nwarmup_steps = 3")
    path = write(tmp_path, "top.toml", 'extends = "below.toml"\n[train]\nlr = 0.2\nmax_steps = 2')
    config = load_study(path, overrides=["--train.lr", "0.3"]).first
    assert (config.seed, config.train.lr, config.train.max_steps, config.train.warmup_steps) == (1, 0.3, 2, 3)


def test_another_method_replaces_the_table_below_it_whole(tmp_path: Path) -> None:
    write(tmp_path, "below.toml", 'method = { name = "kron_vl", shape = [8, 8], terms = 3 }')
    same = write(tmp_path, "same.toml", 'extends = "below.toml"\n[method]\nterms = 2')
    other = write(tmp_path, "other.toml", 'extends = "below.toml"\nmethod = { name = "kron_prune" }')
    assert load_study(same).first.method == KronVL(shape=(8, 8), terms=2)
    assert load_study(other).first.method == KronPrune()


def test_variants_share_the_file_and_flags_reach_all_of_them(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "s.toml",
        'seed = 4\n[[variants]]\nname = "a"\n[[variants]]\nname = "b"\ntrain = { lr = 1.0 }',
    )
    study = load_study(path, overrides=["--train.max-steps", "7"])
    assert [(c.name, c.seed, c.train.max_steps) for c in study.configs] == [("a", 4, 7), ("b", 4, 7)]
    assert study.configs[1].train.lr == 1.0


def test_two_variants_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "s.toml", '[[variants]]\nname = "a"\n[[variants]]\nname = "a"')
    with pytest.raises(ConfigError, match="2 variants are named 'a'"):
        load_study(path)


def test_a_cycle_of_extends_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", 'extends = "b.toml"')
    path = write(tmp_path, "b.toml", 'extends = "a.toml"')
    with pytest.raises(ConfigError, match="extends itself"):
        load_study(path)


@pytest.mark.parametrize("text", ["seed = ", "\x00", "seed = 2020-01-01"])
def test_a_file_that_is_no_toml_of_ours_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write(tmp_path, "x.toml", text))
    assert "x.toml" in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "smoke.toml", "")
    with pytest.raises(ConfigError, match=r"did you mean smoke\.toml"):
        load_study(tmp_path / "smok.toml")


def test_paths_are_relative_to_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEXTS", "/data")
    (tmp_path / "in").mkdir()
    text = 'store = "../s"\n[corpus]\nname = "files"\npaths = ["t/*.txt", "$TEXTS/b.txt"]\n'
    text += '[teacher]\nname="hub"\nid = "gpt2"'
    config = load_study(write(tmp_path / "in", "c.toml", text)).first
    assert config.store == str(tmp_path / "s")
    assert isinstance(config.corpus, FilesCorpus)
    assert config.corpus.paths == (str(tmp_path / "in/t/*.txt"), "/data/b.txt")
    assert config.teacher.id == "gpt2"  # type: ignore[union-attr]


def test_object_stores_are_left_as_they_are() -> None:
    assert load_study(None, overrides=["--store", "s3://bucket/a"]).first.store == "s3://bucket/a"


def test_what_cannot_change_a_result_is_not_identity() -> None:
    first = RunConfig()
    for flags in (
        ["--ray.workers", "2"],
        ["--train.micro-batch", "1"],
        ["--store", "/x"],
        ["--eval.batch", "3"],
        ["--eval.tasks", "/x"],
    ):
        assert identity_fields(load_study(None, overrides=flags).first) == identity_fields(first)
    assert identity_fields(load_study(None, overrides=["--train.lr", "1"]).first) != identity_fields(first)


def test_settings_that_came_later_fork_no_address_of_before() -> None:
    before = {"protocols": ["corpus/val"], "texts": "", "max_tokens": 0}
    assert identity_fields(RunConfig().eval) == before
    half = load_study(None, overrides=["--eval.precision", "bf16"]).first
    assert identity_fields(half.eval) == before | {"precision": "bf16"}


def test_the_command_line_knows_its_options_from_config_fields(tmp_path: Path) -> None:
    path = write(tmp_path, "c.toml", "seed = 2")
    arguments = parse("train", ["--train.max-steps", "5", str(path), "--plan"], about="")
    assert (arguments.study.first.train.max_steps, arguments.study.first.seed, arguments.plan) == (5, 2, True)
    with pytest.raises(ConfigError, match="unknown option --plann"):
        parse("train", ["--plann"], about="")


def test_a_name_and_fields_of_one_section_go_together_on_the_command_line():
    for words in (["--teacher", "hub", "--teacher.id", "x/y"], ["--teacher.id", "x/y", "--teacher", "hub"]):
        assert flag_table(words, base=Path.cwd())["teacher"] == {"name": "hub", "id": "x/y"}
    with pytest.raises(ConfigError, match="exclude each other"):
        flag_table(["--seed", "1", "--seed.x", "2"], base=Path.cwd())
