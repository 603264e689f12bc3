"""Both layers of an MLP in one function: the numbers and gradients of the two layers called one by one."""

from copy import deepcopy

import pytest
import torch
from torch.library import opcheck

from model.config import GPT2Config, Kron, ModelSpec
from model.gpt2 import GPT2
from model.layers import choice
from model.layers import narrow_mlp as op
from model.layers.paired import paired
from model.layers.structured import set_mode

WIDTH, TOKENS = 24, 130


@pytest.fixture(autouse=True)
def _small_layers_choose_as_large_ones(monkeypatch):
    monkeypatch.setattr(choice, "LONG_SIDE", WIDTH)


def block_of(*, q=4, terms=1, scales=False, gather=False, seed=0):
    """A GPT-2 of one block whose MLP is (C x n)(1 x q), with random factors and biases."""
    up = Kron(m1=WIDTH, n1=4 * WIDTH // q, m2=1, n2=q, terms=terms, scales=scales, gather_in=gather)
    arch = GPT2Config(n_layer=1, n_head=2, n_embd=WIDTH, n_ctx=64, vocab_size=50)
    spec = ModelSpec.dense(arch).with_matrices({"h.0.mlp.c_fc": up, "h.0.mlp.c_proj": up.transposed()})
    model = GPT2(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        for buffer in model.buffers():
            buffer.copy_(torch.randperm(len(buffer), generator=generator))
    return model.h[0].mlp


def one_by_one(mlp, x):
    hidden = torch.nn.functional.gelu(mlp.c_fc(x), approximate=mlp.gelu)
    return mlp.c_proj(hidden)


def gradients(mlp, x, call):
    x = x.clone().requires_grad_()
    mlp.zero_grad()
    out = call(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in mlp.parameters())]


@pytest.mark.parametrize("piece", [7 * WIDTH, 10**6])
@pytest.mark.parametrize(
    "structure",
    [
        {"q": 4},
        {"q": 1},
        {"q": 2, "terms": 2},
        {"q": 4, "scales": True},
        {"q": 4, "terms": 3, "gather": True},
    ],
    ids=str,
)
def test_one_function_is_two_layers(structure, piece, monkeypatch):
    monkeypatch.setattr(op, "PIECE", piece)
    mlp = block_of(**structure)
    x = torch.randn(2, TOKENS // 2, WIDTH, generator=torch.Generator().manual_seed(1))
    assert paired(mlp.c_fc, mlp.c_proj, x, gelu=mlp.gelu) is not None
    exact = deepcopy(mlp).double()
    truth = gradients(exact, x.double(), lambda x: one_by_one(exact, x))
    apart = gradients(mlp, x, lambda x: one_by_one(mlp, x))
    for mine, theirs, expected in zip(gradients(mlp, x, mlp), apart, truth, strict=True):
        mistake, other = ((each - expected).norm() / expected.norm() for each in (mine, theirs))
        assert mistake < 3 * other + 1e-6
        assert mistake < 1e-4


def test_far_from_zero_the_gelu_is_still_that_of_torch():
    x = torch.linspace(-60, 60, 4_001).reshape(-1, 1).requires_grad_()
    one, zero = torch.ones(1, 1), torch.zeros(1)
    mine = op.narrow_mlp(x, one, one, zero, one, one)
    (slope,) = torch.autograd.grad(mine.sum(), x)
    theirs = torch.nn.functional.gelu(x, approximate="tanh")
    (expected,) = torch.autograd.grad(theirs.sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=2e-6)


def test_under_autocast_the_products_are_bf16_and_the_rest_is_not_worse_than_layer_by_layer():
    mlp = block_of()
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    exact = gradients(mlp, x, lambda x: one_by_one(mlp, x))

    def half(call):
        def run(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(x)

        return run

    together = gradients(mlp, x, half(mlp))
    apart = gradients(mlp, x, half(lambda x: one_by_one(mlp, x)))
    for mine, theirs, truth in zip(together, apart, exact, strict=True):
        mistake, other = ((each.float() - truth).norm() / truth.norm() for each in (mine, theirs))
        assert mistake < 0.03
        assert mistake < 1.5 * other + 1e-3


def test_the_operator_is_sound_for_the_compiler():
    mlp = block_of(terms=2)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    arguments = (
        x,
        mlp.c_fc.left.detach().transpose(0, 1).flatten(1).clone().requires_grad_(),
        mlp.c_fc.right.detach()[:, 0].clone().requires_grad_(),
        mlp.c_fc.bias.detach().clone().requires_grad_(),
        mlp.c_proj.left.detach().flatten(0, 1).clone().requires_grad_(),
        mlp.c_proj.right.detach()[:, :, 0].clone().requires_grad_(),
    )
    opcheck(torch.ops.krony.narrow_mlp, arguments)


@pytest.mark.parametrize("reason", ["few", "mode", "order", "hook", "gelu", "wide", "exact"])
def test_a_layer_that_is_wanted_by_itself_is_called_by_itself(reason):
    mlp = block_of(q=4 if reason != "wide" else 96)
    x = torch.randn(8 if reason == "few" else TOKENS, WIDTH)
    gelu = mlp.gelu
    if reason == "mode":
        set_mode(mlp, "materialize")
    if reason == "order":
        mlp.c_proj.order = "a_first"
    if reason == "gelu":
        gelu = "none"
    if reason == "exact":
        mlp, x = mlp.double(), x.double()
    heard = []
    if reason == "hook":
        mlp.c_proj.register_forward_hook(lambda *_: heard.append(1))
    assert paired(mlp.c_fc, mlp.c_proj, x, gelu=gelu) is None
    mlp(x)
    assert bool(heard) == (reason == "hook")


def test_only_the_narrow_activation_is_kept_for_the_backward_pass():
    mlp, kept = block_of(), []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    own = {p.data_ptr() for p in mlp.parameters()} | {x.data_ptr()}
    assert (
        sum(t.numel() for t in kept if t.data_ptr() not in own and t.ndim == 2 and len(t) == TOKENS)
        == TOKENS * WIDTH
    )


def test_inside_a_compiled_model_it_stays_one_operator():
    up = Kron(m1=WIDTH, n1=WIDTH, m2=1, n2=4)
    arch = GPT2Config(n_layer=2, n_head=2, n_embd=WIDTH, n_ctx=64, vocab_size=50)
    both = {f"h.{i}.mlp.c_fc": up for i in range(2)} | {
        f"h.{i}.mlp.c_proj": up.transposed() for i in range(2)
    }
    model = GPT2(ModelSpec.dense(arch).with_matrices(both)).init_weights(seed=0)
    idx = torch.randint(50, (2, 64), generator=torch.Generator().manual_seed(0))
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(idx, idx), model(idx, idx))
    assert sum("narrow_mlp" in name for name in seen) == 2
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (whole, model):
        model.zero_grad()
        call(idx, idx).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
