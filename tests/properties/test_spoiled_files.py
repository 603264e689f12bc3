"""Spoiled files: every reader takes them or refuses them in words; `benchmarks/fuzz.py` tries many more."""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_targets import Target, spoil, targets

NAMES = (
    "config", "sweep", "flags", "record", "checkpoint manifest", "history", "shard", "sidecar",
    "corpus manifest", "shard plan", "tokenizer", "corpus .jsonl", "corpus .txt", "corpus .jsonl.gz",
    "corpus .txt.zst", "corpus .parquet", "native config.json", "native model.safetensors",
    "stock config.json", "stock model.safetensors", "stats counts.json", "torch checkpoint",
    "pickle of a checkpoint", "foreign safetensors", "report scores record", "report run record",
    "report init record", "report history", "report matrices", "report structure",
)  # fmt: skip
CHEAP = [name for name in NAMES if not name.startswith("report")]
"""A report takes half a second; `benchmarks/fuzz.py` spoils its files too."""

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def fresh(tmp_path_factory, monkeypatch):
    """A new folder for every input, and a working folder that nothing may be left in."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    yield lambda: tmp_path_factory.mktemp("input")
    assert list(Path.cwd().iterdir()) == []


def test_every_target_is_tried(known):
    assert tuple(known) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_sound_examples_are_taken(known, fresh, name):
    assert all(known[name].takes(example, fresh()) for example in known[name].examples)


@pytest.mark.parametrize("name", CHEAP)
@settings(max_examples=12, deadline=None, suppress_health_check=CHECKS)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_spoiled_file_is_taken_or_refused_in_words(known, fresh, name, seed):
    draw = random.Random(seed)
    known[name].takes(spoil(draw.choice(known[name].examples), draw), fresh())


@pytest.mark.parametrize("name", ["config", "flags", "history", "record", "corpus .txt", "shard"])
@settings(max_examples=12, deadline=None, suppress_health_check=CHECKS)
@given(data=st.binary(max_size=400) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_anything_at_all_is_taken_or_refused_in_words(known, fresh, name, data):
    known[name].takes(data, fresh())
