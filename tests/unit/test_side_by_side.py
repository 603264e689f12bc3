"""Blocks in threads: results in order, one thread per operation, the same numbers whatever the threads."""

from functools import partial

import pytest
import torch

from model.compress.budget import Budget
from model.compress.kron_recipe import KronPerm
from model.compress.methods import make_method, make_plan
from model.compress.side_by_side import side_by_side
from model.config import GPT2Config, ModelError, ModelSpec
from model.gpt2 import GPT2


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_every_task_has_one_thread_and_no_gradients(threads):
    def task(k: int) -> tuple[int, int, bool]:
        return k, torch.get_num_threads(), torch.is_grad_enabled()

    assert side_by_side([partial(task, k) for k in range(5)]) == [(k, 1, False) for k in range(5)]
    assert side_by_side([]) == []
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_an_error_in_a_task_is_an_error_of_all(threads):
    def fail() -> int:
        raise ModelError("block 3 is odd")

    with pytest.raises(ModelError, match="block 3 is odd"):
        side_by_side([lambda: 1, fail])
    assert torch.get_num_threads() == threads


def test_a_search_finds_the_same_whatever_the_threads():
    model = GPT2(ModelSpec.dense(GPT2Config(n_layer=3, n_head=2, n_embd=32, vocab_size=64, n_ctx=16)))
    model.init_weights(seed=0)
    method, before, found = make_method(KronPerm(shape=(16, 32), terms=2)), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(method.compress(model, make_plan(method, model, Budget(), None), None, seed=0))
    torch.set_num_threads(before)
    one, two = (result.model.state_dict() for result in found)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert found[0].report == found[1].report
    assert [row.name for row in found[0].report][:2] == ["h.0.mlp.c_fc", "h.0.mlp.c_proj"]
