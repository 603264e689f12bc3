"""Splits and deduplication hold for any corpus."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.documents import KEY_BYTES, document_id
from pipeline.data.rows import Split, window
from pipeline.data.splits import is_validation, keys_of, nanogpt_validation, repeats

texts = st.lists(st.sampled_from([f"text {i}" for i in range(12)]), max_size=40)


def keys(found):
    return keys_of([document_id(text) for text in found])


@given(texts, st.sampled_from([1, 2, 5, 1 << 22]))
def test_repeats_are_all_but_the_first_of_equal_texts(found, bucket):
    seen, expected = set(), []
    for position, text in enumerate(found):
        if text in seen:
            expected.append(position)
        seen.add(text)
    assert repeats(keys(found), bucket_documents=bucket).tolist() == expected


@given(st.integers(0, 255))
def test_keys_that_share_most_bytes_are_not_repeats(byte):
    one = np.zeros((2, KEY_BYTES), dtype=np.uint8)
    for column in range(KEY_BYTES):
        pair = one.copy()
        pair[1, column] = byte
        assert repeats(pair).tolist() == ([1] if byte == 0 else [])


def test_many_documents_in_small_buckets_equal_one_bucket():
    random = np.random.default_rng(0)
    many = random.integers(0, 256, (20_000, KEY_BYTES), dtype=np.uint8)
    many[random.integers(0, 20_000, 4_000)] = many[random.integers(0, 20_000, 4_000)]
    whole = repeats(many)
    assert len(whole) > 1_000
    assert np.array_equal(repeats(many, bucket_documents=100), whole)


@given(st.text(), st.floats(0.001, 0.999))
def test_the_hash_split_looks_at_the_first_eight_bytes_of_the_id(text, fraction):
    identifier = document_id(text)
    share = int.from_bytes(bytes.fromhex(identifier)[:8]) / 2**64
    assert is_validation(identifier, fraction) == (share < fraction)
    assert is_validation(identifier[:16] + "0" * 48, fraction) == is_validation(identifier, fraction)


def test_the_hash_split_takes_its_share_and_grows_with_the_fraction():
    ids = [document_id(f"document {i}") for i in range(20_000)]
    small = {i for i in ids if is_validation(i, 0.02)}
    large = {i for i in ids if is_validation(i, 0.10)}
    assert 300 < len(small) < 500
    assert small < large


@given(st.integers(1, 5_000))
@settings(max_examples=30)
def test_nanogpt_takes_a_share_rounded_up(documents):
    found = nanogpt_validation(documents)
    assert len(found) == -(-documents // 2000)
    assert len(set(found.tolist())) == len(found)
    assert (np.diff(found) > 0).all()
    assert 0 <= found[0] <= found[-1] < documents


@given(st.lists(st.integers(0, 100), unique=True), st.integers(0, 100), st.integers(0, 50))
def test_a_window_of_positions_is_what_lies_in_it(positions, first, count):
    ordered = np.array(sorted(positions), dtype=np.int64)
    expected = [p for p in sorted(positions) if first <= p < first + count]
    assert window(ordered, first, count).tolist() == expected


@pytest.mark.parametrize(("name", "expected"), [("hash", 0), ("nanogpt", 3)])
def test_only_nanogpt_needs_positions(name, expected):
    assert len(Split.of(name, fraction=0.1, documents=5_000).validation) == expected
