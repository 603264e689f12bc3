"""The low-rank family on a toy GPT-2: each method is optimal in its own metric and keeps its promises."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from low_rank_lab import ARCH, RECIPES, ROWS, measured, squeeze, teacher_of

from model.algebra.kron import nearest_kron
from model.algebra.psd import centred, shrink
from model.algebra.shapes import KronShape
from model.compress.budget import Budget
from model.compress.contract import Plan, StatsSpec, Unmeasured
from model.compress.low_rank_recipe import ASVD, FWSVD, SVD, SVDLLM, SVDLLMBC
from model.compress.methods import make_method
from model.config import LowRank, ModelError, ModelSpec
from model.export import load_native, save_native, save_stock, to_dense
from model.layers.structured import set_mode


@pytest.fixture(scope="module")
def teacher(toy):
    return teacher_of(toy)


@pytest.fixture(scope="module")
def stats(teacher):
    return measured(teacher)


def pair(result, teacher, name):
    """Old and new (weight, bias) of a module."""
    return (
        [part.detach().double() for part in model.site(name).to_dense()] for model in (teacher, result.model)
    )


def inputs(model, name):
    """Every calibration input of a module, (tokens, m)."""
    found = []
    hook = model.site(name).register_forward_hook(lambda _m, args, _o: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ROWS)
    hook.remove()
    return found[0]


def tail(matrix, rank):
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


# --- what every method keeps --------------------------------------------------------------------------------


def test_statistics_that_are_not_there_are_named(teacher, stats):
    method = make_method(SVDLLM(rank=3))
    plan = method.plan(teacher.spec, Budget())
    with pytest.raises(Unmeasured, match="svdllm needs statistics: gram"):
        method.compress(teacher, plan, seed=0)
    sums = {key: value for key, value in stats.sums.items() if not key.startswith("gram/h.1")}
    with pytest.raises(ModelError, match=r"hold no 'gram/h\.1\.mlp\.c_fc'; collect them again"):
        method.compress(teacher, plan, replace(stats, sums=sums), seed=0)


@pytest.mark.parametrize(
    "recipe", [FWSVD(weights="row_col"), *(r for r in RECIPES.values())], ids=lambda r: r.name
)
def test_what_is_collected_covers_what_a_method_reads(recipe):
    wanted = make_method(recipe).stats(ModelSpec.dense(ARCH))
    collected = StatsSpec.everywhere(recipe.needs, ModelSpec.dense(ARCH))
    assert wanted.needs == tuple(sorted(recipe.needs))
    assert wanted | collected == collected


@pytest.mark.parametrize("name", RECIPES)
def test_counts_seed_and_teacher(name, teacher, stats, tmp_path):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    sums = {key: value.clone() for key, value in stats.sums.items()}
    for folder in ("a", "b"):
        result = squeeze(RECIPES[name], teacher, stats)
        save_native(result.model, tmp_path / folder)
    assert result.plan.num_parameters == sum(p.numel() for p in result.model.parameters())
    assert [row.name for row in result.report] == list(result.plan.changed())
    saved = sum(row.dense_parameters - row.parameters for row in result.report)
    assert teacher.num_parameters() - result.model.num_parameters() == saved
    first, again = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b"))
    assert first == again
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(torch.equal(value, sums[key]) for key, value in stats.sums.items())
    changed = set(result.plan.changed())
    for key, value in teacher.state_dict().items():
        is_kept = key.rpartition(".")[0] not in changed or (key.endswith("bias") and "bc" not in name)
        assert not is_kept or torch.equal(result.model.state_dict()[key], value), key


@pytest.mark.parametrize("name", RECIPES)
def test_all_modes_and_all_folders_have_the_same_logits(name, teacher, stats, tmp_path):
    model = squeeze(RECIPES[name], teacher, stats).model
    with torch.no_grad():
        expected = model(ROWS)
        for mode in ("factored", "materialize", "cached"):
            set_mode(model, mode)
            assert float((model(ROWS) - expected).abs().max()) <= 1e-10
        assert float((to_dense(model)(ROWS) - expected).abs().max()) <= 1e-10
        set_mode(model, "auto")
        single = model.float()
        save_native(single, tmp_path / "native")
        again = load_native(tmp_path / "native").eval()
        assert torch.equal(again(ROWS), single(ROWS))
        assert again.num_parameters() == single.num_parameters()
        assert again.lm_head is None


def test_plain_transformers_opens_the_stock_folder(teacher, stats, tmp_path):
    import transformers

    model = squeeze(SVDLLMBC(rank=7, targets="all_linear"), teacher, stats).model.float()
    save_stock(model, tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ROWS).logits, model(ROWS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_predicted_error_is_achieved_error(name, teacher, stats):
    for row in squeeze(RECIPES[name], teacher, stats).report:
        assert row.predicted_error == pytest.approx(row.achieved_error, rel=1e-6)
        assert row.energy_kept == pytest.approx(1 - row.achieved_error / row.energy)
        assert 0 < row.energy_kept < 1
        assert row.rank_bound == int(row.structure.removeprefix("rank "))
        assert ("frobenius_kept" in row.details) == (row.metric != "frobenius")


@pytest.mark.parametrize("name", RECIPES)
def test_more_rank_never_costs(name, teacher, stats):
    errors = [
        [row.achieved_error for row in squeeze(replace(RECIPES[name], rank=rank), teacher, stats).report]
        for rank in (1, 4, 9, 15)
    ]
    for less, more in itertools.pairwise(errors):
        assert all(b <= a * (1 + 1e-9) for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_full_rank_is_lossless(name, teacher, stats):
    method = make_method(RECIPES[name])
    sites = method.plan(teacher.spec, Budget()).changed().values()
    full = {site.name: LowRank(rank=min(site.n_in, site.n_out)) for site in sites}  # past the refusal
    plan = Plan(method=method.name, source=teacher.spec, spec=teacher.spec.with_matrices(full))
    result = method.compress(teacher, plan, stats, seed=0)
    with torch.no_grad():
        assert float((result.model(ROWS) - teacher(ROWS)).abs().max()) <= 1e-6
    assert all(row.energy_kept == pytest.approx(1, abs=1e-10) for row in result.report)


@pytest.mark.parametrize("name", RECIPES)
def test_one_step_in_bf16_lowers_the_loss_and_reaches_every_parameter(name, teacher, stats):
    model = squeeze(RECIPES[name], teacher, stats).model.float().train()
    targets = torch.roll(ROWS, -1, dims=1)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(ROWS, targets) / ROWS.numel()

    before = loss()
    before.backward()
    before = before.detach()
    assert all(float(p.grad.abs().max()) > 0 for key, p in model.named_parameters() if key != "wpe.weight")
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert float(loss().detach()) < float(before)


# --- what each method is ------------------------------------------------------------------------------------


def test_svd_is_the_nearest_of_its_rank(teacher, stats, oracle):
    result = squeeze(RECIPES["svd"], teacher, stats)
    for row in result.report:
        (weight, _), (kept, _) = pair(result, teacher, row.name)
        assert row.achieved_error == pytest.approx(float((weight - kept).square().sum()))
        assert row.achieved_error == pytest.approx(tail(weight, 7), rel=1e-9)
        kron = nearest_kron(weight, KronShape(weight.shape[0], 1, 1, weight.shape[1]), terms=7)
        torch.testing.assert_close(kept, kron.dense(), atol=1e-8, rtol=1e-8)
        first, second, _ = oracle.metric_svd(
            weight.numpy(), 7, np.eye(weight.shape[0]), np.eye(weight.shape[1])
        )
        np.testing.assert_allclose(kept.numpy(), first @ second, atol=1e-8)
        layer = result.model.site(row.name)
        sizes = [layer.first.detach().square().mean(0), layer.second.detach().square().mean(1)]
        torch.testing.assert_close(*sizes)  # balanced


def test_fwsvd_is_the_optimum_of_the_row_weighted_error(teacher, stats, oracle):
    result, plain = (squeeze(RECIPES[name], teacher, stats) for name in ("fwsvd", "svd"))
    for row, other in zip(result.report, plain.report, strict=True):
        (weight, _), (kept, _) = pair(result, teacher, row.name)
        _, (nearest, _) = pair(plain, teacher, row.name)
        fisher = stats.sums[f"full_fisher/{row.name}"].sum(dim=1) / stats.sequences
        error = (weight - kept).square()
        assert row.achieved_error == pytest.approx(float((fisher[:, None] * error).sum()))
        assert row.achieved_error == pytest.approx(tail(fisher.sqrt()[:, None] * weight, 7), rel=1e-8)
        assert row.achieved_error < float((fisher[:, None] * (weight - nearest).square()).sum())
        assert float(error.sum()) > other.achieved_error
        first, second, _ = oracle.fwsvd(weight.numpy(), fisher.numpy(), 7)
        np.testing.assert_allclose(kept.numpy(), first @ second, atol=1e-7)


def test_the_size_of_a_fisher_and_constant_rows_change_nothing(teacher, stats):
    def kept(sums):
        result = squeeze(FWSVD(rank=5), teacher, replace(stats, sums={**stats.sums, **sums}))
        return [result.model.site(row.name).weight_matrix().detach() for row in result.report]

    rows = {key: value for key, value in stats.sums.items() if key.startswith("row_fisher/")}
    for a, b in zip(kept({}), kept({key: 1e-9 * value for key, value in rows.items()}), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
    plain = squeeze(SVD(rank=5), teacher, None)
    for row, a in zip(plain.report, kept({k: torch.full_like(v, 3.0) for k, v in rows.items()}), strict=True):
        torch.testing.assert_close(
            a, plain.model.site(row.name).weight_matrix().detach(), atol=1e-8, rtol=1e-8
        )
    holes = {key: value * (torch.arange(len(value)) % 3 > 0) for key, value in rows.items()}
    assert all(bool(torch.isfinite(a).all()) for a in kept(holes))


def test_a_fisher_is_that_of_the_reference(teacher, stats, oracle):
    name, deltas = "h.0.mlp.c_fc", []

    def keep(_module, _args, output):
        output.register_hook(deltas.append)

    xs = inputs(teacher, name).reshape(12, 24, -1)
    hook = teacher.site(name).register_forward_hook(keep)
    targets = torch.cat([ROWS[:, 1:], torch.full((12, 1), -1)], dim=1)
    torch.autograd.grad(teacher(ROWS, targets) / 23, teacher.wpe.weight)
    hook.remove()
    reference = oracle.sequence_fisher(xs.numpy(), deltas[0].numpy())
    np.testing.assert_allclose(stats.mean(f"full_fisher/{name}").numpy(), reference, rtol=1e-9)


@pytest.mark.parametrize("name", ["svdllm", "svdllm-bc", "asvd"])
def test_the_loss_is_the_tail_and_the_measured_output_error(name, teacher, stats, oracle):
    result = squeeze(RECIPES[name], teacher, stats)
    for row in result.report:
        (weight, bias), (kept, new_bias) = pair(result, teacher, row.name)
        x = inputs(teacher, row.name)
        if name == "asvd":
            metric = torch.diag(x.abs().mean(0))
            measured = float(torch.trace((weight - kept).T @ metric @ (weight - kept)))
        else:
            measured = float((x @ weight + bias - x @ kept - new_bias).square().sum()) / len(x)
            mean = x.mean(0, keepdim=True) if name == "svdllm-bc" else 0.0
            metric = (x - mean).T @ (x - mean) / len(x)
        assert row.achieved_error == pytest.approx(measured, rel=1e-7)
        first, second = oracle.projection_svd(weight.numpy(), 7, metric.numpy())
        np.testing.assert_allclose(kept.numpy(), first @ second, atol=1e-6)
        root = torch.linalg.cholesky(metric + 1e-13 * metric.trace() * torch.eye(len(metric))).T
        assert row.predicted_error == pytest.approx(tail(root @ weight, 7), rel=1e-5)
        assert float(kept.norm()) <= float(weight.norm()) * (1 + 1e-12)


def test_the_null_direction_of_a_layer_norm_does_no_harm(teacher, stats):
    for name in ("svdllm-bc", "kfac-bc"):
        result = squeeze(RECIPES[name], teacher, stats)
        for row in result.report:
            _, (kept, bias) = pair(result, teacher, row.name)
            assert bool(torch.isfinite(kept).all() & torch.isfinite(bias).all())
    cov = centred(stats.mean("gram/h.0.mlp.c_fc"), stats.mean("mean/h.0.mlp.c_fc"))
    values = torch.linalg.eigvalsh(cov)
    assert float(values[0].abs()) <= 1e-13 * float(values[-1])  # it is there


def test_a_corrected_bias_never_costs_and_is_the_best_one(teacher, stats):
    plain, corrected = (squeeze(RECIPES[name], teacher, stats) for name in ("svdllm", "svdllm-bc"))
    for without, row in zip(plain.report, corrected.report, strict=True):
        assert row.achieved_error <= without.achieved_error * (1 + 1e-12)
        (weight, bias), (kept, new_bias) = pair(corrected, teacher, row.name)
        x = inputs(teacher, row.name)
        best = bias + (x @ (weight - kept)).mean(0)
        torch.testing.assert_close(new_bias, best, atol=1e-10, rtol=1e-10)
        uncorrected = float((x @ (weight - kept)).square().sum()) / len(x)
        assert row.achieved_error <= uncorrected
    assert corrected.model.num_parameters() == plain.model.num_parameters()


def test_kfac_svd_is_the_optimum_of_both_metrics_together(teacher, stats, oracle):
    result = squeeze(RECIPES["kfac"], teacher, stats)
    for row in result.report:
        (weight, _), (kept, _) = pair(result, teacher, row.name)
        x = inputs(teacher, row.name)
        gram = x.T @ x / len(x)
        metric = 0.9 * gram + 0.1 * gram.trace() / len(gram) * torch.eye(len(gram))
        delta = stats.mean(f"delta_gram/{row.name}")
        output = 0.7 * delta + 0.3 * delta.trace() / len(delta) * torch.eye(len(delta))
        assert float(output.trace()) == pytest.approx(float(delta.trace()))
        torch.testing.assert_close(shrink(delta, 0.3), output)
        rest = weight - kept
        assert row.achieved_error == pytest.approx(
            float(torch.trace(output @ rest.T @ metric @ rest)), rel=1e-7
        )
        roots = [torch.linalg.cholesky(each) for each in (metric, output)]
        assert row.predicted_error == pytest.approx(tail(roots[0].T @ weight @ roots[1], 7), rel=1e-6)
        first, second, _ = oracle.metric_svd(weight.numpy(), 7, metric.numpy(), output.numpy())
        np.testing.assert_allclose(kept.numpy(), first @ second, atol=1e-6)


def test_the_scale_of_either_metric_changes_nothing(teacher, stats):
    base = squeeze(RECIPES["kfac"], teacher, stats)
    for field, factor in (("gram/", 1e5), ("delta_gram/", 1e-7)):
        sums = {key: value * (factor if key.startswith(field) else 1) for key, value in stats.sums.items()}
        other = squeeze(RECIPES["kfac"], teacher, replace(stats, sums=sums))
        for row in base.report:
            torch.testing.assert_close(*(r.model.site(row.name).weight_matrix() for r in (base, other)))


def test_two_sided_fwsvd_weighs_outputs_as_well(teacher, stats):
    result, one_sided = (squeeze(RECIPES[name], teacher, stats) for name in ("fwsvd-two", "fwsvd"))
    for row in result.report:
        (weight, _), (kept, _) = pair(result, teacher, row.name)
        _, (other, _) = pair(one_sided, teacher, row.name)
        fisher = stats.mean(f"full_fisher/{row.name}")
        weights = fisher.sum(1)[:, None] * fisher.sum(0)[None, :]
        assert row.achieved_error == pytest.approx(
            float((weights * (weight - kept).square()).sum()), rel=1e-8
        )
        assert row.achieved_error < float((weights * (weight - other).square()).sum())
        scaled = fisher.sum(1).sqrt()[:, None] * weight * fisher.sum(0).sqrt()[None, :]
        assert row.predicted_error == pytest.approx(tail(scaled, 7), rel=1e-7)


def test_alpha_goes_from_plain_svd_to_more_weight(teacher, stats):
    plain, none = (squeeze(recipe, teacher, stats) for recipe in (SVD(rank=5), ASVD(rank=5, alpha=0.0)))
    for row in plain.report:
        torch.testing.assert_close(*(r.model.site(row.name).weight_matrix() for r in (plain, none)))
    errors = [
        sum(row.details["frobenius_kept"] for row in squeeze(ASVD(rank=5, alpha=a), teacher, stats).report)
        for a in (0.0, 0.5, 1.0)
    ]
    assert errors[0] > errors[1] > errors[2]
