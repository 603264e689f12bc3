"""One optimizer step is the same for every world size, every micro-batch and every split of the rows."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config.training import LrMultipliers
from pipeline.train.optimizer import build_optimizer
from pipeline.train.session import Session
from pipeline.train.topology import Topology

CPU = torch.device("cpu")
ROWS = 6  # 96 tokens of 16


@dataclass(frozen=True, slots=True)
class Alone(Topology):
    """A rank of a world whose other ranks are run one after the other."""

    def _all_reduce(self, values, op) -> None:
        """Nobody answers."""


def gradient_and_loss(lab, *, rank: int, world: int, micro_batch: int) -> Tensor:
    """All gradients of the first step and, last, the loss: this rank's share of them."""
    request = lab.request(lab.folder / "never-written", micro_batch=micro_batch, grad_clip=0.0)
    session = Session(request, Alone(rank=rank, world=world, device=CPU))
    session.advance()
    return session._buffer._flat.clone()


@settings(max_examples=12, deadline=None)
@given(world=st.integers(1, 8), micro_batch=st.integers(1, ROWS))
def test_shares_of_all_ranks_add_up_to_the_step_of_one(lab, world: int, micro_batch: int):
    whole = gradient_and_loss(lab, rank=0, world=1, micro_batch=ROWS)
    shares = [gradient_and_loss(lab, rank=r, world=world, micro_batch=micro_batch) for r in range(world)]
    total = torch.stack(shares).sum(0)
    assert (total - whole).norm() <= 1e-5 * whole.norm()
    assert float(total[-1]) == pytest.approx(float(whole[-1]), rel=1e-6)
    assert sum(bool(share.any()) for share in shares) == min(world, ROWS)  # the others had no rows


def test_groups_hold_every_parameter_once_and_decay_only_matrices(lab):
    session = Session(lab.request(lab.folder / "never-written"), Alone(rank=0, world=1, device=CPU))
    multipliers = LrMultipliers(embedding=0.5, dense=2.0)
    request = lab.request(lab.folder / "never-written", lr_multipliers=multipliers, weight_decay=0.3)
    optimizers = [build_optimizer(session.model, request.train, device=CPU) for _ in range(2)]
    layouts = [
        [(len(g["params"]), g["weight_decay"], g["multiplier"]) for g in optimizer.param_groups]
        for optimizer in optimizers
    ]
    assert layouts[0] == layouts[1]
    assert {(decay, factor) for _, decay, factor in layouts[0]} >= {(0.3, 0.5), (0.3, 2.0), (0.0, 2.0)}
    held = [p for group in optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in session.model.parameters()}
    names = {id(p): name for name, p in session.model.named_parameters()}
    for group in optimizers[0].param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.ndim > 1), names[id(p)]


def test_the_rate_of_a_group_scales_its_first_step(lab):
    def moved(multipliers: LrMultipliers) -> dict[str, float]:
        request = lab.request(lab.folder / "never-written", lr_multipliers=multipliers, weight_decay=0.0)
        session = Session(request, Alone(rank=0, world=1, device=CPU))
        before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
        session.advance()
        return {n: float((p.detach() - before[n]).abs().max()) for n, p in session.model.named_parameters()}

    plain, half = moved(LrMultipliers()), moved(LrMultipliers(embedding=0.5))
    for name, distance in plain.items():
        factor = 0.5 if name in ("wte.weight", "wpe.weight") else 1.0
        assert half[name] == pytest.approx(factor * distance, rel=1e-3), name
