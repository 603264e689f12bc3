"""The model and its loss: what goes in, what comes out, and what a seed means."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import gpt2
from model.config import GPT2Config, Kron, LowRank, ModelError, ModelSpec, SplitQKV
from model.gpt2 import GPT2, set_recompute
from model.layers.factory import make_linear
from model.layers.structured import parameter_tags, set_mode
from model.losses import chunked_cross_entropy_sum, cross_entropy_sum, distillation_sum

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=24, vocab_size=97)
DENSE = ModelSpec.dense(ARCH)
MIXED = replace(
    DENSE.with_matrices(
        {
            "h.0.attn.c_attn": LowRank(rank=6),
            "h.0.mlp.c_fc": Kron(m1=8, n1=16, m2=4, n2=8, terms=3, scales=True),
            "h.0.mlp.c_proj": Kron(m1=64, n1=32, m2=2, n2=1, gather_in=True, gather_out=True),
            "h.1.attn.k": Kron(m1=32, n1=16, m2=1, n2=2, terms=2),
        }
    ),
    embedding=Kron(m1=97, n1=16, m2=1, n2=2),
)


@pytest.fixture
def idx():
    return torch.randint(97, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", [DENSE, MIXED], ids=["dense", "mixed"])
def test_the_loss_is_the_sum_over_scored_tokens(toy, idx, spec):
    model, targets = toy(spec), idx.roll(-1, dims=1)
    targets[:, -1], targets[0, 3] = -100, -1
    logits = model(idx)
    assert logits.shape == (3, 24, 97)
    keep = targets >= 0
    expected = F.cross_entropy(logits[keep], targets[keep], reduction="sum")
    torch.testing.assert_close(model(idx, targets), expected)


def test_a_token_sees_no_later_one(toy, idx):
    model = toy(MIXED)
    other = idx.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 97
    before, after = model(idx), model(other)
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_a_row_longer_than_the_context_is_refused(toy):
    with pytest.raises(ModelError, match="25 tokens do not fit the context of 24"):
        toy(DENSE)(torch.zeros(1, 25, dtype=torch.long))


def test_every_mode_of_a_whole_model_gives_the_same_logits(toy, idx):
    model = toy(MIXED, dtype=torch.float64)
    with torch.no_grad():
        expected = model(idx)
        for mode in ("factored", "materialize", "cached", "cached"):
            set_mode(model, mode)
            torch.testing.assert_close(model(idx), expected, rtol=1e-10, atol=1e-10)


def gradients(model, idx):
    """Loss and gradients of one pass, and how many bytes autograd kept for it."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(idx, idx.roll(-1, dims=1))
    loss.backward()
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())], bytes_kept


def test_an_mlp_in_pieces_is_the_whole_one(toy, idx, monkeypatch):
    model = toy(MIXED, dtype=torch.float64)
    whole, _ = gradients(model, idx)
    lengths = []
    model.h[0].mlp.c_fc.register_forward_hook(lambda layer, given, out: lengths.append(len(out)))
    monkeypatch.setattr(gpt2, "CPU_PIECE", 11)
    torch.testing.assert_close(gradients(model, idx)[0], whole)
    assert lengths == [11, 11, 11, 11, 11, 11, 6]
    set_mode(model, "materialize")  # a matrix that is formed is formed once
    lengths.clear()
    torch.testing.assert_close(gradients(model, idx)[0], whole)
    assert lengths == [3]


@pytest.mark.parametrize("spec", [DENSE, MIXED], ids=["dense", "mixed"])
def test_what_is_made_again_changes_memory_and_no_bit(toy, idx, spec):
    model = toy(spec)
    usual, most = gradients(model, idx)
    kept = [most]
    for what in ("mlp", "block"):
        set_recompute(model, what)
        again, bytes_kept = gradients(model, idx)
        assert all(torch.equal(a, b) for a, b in zip(again, usual, strict=True))
        kept.append(bytes_kept)
    assert kept[0] > kept[1] > kept[2]


def test_a_seed_names_the_fresh_weights():
    first, again, other = (GPT2(MIXED).init_weights(seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.wpe.weight, other.wpe.weight)


def test_fresh_weights_have_the_spread_of_gpt2():
    wide = GPT2(ModelSpec.dense(GPT2Config(n_layer=8, n_head=2, n_embd=64, n_ctx=64, vocab_size=97)))
    wide.init_weights(seed=0)
    spread = {name: p.std().item() for name, p in wide.named_parameters() if p.ndim > 1}
    residual = 0.02 / 16**0.5
    for name, value in spread.items():
        assert value == pytest.approx(residual if "c_proj" in name else 0.02, rel=0.1), name
    assert all(p.eq(0).all() for name, p in wide.named_parameters() if name.endswith("bias"))


def test_a_factory_fills_every_place_of_the_seam(idx):
    seen = []

    def factory(site):
        seen.append(site.name)
        return make_linear(site)

    GPT2(MIXED, factory=factory)(idx)
    assert seen == [site.name.split(".", 2)[2] for site in MIXED.sites()]


def test_narrow_heads_keep_the_scale_of_the_stock_head(toy, idx):
    """Zero columns of q and k change no score, so dropping them must not either."""
    model = toy(DENSE)
    narrow_spec = replace(DENSE, blocks=tuple(replace(b, head_qk=11) for b in DENSE.blocks))
    narrow = GPT2(narrow_spec)
    state = model.state_dict()
    for i in range(2):
        for name, dim in (("weight", 1), ("bias", 0)):
            key = f"h.{i}.attn.c_attn.{name}"
            q, k, v = state[key].split(32, dim=dim)
            heads = [part.unflatten(dim, (2, 16)) for part in (q, k)]
            for part in heads:
                part.narrow(dim + 1, 11, 5).zero_()
            cut = [part.narrow(dim + 1, 0, 11).flatten(dim, dim + 1) for part in heads]
            state[key] = torch.cat([*cut, v], dim=dim)
            model.get_parameter(key).data.copy_(
                torch.cat([part.flatten(dim, dim + 1) for part in heads] + [v], dim)
            )
    narrow.load_state_dict(state)
    torch.testing.assert_close(narrow(idx), model(idx), atol=1e-5, rtol=1e-5)


def test_split_attention_equals_packed_attention(toy, idx):
    model = toy(DENSE)
    split = GPT2(replace(DENSE, blocks=tuple(replace(b, attn_c_attn=SplitQKV()) for b in DENSE.blocks)))
    state = model.state_dict()
    for i in range(2):
        for part in ("weight", "bias"):
            packed = state.pop(f"h.{i}.attn.c_attn.{part}")
            for name, piece in zip("qkv", packed.split(32, dim=-1), strict=True):
                state[f"h.{i}.attn.{name}.{part}"] = piece
    split.load_state_dict(state)
    torch.testing.assert_close(split(idx), model(idx), atol=1e-6, rtol=1e-6)


def test_a_query_bias_alone_is_the_packed_bias_with_zeros(toy, idx):
    spec = replace(DENSE, blocks=tuple(replace(b, qkv_bias="query") for b in DENSE.blocks))
    bare, full = toy(spec), GPT2(DENSE)
    state = bare.state_dict()
    for i in range(2):
        key = f"h.{i}.attn.c_attn.bias"
        assert state[key].shape == (32,)
        state[key] = torch.cat([state[key], torch.zeros(64)])
    full.load_state_dict(state)
    torch.testing.assert_close(bare(idx), full(idx))


def test_an_untied_head_is_its_own(toy, idx):
    model = toy(ModelSpec.dense(ARCH, tied=False))
    before = model(idx)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(model(idx), 2 * before)


def test_tags_cover_every_parameter_of_a_model():
    tags = parameter_tags(GPT2(replace(MIXED, tied=False)))
    assert {tag.group for tag in tags.values()} == {"factor_big", "factor_small", "embedding", "dense"}
    assert tags["wpe.weight"].group == "embedding"
    assert not tags["ln_f.weight"].decay
    assert tags["h.1.mlp.c_fc.weight"].decay


@pytest.mark.parametrize("spec", [DENSE, MIXED], ids=["dense", "mixed"])
def test_compiled_equals_eager(toy, idx, spec):
    pytest.importorskip("torch._dynamo")
    model, targets = toy(spec), idx.roll(-1, dims=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(idx, targets), model(idx, targets))


# --- losses --------------------------------------------------------------------------------------------


def test_pieces_of_any_size_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(8, 50, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, 7, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-2, 50, (2, 7), generator=generator)

    def run(**limits):
        loss = chunked_cross_entropy_sum(hidden, targets, head=lambda x: x @ head, vocab_size=50, **limits)
        return [loss, *torch.autograd.grad(loss, [hidden, head])]

    whole = run()
    torch.testing.assert_close(whole[0], cross_entropy_sum(hidden @ head, targets))
    for max_logits in (1, 50, 150, 350, 699):
        for got, want in zip(run(max_logits=max_logits), whole, strict=True):
            torch.testing.assert_close(got, want)


def test_a_loss_of_no_scored_token_is_zero():
    assert cross_entropy_sum(torch.randn(3, 5), torch.full((3,), -1)).item() == 0.0


def test_the_loss_of_a_low_precision_model_is_summed_in_fp32():
    logits = torch.randn(4000, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(4000, dtype=torch.long)
    loss = cross_entropy_sum(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), cross_entropy_sum(logits.double(), targets).double(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (0.0, 1.0), (1.0, 3.0), (0.3, 4.0)])
def test_distillation_is_torchs_kl_per_token(alpha, temperature):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 13, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 5, 13, generator=generator, requires_grad=True)
    targets = torch.randint(-1, 13, (2, 5), generator=generator)
    keep = targets >= 0
    kl = F.kl_div(
        F.log_softmax(student[keep] / temperature, -1),
        F.log_softmax(teacher[keep] / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    expected = (
        alpha * F.cross_entropy(student[keep], targets[keep], reduction="sum")
        + (1 - alpha) * temperature**2 * kl
    )
    loss = distillation_sum(student, teacher, targets, alpha=alpha, temperature=temperature)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it():
    logits = torch.randn(2, 5, 13, generator=torch.Generator().manual_seed(0))
    assert distillation_sum(logits, logits, torch.zeros(2, 5).long(), alpha=0.0).item() == pytest.approx(
        0, abs=1e-5
    )


def test_distillation_refuses_another_vocabulary_and_impossible_weights():
    one, other = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)
    targets = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ModelError, match="differ; both models need one tokenizer"):
        distillation_sum(one, other, targets)
    with pytest.raises(ModelError, match=r"alpha=1\.5"):
        distillation_sum(one, one, targets, alpha=1.5)
