"""MoDeGPT, pruning, dropped blocks: exact where nothing is cut, predicted where something is, truly small."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from model.algebra.nystrom import selection_loss
from model.algebra.psd import centred
from model.compress.budget import Budget
from model.compress.contract import Stats, Unmeasured
from model.compress.layer_drop import LayerDropMethod
from model.compress.methods import make_method
from model.compress.modegpt_attention import Heads
from model.compress.recipe import RandomInit
from model.compress.structural_recipe import LayerDrop, ModeGPT, ModeGPTJoint, PruneMLP
from model.config import GPT2Config, ModelError, ModelSpec
from model.export import load_native, save_native, save_stock, to_dense
from model.gpt2 import GPT2

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=16, vocab_size=61)
SMALL = ModelSpec.dense(GPT2Config())
IDX = torch.randint(61, (12, 16), generator=torch.Generator().manual_seed(5))
WIDTHS = {"hidden": 40, "head_rank": 10}
RECIPES = {
    "modegpt": ModeGPT(**WIDTHS),
    "modegpt-bias": ModeGPT(**WIDTHS, bias_correction=True, selector="greedy"),
    "modegpt-mixed": ModeGPT(**WIDTHS, vo_cov="mixed"),
    "modegpt-mlp": ModeGPT(targets="mlp", hidden=40),
    "modegpt-one-block": ModeGPT(**WIDTHS, layers=(1,)),
    "joint": ModeGPTJoint(**WIDTHS),
    "joint-plain": ModeGPTJoint(**WIDTHS, bias_correction=False, selector="greedy"),
    "joint-mixed": ModeGPTJoint(**WIDTHS, vo_cov="mixed"),
    "prune": PruneMLP(hidden=40),
    "prune-activation": PruneMLP(hidden=40, score="activation"),
    "layerdrop": LayerDrop(layers=1, select="bi"),
}


@pytest.fixture(scope="module")
def teacher(toy):
    return toy(ModelSpec.dense(ARCH), seed=1, dtype=torch.float64)


def inputs_of(model: GPT2) -> dict[str, torch.Tensor]:
    """What enters every matrix, (tokens, m), and the stream before and after every block."""
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for site in model.spec.sites():

        def at(_module, args, _out, name=site.name):
            seen[name] = args[0].flatten(0, 1)

        hooks.append(model.site(site.name).register_forward_hook(at))
    for i, block in enumerate(model.h):

        def around(_module, args, out, i=i):
            seen[f"before/h.{i}"], seen[f"after/h.{i}"] = args[0].flatten(0, 1), out.flatten(0, 1)

        hooks.append(block.register_forward_hook(around))
    with torch.no_grad():
        model(IDX)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def stats(teacher) -> Stats:
    """Sums over all tokens, the plain way."""
    seen, sums = inputs_of(teacher), {}
    for site in teacher.spec.sites():
        x = seen[site.name].double()
        sums[f"gram/{site.name}"], sums[f"mean/{site.name}"] = x.T @ x, x.sum(0)
    for i, block in enumerate(teacher.h):
        before, after = seen[f"before/h.{i}"], seen[f"after/h.{i}"]
        sums[f"block_influence/h.{i}"] = torch.cosine_similarity(before, after, dim=-1).sum()
        x = seen[f"h.{i}.attn.c_attn"].reshape(*IDX.shape, -1)
        with torch.no_grad():
            q, k, _ = block.attn.heads(x)
        future = torch.ones(16, 16, dtype=torch.bool).triu(1)
        rows = (q @ k.mT * block.attn.scale).masked_fill(future, -torch.inf).softmax(-1)
        mixed = rows @ x.unsqueeze(1)  # (B, H, T, C)
        sums[f"vo_mixed_gram/h.{i}"] = torch.einsum("bhtc,bhtd->hcd", mixed, mixed)
    return Stats(tokens=IDX.numel(), sequences=len(IDX), sums=sums)


def squeeze(recipe, model, stats):
    method = make_method(recipe)
    plan = method.plan(model.spec, Budget(), stats)
    return method.compress(model, plan, stats, seed=0)


def logits(model: GPT2) -> torch.Tensor:
    with torch.no_grad():
        return model(IDX)


def off(result, teacher) -> float:
    return float((logits(result.model) - logits(teacher)).square().mean())


def errors(result) -> dict[str, float]:
    return {row.name: row.achieved_error for row in result.report}


# --- what every method keeps --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_counts_what_is_built_and_the_modules_are_small(name, teacher, stats) -> None:
    result = squeeze(RECIPES[name], teacher, stats)
    assert result.plan.num_parameters == sum(p.numel() for p in result.model.parameters())
    assert result.model.spec == result.plan.spec
    assert {row.name for row in result.report} >= set(result.plan.changed())
    assert result.model.num_parameters() < teacher.num_parameters()
    assert result.model.spec.macs_per_token() < teacher.spec.macs_per_token()
    for row in result.report:
        layer = result.model.site(row.name)
        assert row.parameters == layer.weight_matrix().numel() < row.dense_parameters


@pytest.mark.parametrize("name", RECIPES)
def test_equal_bytes_and_the_teacher_stays(name, teacher, stats, tmp_path) -> None:
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    for folder in ("a", "b"):
        save_native(squeeze(RECIPES[name], teacher, stats).model, tmp_path / folder)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("name", RECIPES)
def test_folders_and_the_dense_form_give_the_same_logits(name, teacher, stats, tmp_path) -> None:
    model = squeeze(RECIPES[name], teacher, stats).model
    dense = to_dense(model)
    assert dense.spec == ModelSpec.dense(replace(ARCH, n_layer=len(model.h)))
    assert torch.allclose(logits(dense), logits(model), rtol=1e-12, atol=1e-12)
    save_native(model.float(), tmp_path)
    again = load_native(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert again.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("name", ["modegpt", "joint", "layerdrop", "prune"])
def test_plain_transformers_opens_the_stock_form(name, teacher, stats, tmp_path) -> None:
    from transformers import GPT2LMHeadModel

    model = squeeze(RECIPES[name], teacher, stats).model
    save_stock(model, tmp_path)
    stock = GPT2LMHeadModel.from_pretrained(tmp_path).eval().double()
    assert load_file(tmp_path / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    with torch.no_grad():
        assert torch.allclose(stock(IDX).logits, logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_predicted_is_achieved(name, teacher, stats) -> None:
    for row in squeeze(RECIPES[name], teacher, stats).report:
        assert row.predicted_error is not None
        assert row.achieved_error == pytest.approx(row.predicted_error, rel=1e-6), row.name
        assert 0 < row.achieved_error < row.energy
        assert row.energy_kept == pytest.approx(1 - row.achieved_error / row.energy)


@pytest.mark.parametrize("name", ["modegpt", "joint"])
def test_a_training_step_lowers_the_loss_and_reaches_every_parameter(name, teacher, stats) -> None:
    model = squeeze(RECIPES[name], teacher, stats).model.float().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(IDX[:, :-1], IDX[:, 1:])
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


# --- nothing cut, nothing lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [ModeGPT, ModeGPTJoint])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("vo_cov", ["input", "mixed"])
def test_full_widths_reproduce_the_logits_without_key_and_value_biases(
    recipe, correct, vo_cov, teacher, stats
) -> None:
    full = recipe(hidden=128, head_rank=16, bias_correction=correct, vo_cov=vo_cov)
    result = squeeze(full, teacher, stats)
    assert torch.allclose(logits(result.model), logits(teacher), rtol=1e-7, atol=1e-8)
    assert teacher.num_parameters() - result.model.num_parameters() == 2 * 2 * 32


def test_all_blocks_and_all_units_are_the_teacher(teacher, stats) -> None:
    for recipe in (LayerDrop(layers=2), PruneMLP(hidden=128), ModeGPT(targets="mlp", hidden=128)):
        result = squeeze(recipe, teacher, stats)
        assert torch.allclose(logits(result.model), logits(teacher), rtol=1e-9, atol=1e-9)


# --- exact rewrites -----------------------------------------------------------------------------------------


def rewritten(teacher: GPT2, change) -> GPT2:
    """A copy of the teacher with the attention of every block rewritten by `change(Heads)`."""
    model = GPT2(teacher.spec).double()
    model.load_state_dict(teacher.state_dict())
    for i in range(len(model.h)):
        heads = change(Heads.of(model, i))
        packed, output = model.site(f"h.{i}.attn.c_attn"), model.site(f"h.{i}.attn.c_proj")
        parts = (heads.query, heads.key, heads.value)
        biases = (heads.query_bias, heads.key_bias, heads.value_bias)
        with torch.no_grad():
            packed.weight.copy_(torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1))
            packed.bias.copy_(torch.cat([part.flatten() for part in biases]))
            output.weight.copy_(heads.output.flatten(0, 1))
            output.bias.copy_(heads.output_bias)
    return model.eval()


def permuted(model: GPT2) -> GPT2:
    """E3 in place: hidden units in another order."""
    for i, block in enumerate(model.h):
        order = torch.randperm(128, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            block.mlp.c_fc.weight.copy_(block.mlp.c_fc.weight[:, order])
            block.mlp.c_fc.bias.copy_(block.mlp.c_fc.bias[order])
            block.mlp.c_proj.weight.copy_(block.mlp.c_proj.weight[order])
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda heads: heads,
        Heads.without_key_bias,
        Heads.without_value_bias,
        lambda heads: heads.without_key_bias().without_value_bias(),
    ],
    ids=["none", "E1", "E2", "both"],
)
@pytest.mark.parametrize("order", [False, True], ids=["", "E3"])
def test_rewrites_leave_the_logits(change, order, teacher) -> None:
    model = rewritten(teacher, change)
    model = permuted(model) if order else model
    assert torch.allclose(logits(model), logits(teacher), rtol=1e-12, atol=1e-12)
    single = model.float()
    assert torch.allclose(logits(single).double(), logits(teacher), rtol=1e-4, atol=1e-4)


def test_a_value_bias_is_worth_something_and_is_carried(teacher) -> None:
    dropped = rewritten(teacher, lambda heads: replace(heads, value_bias=0 * heads.value_bias))
    assert (logits(dropped) - logits(teacher)).abs().max() > 1e-3


# --- the MLP ------------------------------------------------------------------------------------------------


def mlp_error(model: GPT2, teacher: GPT2, i: int) -> float:
    """Mean squared error of the MLP's output on the teacher's own inputs."""
    x = inputs_of(teacher)[f"h.{i}.mlp.c_fc"]
    with torch.no_grad():
        return float((model.h[i].mlp(x) - teacher.h[i].mlp(x)).square().sum(-1).mean())


@pytest.mark.parametrize("name", ["modegpt", "modegpt-bias", "joint", "joint-plain", "prune-activation"])
def test_the_reported_error_is_the_one_on_the_tokens(name, teacher, stats) -> None:
    result = squeeze(RECIPES[name], teacher, stats)
    for i in range(2):
        assert mlp_error(result.model, teacher, i) == pytest.approx(
            errors(result)[f"h.{i}.mlp.c_proj"], rel=1e-6
        )


def test_a_refit_is_least_squares_and_never_worse_than_none(teacher, stats) -> None:
    result = squeeze(RECIPES["modegpt-mlp"], teacher, stats)
    hidden = inputs_of(teacher)["h.0.mlp.c_proj"]
    old = teacher.site("h.0.mlp.c_proj").weight_matrix().detach()
    columns = teacher.site("h.0.mlp.c_fc").weight_matrix().detach()
    chosen = result.model.site("h.0.mlp.c_fc").weight_matrix().detach()
    keep = torch.tensor([int((columns - c[:, None]).abs().sum(0).argmin()) for c in chosen.T])
    assert torch.equal(keep, keep.sort().values)
    best = torch.linalg.lstsq(hidden[:, keep], hidden @ old).solution
    assert torch.allclose(result.model.site("h.0.mlp.c_proj").weight_matrix(), best, rtol=1e-6, atol=1e-8)
    gram = stats.mean("gram/h.0.mlp.c_proj")
    assert selection_loss(gram, keep, old, best) <= selection_loss(gram, keep, old, old[keep])


@pytest.mark.parametrize("selector", ["rls", "greedy"])
def test_correction_refit_and_units_each_help(selector, teacher, stats) -> None:
    def total(recipe) -> float:
        return sum(row.achieved_error for row in squeeze(recipe, teacher, stats).report)

    refit = [ModeGPT(targets="mlp", hidden=k, selector="greedy") for k in (8, 20, 40, 90)]
    found = [total(recipe) for recipe in refit]
    assert all(more <= less * (1 + 1e-9) for less, more in itertools.pairwise(found))
    plain = total(ModeGPT(targets="mlp", hidden=40, selector=selector))
    pruned = total(PruneMLP(hidden=40, score="activation"))
    corrected = total(ModeGPT(targets="mlp", hidden=40, selector=selector, bias_correction=True))
    assert corrected < plain < pruned


def test_pruning_keeps_the_highest_scores(teacher, stats) -> None:
    up = teacher.site("h.1.mlp.c_fc").weight_matrix().detach()
    down = teacher.site("h.1.mlp.c_proj").weight_matrix().detach()
    hidden = inputs_of(teacher)["h.1.mlp.c_proj"]
    scores = {
        "magnitude": up.norm(dim=0) * down.norm(dim=1),
        "activation": hidden.square().mean(0) * down.square().sum(1),
    }
    for score, values in scores.items():
        model = squeeze(PruneMLP(hidden=30, score=score), teacher, stats).model
        keep = values.topk(30).indices.sort().values
        assert torch.equal(model.site("h.1.mlp.c_fc").weight_matrix(), up[:, keep])
        assert torch.equal(model.site("h.1.mlp.c_proj").weight_matrix(), down[keep])
        assert torch.equal(model.h[1].mlp.c_proj.bias, teacher.h[1].mlp.c_proj.bias)


# --- attention ----------------------------------------------------------------------------------------------


def centred_logits(heads: Heads, x: torch.Tensor) -> torch.Tensor:
    """All pairs of queries and centred keys, (H, N, N)."""
    q = x @ heads.query + heads.query_bias.unsqueeze(1)
    k = (x - x.mean(0)) @ heads.key
    return q @ k.mT


@pytest.mark.parametrize("name", ["modegpt", "joint", "joint-mixed"])
def test_the_logit_error_is_the_one_over_all_pairs_of_tokens(name, teacher, stats) -> None:
    result = squeeze(RECIPES[name], teacher, stats)
    x = inputs_of(teacher)["h.1.attn.c_attn"]
    old, new = (centred_logits(Heads.of(model, 1), x) for model in (teacher, result.model))
    measured = (old - new).square().mean(dim=(1, 2)).sum()
    assert float(measured) == pytest.approx(errors(result)["h.1.attn.c_attn"], rel=1e-6)


def test_the_joint_pair_is_never_worse_than_any_selection_and_falls_with_rank(teacher, stats) -> None:
    def total(recipe) -> float:
        return sum(e for name, e in errors(squeeze(recipe, teacher, stats)).items() if "c_attn" in name)

    joint = [total(ModeGPTJoint(hidden=128, head_rank=r)) for r in (2, 6, 10, 15)]
    assert all(more < less for less, more in itertools.pairwise(joint))
    for r, best in zip((2, 6, 10, 15), joint, strict=True):
        assert best <= total(ModeGPT(hidden=128, head_rank=r))


def test_columns_are_chosen_by_both_norms_and_left_as_they_are(teacher, stats) -> None:
    model = squeeze(RECIPES["modegpt"], teacher, stats).model
    x = inputs_of(teacher)["h.0.attn.c_attn"]
    old, new = Heads.of(teacher, 0), Heads.of(model, 0)
    for h in range(2):
        q, k = x @ old.query[h] + old.query_bias[h], x @ old.key[h] + old.key_bias[h]
        keep = (q.square().mean(0) * k.square().mean(0)).topk(10).indices.sort().values
        assert torch.equal(new.query[h], old.query[h][:, keep])
        assert torch.equal(new.key[h], old.key[h][:, keep])
        assert torch.equal(new.query_bias[h], old.query_bias[h][keep])


@pytest.mark.parametrize("vo_cov", ["input", "mixed"])
def test_values_lose_what_is_predicted_on_the_tokens(vo_cov, teacher, stats) -> None:
    result = squeeze(ModeGPT(**WIDTHS, vo_cov=vo_cov), teacher, stats)
    x = inputs_of(teacher)["h.0.attn.c_attn"]
    old, new = Heads.of(teacher, 0), Heads.of(result.model, 0)
    lost = old.value @ old.output - new.value @ new.output  # (H, d, d)
    seen = x.expand(2, -1, -1)
    if vo_cov == "mixed":
        batches = x.reshape(*IDX.shape, -1)
        with torch.no_grad():
            q, k, _ = teacher.h[0].attn.heads(batches)
        future = torch.ones(16, 16, dtype=torch.bool).triu(1)
        rows = (q @ k.mT * teacher.h[0].attn.scale).masked_fill(future, -torch.inf).softmax(-1)
        seen = (rows @ batches.unsqueeze(1)).transpose(0, 1).flatten(1, 2)
    measured = (seen @ lost).square().sum(-1).mean(-1).sum()
    assert float(measured) == pytest.approx(errors(result)["h.0.attn.c_proj"], rel=1e-6)


def test_the_output_bias_carries_the_value_biases_and_the_mean(teacher, stats) -> None:
    result = squeeze(RECIPES["joint"], teacher, stats)
    old, new = Heads.of(teacher, 0), Heads.of(result.model, 0)
    mean = stats.mean("mean/h.0.attn.c_attn")

    def constant(heads: Heads) -> torch.Tensor:
        return (
            torch.einsum("hs,hsd->d", mean @ heads.value + heads.value_bias, heads.output) + heads.output_bias
        )

    assert torch.allclose(constant(old), constant(new), rtol=1e-9, atol=1e-12)
    metric = centred(stats.mean("gram/h.0.attn.c_attn"), mean)
    lost = old.value @ old.output - new.value @ new.output
    left = torch.einsum("hcd,ce,hed->", lost, metric, lost)
    assert float(left) == pytest.approx(errors(result)["h.0.attn.c_proj"], rel=1e-6)


# --- sizes --------------------------------------------------------------------------------------------------

TABLE = {
    103_176_192: ((1919, 103_173_876), (2304, 48, 103_176_192), (9, 103_176_192)),
    96_128_304: ((1537, 96_128_268), (2041, 43, 96_112_860), (8, 96_088_320)),
    89_000_448: ((1150, 88_990_440), (1799, 37, 88_994_340), (7, 89_000_448)),
    81_972_576: ((769, 81_963_276), (1538, 32, 81_967_896), (6, 81_912_576)),
    71_783_424: ((217, 71_782_188), (1177, 24, 71_769_516), (4, 67_736_832)),
    68_213_376: ((23, 68_204_052), (1032, 22, 68_210_112), (4, 67_736_832)),
}


@pytest.mark.parametrize("cap", TABLE)
def test_uniform_sizes_of_gpt2_small(cap: int) -> None:
    (mlp, mlp_count), (hidden, head, count), (layers, drop_count) = TABLE[cap]
    budget = Budget(params=cap)
    for recipe in (ModeGPT(targets="mlp"), PruneMLP()):
        plan = make_method(recipe).plan(SMALL, budget)
        assert {block.mlp_hidden for block in plan.spec.blocks} == {mlp}
        assert plan.num_parameters == mlp_count == 67_779_840 + 1_537 * 12 * mlp
    for recipe in (ModeGPT(), ModeGPTJoint()):
        plan = make_method(recipe).plan(SMALL, budget)
        assert {(b.mlp_hidden, b.head_qk, b.head_vo) for b in plan.spec.blocks} == {(hidden, head, head)}
        assert plan.num_parameters == count
        assert count == 39_440_640 + 12 * (1_537 * hidden + 18_444 * head + 18_432 * head)
    plan = make_method(LayerDrop(layers=0)).plan(SMALL, budget)
    assert len(plan.spec.blocks) == layers
    assert plan.num_parameters == drop_count == 39_385_344 + 7_087_872 * layers
    assert any(f"{cap - drop_count:,}" in note for note in plan.notes)


def test_full_sizes_of_gpt2_small() -> None:
    full = make_method(ModeGPT(hidden=3072, head_rank=64)).plan(SMALL, Budget())
    assert full.num_parameters == 124_421_376
    mlp = make_method(ModeGPT(targets="mlp", hidden=3072)).plan(SMALL, Budget())
    assert mlp.num_parameters == SMALL.num_parameters() == 124_439_808


SCORES = (0.4, 0.2, 0.15, 0.12, 0.1, 0.08, 0.07, 0.06, 0.05, 0.06, 0.1, 0.3)


def influence(scores) -> Stats:
    """Statistics that hold block influence alone."""
    sums = {f"block_influence/h.{i}": torch.tensor(10 * (1.0 - s)) for i, s in enumerate(scores)}
    return Stats(tokens=10, sequences=1, sums=sums)


@pytest.mark.parametrize("cap", TABLE)
@pytest.mark.parametrize("recipe", [ModeGPT(), ModeGPT(targets="mlp", max_sparsity=0.999), PruneMLP()])
def test_influence_spreads_a_budget_without_exceeding_it(cap: int, recipe) -> None:
    budget = Budget(params=cap, allocate="modegpt_bi")
    if isinstance(recipe, PruneMLP) and cap < 80_000_000:
        with pytest.raises(ModelError, match=r"below|above"):  # at most 0.8 may go from each block
            make_method(recipe).plan(SMALL, budget, influence(SCORES))
        return
    plan = make_method(recipe).plan(SMALL, budget, influence(SCORES))
    assert cap - 2 * 1_537 < plan.num_parameters <= cap
    hidden = [block.mlp_hidden for block in plan.spec.blocks]
    for (s, k), (t, j) in itertools.combinations(zip(SCORES, hidden, strict=True), 2):
        assert (s - t) * (k - j) >= 0 or abs(k - j) <= 1


def test_a_large_eps_is_uniform_and_multiples_are_kept() -> None:
    budget = Budget(params=81_972_576, allocate="modegpt_bi")
    plan = make_method(ModeGPT(eps=1e6, max_sparsity=0.95)).plan(SMALL, budget, influence(SCORES))
    hidden = [block.mlp_hidden for block in plan.spec.blocks]
    assert max(hidden) - min(hidden) <= 1
    for allocate in ("uniform", "modegpt_bi"):
        eight = make_method(ModeGPT(rank_multiple=8)).plan(
            SMALL, Budget(params=81_972_576, allocate=allocate), influence(SCORES)
        )
        assert all(b.mlp_hidden % 8 == 0 and b.head_qk % 8 == 0 for b in eight.spec.blocks)
        assert eight.num_parameters <= 81_972_576


def test_what_cannot_be_is_refused_with_what_can(teacher, stats) -> None:
    def plan(recipe, **budget):
        return make_method(recipe).plan(SMALL, Budget(**budget))

    with pytest.raises(ModelError, match="can have 40,362,552 to 124,421,376 parameters"):
        plan(ModeGPT(), params=30_000_000)
    with pytest.raises(ModelError, match=r"hidden = 1538, head_rank = 32 has 81,967,896"):
        plan(ModeGPT(hidden=2000, head_rank=32), params=81_972_576)
    with pytest.raises(ModelError, match="needs head_rank"):
        plan(ModeGPT(hidden=2000))
    with pytest.raises(ModelError, match="at most 3072 and 64"):
        plan(ModeGPT(hidden=4000, head_rank=64))
    with pytest.raises(ModelError, match=r"set budget\.params or hidden"):
        plan(ModeGPT())
    with pytest.raises(ModelError, match="cannot spread a budget by greedy_gain"):
        plan(ModeGPT(), params=81_972_576, allocate="greedy_gain")
    with pytest.raises(Unmeasured):
        plan(ModeGPT(), params=81_972_576, allocate="modegpt_bi")
    with pytest.raises(ModelError, match=r"layers = 6 has 81,912,576"):
        plan(LayerDrop(layers=7), params=81_972_576)
    with pytest.raises(ModelError, match="below the cap"):
        plan(LayerDrop(layers=5), params=81_972_576)
    with pytest.raises(ModelError, match="cannot keep 13 of 12"):
        plan(LayerDrop(layers=13))
    small = squeeze(RECIPES["modegpt"], teacher, stats).model.spec
    method = make_method(ModeGPT(**WIDTHS))
    with pytest.raises(ModelError, match="compressed already"):
        method.plan(small, Budget())
    whole = method.plan(teacher.spec, Budget())
    with pytest.raises(Unmeasured):
        method.compress(teacher, whole, None, seed=0)


# --- dropped blocks -----------------------------------------------------------------------------------------


def test_dropped_blocks_leave_the_others_bit_equal(toy) -> None:
    model = toy(ModelSpec.dense(replace(ARCH, n_layer=12)), seed=3)
    for layers, kept in ((6, (0, 2, 4, 7, 9, 11)), (8, (0, 2, 3, 5, 6, 8, 9, 11))):
        method = LayerDropMethod(LayerDrop(layers=layers))
        result = method.compress(model, method.plan(model.spec, Budget()), seed=0)
        assert tuple(block.source for block in result.model.spec.blocks) == kept
        for i, source in enumerate(kept):
            old, new = model.h[source].state_dict(), result.model.h[i].state_dict()
            assert all(torch.equal(value, new[name]) for name, value in old.items())
        x = result.model.embed(IDX)
        for source in kept:
            x = model.h[source](x)
        assert torch.equal(result.model(IDX), model.logits(model.ln_f(x)))


def test_influence_keeps_the_blocks_that_turn_the_stream(toy) -> None:
    plan = make_method(LayerDrop(layers=4, select="bi")).plan(SMALL, Budget(), influence(SCORES))
    assert [block.source for block in plan.spec.blocks] == [0, 1, 2, 11]
    ties = make_method(LayerDrop(layers=3, select="bi")).plan(SMALL, Budget(), influence([0.5] * 12))
    assert [block.source for block in ties.spec.blocks] == [0, 1, 2]
    with pytest.raises(Unmeasured):
        make_method(LayerDrop(layers=4, select="bi")).plan(SMALL, Budget())


@pytest.mark.parametrize("name", ["modegpt", "joint", "prune", "layerdrop"])
def test_random_weights_fill_the_same_structure(name, teacher, stats) -> None:
    recipe = RECIPES[name]
    control, real = squeeze(RandomInit(of=recipe), teacher, stats), squeeze(recipe, teacher, stats)
    assert control.model.spec == real.model.spec
    for site in control.plan.changed():
        new, old = (model.site(site).weight_matrix().detach() for model in (control.model, teacher))
        assert float(new.square().mean()) == pytest.approx(float(old.square().mean()), rel=1e-5)
