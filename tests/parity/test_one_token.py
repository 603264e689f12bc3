"""One token through factors that were prepared for it: the numbers of the formed W, and never old weights."""

from copy import deepcopy

import pytest
import torch
from torch.nn.utils import parametrize

from model.config import GPT2Config, Kron, ModelSpec, Site
from model.export import to_dense
from model.gpt2 import GPT2
from model.layers import one_token
from model.layers.factory import make_linear
from model.layers.structured import set_mode

ALL = {"scales": True, "gather_in": True, "gather_out": True}
SHAPES = [
    Kron(m1=12, n1=12, m2=1, n2=4),
    Kron(m1=12, n1=12, m2=4, n2=1, terms=3, **ALL),
    Kron(m1=12, n1=24, m2=1, n2=2, terms=2, **ALL),
    Kron(m1=4, n1=8, m2=3, n2=6),
    Kron(m1=6, n1=24, m2=2, n2=2, terms=2, **ALL),
    Kron(m1=8, n1=1, m2=3, n2=8, terms=3),
]


def layer_of(kron, *, n_bias=None):
    """A layer with random factors, permutations and bias, in evaluation."""
    n_in, n_out = kron.m1 * kron.m2, kron.n1 * kron.n2
    layer = make_linear(Site("w", n_in, n_out, n_out if n_bias is None else n_bias, kron)).eval()
    layer.mode = "factored"  # small shapes have a large share
    return with_random_numbers(layer)


def with_random_numbers(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for buffer in module.buffers():
            buffer.copy_(torch.randperm(len(buffer), generator=generator))
    return module


def model_of(kron=None, *, activation="gelu_new"):
    """A GPT-2 of one block with Kronecker sums in its MLP."""
    kron = kron or Kron(m1=24, n1=24, m2=1, n2=4, gather_in=True)
    arch = GPT2Config(n_layer=1, n_head=2, n_embd=24, n_ctx=8, vocab_size=50, activation=activation)
    both = {"h.0.mlp.c_fc": kron, "h.0.mlp.c_proj": kron.transposed()}
    return with_random_numbers(GPT2(ModelSpec.dense(arch).with_matrices(both))).eval()


def token(width, seed=1):
    return torch.randn(1, 1, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [7, 10**6])
@pytest.mark.parametrize("order", ["auto", "a_first", "b_first"])
@pytest.mark.parametrize("kron", SHAPES, ids=str)
def test_one_token_is_multiplied_as_by_the_formed_weight(kron, order, block, monkeypatch):
    monkeypatch.setattr(one_token, "BLOCK", block)
    for n_bias in (kron.n1 * kron.n2, 5, 0):
        layer = layer_of(kron, n_bias=n_bias)
        layer.order = order
        x = token(layer.n_in)
        weight, bias = layer.double().to_dense()
        expected = x.double() @ weight + bias
        with torch.no_grad():
            assert layer.float().for_one_token() is not None
            for same in (x, x.repeat_interleave(2, -1)[..., ::2], x[0, 0]):  # one is strided
                y = layer(same)
                assert y.shape == (*same.shape[:-1], layer.n_out)
                torch.testing.assert_close(y.double().view(expected.shape), expected, rtol=1e-5, atol=1e-5)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = layer(x.bfloat16())
                assert torch.is_autocast_enabled("cpu")
        assert half.dtype == torch.bfloat16
        assert (half - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("kron", [None, Kron(m1=8, n1=16, m2=3, n2=6, terms=2)], ids=str)
def test_a_model_reads_one_token_as_its_dense_twin_does(kron, activation):
    model = model_of(kron, activation=activation)
    dense, idx = to_dense(model), torch.tensor([[7]])
    with torch.inference_mode():
        expected = dense(idx)
        for mode in ("auto", "factored", "materialize", "cached"):
            set_mode(model, mode)
            torch.testing.assert_close(model(idx), expected, rtol=1e-4, atol=1e-4)


def test_what_was_prepared_follows_every_change_of_a_weight():
    layer = layer_of(SHAPES[2])
    x = token(layer.n_in)
    changes = [
        lambda: layer.left.mul_(2.0),
        lambda: layer.scales.add_(1.0),
        layer.bias.neg_,
        lambda: layer.gather_out.copy_(layer.gather_out.flip(0)),
        lambda: layer.load_state_dict({n: v.flip(0) for n, v in layer.state_dict().items()}),
        lambda: layer.load_state_dict({"bias": layer.bias * 3}, strict=False, assign=True),
        lambda: setattr(layer, "right", torch.nn.Parameter(layer.right * 3)),
        lambda: setattr(layer, "order", "b_first"),
        lambda: layer.train().eval(),
    ]
    with torch.no_grad():
        assert layer.for_one_token() is layer.for_one_token(), "prepared once"
        for change in changes:
            layer(x)
            change()
            weight, bias = layer.to_dense()
            torch.testing.assert_close(layer(x), x @ weight + bias, rtol=1e-4, atol=1e-4)


def test_factors_behind_a_parametrization_are_read_anew():
    layer = layer_of(SHAPES[2])
    x = token(layer.n_in)
    parametrize.register_parametrization(layer, "left", Doubled())
    with torch.no_grad():
        for _ in range(2):
            layer.parametrizations.left.original.mul_(2.0)
            for layer.mode in ("factored", "cached"):
                weight, bias = layer.to_dense()
                torch.testing.assert_close(layer(x), x @ weight + bias, rtol=1e-4, atol=1e-4)


class Doubled(torch.nn.Module):
    """What stands between a parameter and its use."""

    def forward(self, weight):
        """Twice the parameter."""
        return 2.0 * weight


def test_an_mlp_hears_hooks_trains_its_factors_and_saves_what_it_did_before():
    model, x = model_of(), token(24)
    mlp, names = model.h[0].mlp, set(model.state_dict())
    with torch.no_grad():
        together = mlp(x)
        heard = []
        with_hook = deepcopy(mlp)
        with_hook.c_fc.register_forward_hook(lambda *_: heard.append(1))
        torch.testing.assert_close(with_hook(x), together)
    assert heard
    assert set(model.state_dict()) == names
    mlp(x).sum().backward()
    assert all(p.grad is not None for p in mlp.parameters())


@pytest.mark.parametrize("reason", ["training", "mode", "share", "exact", "uncounted"])
def test_a_layer_keeps_its_usual_way_where_nothing_may_be_prepared(reason):
    layer = layer_of(SHAPES[0])
    x = token(layer.n_in)
    if reason == "training":
        layer.train()
    if reason == "mode":
        layer.mode = "materialize"
    if reason == "share":
        layer = layer_of(Kron(m1=8, n1=16, m2=3, n2=6, terms=18))
        layer.mode, x = "auto", token(24)
    if reason == "exact":
        layer, x = layer.double(), x.double()
    if reason == "uncounted":
        with torch.inference_mode():
            layer.bias = torch.nn.Parameter(layer.bias * 2, requires_grad=False)
    with torch.no_grad():
        weight, bias = layer.to_dense()
        assert layer.for_one_token() is None
        torch.testing.assert_close(layer(x), x @ weight + bias, rtol=1e-4, atol=1e-4)


def test_the_compiler_sees_the_factors():
    model, idx = model_of(), torch.tensor([[7]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(idx), model(idx), rtol=1e-4, atol=1e-4)
        model.h[0].mlp.c_fc.left.mul_(2.0)
        torch.testing.assert_close(compiled(idx), model(idx), rtol=1e-4, atol=1e-4)
