"""The loop equals the shortest loop that one would write by hand."""

import numpy as np
import pytest
import torch

from model.export import load_native
from pipeline.data.batches import Batches, TokenStream
from pipeline.train.schedule import rate_at


def bare_losses(lab, request) -> list[float]:
    """Whole batches, `clip_grad_norm_`, two AdamW groups; no accumulation, no buffer, no ranks."""
    config = request.train
    model = load_native(lab.folder / "init").train()
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("scales")]
    plain = [p for name, p in model.named_parameters() if p.ndim <= 1 or name.endswith("scales")]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=1.0, betas=(config.beta1, config.beta2), fused=False, foreach=False
    )
    shards = [lab.folder / "tokens" / name for name in request.shards]
    batches = Batches(
        TokenStream(shards), seq_len=config.seq_len, batch_tokens=config.batch_tokens, seed=request.seed
    )
    losses = []
    for step in range(config.max_steps):
        inputs, targets = (torch.from_numpy(rows) for rows in batches.batch(step))
        logits = model(inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, config)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loop_equals_a_bare_loop(lab, tmp_path):
    request = lab.request(tmp_path / "run", log_every=1, grad_clip=0.5)
    outcome = lab.fit(request)
    logged = [row["loss"] for row in outcome.rows if "loss" in row]
    np.testing.assert_allclose(logged, bare_losses(lab, request), rtol=2e-5)


@pytest.mark.parametrize("micro_batch", [1, 4, 6])
def test_micro_batches_give_the_same_losses(lab, tmp_path, micro_batch):
    runs = [
        lab.fit(lab.request(tmp_path / str(size), micro_batch=size, log_every=1, max_steps=8))
        for size in (2, micro_batch)
    ]
    for name in ("loss", "grad_norm"):
        first, second = ([row[name] for row in run.rows if name in row] for run in runs)
        np.testing.assert_allclose(first, second, rtol=1e-4)


def test_a_kronecker_model_trains_in_the_same_loop_and_equals_it_too(lab, tmp_path):
    kronecker = type(lab).build(tmp_path / "lab", model="kronecker")
    request = kronecker.request(tmp_path / "run", log_every=1)
    outcome = kronecker.fit(request)
    logged = [row["loss"] for row in outcome.rows if "loss" in row]
    np.testing.assert_allclose(logged, bare_losses(kronecker, request), rtol=2e-5)
    assert load_native(tmp_path / "run").spec == load_native(kronecker.folder / "init").spec
