"""Narrower heads: scores, joint query/key and value/output pairs against their full-sized definitions."""

import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.algebra.attention import (
    cr_scores,
    head_gram,
    head_metric,
    joint_query_key,
    value_output,
    value_output_two_stage,
)
from model.algebra.bias import corrected_bias
from model.algebra.nystrom import keep_top
from model.algebra.psd import centred, homogeneous, metric_loss, psd_roots
from model.config import ModelError

HEADS, WIDTH, HEAD, TOKENS = 2, 16, 6, 60
RNG = np.random.default_rng(1)


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape))


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)
    return x * (normal(WIDTH).abs() + 0.3) + normal(WIDTH) / 2


X = layer_norm(normal(TOKENS, WIDTH) @ normal(WIDTH, WIDTH))
GRAM, MEAN = X.T @ X / TOKENS, X.mean(dim=0)
COV = centred(GRAM, MEAN)
WQ, WK, WV = (normal(HEADS, WIDTH, HEAD) / 3 for _ in range(3))
BQ, BK, BV = (normal(HEADS, HEAD) for _ in range(3))
WO = normal(HEADS, HEAD, WIDTH) / 3


def logit_loss(head: int, query: torch.Tensor, bias: torch.Tensor, key: torch.Tensor) -> float:
    """Mean squared logit error over all (query, centred key) pairs, from the tokens."""
    centred_x = X - MEAN
    old = (X @ WQ[head] + BQ[head]) @ (centred_x @ WK[head]).T
    new = (X @ query + bias) @ (centred_x @ key).T
    return float((old - new).square().sum()) / TOKENS**2


def joint(rank: int):
    grams = head_gram(WQ, BQ, GRAM, MEAN), head_metric(WK, COV)
    return joint_query_key(WQ, BQ, WK, *grams, rank=rank)


def test_head_statistics_follow_from_the_input():
    query, key = X @ WQ + BQ[:, None], X @ WK
    assert_close(head_gram(WQ, BQ, GRAM, MEAN), query.mT @ query / TOKENS)
    shifted = key - key.mean(dim=1, keepdim=True)
    assert_close(head_metric(WK, COV), shifted.mT @ shifted / TOKENS, rtol=1e-6, atol=1e-9)


def test_cr_scores_are_column_norms_of_the_roots_not_of_cholesky_factors():
    query, key = head_gram(WQ, BQ, GRAM, MEAN), head_gram(WK, BK, GRAM, MEAN)
    scores = cr_scores(query, key)
    roots = psd_roots(query).root.norm(dim=-2) * psd_roots(key).root.norm(dim=-2)
    assert_close(scores, roots)
    wrong = torch.linalg.cholesky(query).norm(dim=-2) * torch.linalg.cholesky(key).norm(dim=-2)
    assert not torch.allclose(scores, wrong)


def test_the_joint_pair_is_exact_at_full_width_and_needs_the_query_bias():
    full = joint(HEAD)
    for head in range(HEADS):
        scale = float(full.sigma[head, 0]) ** 2
        assert logit_loss(head, full.query[head], full.query_bias[head], full.key[head]) < 1e-20 * scale
        assert logit_loss(head, full.query[head], 0 * BQ[head], full.key[head]) > 1e-6 * scale


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_joint_loss_is_the_tail_and_below_every_column_selection(rank: int):
    pair = joint(rank)
    scores = cr_scores(head_gram(WQ, BQ, GRAM, MEAN), head_gram(WK, BK, GRAM, MEAN))
    for head in range(HEADS):
        loss = logit_loss(head, pair.query[head], pair.query_bias[head], pair.key[head])
        assert loss == pytest.approx(float(pair.sigma[head, rank:].square().sum()), rel=1e-8)
        selections = [
            logit_loss(head, WQ[head][:, kept], BQ[head][kept], WK[head][:, kept])
            for kept in map(list, itertools.combinations(range(HEAD), rank))
        ]
        chosen = keep_top(scores[head], rank)
        published = logit_loss(head, WQ[head][:, chosen], BQ[head][chosen], WK[head][:, chosen])
        assert loss <= min(selections) <= published * (1 + 1e-12)


def test_the_head_sized_form_is_the_full_sized_one():
    pair, rank = joint(3), 3
    for head in range(HEADS):
        extended, full = torch.cat([WQ[head], BQ[head][None]]), homogeneous(GRAM, MEAN)
        roots_q, roots_k = psd_roots(full), psd_roots(COV)
        u, s, vh = torch.linalg.svd(roots_q.root @ extended @ WK[head].T @ roots_k.root)
        product = roots_q.inverse @ (u[:, :rank] * s[:rank]) @ vh[:rank] @ roots_k.inverse
        small = torch.cat([pair.query[head], pair.query_bias[head][None]]) @ pair.key[head].T
        # the metrics are singular: compare what tokens can see
        assert_close(roots_q.root @ small @ roots_k.root, roots_q.root @ product @ roots_k.root)
        assert_close(pair.sigma[head], s[:HEAD])


def test_a_dead_head_stays_finite():
    zero = torch.zeros(HEAD, HEAD, dtype=torch.float64)
    pair = joint_query_key(0 * WQ[0], 0 * BQ[0], WK[0], zero, head_metric(WK[0], COV), rank=4)
    assert float(pair.query.abs().max()) == 0
    assert torch.isfinite(pair.key).all()


@pytest.mark.parametrize("metric", [GRAM, COV], ids=["second moment", "covariance"])
@pytest.mark.parametrize("rank", [1, 4, HEAD])
def test_value_output_loss_is_the_tail_in_all_forms(metric: torch.Tensor, rank: int):
    small, staged = value_output(WV, WO, metric, rank=rank), value_output_two_stage(WV, WO, metric, rank=rank)
    for head in range(HEADS):
        product = WV[head] @ WO[head]
        sigma = torch.linalg.svdvals(psd_roots(metric).root @ product)[:HEAD]
        tail = float(sigma[rank:].square().sum())
        assert_close(small.sigma[head], sigma, rtol=1e-6, atol=1e-9)
        for pair in (small, staged):
            new = pair.value[head] @ pair.output[head]
            assert metric_loss(product - new, input_metric=metric) == pytest.approx(tail, rel=1e-7, abs=1e-12)
    root = psd_roots(metric).root
    assert_close(root @ small.value @ small.output, root @ staged.value @ staged.output)


def test_the_mean_of_the_value_path_moves_into_the_output_bias():
    causal = torch.tril(torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))).double()
    rows = causal / causal.sum(dim=1, keepdim=True)  # attention rows sum to one
    pair, bias = value_output(WV, WO, COV, rank=3), normal(WIDTH)
    drift = (WV @ WO - pair.value @ pair.output).sum(dim=0)  # both heads see the same rows here
    new = corrected_bias(bias, mean=MEAN, difference=drift)
    error = rows @ X @ drift - (new - bias)
    assert_close(error, rows @ (X - MEAN) @ drift, rtol=1e-8, atol=1e-9)
    assert float(error.square().sum()) < float((rows @ X @ drift).square().sum())


def test_a_rank_beyond_the_head_is_refused():
    for rank in (0, HEAD + 1):
        with pytest.raises(ModelError, match=f"head rank {rank} of a head of width 6"):
            value_output(WV, WO, GRAM, rank=rank)
        with pytest.raises(ModelError, match="choose 1 to 6"):
            joint(rank)
