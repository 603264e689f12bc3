"""Batches depend on (seed, step, shards) and on nothing else: not on ranks, not on the past, not on cuts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batches import Batches, TokenStream, stable_order
from pipeline.data.shards import ShardError, ShardWriter
from pipeline.errors import DataError


def write(folder, tokens, cuts=()):
    paths = []
    for number, piece in enumerate(np.split(np.asarray(tokens), sorted(cuts))):
        paths.append(folder / f"train-{number:05d}.bin")
        with ShardWriter(paths[-1]) as writer:
            writer.add(piece)
    return paths


@st.composite
def streams(draw):
    length = draw(st.integers(6, 120))
    cuts = draw(st.lists(st.integers(0, length), max_size=4))
    seq_len = draw(st.integers(1, length - 1))
    rows = draw(st.integers(1, 7))
    return length, cuts, seq_len, rows, draw(st.integers(0, 2**32))


@given(streams(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_window_is_the_same_however_the_tokens_are_cut_into_shards(tmp_path_factory, problem, data):
    length, cuts, *_ = problem
    tokens = np.arange(length) * 7 % 65_536
    stream = TokenStream(write(tmp_path_factory.mktemp("s"), tokens, cuts))
    start = data.draw(st.integers(0, length))
    count = data.draw(st.integers(0, length - start))
    assert len(stream) == length
    assert stream.read(start, count).tolist() == tokens[start : start + count].tolist()


@given(streams())
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_every_row_once_and_targets_are_the_next_tokens(tmp_path_factory, problem):
    length, cuts, seq_len, rows, seed = problem
    tokens = np.arange(length)
    stream = TokenStream(write(tmp_path_factory.mktemp("s"), tokens, cuts))
    batches = Batches(stream, seq_len=seq_len, batch_tokens=rows * seq_len, seed=seed)
    R = batches.rows_per_epoch
    assert (length - 1) // seq_len == R
    for epoch in range(2):
        assert sorted(batches.rows(range(epoch * R, (epoch + 1) * R))) == list(range(R))
    for step in range(3):
        inputs, targets = batches.batch(step)
        assert inputs.shape == targets.shape == (rows, seq_len)
        assert inputs.dtype == targets.dtype == np.int64
        assert (targets == inputs + 1).all()
        starts = batches.rows(range(step * rows, (step + 1) * rows))
        assert (inputs[:, 0] // seq_len).tolist() == starts


@given(streams(), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_ranks_together_read_the_global_batch_for_any_world(tmp_path_factory, problem, world, step):
    length, cuts, seq_len, rows, seed = problem
    stream = TokenStream(write(tmp_path_factory.mktemp("s"), np.arange(length), cuts))
    batches = Batches(stream, seq_len=seq_len, batch_tokens=rows * seq_len, seed=seed)
    whole = batches.batch(step)
    parts = [batches.batch(step, rank=rank, world=world) for rank in range(world)]
    for side in (0, 1):
        assert np.array_equal(np.concatenate([part[side] for part in parts]), whole[side])
    counts = [len(part[0]) for part in parts]
    assert max(counts) - min(counts) <= 1


def test_a_batch_does_not_depend_on_what_was_read_before(tmp_path):
    paths = write(tmp_path, np.arange(1000))
    fresh = Batches(TokenStream(paths), seq_len=8, batch_tokens=64, seed=3)
    used = Batches(TokenStream(paths), seq_len=8, batch_tokens=64, seed=3)
    for step in (40, 3, 17):
        used.batch(step)
    assert np.array_equal(fresh.batch(12)[0], used.batch(12)[0])


def test_seeds_and_epochs_have_orders_of_their_own(tmp_path):
    stream = TokenStream(write(tmp_path, np.arange(1000)))
    first, second = (Batches(stream, seq_len=8, batch_tokens=64, seed=seed) for seed in (0, 1))
    R = first.rows_per_epoch
    orders = [first.rows(range(R)), first.rows(range(R, 2 * R)), second.rows(range(R))]
    assert len({tuple(order) for order in orders}) == 3


def test_the_order_of_an_epoch_is_fixed_for_good(tmp_path):
    """Held for every version of NumPy: a run that is resumed elsewhere must see the same rows."""
    stream = TokenStream(write(tmp_path, np.arange(81)))
    batches = Batches(stream, seq_len=8, batch_tokens=8, seed=1)
    assert batches.rows(range(10)) == GOLDEN_ORDER


GOLDEN_ORDER = [9, 2, 4, 7, 5, 0, 8, 6, 3, 1]


@pytest.mark.parametrize("length", [0, 1, 8])
def test_a_corpus_smaller_than_one_row_is_named(tmp_path, length):
    stream = TokenStream(write(tmp_path, np.arange(length)))
    with pytest.raises(DataError, match=rf"holds {length} tokens, one row needs 9"):
        Batches(stream, seq_len=8, batch_tokens=64, seed=0)


def test_a_batch_that_is_no_whole_number_of_rows_is_refused(tmp_path):
    stream = TokenStream(write(tmp_path, np.arange(100)))
    with pytest.raises(DataError, match="multiple of seq_len"):
        Batches(stream, seq_len=8, batch_tokens=60, seed=0)


def test_no_shards_and_damaged_shards_are_named(tmp_path):
    with pytest.raises(DataError, match="no shards"):
        TokenStream([])
    paths = write(tmp_path, np.arange(100), [50])
    paths[1].write_bytes(paths[1].read_bytes()[:-3])
    with pytest.raises(ShardError, match=r"train-00001\.bin"):
        TokenStream(paths)


@given(
    st.lists(
        st.one_of(st.integers(0, 40), st.integers(2**64 - 40, 2**64 - 1), st.integers(0, 2**64 - 1)),
        min_size=1,
    )
)
@settings(max_examples=200, deadline=None)
def test_the_quick_order_is_the_stable_one_whatever_the_keys(numbers):
    keys = np.array(numbers, dtype=np.uint64)
    assert stable_order(keys).tolist() == np.argsort(keys, kind="stable").tolist()


def test_the_quick_order_of_many_random_keys_is_the_stable_one():
    keys = np.random.PCG64(3).random_raw(300_000) >> np.uint64(20)  # many agree in the bits that are sorted
    assert np.array_equal(stable_order(keys), np.argsort(keys, kind="stable"))
