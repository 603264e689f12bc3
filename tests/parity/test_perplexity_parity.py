"""Krony-PT's protocol as a loop of plain transformers over chunks with `labels=`, on an exported folder."""

import math

import numpy as np
import pytest
import torch

from model.config import GPT2Config, ModelSpec
from model.export import save_stock
from model.gpt2 import GPT2
from pipeline.evaluate.perplexity import evaluate_perplexity
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.sequences import TokenSequence


@pytest.mark.parametrize("count", [32 * 5, 32 * 5 + 1, 32 * 5 + 17])
def test_a_plain_transformers_loop_gives_the_same_perplexity(tmp_path, count):
    from transformers import GPT2LMHeadModel

    arch = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=32, vocab_size=97)
    model = GPT2(ModelSpec.dense(arch)).init_weights(seed=5)
    save_stock(model, tmp_path, eos_id=96)
    stock = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids = np.random.default_rng(0).integers(0, 97, count)
    losses = []
    for start in range(0, count, 32):
        chunk = torch.tensor(ids[None, start : start + 32])
        if chunk.shape[1] > 1:
            with torch.no_grad():
                losses.append(float(stock(chunk, labels=chunk).loss))
    protocol = get_protocol("krony/wt103").at_context(32)
    sequence = TokenSequence("t", ids, np.ones(97, dtype=np.uint16), "d")
    scores = evaluate_perplexity(model, protocol, sequence, batch=4, quiet=True)
    assert scores.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert scores.windows == len(losses)
