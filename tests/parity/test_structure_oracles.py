"""Structures against slow NumPy references, where they are at hand: units, heads, shares of a budget, sizes.

As in `test_algebra_oracles.py`, products and losses are compared, never factors.
"""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle_lab import close, few, seeds, tensor

from model.algebra import allocation, attention, nystrom, psd
from model.algebra.shapes import legal_shapes
from model.compress.budget import Budget
from model.compress.kron_recipe import KronVL
from model.compress.low_rank_recipe import SVD
from model.compress.methods import make_method
from model.compress.structural_recipe import LayerDrop, ModeGPT, PruneMLP
from model.config import SIZES, ModelSpec

SMALL = ModelSpec.dense(SIZES["gpt2"])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_nystrom(oracle, rng):
    hidden = oracle.gelu_new(rng.normal(size=(400, 24)) @ rng.normal(size=(24, 24)) / 4)
    gram, mean, down, old = (
        hidden.T @ hidden / 400,
        hidden.mean(0),
        rng.normal(size=(24, 8)),
        rng.normal(size=8),
    )
    ridge = np.trace(gram) / 24
    close(nystrom.ridge_leverage(tensor(gram)), oracle.ridge_leverage(gram, ridge))
    scores = oracle.ridge_leverage(gram, ridge)
    keep = oracle.keep_top(scores, 9)
    assert nystrom.keep_top(tensor(scores), 9).tolist() == keep.tolist()
    for count in (1, 5, 9, 20):
        ours = nystrom.greedy_keep(tensor(gram), tensor(down), count)
        assert ours.tolist() == oracle.greedy_keep(gram, down, count).tolist()
    new = nystrom.refit(tensor(gram), tensor(keep), tensor(down))
    close(new, oracle.nystrom_refit(gram, keep, down), rtol=1e-6)
    close(
        nystrom.selection_loss(tensor(gram), tensor(keep), tensor(down), new),
        oracle.nystrom_loss(gram, keep, down),
    )
    ours = nystrom.refit_with_bias(tensor(gram), tensor(mean), tensor(keep), tensor(down), tensor(old))
    theirs = oracle.nystrom_bias_corrected(gram, mean, keep, down, old)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, rtol=1e-6)


@few
@given(st.integers(2, 12), seeds, st.data())
def test_a_refit_with_its_bias_leaves_the_centred_schur_trace(oracle, hidden, seed, data):
    generator, count = np.random.default_rng(seed), data.draw(st.integers(1, hidden - 1))
    units = oracle.gelu_new(generator.normal(size=(80, hidden)) + generator.normal(size=hidden))
    down, old = generator.normal(size=(hidden, 5)), generator.normal(size=5)
    gram, mean = units.T @ units / 80, units.mean(0)
    keep = np.sort(generator.permutation(hidden)[:count])

    def measured(new, bias):
        return ((units @ down + old - units[:, keep] @ new - bias) ** 2).sum() / 80

    both = nystrom.refit_with_bias(tensor(gram), tensor(mean), tensor(keep), tensor(down), tensor(old))
    corrected = measured(*(part.numpy() for part in both))
    centred = oracle.nystrom_loss(oracle.centred(gram, mean), keep, down)
    assert corrected == pytest.approx(centred, rel=1e-6, abs=1e-10)
    refit = nystrom.refit(tensor(gram), tensor(keep), tensor(down)).numpy()
    assert measured(refit, old) == pytest.approx(oracle.nystrom_loss(gram, keep, down), rel=1e-6, abs=1e-10)
    assert corrected <= measured(refit, old) * (1 + 1e-9)


def test_attention(oracle, rng):
    x = rng.normal(size=(50, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12)
    gram, mean = x.T @ x / 50, x.mean(0)
    wq, wk, wv, wo = (rng.normal(size=size) for size in ((12, 5), (12, 5), (12, 5), (5, 12)))
    bq, bk = rng.normal(size=5), rng.normal(size=5)
    gram_q = attention.head_gram(tensor(wq), tensor(bq), tensor(gram), tensor(mean))
    gram_k = attention.head_gram(tensor(wk), tensor(bk), tensor(gram), tensor(mean))
    close(gram_q, oracle.head_gram(wq, bq, gram, mean))
    close(attention.cr_scores(gram_q, gram_k), oracle.cr_scores(gram_q.numpy(), gram_k.numpy()))
    cov = psd.centred(tensor(gram), tensor(mean))
    for rank in (1, 3, 5):
        query, query_bias, key, sigma = oracle.joint_qk(wq, bq, wk, gram, mean, rank)
        ours = attention.joint_query_key(
            tensor(wq),
            tensor(bq),
            tensor(wk),
            gram_q,
            attention.head_metric(tensor(wk), cov),
            rank=rank,
        )
        close(ours.query @ ours.key.mT, query @ key.T, rtol=1e-6)
        close(ours.query_bias @ ours.key.mT, query_bias @ key.T, rtol=1e-6)
        close(ours.sigma, sigma[:5], rtol=1e-6)
        gram_of_keys = attention.head_metric(tensor(wk), cov).numpy()
        small = oracle.joint_qk_small(wq, bq, wk, gram_q.numpy(), gram_of_keys, rank)
        close(ours.query @ ours.key.mT, small[0] @ small[2].T, rtol=1e-6)
        found = (part.numpy() for part in (ours.query, ours.query_bias, ours.key))
        loss = oracle.qk_loss(wq, bq, wk, *found, gram, mean)
        assert loss == pytest.approx((sigma[rank:] ** 2).sum(), rel=1e-6, abs=1e-12 * sigma[0] ** 2)
        value, output, sigma = oracle.vo_svd(wv, wo, gram, rank)
        for staged in (oracle.vo_svd_two_stage(wv, wo, gram, rank), oracle.vo_svd_small(wv, wo, gram, rank)):
            close(tensor(staged[0] @ staged[1]), value @ output, rtol=1e-6)
        for form in (attention.value_output, attention.value_output_two_stage):
            pair = form(tensor(wv), tensor(wo), tensor(gram), rank=rank)
            close(pair.value @ pair.output, value @ output, rtol=1e-6)
            close(pair.sigma, sigma[:5], rtol=1e-6)


def test_allocation(oracle, rng):
    for _ in range(10):
        scores = rng.uniform(0.02, 0.3, 12)
        for average, eps in ((0.3, 0.1), (0.5, 0.05), (0.7, 0.01)):
            ours = allocation.allocate_sparsity(scores.tolist(), average=average, eps=eps)
            np.testing.assert_allclose(ours, oracle.allocate_sparsity(scores, average, eps))
    for keep in range(2, 13):
        assert list(allocation.even_layers(keep)) == oracle.even_layers(keep)
    x = rng.normal(size=(7, 5))
    assert 1 - float(torch.cosine_similarity(tensor(x), tensor(2 * x), dim=-1).mean()) == pytest.approx(
        oracle.block_influence(x, 2 * x), abs=1e-12
    )


@few
@given(st.data())
def test_sizes_of_gpt2_small_in_every_structure(oracle, data):
    """Counts of specs, which built models have by assertion, against formulas written for the table."""
    shape = data.draw(st.sampled_from(legal_shapes(768, 3072)))
    terms, scales = data.draw(st.integers(1, min(20, shape.max_terms))), data.draw(st.booleans())
    recipe = KronVL(shape=(shape.m1, shape.n1), terms=terms, scales=scales)
    assert count(recipe) == oracle.count_kron(oracle.KronShape(*astuple(shape)), terms, scales)
    rank = data.draw(st.integers(1, 383))
    assert count(SVD(rank=rank)) == oracle.count_svd_mlp(rank)
    assert count(SVD(rank=rank, targets="all_linear")) == oracle.count_svd_all(rank, rank, rank)
    width, head = data.draw(st.integers(1, 3072)), data.draw(st.integers(1, 64))
    assert count(ModeGPT(hidden=width, head_rank=head)) == oracle.count_modegpt(width, head, head)
    assert count(PruneMLP(hidden=width)) == count(ModeGPT(hidden=width, targets="mlp"))
    assert count(PruneMLP(hidden=width)) == oracle.count_prune_mlp(width)
    layers = data.draw(st.integers(2, 12))
    assert count(LayerDrop(layers=layers)) == oracle.count_layerdrop(layers)


@few
@given(cap=st.integers(68_000_000, 124_000_000))
def test_even_ranks_and_widths_under_any_cap(oracle, cap):
    budget = Budget(params=cap, tolerance=0.02)
    block = make_method(SVD(targets="all_linear")).plan(SMALL, budget).spec.blocks[0]
    ranks = block.mlp_c_fc.rank, block.attn_c_attn.rank, block.attn_c_proj.rank
    assert ranks == oracle.uniform_svd_ranks(cap)
    block = make_method(ModeGPT()).plan(SMALL, budget).spec.blocks[0]
    assert (block.mlp_hidden, block.head_qk) == oracle.uniform_modegpt(cap)


def count(recipe) -> int:
    return make_method(recipe).plan(SMALL, Budget()).num_parameters
