"""Orders of the Kronecker family: which entries stand together, and that the order costs nothing to run."""

import numpy as np
import pytest
import torch
from kronecker_lab import RECIPES, ROWS, inputs, matrix, measured, row_of, squeeze, teacher_of

from model.algebra.kron import kron_sum, nearest_kron
from model.algebra.permute_columns import column_order, halved_columns
from model.algebra.shapes import KronShape
from model.compress.budget import Budget
from model.compress.kron_recipe import KronPerm, KronVL
from model.compress.methods import make_method
from model.config import SIZES, ModelError, ModelSpec
from model.export import to_dense

GPT2_SMALL = ModelSpec.dense(SIZES["gpt2"])
LOOKED_AT = (
    "prune-importance",
    "perm",
    "perm-separate",
    "perm-separate-inner",
    "perm-inner",
    "kngpt2",
    "tq",
    "tq-tied",
)


@pytest.fixture(scope="module")
def teacher(toy):
    return teacher_of(toy)


@pytest.fixture(scope="module")
def stats(teacher):
    return measured(teacher)


@pytest.fixture(scope="module")
def results(teacher, stats):
    """What these recipes make of the teacher."""
    return {name: squeeze(RECIPES[name], teacher, stats) for name in LOOKED_AT}


# --- kron_prune ---------------------------------------------------------------------------------------------


def test_importance_weighs_rows_by_their_mean_square(teacher, stats, results):
    for i in range(2):
        up, down = (f"h.{i}.mlp.{role}" for role in ("c_fc", "c_proj"))
        scores = {}
        for row in range(2):
            for hidden in range(2):
                for col in range(2):
                    parts = []
                    for name, (r, c) in ((up, (row, hidden)), (down, (hidden, col))):
                        kept = matrix(teacher, name)[r::2, c::2].square()
                        mean_square = inputs(teacher, name).square().mean(dim=0)[r::2]
                        parts.append(float((mean_square[:, None] * kept).sum()))
                    scores[row, hidden, col] = sum(parts)
        details = [row_of(results["prune-importance"], name).details for name in (up, down)]
        chosen = details[0]["offset_row"], details[0]["offset_col"], details[1]["offset_col"]
        assert details[0]["offset_col"] == details[1]["offset_row"]
        assert scores[chosen] == max(scores.values())


# --- kron_perm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["perm", "perm-separate", "perm-separate-inner", "perm-inner"])
def test_a_permuted_pair_is_never_worse_than_van_loan(name, teacher, results):
    recipe, result = RECIPES[name], results[name]
    plain = squeeze(KronVL(shape=recipe.shape, terms=recipe.terms), teacher)
    for i in range(2):
        names = [f"h.{i}.mlp.{role}" for role in ("c_fc", "c_proj")]
        ours, theirs = (sum(row_of(each, n).achieved_error for n in names) for each in (result, plain))
        assert ours <= theirs * (1 + 1e-9)
        details = row_of(result, names[0]).details
        assert details["pair_error"] == pytest.approx(ours, rel=1e-6)
        assert details["loss_from_identity"] <= theirs * (1 + 1e-9)


@torch.no_grad()
def test_the_hidden_order_folds_and_the_outer_ones_are_buffers(teacher, results):
    result = results["perm"]
    for i in range(2):
        mlp, old = result.model.h[i].mlp, teacher.h[i].mlp
        new_bias, old_bias = mlp.c_fc.bias.detach(), old.c_fc.bias.detach()
        hidden = torch.tensor([int((old_bias == value).nonzero()) for value in new_bias])
        assert sorted(hidden.tolist()) == list(range(64))
        assert torch.equal(mlp.c_proj.bias, old.c_proj.bias)
        assert mlp.c_fc.gather_out is None
        assert mlp.c_proj.gather_in is None
        inputs_, outputs = mlp.c_fc.gather_in, mlp.c_proj.gather_out.argsort()
        dense_up, dense_down = to_dense(result.model).h[i].mlp.c_fc.weight, mlp.c_proj.weight_matrix()
        up = kron_sum(mlp.c_fc.left, mlp.c_fc.right)
        torch.testing.assert_close(dense_up[inputs_], up)
        torch.testing.assert_close(dense_down[:, outputs], kron_sum(mlp.c_proj.left, mlp.c_proj.right))
        # one and the same order for both: each is the nearest to the teacher's matrices in it
        row_up, row_down = (row_of(result, f"h.{i}.mlp.{role}") for role in ("c_fc", "c_proj"))
        ordered_up, ordered_down = old.c_fc.weight[:, hidden], old.c_proj.weight[hidden]
        assert float((dense_up - ordered_up).square().sum()) == pytest.approx(row_up.achieved_error)
        assert float((dense_down - ordered_down).square().sum()) == pytest.approx(row_down.achieved_error)


def test_index_buffers_are_there_only_where_an_order_matters(results):
    def buffers(name):
        return {key.split(".", 2)[2] for key, _ in results[name].model.named_buffers()}

    assert buffers("perm") == {"mlp.c_fc.gather_in", "mlp.c_proj.gather_out"}
    assert buffers("perm-separate") == {"mlp.c_fc.gather_in", "mlp.c_proj.gather_in", "mlp.c_proj.gather_out"}
    assert buffers("perm-separate-inner") == {"mlp.c_proj.gather_in"}
    assert buffers("perm-inner") == set()
    flat = make_method(KronPerm(shape=(768, 768))).plan(GPT2_SMALL, Budget()).spec.blocks[0]
    assert not flat.mlp_c_fc.gather_in
    assert not flat.mlp_c_proj.gather_out


def test_each_fit_is_van_loan_in_its_order(teacher, results, oracle):
    model = results["perm"].model
    for i in range(2):
        mlp, old = model.h[i].mlp, teacher.h[i].mlp
        hidden = torch.tensor([int((old.c_fc.bias == value).nonzero()) for value in mlp.c_fc.bias])
        ordered = old.c_fc.weight.detach()[mlp.c_fc.gather_in][:, hidden].numpy()
        a, b, _ = oracle.van_loan(ordered, oracle.KronShape(8, 32, 2, 2), 2)
        np.testing.assert_allclose(
            oracle.kron_sum(a, b), kron_sum(mlp.c_fc.left, mlp.c_fc.right).detach().numpy(), atol=1e-8
        )


# --- tables and rivals --------------------------------------------------------------------------------------


def test_columns_are_put_beside_those_that_are_alike():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    table = torch.kron(groups, torch.tensor([[1.0, 0.5]], dtype=torch.float64))
    scramble = torch.randperm(12, generator=generator)
    shuffled = table[:, scramble]
    shape = KronShape(40, 6, 1, 2)
    assert nearest_kron(shuffled, shape, terms=1).energy_kept < 0.9
    order, how = column_order(shuffled, 6, rtol=1e-9)
    assert nearest_kron(shuffled[:, order], shape, terms=1).energy_kept > 1 - 1e-9
    assert how.history[-1] == min(loss for _, loss in how.by_start)
    with pytest.raises(ModelError, match="12 columns cannot form 5 groups"):
        column_order(shuffled, 5, rtol=1e-5)
    with pytest.raises(ModelError, match="cannot be halved 3 times"):
        halved_columns(shuffled, times=3)


def test_halving_twice_is_never_worse_than_the_nested_products():
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    outer, _ = column_order(table, 8, rtol=1e-5)
    first = nearest_kron(table[:, outer], KronShape(50, 8, 1, 2), terms=1)
    inner, _ = column_order(first.left[0], 4, rtol=1e-5)
    second = nearest_kron(first.left[0][:, inner], KronShape(50, 4, 1, 2), terms=1)
    middle = torch.empty(50, 8, dtype=torch.float64)
    middle[:, inner] = second.dense()
    nested = torch.empty_like(table)
    nested[:, outer] = torch.kron(middle, first.right[0])
    found = halved_columns(table, times=2)
    assert sorted(found.order.tolist()) == list(range(16))
    direct = torch.empty_like(table)
    direct[:, found.order] = found.fit.dense()
    error = float((table - direct).square().sum())
    assert error == pytest.approx(found.fit.error, rel=1e-9)
    assert error <= float((table - nested).square().sum()) * (1 + 1e-12)
    stored = nearest_kron(table, KronShape(50, 4, 1, 4), terms=1).error
    assert error < stored


def test_kngpt2_cuts_query_key_and_value_out_of_the_packed_matrix(teacher, results):
    model = results["kngpt2"].model
    packed, bias = teacher.site("h.1.attn.c_attn").to_dense()
    for part, name in enumerate("qkv"):
        layer = model.site(f"h.1.attn.{name}")
        weight = packed[:, 16 * part : 16 * (part + 1)]
        fit = nearest_kron(weight, KronShape(16, 8, 1, 2), terms=1)
        torch.testing.assert_close(layer.weight_matrix().detach(), fit.dense())
        assert torch.equal(layer.bias.detach(), bias[16 * part : 16 * (part + 1)])
    table = nearest_kron(teacher.wte.weight, KronShape(61, 8, 1, 2), terms=1)
    torch.testing.assert_close(model.wte.table().detach(), table.dense())
    assert torch.equal(model.lm_head.weight, teacher.wte.weight)
    assert model.h[0].state_dict().keys() == teacher.h[0].state_dict().keys()


@torch.no_grad()
def test_tqcompressor_reads_its_table_in_the_order_found(teacher, results):
    for name in ("tq", "tq-tied"):
        model = results[name].model
        row = row_of(results[name], "wte")
        error = float((model.wte.table().detach() - teacher.wte.weight).square().sum())
        assert error == pytest.approx(row.predicted_error, rel=1e-6)
        assert error < nearest_kron(teacher.wte.weight, KronShape(61, 4, 1, 4), terms=1).error
        with torch.no_grad():
            vectors = model.wte(ROWS)
            torch.testing.assert_close(vectors, model.wte.table()[ROWS])
            torch.testing.assert_close(model.wte.logits(vectors), vectors @ model.wte.table().T)
