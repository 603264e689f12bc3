"""A sweep file: strict, one line per mistake, and choices that are laid as files would lay them."""

from pathlib import Path

import pytest

from model.compress.kron_recipe import KronPrune, KronVL
from model.compress.recipe import RandomInit
from pipeline.config.load import load_study, to_json, validate
from pipeline.config.paths import known_paths, landing, require_path, value_at
from pipeline.config.schema import RunConfig
from pipeline.config.sweep import StopRule, SweepStudy, load_sweep
from pipeline.errors import ConfigError
from pipeline.sweep.space import grid

HEAD = """
name    = "tiny"
teacher = { name = "scratch", n_layer = 2, n_head = 2, n_embd = 16, n_ctx = 32, train = { seq_len = 32 } }
train   = { seq_len = 32, batch_tokens = 64, max_steps = 4 }
calibration = { length = 32 }
method  = { name = "kron_vl", shape = [8, 8] }
"""


def sweep(folder: Path, text: str, *flags: str) -> SweepStudy:
    path = folder / "sweep.toml"
    path.write_text(f"{HEAD}{text}")
    return load_sweep(path, overrides=flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[sweep.axes]\n"train.learning_rate" = [1.0]', "no setting is called 'train.learning_rate'"),
        ('[sweep.axes]\n"train.max_step" = [1]', "did you mean 'train.max_steps'?"),
        ('[sweep.axes]\n"lr" = [1.0]', "did you mean 'train.lr'?"),
        ('[sweep.axes]\n"seed" = [1, 2]', "list the seeds in sweep.seeds"),
        ('[sweep.axes]\n"ray.workers" = [0, 2]', "cannot change a trained model"),
        ('[sweep.axes]\n"train.log_every" = [1, 2]', "cannot change a trained model"),
        ('[sweep.axes]\n"train.lr" = 1.0', "expected a list of values"),
        ('[sweep.axes]\n"train.lr" = []', "expected a list of values"),
        ('[sweep.axes]\n"train.lr" = [1.0, 1.0]', "the value 'lr=1' is there 2 times"),
        ('[sweep.axes]\n"train.lr" = ["fast"]', "sweep.axes.train.lr: train.lr='fast' is wrong"),
        (
            '[sweep.axes]\nmethod = ["kron_vl"]\n"method.shape" = [3]',
            "sweep.axes.method.shape: method.shape=3",
        ),
        ('[sweep.axes]\n"train.lr" = { low = 1e-4, high = 1e-3 }', "a range has no grid"),
        ('[sweep.axes]\n"method" = ["kron_v"]', "did you mean 'kron_vl'?"),
        ('[sweep.axes]\n"method" = [{ name = "svd", rang = 4 }]', "did you mean 'rank'?"),
        (
            '[sweep.axes]\n"method.shape" = { shapes_of = [768, 3072] }',
            "the teacher's up-projection is 16x64",
        ),
        ('[sweep.axes]\n"method.shape" = { shapes_of = "mlp", parms = 3 }', "'parms' is unknown"),
        ('[sweep.axes]\n"method.shape" = { shapes_of = "mlp", params = 9 }', "no shape of 16x64 qualifies"),
        ('[sweep.axes]\n"method.shape" = { shapes_of = "mlp", terms = [2, 1] }', "terms=[2, 1] must be"),
        ('[sweep.axes]\n"train.lr" = { shapes_of = "mlp" }', "a condition on 'method.shape'"),
        ('[sweep.axes]\n"method" = [{ methods = "all", params = 0 }]', "with N above 0"),
        ('[sweep.axes]\n"train.lr" = [{ methods = "all", params = 9 }]', "a value of the axis 'method'"),
        ("[sweep]\nseeds = []", "at least one seed"),
        ("[sweep]\nseeds = [1, 1]", "each once"),
        ("[sweep]\nseed = [1]", "unknown key 'sweep.seed'; did you mean 'seeds'?"),
        ('[sweep]\nsearch = "gird"', "sweep.search='gird' is wrong; expected 'grid', 'random'"),
        ('[sweep]\nsearch = "tpe"', "set sweep.samples to at least 1"),
        ("[sweep]\nsamples = 3", "is for sweep.search"),
        ("[sweep]\nsilence_s = 0.0", "sweep.silence_s=0 above 0"),
        ('[sweep.axes]\n"train.lr" = [1e-3, inf]', "sweep.axes.train.lr=inf is wrong"),
        ('[sweep.stop]\nname = "ash"', "sweep.stop.name='ash' is wrong; expected 'asha'"),
        ("[sweep.stop]\nreduction = 1", "at least 2"),
        ('[[sweep.skip]]\n"method.shap" = [8, 8]', "did you mean 'method.shape'?"),
        ("", "has no [sweep] section"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line_that_says_what_to_do(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        grid(sweep(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "sweep.toml" in str(caught.value)


def test_a_sweep_is_no_run_and_says_so(tmp_path: Path):
    sweep(tmp_path, "[sweep]")
    with pytest.raises(ConfigError, match="krony sweep"):
        load_study(tmp_path / "sweep.toml")


def test_dotted_keys_mean_the_same_with_and_without_quotes(tmp_path: Path):
    quoted = sweep(
        tmp_path, '[sweep.axes]\n"train.lr" = [1.0]\n"method" = ["svd"]\n"method.shape" = [[8, 8]]'
    )
    plain = sweep(tmp_path, "[sweep.axes]\ntrain.lr = [1.0]\nmethod = ['svd']\n'method.shape' = [[8, 8]]")
    assert quoted.sweep == plain.sweep
    assert list(quoted.sweep.axes) == list(plain.sweep.axes) == ["train.lr", "method", "method.shape"]


def test_flags_reach_the_base_and_the_sweep(tmp_path: Path):
    text = '[sweep]\nseeds = [0]\n[sweep.axes]\n"train.lr" = [1.0, 2.0]'
    flags = ["--train.max-steps", "9", "--sweep.seeds", "[3, 4]", "--sweep.axes.train.lr", "[0.5]"]
    study = sweep(tmp_path, text, *flags)
    assert study.sweep.seeds == (3, 4)
    assert [(trial.seed, trial.config.train.lr) for trial in grid(study).trials] == [(3, 0.5), (4, 0.5)]
    assert study.first.train.max_steps == 9


def test_a_sweep_extends_a_study_without_its_variants(tmp_path: Path):
    (tmp_path / "study.toml").write_text(f'{HEAD}[[variants]]\nname = "a"\nmethod = "svd"\n')
    path = tmp_path / "sweep.toml"
    path.write_text('extends = "study.toml"\nname = "s"\n[sweep]')
    study = load_sweep(path)
    assert isinstance(study.first.method, KronVL)
    assert study.name == "s"


def test_choices_are_laid_in_their_order_as_files_would_be(tmp_path: Path):
    study = sweep(tmp_path, "[sweep]")
    same = study.config({"method": {"name": "kron_vl", "terms": 2}}, 0)
    assert same.method == KronVL(shape=(8, 8), terms=2)
    other = study.config({"method": "kron_prune", "method.shape": [4, 16]}, 0)
    assert other.method == KronPrune(shape=(4, 16))
    late = study.config({"method.shape": [4, 16], "method": "kron_prune"}, 0)
    assert late.method == KronPrune()
    wrapped = study.config({"method": "random_init", "method.shape": [4, 16], "method.terms": 2}, 0)
    assert wrapped.method == RandomInit(of=KronVL(shape=(4, 16), terms=2))
    chosen = {"name": "random_init", "of": {"name": "svd", "rank": 3}}
    again = study.config({"method": chosen, "method.of": {"name": "kron_prune"}, "method.shape": [2, 2]}, 0)
    assert again.method == RandomInit(of=KronPrune(shape=(2, 2)))
    with pytest.raises(ConfigError, match="svd has no setting 'shape'"):
        study.config({"method": "svd", "method.shape": [4, 16]}, 0)
    assert study.effective({"method": "svd", "method.shape": [4, 16]}) == {"method": "svd"}
    assert study.base["method"]["name"] == "kron_vl", "the base is never changed"


def test_the_seed_is_that_of_training_and_of_calibration_unless_shared(tmp_path: Path):
    follows = sweep(tmp_path, "[sweep]").config({}, 7)
    shared = sweep(tmp_path, "[sweep]\nseed_calibration = false").config({}, 7)
    assert (follows.seed, follows.calibration.seed) == (7, 7)
    assert (shared.seed, shared.calibration.seed) == (7, 0)


def test_every_setting_has_a_path_and_every_path_a_landing():
    table = to_json(RunConfig())
    for path in known_paths():
        require_path(path, where="here")
        if (place := landing(table, path)) is not None:
            assert place == path
    assert value_at(table, "method.shape") == [768, 768]
    assert value_at(table, "method.rank") is None
    assert (
        landing({"method": {"name": "random_init", "of": {"name": "svd"}}}, "method.rank") == "method.of.rank"
    )
    assert landing({}, "train.lr.x") is None


def test_a_resolved_config_is_its_own_table():
    config = RunConfig(name="x")
    assert validate(to_json(config), source="here") == config


@pytest.mark.parametrize(("total", "rungs"), [(10, ()), (11, (10,)), (31, (10, 30)), (270, (10, 30, 90))])
def test_rungs_are_powers_of_the_reduction_below_the_end(total: int, rungs: tuple[int, ...]):
    assert StopRule(grace_tokens=10, reduction=3).rungs(total) == rungs


def test_places_in_axes_and_skips_are_relative_to_the_file_that_names_them(tmp_path):
    for name in ("here", "below"):
        (tmp_path / name).mkdir()
    head = HEAD.replace("\nname", '\ncorpus = { name = "files", paths = ["z.txt"] }\nname')
    (tmp_path / "below" / "base.toml").write_text(
        f'{head}\n[sweep.axes]\n"teacher" = [{{ name = "hub", id = "../gpt" }}, "scratch"]\n'
    )
    path = tmp_path / "here" / "sweep.toml"
    path.write_text(
        'extends = "../below/base.toml"\n[sweep]\n[sweep.axes]\ncorpus.paths = [["a.txt"], ["b/*.txt"]]\n'
        '[[sweep.skip]]\n"corpus.paths" = ["a.txt"]\n"tokenizer.path" = "t.json"\n'
    )
    study = load_sweep(path)
    here = str(tmp_path / "here")
    teachers = [{"name": "hub", "id": str(tmp_path / "gpt")}, "scratch"]
    assert study.sweep.axes == {
        "teacher": teachers,
        "corpus.paths": [[f"{here}/a.txt"], [f"{here}/b/*.txt"]],
    }
    assert study.sweep.skip == ({"corpus.paths": [f"{here}/a.txt"], "tokenizer.path": f"{here}/t.json"},)
    assert study.config({"corpus.paths": [f"{here}/a.txt"]}, 0).corpus == load_study_corpus(here)


def load_study_corpus(folder: str):
    path = Path(folder) / "plain.toml"
    path.write_text('corpus = { name = "files", paths = ["a.txt"] }')
    return load_study(path).first.corpus


def test_places_on_the_command_line_are_relative_to_where_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = 'corpus = { name = "files", paths = ["z.txt"] }\n[sweep]\n'
    study = sweep(tmp_path, text, "--sweep.axes.corpus.paths", '[["a.txt"], ["b.txt"]]')
    assert study.sweep.axes == {"corpus.paths": [[str(tmp_path / "a.txt")], [str(tmp_path / "b.txt")]]}


def test_a_stop_rule_of_an_extended_file_can_be_lifted(tmp_path):
    axes = '[sweep.stop]\nname = "halving"\n[sweep.axes]\n"train.lr" = [1.0, 2.0]'
    assert sweep(tmp_path, axes).sweep.stop == StopRule(name="halving")
    assert sweep(tmp_path, axes, "--sweep.stop.name", "none").sweep.stop is None
