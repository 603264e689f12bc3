"""Distillation: the plain formula, its gradient, and what it is where it must vanish."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.config import GPT2Config, ModelSpec
from model.losses import (
    attention_sum,
    chunked_distillation_sum,
    cross_entropy_sum,
    distillation_sum,
    hidden_sum,
    log_attention,
)
from pipeline.config.identity import identity_fields
from pipeline.config.load import load_study
from pipeline.config.schema import ScratchTeacher
from pipeline.config.training import DistillConfig, TrainConfig
from pipeline.errors import ConfigError, TrainError
from pipeline.train import distill
from pipeline.train.distill import Distillation

ARCH = GPT2Config(n_layer=3, n_head=2, n_embd=16, n_ctx=12, vocab_size=31)
EVERYTHING = DistillConfig(alpha=0.3, temperature=2.5, hidden=0.7, attention=1.3, embedding=0.9)


def rows(count: int = 4, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (count, 12); some targets do not count."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(0, 31, (2, count, 12), generator=generator)
    return inputs, targets.masked_fill(torch.rand(targets.shape, generator=generator) < 0.2, -1)


def plain(student, teacher, inputs, targets, config: DistillConfig) -> torch.Tensor:
    """The whole objective as one would write it down, for models with the same blocks."""

    def trace(model):
        x = model.embed(inputs)
        states, maps = [x], []
        for block in model.h:
            q, k, _ = block.attn.heads(block.ln_1(x))
            scores = (q @ k.mT) / 8**0.5
            future = torch.ones(12, 12, dtype=torch.bool).triu(1)
            maps.append(scores.masked_fill(future, -1e30).softmax(-1))
            x = block(x)
            states.append(x)
        return model.logits(model.ln_f(x)), states, maps

    counts = targets >= 0
    logits, states, maps = trace(student)
    with torch.no_grad():
        t_logits, t_states, t_maps = trace(teacher)
    ce = F.cross_entropy(logits[counts], targets[counts], reduction="sum")
    p, q = ((each[counts] / config.temperature).softmax(-1) for each in (t_logits, logits))
    kl = (p * (p.log() - q.log())).sum()
    total = config.alpha * ce + (1 - config.alpha) * config.temperature**2 * kl
    weights = [config.embedding, *[config.hidden / len(maps)] * len(maps)]
    for weight, s, t in zip(weights, states, t_states, strict=True):
        error = (s - t).square().sum(-1) / t.square().sum(-1)
        total = total + weight * error[counts].sum()
    for s, t in zip(maps, t_maps, strict=True):
        divergence = torch.where(t > 0, t * (t.clamp_min(1e-38).log() - s.clamp_min(1e-38).log()), 0.0)
        total = total + config.attention / len(maps) * divergence.sum(-1).mean(1)[counts].sum()
    return total


@pytest.mark.parametrize("config", [DistillConfig(), EVERYTHING])
def test_value_and_gradient_are_those_of_the_plain_formula(toy, config: DistillConfig) -> None:
    spec = ModelSpec.dense(ARCH)
    student, teacher = toy(spec, seed=1, dtype=torch.float64), toy(spec, seed=2, dtype=torch.float64)
    inputs, targets = rows()
    losses = (
        Distillation(student, teacher, config)(inputs, targets),
        plain(student, teacher, inputs, targets, config),
    )
    gradients = [torch.autograd.grad(loss, list(student.parameters())) for loss in losses]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-5)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 2.5), (0.0, 1.0), (1.0, 2.0)])
def test_the_gradient_of_the_logits_is_that_of_the_formula(alpha: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, taught = 5.0 * torch.randn(2, 3, 4, 11, generator=generator, dtype=torch.float64)
    logits, taught = (each - 60.0 for each in (logits, taught))  # where GPT-2's logits are
    targets = torch.randint(-2, 11, (3, 4), generator=generator)
    one, other = (logits.clone().requires_grad_() for _ in range(2))
    loss = distillation_sum(one, taught, targets, alpha=alpha, temperature=temperature)
    counts = targets >= 0
    p, log_p = ((taught / temperature).softmax(-1), (taught / temperature).log_softmax(-1))
    divergence = (p * (log_p - (other / temperature).log_softmax(-1))).sum(-1)[counts].sum()
    entropy = F.cross_entropy(other[counts], targets[counts], reduction="sum")
    plainly = alpha * entropy + (1 - alpha) * temperature**2 * divergence
    assert loss.item() == pytest.approx(plainly.item(), rel=1e-6)
    gradients = [torch.autograd.grad(0.01 * each, x)[0] for each, x in ((loss, one), (plainly, other))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
    assert not gradients[0][~counts].any()


def test_the_gradient_of_bf16_logits_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, taught = 5.0 * torch.randn(2, 20, 50, generator=generator)
    targets = torch.randint(0, 50, (20,), generator=generator)
    exact, rounded = logits.bfloat16().float().requires_grad_(), logits.bfloat16().requires_grad_()
    for each in (exact, rounded):
        (distillation_sum(each, taught, targets) / 1000).backward()
    assert rounded.grad.dtype == torch.bfloat16
    assert torch.equal(rounded.grad, exact.grad.bfloat16())


def test_all_cross_entropy_is_the_plain_objective(toy) -> None:
    student, teacher = (toy(ModelSpec.dense(ARCH), seed=seed) for seed in (1, 2))
    loss = Distillation(student, teacher, DistillConfig(alpha=1.0))(*rows())
    assert loss.item() == pytest.approx(student(*rows()).item(), rel=1e-6)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(toy) -> None:
    student, teacher = (toy(ModelSpec.dense(ARCH), seed=1) for _ in range(2))
    config = DistillConfig(alpha=0.0, hidden=1.0, attention=1.0, embedding=1.0)
    loss = Distillation(student, teacher, config)(*rows())
    loss.backward()
    assert abs(loss.item()) < 1e-4
    largest = max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None)
    assert largest < 1e-4


def test_rows_add_up(toy) -> None:
    student, teacher = (toy(ModelSpec.dense(ARCH), seed=seed) for seed in (1, 2))
    objective = Distillation(student, teacher, EVERYTHING)
    inputs, targets = rows(5)
    whole = objective(inputs, targets).item()
    parts = sum(objective(inputs[i:j], targets[i:j]).item() for i, j in ((0, 2), (2, 5)))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_missing_blocks_are_passed_over_by_the_student_alone(toy) -> None:
    teacher = toy(ModelSpec.dense(ARCH), seed=1)
    full = ModelSpec.dense(ARCH)
    student = toy(ModelSpec(arch=ARCH, blocks=(full.blocks[0], full.blocks[2])), seed=2)
    for mine, theirs in ((0, 0), (1, 2)):
        student.h[mine].load_state_dict(teacher.h[theirs].state_dict())
    for name in ("wte", "wpe", "ln_f"):
        getattr(student, name).load_state_dict(getattr(teacher, name).state_dict())
    inputs, targets = rows()
    objective = Distillation(student, teacher, DistillConfig(alpha=0.0, temperature=1.0))
    expected = distillation_sum(student(inputs), teacher(inputs), targets, alpha=0.0, temperature=1.0)
    assert objective(inputs, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() > 0.01


def test_pieces_of_the_logits_change_neither_loss_nor_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, taught = torch.randn(2, 3, 7, 5, generator=generator)
    head, other = torch.randn(2, 5, 11, generator=generator)
    targets = torch.randint(-1, 11, (3, 7), generator=generator)
    found = []
    for max_logits in (10**6, 50, 1):
        x = hidden.clone().requires_grad_()
        loss = chunked_distillation_sum(
            x,
            taught,
            targets,
            student_head=lambda z: z @ head,
            teacher_head=lambda z: z @ other,
            vocab_size=11,
            max_logits=max_logits,
        )
        found.append((loss.item(), torch.autograd.grad(loss, x)[0]))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert torch.allclose(gradient, found[0][1], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_rows_are_those_of_the_attention_that_runs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = 3.0 * torch.randn(2, 2, 3, 12, 8, generator=generator)  # scores up to 40, as GPT-2 has them
    value = torch.randn(2, 3, 12, 5, generator=generator)
    query, key = query.to(dtype), key.to(dtype)
    expected = F.scaled_dot_product_attention(
        query.float(), key.float(), value, is_causal=True, scale=8**-0.5
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        rows = log_attention(query, key, scale=8**-0.5).exp()
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 3, 12))
    torch.testing.assert_close(rows @ value, expected, rtol=1e-5, atol=1e-6)


def test_attention_rows_are_those_inside_the_model(toy) -> None:
    model = toy(ModelSpec.dense(ARCH), seed=1)
    attention, x = model.h[0].attn, torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    query, key, value = attention.heads(x)
    mixed = log_attention(query, key, scale=attention.scale).exp() @ value
    torch.testing.assert_close(attention.c_proj(mixed.transpose(1, 2).flatten(2)), attention(x))


def test_compiled_equals_eager(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    in_two = partial(chunked_distillation_sum, max_logits=12 * 2 * 31)  # tokens of both models
    monkeypatch.setattr(distill, "chunked_distillation_sum", in_two)
    spec = ModelSpec.dense(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_ctx=12, vocab_size=31))
    student, teacher = (toy(spec, seed=seed) for seed in (1, 2))
    objective = Distillation(student, teacher, EVERYTHING)
    inputs, targets = rows(2)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    losses = [each(inputs, targets) for each in (compiled, objective)]
    torch.testing.assert_close(*losses)
    for mine, theirs in zip(
        *(torch.autograd.grad(loss, list(student.parameters())) for loss in losses), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_temperature_keeps_the_size_of_the_gradient() -> None:
    """For large T the gradient of T^2 KL tends to (z_s - z_t) / V, logits centred (Hinton et al. 2015)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    student, teacher = (each - each.mean(-1, keepdim=True) for each in (student, teacher))
    student = student.requires_grad_()
    loss = distillation_sum(student, teacher, torch.zeros(6, dtype=torch.long), alpha=0.0, temperature=300.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.allclose(gradient, (student - teacher) / 9, atol=0.02)


def test_ignored_tokens_count_nowhere() -> None:
    nothing = torch.full((2, 3), -1)
    states = torch.randn(2, 2, 3, 4)
    heads = torch.randn(4, 2, 2, 3, 4)
    assert hidden_sum(states[0], states[1], nothing).item() == 0
    assert attention_sum((heads[0], heads[1]), (heads[2], heads[3]), nothing, scale=0.5).item() == 0
    assert distillation_sum(states[0], states[1], nothing).item() == 0
    assert cross_entropy_sum(states[0], nothing).item() == 0


def test_models_that_cannot_be_compared_are_refused(toy) -> None:
    student = toy(ModelSpec.dense(ARCH))
    other = toy(ModelSpec.dense(GPT2Config(n_layer=3, n_head=2, n_embd=16, n_ctx=12, vocab_size=32)))
    with pytest.raises(TrainError, match="vocab_size=31, its teacher has 32"):
        Distillation(student, other, DistillConfig())


def test_settings_without_meaning_are_refused() -> None:
    for wrong in ({"alpha": 1.5}, {"temperature": 0.0}, {"hidden": -1.0}, {"embedding": -1.0}):
        with pytest.raises(ConfigError, match="distill"):
            DistillConfig(**wrong)
    with pytest.raises(ConfigError, match="a teacher has no teacher"):
        ScratchTeacher(train=TrainConfig(objective="kd", seq_len=64))


def test_a_weight_that_came_later_forks_no_address_of_earlier_runs() -> None:
    earlier = {"alpha": 0.5, "temperature": 2.0, "hidden": 0.0, "attention": 0.0}
    assert identity_fields(DistillConfig()) == earlier
    assert identity_fields(DistillConfig(embedding=0.0)) == earlier
    assert identity_fields(DistillConfig(embedding=0.1)) == earlier | {"embedding": 0.1}


# --- in the training loop -----------------------------------------------------------------------------------


def request_of(lab, run: Path, **train):
    """A run that learns from another model of the lab."""
    return lab.request(run, objective="kd", **train)


def losses_of(outcome) -> list[float]:
    """Every logged training loss."""
    return [row["loss"] for row in outcome.rows if "loss" in row]


def test_a_run_on_cross_entropy_alone_is_the_plain_run(lab, tmp_path: Path) -> None:
    plain_run = lab.fit(lab.request(tmp_path / "ce", max_steps=4, log_every=1))
    kd = lab.fit(request_of(lab, tmp_path / "kd", max_steps=4, log_every=1, distill={"alpha": 1.0}))
    assert losses_of(kd) == pytest.approx(losses_of(plain_run), rel=1e-5)


def test_a_distilling_run_resumes_to_the_same_bytes(lab, tmp_path: Path) -> None:
    settings = {
        "max_steps": 8,
        "log_every": 1,
        "distill": {"hidden": 0.5, "attention": 0.5, "embedding": 0.5},
    }
    whole = lab.fit(request_of(lab, tmp_path / "whole", **settings))
    first = lab.fit(request_of(lab, tmp_path / "cut", **settings), stop_at=3)
    assert first.result.stopped
    rest = lab.fit(request_of(lab, tmp_path / "cut", **settings))
    assert rest.result.resumed_from == first.result.step
    weights = lab.weights(tmp_path / "cut")
    assert all(torch.equal(weights[name], p) for name, p in lab.weights(tmp_path / "whole").items())
    assert losses_of(whole)[-1] < losses_of(whole)[0]


def test_shares_of_ranks_add_up_to_one_step(lab, tmp_path: Path) -> None:
    from pipeline.train.session import Session
    from pipeline.train.topology import Topology

    class Alone(Topology):
        def _all_reduce(self, values, op) -> None:
            """Nobody answers: the other ranks run one after the other."""

    def share(rank: int, world: int) -> torch.Tensor:
        distill = {"hidden": 1.0, "attention": 1.0, "embedding": 1.0}
        request = request_of(lab, tmp_path / "x", grad_clip=0.0, distill=distill)
        session = Session(request, Alone(rank=rank, world=world, device=torch.device("cpu")))
        session.advance()
        return session._buffer._flat.clone()

    whole, halves = share(0, 1), share(0, 2) + share(1, 2)
    assert (halves - whole).norm() <= 1e-5 * whole.norm()


def test_distillation_without_a_teacher_is_refused(lab, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="needs a teacher"):
        lab.fit(dataclasses.replace(request_of(lab, tmp_path / "run"), teacher=None))


def test_flags_reach_the_weights() -> None:
    flags = ["--train.objective", "kd", "--train.distill.alpha", "0.2"]
    train = load_study(None, overrides=flags).first.train
    assert train.objective == "kd"
    assert train.distill.alpha == 0.2


def test_a_compiled_run_has_the_losses_of_the_plain_one(
    lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced and differentiated as by the real compiler, without minutes of code generation
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    terms = {"hidden": 0.5, "embedding": 0.5}
    settings = {"max_steps": 2, "log_every": 1, "batch_tokens": 64, "lr": 1e-3, "distill": terms}
    runs = [
        lab.fit(request_of(lab, tmp_path / name, compile=name == "compiled", **settings))
        for name in ("plain", "compiled")
    ]
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), rel=1e-5)
