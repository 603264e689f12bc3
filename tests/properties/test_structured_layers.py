"""Every way to multiply with a structured weight is one function: factored, formed, kept, numpy's."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.algebra.shapes import divisors, legal_shapes
from model.config import Kron, LowRank, Site
from model.layers.embedding import Embedding, KroneckerEmbedding
from model.layers.factory import make_linear
from model.layers.structured import StructuredLinear, parameter_tags, set_mode

WAYS = [
    ("factored", "b_first"),
    ("factored", "a_first"),
    ("factored", "auto"),
    ("materialize", "auto"),
    ("auto", "auto"),
]


def filled(site, *, seed=0, dtype=torch.float64):
    """A layer with random parameters and permutations."""
    layer, generator = make_linear(site).to(dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for buffer in layer.buffers():
            buffer.copy_(torch.randperm(len(buffer), generator=generator))
    return layer


def numpy_weight(layer):
    """sum_k s_k A_k (x) B_k by numpy.kron, gathers written out as y[j] = sum_i x[gi[i]] K[i, go[j]]."""
    left, right = layer.left.detach().numpy(), layer.right.detach().numpy()
    scales = np.ones(len(left)) if layer.scales is None else layer.scales.detach().numpy()
    inner = sum(s * np.kron(a, b) for s, a, b in zip(scales, left, right, strict=True))
    weight = np.zeros_like(inner)
    rows = np.arange(len(inner)) if layer.gather_in is None else layer.gather_in.numpy()
    columns = np.arange(inner.shape[1]) if layer.gather_out is None else layer.gather_out.numpy()
    weight[rows] = inner
    return weight[:, columns]


def outcome(layer, x, *, mode, order="auto"):
    """Output and the gradients of input and parameters for a fixed quadratic loss."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    layer.mode = mode
    if hasattr(layer, "order"):
        layer.order = order
    y = layer(x)
    (y.square().sum() / 2 + y.sum()).backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@st.composite
def kron_sites(draw):
    rows, cols = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    m1, n1 = draw(st.sampled_from(divisors(rows))), draw(st.sampled_from(divisors(cols)))
    m2, n2 = rows // m1, cols // n1
    kron = Kron(
        m1=m1,
        n1=n1,
        m2=m2,
        n2=n2,
        terms=draw(st.integers(1, min(4, m1 * n1, m2 * n2))),
        scales=draw(st.booleans()),
        gather_in=draw(st.booleans()),
        gather_out=draw(st.booleans()),
    )
    return Site("w", rows, cols, draw(st.sampled_from([0, cols // 2, cols])), kron)


@settings(max_examples=60, deadline=None)
@given(kron_sites(), st.integers(0, 10**6), st.sampled_from([(3,), (2, 3), ()]))
def test_all_ways_are_one_function_with_one_gradient(site, seed, batch):
    layer = filled(site, seed=seed)
    x = torch.randn(*batch, site.n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bias = np.zeros(site.n_out)
    if layer.bias is not None:
        bias[: site.n_bias] = layer.bias.detach().numpy()
    expected = outcome(layer, x, mode="materialize")
    np.testing.assert_allclose(expected[0].numpy(), x.numpy() @ numpy_weight(layer) + bias, atol=1e-10)
    for mode, order in WAYS:
        for got, want in zip(outcome(layer, x, mode=mode, order=order), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-9)
    layer.mode = "cached"
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected[0], rtol=1e-10, atol=1e-10)


def test_every_shape_and_up_to_four_terms_agree():
    x = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shapes = legal_shapes(24, 96)
    assert len(shapes) == 96
    for shape in shapes:
        for terms in range(1, min(4, shape.max_terms) + 1):
            kron = Kron(m1=shape.m1, n1=shape.n1, m2=shape.m2, n2=shape.n2, terms=terms)
            for site in (Site("up", 24, 96, 96, kron), Site("down", 96, 24, 24, kron.transposed())):
                layer, rows = filled(site, seed=terms), x if site.n_in == 24 else x.repeat(1, 4)
                expected = outcome(layer, rows, mode="materialize")
                for order in ("b_first", "a_first"):
                    for got, want in zip(
                        outcome(layer, rows, mode="factored", order=order), expected, strict=True
                    ):
                        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


FULL_SIZE = [
    (32, 64, 1),
    (256, 64, 4),
    (256, 1024, 2),
    (384, 768, 4),
    (768, 768, 1),
    (384, 3072, 1),
    (768, 1, 2),
    (1, 3072, 3),
]


@pytest.mark.parametrize(("m1", "n1", "terms"), FULL_SIZE)
def test_full_size_shapes_agree_in_single_precision(m1, n1, terms):
    kron = Kron(m1=m1, n1=n1, m2=768 // m1, n2=3072 // n1, terms=terms)
    for site in (Site("up", 768, 3072, 3072, kron), Site("down", 3072, 768, 768, kron.transposed())):
        layer = filled(site, dtype=torch.float32)
        x = torch.randn(4, site.n_in, generator=torch.Generator().manual_seed(2))
        expected = outcome(layer, x, mode="materialize")
        for got, want in zip(outcome(layer, x, mode="factored"), expected, strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(
    "matrix", [LowRank(rank=3), LowRank(rank=10), Kron(m1=10, n1=1, m2=1, n2=14, terms=4)]
)
def test_low_rank_multiplies_like_its_product(matrix):
    layer = filled(Site("w", 10, 14, 9, matrix))
    x = torch.randn(5, 10, dtype=torch.float64)
    weight, bias = layer.to_dense()
    assert bias[9:].eq(0).all()
    assert torch.linalg.matrix_rank(weight) == layer.cost.rank_bound
    for mode in ("factored", "materialize"):
        torch.testing.assert_close(outcome(layer, x, mode=mode)[0], x @ weight + bias)


def test_a_kept_weight_follows_every_change_of_a_factor():
    layer = filled(Site("w", 12, 8, 8, Kron(m1=4, n1=2, m2=3, n2=4, terms=2, scales=True))).eval()
    layer.mode = "cached"
    x = torch.randn(3, 12, dtype=torch.float64)
    changes = [
        lambda: layer.left.mul_(2.0),
        lambda: layer.scales.add_(1.0),
        lambda: layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}),
        lambda: layer.train().eval(),
        lambda: setattr(layer, "right", torch.nn.Parameter(layer.right * 3)),
        lambda: layer.float().double(),
    ]
    with torch.no_grad():
        formed = layer._cached_weight()
        assert layer._cached_weight() is formed, "nothing changed, so W is not formed again"
        for change in changes:
            layer(x)
            change()
            weight, bias = layer.to_dense()
            torch.testing.assert_close(layer(x), x @ weight + bias)


def test_a_kept_weight_never_hides_the_factors_from_training():
    layer = filled(Site("w", 12, 8, 8, Kron(m1=4, n1=2, m2=3, n2=4))).eval()
    layer.mode = "cached"
    layer(torch.randn(3, 12, dtype=torch.float64)).sum().backward()
    assert layer.left.grad is not None
    assert layer.right.grad is not None


def test_a_weight_kept_under_autocast_is_not_taken_for_the_exact_one():
    layer = make_linear(Site("w", 12, 8, 8, LowRank(rank=3))).eval()
    layer.init_weights(std=1.0, generator=torch.Generator().manual_seed(0))
    layer.mode, x = "cached", torch.randn(5, 12)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(layer(x).float(), exact)
        assert torch.equal(layer(x), exact)


def test_auto_forms_the_weight_only_where_that_is_cheaper():
    cheap = make_linear(Site("w", 768, 3072, 3072, Kron(m1=768, n1=768, m2=1, n2=4)))
    dear = make_linear(Site("w", 768, 3072, 3072, Kron(m1=256, n1=1024, m2=3, n2=3, terms=4)))
    low = make_linear(Site("w", 768, 3072, 3072, LowRank(rank=576)))
    assert cheap.resolve_mode(1) == cheap.resolve_mode(10**6) == "factored"
    assert low.resolve_mode(1) == low.resolve_mode(10**6) == "factored"
    # 1.337 of the multiply-accumulates at an efficiency of 0.8 pay for 400 tokens of forming after 595
    assert dear.resolve_mode(590) == "factored"
    assert dear.resolve_mode(600) == "materialize"
    # factors of short sides do half as much in the same time: 0.84 of the work costs 2.1
    short = make_linear(Site("w", 768, 3072, 3072, Kron(m1=32, n1=64, m2=24, n2=48, terms=16)))
    assert short.resolve_mode(1024) == "factored"
    assert short.resolve_mode(4096) == "materialize"
    half = make_linear(Site("w", 768, 3072, 3072, Kron(m1=384, n1=1536, m2=2, n2=2)))
    with torch.no_grad():
        assert short.eval().resolve_mode(256) == "cached"
        five = make_linear(Site("w", 768, 3072, 3072, Kron(m1=256, n1=1024, m2=3, n2=3, terms=5)))  # 1.67
        assert {layer.eval().resolve_mode(1) for layer in (five, low)} == {"cached"}
        assert dear.eval().resolve_mode(1) == "factored"  # prepared, and read by all threads
        assert cheap.eval().resolve_mode(1) == half.eval().resolve_mode(1) == "factored"
        with torch.autocast("cpu", dtype=torch.bfloat16):  # W has half of the bytes, the steps are as many
            assert (half.resolve_mode(2), half.resolve_mode(64)) == ("cached", "factored")
            assert half.resolve_mode(1) == "factored"  # by factors that were prepared for it


@pytest.mark.parametrize(
    "matrix",
    [
        Kron(m1=64, n1=96, m2=4, n2=4, terms=1),
        Kron(m1=64, n1=96, m2=4, n2=4, terms=5, scales=True),
        LowRank(rank=40),
    ],
)
def test_fresh_factors_make_a_weight_of_the_wanted_spread(matrix):
    layer = make_linear(Site("w", 256, 384, 384, matrix))
    layer.init_weights(std=0.02, generator=torch.Generator().manual_seed(0))
    again = make_linear(Site("w", 256, 384, 384, matrix))
    again.init_weights(std=0.02, generator=torch.Generator().manual_seed(0))
    assert layer.weight_matrix().std().item() == pytest.approx(0.02, rel=0.25)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "kron",
    [Kron(m1=29, n1=8, m2=1, n2=2), Kron(m1=29, n1=4, m2=1, n2=4, terms=3, scales=True, gather_out=True)],
)
def test_a_kronecker_table_reads_and_scores_like_the_dense_one(kron):
    table = KroneckerEmbedding(kron).double()
    generator = torch.Generator().manual_seed(3)
    table.init_weights(std=1.0, generator=generator)
    if table.gather_out is not None:
        table.gather_out.copy_(torch.randperm(16, generator=generator))
    rows = [
        np.kron(a, b)
        for a, b in zip(table.left.detach().numpy(), table.rows().detach().numpy()[:, None], strict=True)
    ]
    expected = torch.from_numpy(sum(rows))
    if table.gather_out is not None:
        expected = expected[:, table.gather_out]
    torch.testing.assert_close(table.table(), expected)
    idx, x = torch.randint(0, 29, (2, 5)), torch.randn(2, 5, 16, dtype=torch.float64)
    dense = Embedding(29, 16).double()
    with torch.no_grad():
        dense.weight.copy_(expected)
    torch.testing.assert_close(table(idx), dense(idx))
    torch.testing.assert_close(table.logits(x), dense.logits(x))


def test_tags_tell_the_optimizer_what_is_what():
    layers = torch.nn.ModuleDict(
        {
            "up": make_linear(Site("w", 12, 48, 48, Kron(m1=12, n1=12, m2=1, n2=4, scales=True))),
            "pruned": make_linear(Site("w", 12, 48, 48, Kron(m1=2, n1=2, m2=6, n2=24, decay_right=False))),
            "thin": make_linear(Site("w", 12, 48, 48, LowRank(rank=2))),
            "full": make_linear(Site("w", 12, 48, 48, Kron(m1=12, n1=48, m2=1, n2=1))),
            "norm": torch.nn.LayerNorm(12),
            "wte": KroneckerEmbedding(Kron(m1=29, n1=8, m2=1, n2=2)),
        }
    )
    tags = {name: (tag.group, tag.decay) for name, tag in parameter_tags(layers).items()}
    assert set(tags) == {name for name, _ in layers.named_parameters()}
    assert tags["up.left"] == tags["full.left"] == tags["thin.second"] == ("factor_big", True)
    assert tags["up.right"] == tags["thin.first"] == ("factor_small", True)
    assert tags["up.scales"] == ("factor_small", False)
    assert tags["pruned.right"] == ("factor_big", False)
    assert tags["up.bias"] == tags["norm.weight"] == ("dense", False)
    assert tags["wte.left"] == ("embedding", True)


def test_one_call_sets_the_mode_of_a_whole_model():
    layers = torch.nn.ModuleList([make_linear(Site("w", 4, 4, 4, LowRank(rank=2))) for _ in range(2)])
    set_mode(layers, "materialize")
    assert all(isinstance(layer, StructuredLinear) and layer.mode == "materialize" for layer in layers)
