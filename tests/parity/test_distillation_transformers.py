"""The distillation loss is what one computes from transformers' own outputs, and so is its gradient.

Two stock models with eager attention give logits, hidden states and attention probabilities; the objective of
KnGPT2 and the logit term follow from them in a few plain lines.
"""

import pytest
import torch
import torch.nn.functional as F

from model.gpt2 import GPT2
from model.pretrained import config_from_stock, from_stock
from pipeline.config.training import DistillConfig
from pipeline.train.distill import Distillation

CONFIG = DistillConfig(alpha=0.4, temperature=3.0, hidden=0.6, attention=1.1, embedding=1.7)


@pytest.fixture(scope="module")
def stock():
    """A student and a teacher as transformers has them, attention written out, nothing trivial."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=3,
        n_head=4,
        n_embd=32,
        n_positions=24,
        vocab_size=97,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        attn_implementation="eager",
    )
    generator = torch.Generator().manual_seed(3)
    pair = [transformers.GPT2LMHeadModel(config).eval() for _ in range(2)]
    with torch.no_grad():
        for parameter in (p for model in pair for p in model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return pair


def ours(model) -> GPT2:
    """The same weights in our model."""
    return from_stock(model.state_dict(), config_from_stock(model.config.to_dict())).eval()


def outputs_of(model, idx):
    """Logits, what enters the first block and leaves each one, attention probabilities of each block."""
    last = []
    # transformers puts the final LayerNorm on the last of its hidden states; the block's own output is hooked
    hook = model.transformer.h[-1].register_forward_hook(
        lambda module, inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    out = model(idx, output_hidden_states=True, output_attentions=True)
    hook.remove()
    return out.logits, [*out.hidden_states[:-1], last[0]], out.attentions


def objective(student, teacher, idx, targets) -> torch.Tensor:
    """The sum over the tokens that count, term by term."""
    logits, states, maps = outputs_of(student, idx)
    with torch.no_grad():
        t_logits, t_states, t_maps = outputs_of(teacher, idx)
    counts = targets >= 0

    def relative(s, t):
        return ((s - t).square().sum(-1) / t.square().sum(-1))[counts].sum()

    log_q, log_p = (F.log_softmax(each[counts] / CONFIG.temperature, dim=-1) for each in (logits, t_logits))
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    rows = [(t * ((t + 1e-30).log() - (s + 1e-30).log())).sum(-1) for s, t in zip(maps, t_maps, strict=True)]
    return (
        CONFIG.alpha * F.cross_entropy(logits[counts], targets[counts], reduction="sum")
        + (1 - CONFIG.alpha) * CONFIG.temperature**2 * divergence
        + CONFIG.embedding * relative(states[0], t_states[0])
        + CONFIG.hidden / 3 * sum(relative(s, t) for s, t in zip(states[1:], t_states[1:], strict=True))
        + CONFIG.attention / 3 * sum(row.mean(1)[counts].sum() for row in rows)
    )


def test_loss_and_gradient_are_those_of_transformers_outputs(stock):
    student, teacher = stock
    generator = torch.Generator().manual_seed(0)
    idx, targets = torch.randint(97, (2, 3, 24), generator=generator)
    targets = targets.masked_fill(torch.rand(targets.shape, generator=generator) < 0.2, -1)
    mine = ours(student)
    loss = Distillation(mine, ours(teacher), CONFIG)(idx, targets)
    expected = objective(student, teacher, idx, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for name, parameter in mine.named_parameters():
        theirs = student.get_parameter(f"transformer.{name}").grad
        torch.testing.assert_close(
            parameter.grad, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()) + 1e-5
        )
