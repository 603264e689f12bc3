"""A recipe as a file: any config survives being written as TOML, and what is none is refused."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.recipe import recipe, to_toml
from pipeline.chain import chain
from pipeline.config.load import load_study, to_json
from pipeline.errors import ConfigError, KronyError

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("gpt2/k*.toml")), ids=lambda p: p.stem)
def test_any_shipped_config_survives_being_written(path, tmp_path):
    for number, config in enumerate(load_study(path).configs):
        target = tmp_path / f"{number}.toml"
        target.write_text(recipe(to_json(config)))
        (again,) = load_study(target).configs
        assert again == config
        assert chain(again).run.fingerprint == chain(config).run.fingerprint


def test_a_recipe_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="unknown key 'sead'"):
        recipe({"sead": 1})


plain = st.one_of(
    st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.text(max_size=12)
)
table = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=6), table, max_size=4))
def test_what_is_written_as_toml_is_read_back(value):
    assert tomllib.loads(to_toml(value)) == value


def test_what_toml_cannot_hold_is_refused():
    with pytest.raises(KronyError, match="has no form in TOML"):
        to_toml({"a": {1, 2}})
