"""Window arithmetic and weighing, held against a brute force that knows only the words of the protocol."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import EvaluateError
from pipeline.evaluate.perplexity import Window, evaluate_perplexity, token_losses, windows
from pipeline.evaluate.protocols import PROTOCOLS, Protocol
from pipeline.evaluate.sequences import TokenSequence, document_ends

VOCABULARY = 11


class Prefix(nn.Module):
    """A small causal model whose logits depend on the whole prefix, so that a wrong window shows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.mix = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        count = torch.arange(1, idx.shape[1] + 1)[:, None]
        return self.table[idx] + self.mix[idx].cumsum(1) / count


MODEL = Prefix()


def protocol(**changes: object) -> Protocol:
    return Protocol(**{"id": "test", "text": "t", "about": "A test.", "window": 8, "stride": 8} | changes)


def sequence(ids: list[int], ends: list[int] | None = None) -> TokenSequence:
    lengths = np.array([0] + [1 + i % 3 for i in range(1, VOCABULARY)], dtype=np.uint16)
    return TokenSequence("t", np.array(ids), lengths, "d", None if ends is None else np.array(ends))


def loss_of(context: list[int], target: int) -> float:
    """One forward pass for one token, nothing shared with the code under test."""
    with torch.no_grad():
        return -float(MODEL(torch.tensor([context]))[0, -1].double().log_softmax(-1)[target])


def krony_by_hand(ids: list[int], width: int) -> tuple[float, int]:
    """Chunks of `width`; in each, every token but its first is scored from the chunk alone; mean of means."""
    means = []
    for start in range(0, len(ids), width):
        chunk = ids[start : start + width]
        if len(chunk) > 1:
            means.append(sum(loss_of(chunk[:i], chunk[i]) for i in range(1, len(chunk))) / (len(chunk) - 1))
    return sum(means) / len(means), len(means)


tokens = st.lists(st.integers(1, VOCABULARY - 1), min_size=2, max_size=40)


@settings(deadline=None, max_examples=40)
@given(tokens, st.integers(2, 9), st.integers(1, 5))
def test_krony_perplexity_is_the_mean_of_chunk_means(ids, width, batch):
    loss, count = krony_by_hand(ids, width)
    scores = evaluate_perplexity(
        MODEL,
        protocol(window=width, stride=width, weighting="windows"),
        sequence(ids),
        batch=batch,
        quiet=True,
    )
    assert scores.loss == pytest.approx(loss, rel=1e-5)
    assert scores.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert scores.windows == count


@settings(deadline=None, max_examples=40)
@given(tokens, st.integers(2, 9))
def test_shifted_targets_score_every_token_but_the_first_once(ids, width):
    expected = [
        loss_of(ids[(i - 1) // width * width : i], ids[i])  # the window that holds its last input
        for i in range(1, len(ids))
    ]
    plan = windows(len(ids), protocol(window=width, stride=width, targets="shifted"))
    losses = token_losses(MODEL, np.array(ids), plan, batch=3)
    assert np.isnan(losses[0])
    np.testing.assert_allclose(losses[1:], expected, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.integers(2, 12), st.data())
def test_overlap_is_context_and_never_scored_twice(count, width, data):
    stride = data.draw(st.integers(1, width))
    plan = windows(count, protocol(window=width, stride=stride))
    scored = [token for w in plan for token in range(w.first, w.last)]
    assert len(scored) == len(set(scored))
    assert all(w.begin < w.first < w.last <= w.end <= min(count, w.begin + width) for w in plan)
    unscored = set(range(count)) - set(scored)
    starts = set(range(0, count, width)) if stride == width else {0}
    assert (
        unscored == starts
    )  # without overlap the first token of each window, with overlap only the very first


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (16, [Window(0, 8, 1, 8), Window(8, 16, 9, 16)]),  # a multiple of the window
        (17, [Window(0, 8, 1, 8), Window(8, 16, 9, 16)]),  # a last window of one token scores nothing
        (18, [Window(0, 8, 1, 8), Window(8, 16, 9, 16), Window(16, 18, 17, 18)]),
        (2, [Window(0, 2, 1, 2)]),
    ],
)
def test_edges_of_plain_windows(count, expected):
    assert windows(count, protocol()) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (
            16,
            [Window(0, 8, 1, 9), Window(8, 15, 9, 16)],
        ),  # where the original breaks: a multiple of the window
        (17, [Window(0, 8, 1, 9), Window(8, 16, 9, 17)]),
        (18, [Window(0, 8, 1, 9), Window(8, 16, 9, 17), Window(16, 17, 17, 18)]),
    ],
)
def test_edges_of_shifted_windows(count, expected):
    assert windows(count, protocol(targets="shifted")) == expected


@pytest.mark.parametrize(
    ("name", "tokens", "count", "last"),
    [
        ("krony/wt103", 286_657, 280, 961),
        ("krony/wt2", 297_300, 291, 340),
        ("krony/lambada_text", 429_710, 420, 654),
    ],
)
def test_window_counts_of_the_krony_protocols(name, tokens, count, last):
    plan = windows(tokens, PROTOCOLS[name])
    assert (len(plan), plan[-1].end - plan[-1].begin) == (count, last)
    assert all(w.last - w.first == 1023 for w in plan[:-1])


def test_batch_size_does_not_change_the_number():
    ids = np.random.default_rng(0).integers(1, VOCABULARY, 203).tolist()
    values = [
        evaluate_perplexity(
            MODEL, protocol(weighting="windows"), sequence(ids), batch=batch, quiet=True
        ).value
        for batch in (1, 2, 7, 64)
    ]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)
    again = evaluate_perplexity(MODEL, protocol(weighting="windows"), sequence(ids), batch=7, quiet=True)
    assert again.value == values[2]  # the same call twice is the same number to the bit


def test_token_weighted_and_window_weighted_differ_by_the_short_window():
    ids = np.random.default_rng(1).integers(1, VOCABULARY, 18).tolist()
    by_window = evaluate_perplexity(MODEL, protocol(weighting="windows"), sequence(ids), batch=4, quiet=True)
    by_token = evaluate_perplexity(MODEL, protocol(), sequence(ids), batch=4, quiet=True)
    units = by_window.units
    assert by_window.loss == pytest.approx(float((units.nll / units.tokens).mean()))
    assert by_token.loss == pytest.approx(float(units.nll.sum() / units.tokens.sum()))
    assert by_token.loss == by_window.token_loss != by_window.loss


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=3, max_size=40))
def test_documents_share_out_all_of_the_loss(ids):
    ends = document_ends(np.array(ids), end_token=0)
    scores = evaluate_perplexity(
        MODEL, protocol(targets="shifted"), sequence(ids, ends.tolist()), batch=4, quiet=True
    )
    assert scores.unit == "document"
    assert int(scores.units.tokens.sum()) == scores.scored == len(ids) - 1
    assert float(scores.units.nll.sum()) / scores.scored == pytest.approx(scores.token_loss)
    assert ends[-1] == len(ids)
    assert all(ids[end - 1] == 0 for end in ends[:-1])


def test_bits_per_byte_leaves_out_tokens_that_write_nothing():
    ids = [3, 0, 4, 0, 5]
    scores = evaluate_perplexity(MODEL, protocol(targets="shifted"), sequence(ids), batch=1, quiet=True)
    nll = sum(loss_of(ids[:i], ids[i]) for i in (2, 4))
    lengths = sequence(ids).token_bytes
    assert scores.bits_per_byte == pytest.approx(nll / math.log(2) / float(lengths[4] + lengths[5]), rel=1e-5)


def test_a_diverged_model_is_named_and_gives_no_number():
    broken = Prefix()
    with torch.no_grad():
        broken.table[4] = float("nan")
    with pytest.raises(EvaluateError, match=r"tokens 9 to 15 of t.*diverged"):
        evaluate_perplexity(broken, protocol(), sequence([1] * 8 + [4] * 8), batch=1, quiet=True)


def test_one_token_is_no_text():
    with pytest.raises(EvaluateError, match="at least 2"):
        evaluate_perplexity(MODEL, protocol(), sequence([1]), batch=1, quiet=True)
