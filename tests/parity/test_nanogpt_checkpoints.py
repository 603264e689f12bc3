"""Checkpoints of Krony-PT and nanoGPT, written and computed here with plain torch, give the same logits.

The writer and the forward pass know the published layouts and `torch.kron`, and nothing of our layers.
"""

import os
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model.config import GPT2Config, Kron, ModelError, ModelSpec
from model.export import load_native
from model.gpt2 import GPT2
from model.nanogpt import from_checkpoint, read_checkpoint, save_nanogpt, to_nanogpt
from model.pretrained import load_stock
from pipeline.compress.foreign import import_checkpoint
from pipeline.errors import CompressError, PreflightError

WIDTH, LAYERS, HEADS, CONTEXT, TOKENS = 24, 3, 4, 20, 61
HIDDEN = 4 * WIDTH
IDX = torch.randint(TOKENS, (2, CONTEXT), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Shape:
    """A Krony-PT shape by its first factor of c_fc, for y = xW."""

    d1: int
    d2: int
    terms: int
    scalers: bool = False


SHAPES = [
    Shape(24, 24, 1),
    Shape(12, 96, 1),
    Shape(8, 32, 4),
    Shape(8, 32, 4, scalers=True),
    Shape(6, 12, 2, scalers=True),
]


def random(*size, scale=0.2, seed=[0]):  # noqa: B006 - a counter
    seed[0] += 1
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed[0]))


def nanogpt_state(*, bias=True, mask=False):
    """A nanoGPT state dict: `nn.Linear` weights (out, in), the head tied."""
    state = {
        "transformer.wte.weight": random(TOKENS, WIDTH),
        "transformer.wpe.weight": random(CONTEXT, WIDTH),
        "transformer.ln_f.weight": 1 + random(WIDTH),
    }
    for i in range(LAYERS):
        here = f"transformer.h.{i}"
        for name, rows, columns in (
            ("attn.c_attn", 3 * WIDTH, WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", HIDDEN, WIDTH),
            ("mlp.c_proj", WIDTH, HIDDEN),
        ):
            state[f"{here}.{name}.weight"] = random(rows, columns)
            if bias:
                state[f"{here}.{name}.bias"] = random(rows)
        for norm in ("ln_1", "ln_2"):
            state[f"{here}.{norm}.weight"] = 1 + random(WIDTH)
            if bias:
                state[f"{here}.{norm}.bias"] = random(WIDTH)
        if mask:
            state[f"{here}.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
    if bias:
        state["transformer.ln_f.bias"] = random(WIDTH)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def krony_state(shape, *, old=False, bias=True):
    """A Krony-PT state dict, and the dense W (in, out) of every MLP matrix by `torch.kron`."""
    state, dense = nanogpt_state(), {}
    for i in range(LAYERS):
        here = f"transformer.h.{i}.mlp"
        for role in ("c_fc", "c_proj"):
            state.pop(f"{here}.{role}.weight")
            value = state.pop(f"{here}.{role}.bias")
            if bias:
                state[f"{here}.{role}_bias"] = value
        up = (shape.terms, shape.d1, shape.d2), (shape.terms, WIDTH // shape.d1, HIDDEN // shape.d2)
        for role, sizes, name in (
            ("c_fc", up, "scalers_fc"),
            ("c_proj", [(k, columns, rows) for k, rows, columns in up], "scalers_proj"),
        ):
            left, right = random(*sizes[0]), random(*sizes[1])
            factor = torch.ones(shape.terms)
            if old:  # one pair per term, of the transposed weight
                for k in range(shape.terms):
                    state[f"{here}.{role}_{k}_0"] = left[k].T.contiguous()
                    state[f"{here}.{role}_{k}_1"] = right[k].T.contiguous()
            else:
                state |= {f"{here}.{role}_0": left, f"{here}.{role}_1": right}
            if shape.scalers:
                factor = state[f"{here}.{name}"] = 1 + random(shape.terms, scale=1.0)
            dense[i, role] = sum(factor[k] * torch.kron(left[k], right[k]) for k in range(shape.terms))
    return state, dense


def reference(state, dense=None):
    """Logits as nanoGPT computes them, with the exact GELU; `dense` replaces the MLP matrices."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    def mlp(x, here, layer, role):
        if dense is None:
            return linear(x, f"{here}.mlp.{role}")
        return x @ dense[layer, role] + state.get(f"{here}.mlp.{role}_bias", 0.0)

    x = state["transformer.wte.weight"][IDX] + state["transformer.wpe.weight"]
    later = torch.ones(CONTEXT, CONTEXT).triu(1).bool()
    for i in range(LAYERS):
        here = f"transformer.h.{i}"
        q, k, v = (
            part.reshape(2, CONTEXT, HEADS, -1).transpose(1, 2)
            for part in linear(norm(x, f"{here}.ln_1"), f"{here}.attn.c_attn").chunk(3, dim=-1)
        )
        weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).masked_fill(later, -torch.inf).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{here}.attn.c_proj")
        hidden = F.gelu(mlp(norm(x, f"{here}.ln_2"), here, i, "c_fc"))
        x = x + mlp(hidden, here, i, "c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("file", ["krony.pt", "krony.safetensors"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_krony_pt_checkpoint_gives_its_logits(tmp_path, shape, file):
    state, dense = krony_state(shape)
    path = tmp_path / file
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file({name: value for name, value in state.items() if name != "lm_head.weight"}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.layout == "krony-pt"
    model = from_checkpoint(checkpoint, n_head=HEADS).eval()
    matrix = model.spec.blocks[1].mlp_c_fc
    kron = Kron(m1=shape.d1, n1=shape.d2, m2=24 // shape.d1, n2=96 // shape.d2, terms=shape.terms)
    assert (matrix.m1, matrix.n1, matrix.m2, matrix.n2) == (kron.m1, kron.n1, kron.m2, kron.n2)
    assert model.spec.tied
    distinct = sum(value.numel() for name, value in state.items() if name != "lm_head.weight")
    assert model.num_parameters() == distinct
    close(model(IDX), reference(state, dense))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not shape.scalers], ids=str)
def test_the_layout_of_before_march_2024_gives_its_logits(tmp_path, shape, bias):
    state, dense = krony_state(shape, old=True, bias=bias)
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "old.pt")
    checkpoint = read_checkpoint(tmp_path / "old.pt")
    assert checkpoint.layout == "krony-pt-until-2024-03"
    close(from_checkpoint(checkpoint, n_head=HEADS).eval()(IDX), reference(state, dense))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod."])
def test_a_nanogpt_checkpoint_gives_its_logits(tmp_path, bias, wrapper):
    state = nanogpt_state(bias=bias, mask=not bias)
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": CONTEXT}
    content = {
        "model": {wrapper + name: value for name, value in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": {**sizes, "vocab_size": TOKENS, "bias": bias, "dropout": 0.0},
        "iter_num": 7,
        "best_val_loss": torch.tensor(3.2),
        "config": {"dataset": "openwebtext"},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.layout == "nanogpt"
    model = from_checkpoint(checkpoint).eval()  # heads from model_args
    arch = GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, n_ctx=CONTEXT, vocab_size=TOKENS, activation="gelu"
    )
    assert model.spec == ModelSpec.dense(arch)
    close(model(IDX), reference(state))


def test_a_padded_table_is_cut_and_integer_factors_are_numbers(tmp_path):
    state, dense = krony_state(SHAPES[1])
    for i in range(LAYERS):  # the pruned start of the original stores B = (1, 0) as whole numbers
        state[f"transformer.h.{i}.mlp.c_fc_1"] = torch.tensor([[[1], [0]]])
        left = state[f"transformer.h.{i}.mlp.c_fc_0"][0]
        dense[i, "c_fc"] = torch.kron(left, torch.tensor([[1.0], [0.0]]))
    torch.save(state, tmp_path / "prune.pt")
    padded = state | {name: torch.cat([state[name], torch.ones(3, WIDTH)]) for name in ("lm_head.weight",)}
    padded["transformer.wte.weight"] = padded["lm_head.weight"]
    torch.save(padded, tmp_path / "padded.pt")
    for name, cut in (("prune.pt", 0), ("padded.pt", TOKENS)):
        model = from_checkpoint(read_checkpoint(tmp_path / name), n_head=HEADS, vocab_size=cut).eval()
        close(model(IDX), reference(state, dense))


def test_what_we_write_for_nanogpt_is_what_it_reads(toy, tmp_path):
    arch = GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, n_ctx=CONTEXT, vocab_size=TOKENS, activation="gelu"
    )
    kron = Kron(m1=24, n1=24, m2=1, n2=4)
    model = toy(ModelSpec.dense(arch).with_matrices({f"h.{i}.mlp.c_fc": kron for i in range(LAYERS)}))
    save_nanogpt(model, tmp_path / "nanogpt" / "ckpt.pt")
    content = torch.load(tmp_path / "nanogpt" / "ckpt.pt", weights_only=True)
    assert set(content["model"]) == set(nanogpt_state())
    close(reference(content["model"]), model(IDX))
    names = {"n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias", "dropout"}
    assert set(content["model_args"]) == names
    again = from_checkpoint(read_checkpoint(tmp_path / "nanogpt" / "ckpt.pt")).eval()
    close(again(IDX), model(IDX))
    with pytest.raises(ModelError, match="nanoGPT ties it"):
        to_nanogpt(toy(ModelSpec.dense(arch, tied=False)))


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, inside):
    proof = tmp_path / "proof"
    path = tmp_path / "evil.pt"
    if inside:
        torch.save({"model": nanogpt_state(), "config": Hostile(proof)}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(proof), protocol=2))
    with pytest.raises(ModelError, match=r"asks for the Python object \S*system, which could run") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not proof.exists()


def edited(**changes):
    state, _ = krony_state(SHAPES[3])
    for name, value in changes.items():
        key = f"transformer.{name.replace('__', '.')}"
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (edited(h__1__mlp__c_fc_1=None), r"h\.1\.mlp\.c_fc_1 is missing, one factor of h\.1\.mlp\.c_fc"),
        (edited(h__1__mlp__c_fc_bias=None), r"1 tensors are missing, such as 'h\.1\.mlp\.c_fc\.bias'"),
        (edited(h__2__attn__c_attn__weight=None), r"such as 'h\.2\.attn\.c_attn\.weight'"),
        (edited(wpe__weight=None), r"such as 'wpe\.weight'"),
        (edited(wte__weight=None), r"no tensor transformer\.wte\.weight; expected the state of"),
        (edited(adapter=torch.zeros(2)), "1 tensors have no place, such as 'adapter'"),
        (edited(h__0__mlp__c_fc_0=torch.zeros(2, 2)), r"c_fc_0 is \(2, 2\), expected a krony-pt factor"),
        (edited(h__0__mlp__c_fc_0=torch.zeros(3, 8, 32)), "3 left and 4 right factors"),
        (
            edited(h__0__mlp__c_fc_0=torch.zeros(4, 8, 16)),
            r"h\.0\.mlp\.c_fc: .* is a 24x48 matrix, not 24x96",
        ),
        (edited(h__0__mlp__scalers_fc=torch.zeros(2)), r"scales is \(2,\), expected \(4,\)"),
        ([1, 2], "expected the state of"),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_a_checkpoint_with_holes_or_extras_is_named_in_one_line(tmp_path, state, message):
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match=message) as error:
        from_checkpoint(read_checkpoint(tmp_path / "bad.pt"), n_head=HEADS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no torch checkpoint"),
        (b"PK\x03\x04 cut short", "no torch checkpoint"),
        (b"not a pickle at all", "no torch checkpoint"),
        (None, "No such file"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        read_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_one_line(tmp_path):
    torch.save(nanogpt_state(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in range(1, len(whole), len(whole) // 20):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(ModelError, match="no torch checkpoint") as error:
            read_checkpoint(tmp_path / "cut.pt")
        assert "\n" not in str(error.value)


def test_heads_that_nothing_tells_are_asked_for(tmp_path):
    state, _ = krony_state(SHAPES[0])
    torch.save(state, tmp_path / "k.pt")
    with pytest.raises(ModelError, match="nothing tells how many heads share width 24; give n_head"):
        from_checkpoint(read_checkpoint(tmp_path / "k.pt"))
    with pytest.raises(ModelError, match="vocab_size=99, but the table has 61 rows"):
        from_checkpoint(read_checkpoint(tmp_path / "k.pt"), n_head=HEADS, vocab_size=99)


def test_an_imported_checkpoint_lies_in_folders(tmp_path):
    state, dense = krony_state(SHAPES[3])
    path, out = tmp_path / "krony.pt", tmp_path / "out"
    torch.save(state, path)
    found = import_checkpoint(path, out, n_head=HEADS)
    assert found.layout.startswith("Krony-PT, stacked")
    assert found.parameters - found.krony_parameters == CONTEXT * WIDTH
    expected = reference(state, dense)
    for model in (load_native(out / "native"), load_stock(out / "stock")):
        assert isinstance(model, GPT2)
        close(model.eval()(IDX), expected)
    card = (out / "factored" / "README.md").read_text()
    assert "Krony-PT, stacked factors" in card
    assert "krony.pt" in card
    assert str(tmp_path) not in card
    with pytest.raises(PreflightError, match="holds a model already"):
        import_checkpoint(path, out, n_head=HEADS)
    import_checkpoint(path, out, n_head=HEADS, force=True)
    with pytest.raises(CompressError, match="give n_head"):
        import_checkpoint(path, tmp_path / "other")
