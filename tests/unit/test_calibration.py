"""Statistics against their definitions, written out with loops and autograd; and what splitting changes."""

import math

import pytest
import torch

from model.algebra.psd import centred
from model.compress.calibration import Measurement, collect
from model.compress.contract import Stats, StatsSpec
from model.compress.stats_file import SUMS, half_correlation, load_stats, save_stats
from model.config import GPT2Config, ModelError, ModelSpec

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=24, vocab_size=61)
SPEC = ModelSpec.dense(ARCH)
FIELDS = (
    "gram",
    "abs_mean",
    "row_fisher",
    "col_fisher",
    "full_fisher",
    "delta_gram",
    "vo_mixed_gram",
    "block_influence",
)
ALL = StatsSpec.everywhere(FIELDS, SPEC)
ROWS = torch.randint(61, (5, 24), generator=torch.Generator().manual_seed(3))
SITES = [site.name for site in SPEC.sites()]


@pytest.fixture(scope="module")
def model(toy):
    return toy(SPEC, seed=2, dtype=torch.float64)


@pytest.fixture(scope="module")
def traces(model):
    """Per sequence and site: input (T, m), gradient (T, n) of its mean loss, and gradient of the weight."""
    return [trace(model, row) for row in ROWS]


def trace(model, row):
    inputs, outputs = {}, {}

    def keep(name, args, output):
        inputs[name], outputs[name] = args[0][0].detach(), output
        output.retain_grad()

    hooks = [
        model.site(name).register_forward_hook(lambda _m, args, output, name=name: keep(name, args, output))
        for name in SITES
    ]
    model.zero_grad(set_to_none=True)
    (model(row[None], torch.cat([row[1:], torch.tensor([-1])])[None]) / (len(row) - 1)).backward()
    found = {
        name: (inputs[name], outputs[name].grad[0], model.site(name).weight.grad.clone()) for name in SITES
    }
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return found


def close(a, b, rel=1e-10):
    assert float((a - b).norm()) <= rel * float(b.norm()), float((a - b).norm() / b.norm())


def same(one: Stats, other: Stats, rel=1e-10):
    assert (one.tokens, one.sequences, set(one.sums)) == (other.tokens, other.sequences, set(other.sums))
    for key, value in one.sums.items():
        assert value.dtype == torch.float64
        close(value, other.sums[key], rel)


def test_sums_of_inputs_are_their_definitions(model, traces):
    for skip in (0, 3):
        stats = collect(model, ALL, ROWS, measurement=Measurement(skip_first_tokens=skip))
        assert (stats.tokens, stats.sequences) == (5 * (24 - skip), 5)
        for name in SITES:
            x = torch.cat([trace[name][0][skip:] for trace in traces])
            close(stats.sums[f"gram/{name}"], x.T @ x)
            close(stats.sums[f"mean/{name}"], x.sum(0))
            close(stats.sums[f"abs_mean/{name}"], x.abs().sum(0))
            close(stats.mean(f"mean/{name}"), x.mean(0))


def test_fisher_sums_are_squared_weight_gradients_of_single_sequences(model, traces):
    stats = collect(model, ALL, ROWS, measurement=Measurement())
    for name in SITES:
        squares = sum(trace[name][2].square() for trace in traces)  # autograd's own gradient of the weight
        close(stats.sums[f"full_fisher/{name}"], squares)
        close(stats.sums[f"row_fisher/{name}"], squares.sum(dim=1))
        close(stats.sums[f"col_fisher/{name}"], squares.sum(dim=0))
        close(stats.mean(f"full_fisher/{name}"), squares / 5)
        of_the_mean = sum(trace[name][2] for trace in traces).square()  # squaring batches is something else
        assert float((of_the_mean / 5 - squares).norm()) > 0.1 * float(squares.norm())


def test_fisher_by_token_and_skipped_positions(model, traces):
    stats = collect(model, ALL, ROWS, measurement=Measurement(fisher="token", skip_first_tokens=2))
    by_sequence = collect(model, ALL, ROWS, measurement=Measurement(skip_first_tokens=2))
    for name in SITES:
        pairs = [(x[2:], d[2:]) for x, d, _ in (trace[name] for trace in traces)]
        token = sum(torch.einsum("ti,tj->ij", x.square(), d.square()) for x, d in pairs)
        close(stats.sums[f"full_fisher/{name}"], token)
        close(
            stats.sums[f"row_fisher/{name}"],
            sum((x.square() * d.square().sum(1, keepdim=True)).sum(0) for x, d in pairs),
        )
        close(by_sequence.sums[f"full_fisher/{name}"], sum((x.T @ d).square() for x, d in pairs))


@pytest.mark.parametrize(("trim", "clip"), [(0.125, 10.0), (0.25, 1.2), (0.0, 1e9)])
def test_delta_gram_drops_both_ends_and_shortens_what_is_long(model, traces, trim, clip):
    stats = collect(model, ALL, ROWS, measurement=Measurement(delta_trim=trim, delta_clip=clip))
    cut = math.floor(24 * trim)
    shortened = 0
    for name in SITES:
        expected = torch.zeros_like(stats.sums[f"delta_gram/{name}"])
        for trace in traces:
            delta = trace[name][1][cut : 24 - cut]
            limit = clip * float(delta.norm(dim=1).mean())
            for each in delta:
                is_long = float(each.norm()) > limit
                shortened += is_long
                short = each * (limit / float(each.norm())) if is_long else each
                expected += torch.outer(short, short)
        close(stats.sums[f"delta_gram/{name}"], expected)
    assert bool(shortened) == (clip == 1.2)


def test_block_influence_is_the_cosine_over_a_block(model):
    stats = collect(model, ALL, ROWS, measurement=Measurement(skip_first_tokens=1))
    streams = []
    hooks = [block.register_forward_pre_hook(lambda _m, args: streams.append(args[0])) for block in model.h]
    hooks.append(model.ln_f.register_forward_pre_hook(lambda _m, args: streams.append(args[0])))
    with torch.no_grad():
        model(ROWS)
    for hook in hooks:
        hook.remove()
    for i in range(2):
        a, b = streams[i][:, 1:], streams[i + 1][:, 1:]
        expected = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum()
        assert float(stats.sums[f"block_influence/h.{i}"]) == pytest.approx(float(expected), rel=1e-12)


def test_mixed_inputs_are_what_values_are_made_of(model, traces):
    skip = 2
    stats = collect(model, ALL, ROWS, measurement=Measurement(skip_first_tokens=skip))
    for i in range(2):
        layer = model.site(f"h.{i}.attn.c_attn")
        q_w, k_w, v_w = layer.weight.detach().split(32, dim=1)
        q_b, k_b, v_b = layer.bias.detach().split(32)
        expected = torch.zeros(2, 32, 32, dtype=torch.float64)
        for trace in traces:
            x, heads = trace[f"h.{i}.attn.c_attn"][0], trace[f"h.{i}.attn.c_proj"][0]
            for h in range(2):
                at = slice(16 * h, 16 * h + 16)
                query, key = x @ q_w[:, at] + q_b[at], x @ k_w[:, at] + k_b[at]
                weights = torch.zeros(24, 24, dtype=torch.float64)
                for t in range(24):
                    weights[t, : t + 1] = torch.softmax(key[: t + 1] @ query[t] / 4.0, dim=0)
                mixed = weights @ x
                close(mixed @ v_w[:, at] + v_b[at], heads[:, at], rel=1e-9)  # it is the head's own output
                expected[h] += mixed[skip:].T @ mixed[skip:]
        close(stats.sums[f"vo_mixed_gram/h.{i}"], expected)


def test_the_null_direction_of_a_layer_norm_survives_the_sums(model):
    stats = collect(model, ALL, ROWS, measurement=Measurement())
    for i in range(2):
        for norm, name in ((model.h[i].ln_1, "attn.c_attn"), (model.h[i].ln_2, "mlp.c_fc")):
            cov = centred(stats.mean(f"gram/h.{i}.{name}"), stats.mean(f"mean/h.{i}.{name}"))
            null = 1 / norm.weight.detach()
            assert float((cov @ null).norm()) <= 1e-12 * float(cov.norm() * null.norm())


@pytest.mark.parametrize("labels", ["observed", "sampled"])
def test_any_batch_and_any_split_give_the_same_sums(model, labels):
    how = Measurement(skip_first_tokens=1, labels=labels, seed=4)
    whole = collect(model, ALL, ROWS, measurement=how)
    for batch in (2, 3, 5):
        same(collect(model, ALL, ROWS, measurement=how, batch=batch), whole)
    for cut in (1, 3):
        first = collect(model, ALL, ROWS[:cut], measurement=how)
        same(first + collect(model, ALL, ROWS[cut:], measurement=how, first=cut, batch=2), whole)


def test_in_single_precision_a_split_changes_nothing_either(toy):
    model, how = toy(SPEC, seed=2), Measurement()
    whole = collect(model, ALL, ROWS, measurement=how)
    parts = [collect(model, ALL, ROWS[i : i + 1], measurement=how, first=i) for i in range(5)]
    same(sum(parts[1:], start=parts[0]), whole, rel=1e-13)
    for key, value in collect(model.double(), ALL, ROWS, measurement=how).sums.items():
        close(whole.sums[key], value, rel=1e-4)
    model.float()


def test_sampled_labels_follow_the_model_and_their_seed(model):
    def fisher(**how):
        return collect(model, ALL, ROWS, measurement=Measurement(**how)).sums["full_fisher/h.0.mlp.c_fc"]

    sampled = fisher(labels="sampled")
    assert torch.equal(sampled, fisher(labels="sampled"))
    assert not torch.equal(sampled, fisher(labels="sampled", seed=1))
    assert not torch.equal(sampled, fisher())


def test_a_drawn_token_has_the_probability_of_the_model():
    from model.compress.calibration import _draw

    logits = torch.log(torch.tensor([0.1, 0.6, 0.0, 0.3])).expand(4000, 4)
    share = torch.bincount(_draw(logits, seed=0, number=0), minlength=4) / 4000
    assert share.tolist() == pytest.approx([0.1, 0.6, 0.0, 0.3], abs=0.03)
    assert not torch.equal(_draw(logits, seed=0, number=1), _draw(logits, seed=0, number=0))


def test_measuring_leaves_a_model_as_it_was(toy):
    model = toy(SPEC, seed=5).train()
    model.ln_f.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        collect(model, ALL, ROWS, measurement=Measurement())
        with pytest.raises(ModelError, match="do not fit the context of 24"):
            collect(model, ALL, torch.zeros(1, 30, dtype=torch.long), measurement=Measurement())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, p in model.named_parameters():
        assert p.grad is None
        assert p.requires_grad == before[name][1]
        assert torch.equal(p, before[name][0])


def test_only_what_is_asked_for_is_collected(model):
    spec = StatsSpec(gram=frozenset({"h.1.mlp.c_proj"}), row_fisher=frozenset({"h.0.attn.c_proj"}))
    stats = collect(model, spec, ROWS, measurement=Measurement())
    assert {key.partition("/")[0] for key in stats.sums} == {"gram", "mean", "row_fisher", "row_fisher_even"}
    assert {key.partition("/")[2] for key in stats.sums} == {"h.1.mlp.c_proj", "h.0.attn.c_proj"}
    with pytest.raises(ModelError, match=r"statistics hold no 'gram/h\.0\.mlp\.c_fc'"):
        stats.mean("gram/h.0.mlp.c_fc")
    with pytest.raises(ModelError, match="'grams' is no statistic; choose from gram, abs_mean"):
        StatsSpec.everywhere(["grams"], SPEC)
    with pytest.raises(ModelError, match="24 tokens, 23 of them skipped, leave nothing"):
        collect(model, spec, ROWS, measurement=Measurement(skip_first_tokens=23))


def test_sums_that_are_not_finite_are_refused_by_name():
    for spoiled in (torch.nan, torch.inf):
        sums = {"gram/h.0.mlp.c_fc": torch.eye(3), "row_fisher/h.1.mlp.c_fc": torch.tensor([1.0, spoiled])}
        stats = Stats(tokens=2, sequences=1, sums=sums)
        assert float(stats.mean("gram/h.0.mlp.c_fc")[0, 0]) == 0.5
        with pytest.raises(ModelError, match=r"NaN or infinity in 'row_fisher/h\.1\.mlp\.c_fc'"):
            stats.mean("row_fisher/h.1.mlp.c_fc")


def test_halves_are_compared_by_rank():
    even = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()

    def correlation(odd):
        sums = {"row_fisher_even/a": even, "row_fisher/a": even + odd}
        return half_correlation(Stats(tokens=1, sequences=2, sums=sums))

    assert correlation(10 * even.exp()) == {"a": pytest.approx(1.0)}
    assert correlation(-even) == {"a": pytest.approx(-1.0)}
    assert correlation(torch.tensor([1.0, 3.0, 2.0, 4.0])) == {"a": pytest.approx(0.8)}
    assert correlation(torch.zeros(4)) == {}


def test_statistics_come_back_from_a_folder_or_not_at_all(model, tmp_path):
    stats = collect(model, ALL, ROWS, measurement=Measurement())
    for folder in ("a", "b"):
        save_stats(stats, tmp_path / folder)
    again = load_stats(tmp_path / "a")
    assert (again.tokens, again.sequences) == (stats.tokens, stats.sequences)
    assert all(torch.equal(again.sums[key], value) for key, value in stats.sums.items())
    assert (tmp_path / "a" / SUMS).read_bytes() == (tmp_path / "b" / SUMS).read_bytes()
    (tmp_path / "a" / "counts.json").write_text('{"format": "krony-stats", "version": 1, "tokens": 3}')
    with pytest.raises(ModelError, match="holds no statistics of format krony-stats 1"):
        load_stats(tmp_path / "a")
    with (tmp_path / "b" / SUMS).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match="cut short or damaged"):
        load_stats(tmp_path / "b")
