"""The shard plan covers a corpus exactly once, keeps its bound, and depends on the corpus alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.sources import DataConfig
from pipeline.data import plan as planning
from pipeline.data.plan import ShardPlan, make_plan, plan_shards, shard_bytes
from pipeline.data.shards import ShardError
from pipeline.data.tables import Manifest, TextFile

groups = st.tuples(st.integers(1, 50), st.integers(0, 4_000_000))
sides = st.sampled_from(["", "train", "val"])


@st.composite
def manifests(draw):
    files = [
        TextFile(
            name=f"documents-{number:05d}-000.parquet",
            size_bytes=1,
            sha256="",
            groups=tuple(draw(st.lists(groups, max_size=6))),
            side=draw(sides),
        )
        for number in range(draw(st.integers(1, 5)))
    ]
    return Manifest(files=tuple(files))


@given(manifests(), st.integers(1024, 10**8))
def test_every_document_is_in_exactly_one_shard_in_order(manifest, shard_tokens):
    position = 0
    covered = []
    for number, shard in enumerate(plan_shards(manifest, shard_tokens=shard_tokens)):
        assert shard.index == number
        assert shard.first == position
        assert shard.documents >= 1
        position += shard.documents
        covered += [(part.file, row) for part in shard.ranges for row in range(part.start, part.stop)]
    assert position == manifest.documents
    assert covered == [
        (number, row) for number, file in enumerate(manifest.files) for row in range(file.documents)
    ]


@given(manifests(), st.integers(1024, 10**8))
def test_no_shard_can_have_more_tokens_than_allowed_unless_one_document_has(manifest, shard_tokens):
    """A token is a byte or more, and every document gets one token for its end."""
    for shard in plan_shards(manifest, shard_tokens=shard_tokens):
        assert shard.text_bytes + shard.documents <= shard_tokens or shard.documents == 1


@given(st.integers(0, 10**12), st.integers(1024, 10**9))
def test_small_corpora_have_work_for_all_cores_and_large_ones_full_shards(text_bytes, shard_tokens):
    size = shard_bytes(text_bytes, shard_tokens)
    assert size <= shard_tokens
    if text_bytes > planning.SMALL_BYTES * planning.SMALL_SHARDS:
        assert size == min(shard_tokens, -(-text_bytes // planning.SMALL_SHARDS))


def plan_of(manifest, **changes):
    return make_plan(manifest, DataConfig(**changes), corpus="c", tokenizer="t", repeats=None)


@given(manifests())
def test_a_plan_survives_its_file_and_its_digest_is_that_of_its_settings(manifest):
    plan = plan_of(manifest)
    again = ShardPlan.from_json(plan.to_json(), where="x")
    assert again == plan
    assert again.digest == plan.digest
    assert plan_of(manifest, tokenize_workers=7).digest == plan.digest
    assert plan_of(manifest, validation_fraction=0.5).digest != plan.digest


@pytest.mark.parametrize("data", [b"", b"{}", b'{"format": 9}', b'{"format": 1, "shards": [{}]}'])
def test_a_broken_plan_is_named(data):
    with pytest.raises(ShardError, match=r"^here: "):
        ShardPlan.from_json(data, where="here")
