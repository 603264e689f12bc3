"""Folders: what is saved is what is loaded, damage is named, and an export is the same function."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import BlockSpec, GPT2Config, Kron, LowRank, ModelError, ModelSpec, SplitQKV
from model.export import load_native, save_native, save_stock, to_dense
from model.pretrained import config_from_stock, from_stock, load_stock, to_stock_state_dict

ARCH = GPT2Config(n_layer=3, n_head=2, n_embd=32, n_ctx=24, vocab_size=97)
DENSE = ModelSpec.dense(ARCH)
KRON = Kron(m1=8, n1=16, m2=4, n2=8, terms=3, scales=True, gather_in=True)
SPECS = {
    "dense": DENSE,
    "untied": ModelSpec.dense(ARCH, tied=False),
    "kronecker": DENSE.with_matrices({"h.0.mlp.c_fc": KRON, "h.0.mlp.c_proj": KRON.transposed()}),
    "low rank": DENSE.with_matrices({f"h.1.{role}": LowRank(rank=5) for role in ("attn.c_attn", "mlp.c_fc")}),
    "split": DENSE.with_matrices({f"h.1.attn.{part}": Kron(m1=32, n1=16, m2=1, n2=2) for part in "qkv"}),
    "fewer blocks": replace(DENSE, blocks=DENSE.blocks[::2]),
    "narrow": replace(
        DENSE,
        blocks=(
            replace(DENSE.blocks[0], mlp_hidden=40, head_qk=5, head_vo=11, qkv_bias="query"),
            BlockSpec(
                source=2, mlp_hidden=128, head_qk=16, head_vo=3, qkv_bias="query", attn_c_attn=SplitQKV()
            ),
        ),
    ),
    "kronecker table": replace(DENSE, embedding=Kron(m1=97, n1=16, m2=1, n2=2, terms=2, gather_out=True)),
}
IDX = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=SPECS, ids=lambda name: name.replace(" ", "-"))
def model(request, toy):
    return toy(SPECS[request.param])


def test_a_native_folder_gives_back_the_same_model(model, tmp_path):
    save_native(model, tmp_path)
    again = load_native(tmp_path).eval()
    assert again.spec == model.spec
    assert again.num_parameters() == model.num_parameters()
    assert torch.equal(again(IDX), model(IDX))


def test_the_same_model_gives_the_same_bytes(model, tmp_path):
    for folder in ("a", "b"):
        save_native(model, tmp_path / folder)
        save_stock(model, tmp_path / folder / "stock")
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 4
    assert all(
        path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
        for path in files
    )


def test_the_dense_form_is_the_same_function(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = to_dense(model)
    assert dense.spec == ModelSpec.dense(replace(ARCH, n_layer=len(model.spec.blocks)), tied=model.spec.tied)
    torch.testing.assert_close(dense(IDX), model(IDX), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    exact = to_dense(model.double())
    assert (exact(IDX) - model(IDX)).abs().max() <= 1e-10


def test_a_stock_folder_reads_back_as_the_dense_form(model, tmp_path):
    save_stock(model, tmp_path)
    again = load_stock(tmp_path).eval()
    assert again.spec.tied == model.spec.tied
    torch.testing.assert_close(again(IDX), model(IDX), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
        (lambda f: (f / "config.json").write_text('{"format": "krony'), "is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "expected an object"),
        (lambda f: _edit(f, format="other"), "is no krony-native model"),
        (lambda f: _edit(f, version=2), "has format version 2, this krony reads 1"),
        (lambda f: _edit(f, model={}), "model lacks key 'arch'"),
        (lambda f: _cut(f, 100), "cannot be read .* cut short or damaged"),
        (lambda f: _cut(f, 4), "cannot be read .* cut short or damaged"),
        (lambda f: _tensors(f, lambda s: s.pop("ln_f.bias")), "1 tensors are missing, such as 'ln_f.bias'"),
        (lambda f: _tensors(f, lambda s: s.update(x=torch.zeros(1))), "1 tensors have no place, such as 'x'"),
        (
            lambda f: _tensors(f, lambda s: s.update({"ln_f.bias": torch.zeros(3)})),
            r"ln_f.bias is \(3,\), expected \(32,\)",
        ),
        (
            lambda f: _tensors(f, lambda s: s.update({"ln_f.bias": torch.zeros(32).long()})),
            "holds torch.int64",
        ),
        (lambda f: _tensors(f, lambda s: None, metadata={"format": "pt"}), "does not belong to"),
    ],
)
def test_a_damaged_native_folder_is_named_in_one_line(toy, tmp_path, damage, message):
    save_native(toy(SPECS["kronecker"]), tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load_native(tmp_path)
    assert "\n" not in str(caught.value)


def _edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def _tensors(folder, change, metadata=None):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata=metadata or {"krony-native": "1"})


def test_stock_names_come_with_or_without_their_prefix_masks_and_head(toy):
    model = toy(DENSE)
    state = to_stock_state_dict(model)
    assert "transformer.h.0.attn.c_attn.weight" in state
    masks = {
        f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(3) for name in ("bias", "masked_bias")
    }
    bare = {name.removeprefix("transformer."): value for name, value in state.items()}
    tied = {"lm_head.weight": state["transformer.wte.weight"].clone()}
    for names in (state, bare, state | masks, bare | tied, {k: v.double() for k, v in state.items()}):
        again = from_stock(names, ARCH).eval()
        assert again.spec.tied
        assert torch.equal(again(IDX), model(IDX))
    untied = from_stock(state | {"lm_head.weight": torch.zeros(97, 32)}, ARCH)
    assert not untied.spec.tied
    assert untied(IDX).eq(0).all()


def test_a_stock_state_with_holes_or_extras_is_refused(toy):
    state = to_stock_state_dict(toy(DENSE))
    short = {name: value for name, value in state.items() if ".h.1." not in name}
    with pytest.raises(ModelError, match=r"12 tensors are missing, such as 'h\.1\.attn"):
        from_stock(short, ARCH)
    with pytest.raises(ModelError, match=r"1 tensors have no place, such as 'score'"):
        from_stock(state | {"score": torch.zeros(2)}, ARCH)
    transposed = state | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(128, 32)}
    with pytest.raises(ModelError, match=r"h\.0\.mlp\.c_fc\.weight is \(128, 32\), expected \(32, 128\)"):
        from_stock(transposed, ARCH)


def test_a_compressed_model_has_no_stock_names(toy):
    with pytest.raises(ModelError, match=r"h\.0\.mlp\.c_fc is not as in stock GPT-2"):
        to_stock_state_dict(toy(SPECS["kronecker"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'; 'gelu_new' and 'gelu' can be read"),
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_inner": 100}, "n_inner is 100; only 4 n_embd = 128"),
        ({"n_layer": None}, "n_layer is None, expected a whole number"),
        ({"n_head": 5}, "must be a multiple of n_head=5"),
    ],
)
def test_a_stock_config_that_is_not_gpt2_is_refused(change, message):
    stock = {
        "model_type": "gpt2",
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 32,
        "n_positions": 24,
        "vocab_size": 97,
    }
    assert config_from_stock(stock | {"n_inner": None}) == ARCH
    with pytest.raises(ModelError, match=message):
        config_from_stock(stock | change)


def test_a_stock_folder_names_its_end_of_text(toy, tmp_path):
    for eos_id, expected in ((None, 96), (0, 0)):
        save_stock(toy(DENSE), tmp_path, eos_id=eos_id)
        assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == expected
    with pytest.raises(ModelError, match="eos_id=97 is no token"):
        save_stock(toy(DENSE), tmp_path, eos_id=97)
