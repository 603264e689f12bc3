"""A factored folder in the hands of a stranger: transformers opens it without krony as the same model."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from model.config import BlockSpec, GPT2Config, Kron, LowRank, ModelSpec, SplitQKV
from pipeline.compress.card import Card
from pipeline.compress.folders import write_folders
from pipeline.data.tokenizer import train_bpe

ARCH = GPT2Config(n_layer=3, n_head=2, n_embd=32, n_ctx=48, vocab_size=300)
DENSE = ModelSpec.dense(ARCH)
SUM = Kron(m1=8, n1=16, m2=4, n2=8, terms=3, scales=True, gather_in=True, gather_out=True)
ROW = Kron(m1=32, n1=32, m2=1, n2=4, terms=2)  # a side of 1: the paths without a transposition
SPECS = {
    "dense": DENSE,
    "exact-gelu": replace(DENSE, arch=replace(ARCH, activation="gelu")),
    "untied": ModelSpec.dense(ARCH, tied=False),
    "kronecker": DENSE.with_matrices({"h.0.mlp.c_fc": SUM, "h.0.mlp.c_proj": SUM.transposed()}),
    "krony": DENSE.with_matrices(
        {
            f"h.{i}.mlp.{role}": m
            for i in range(3)
            for role, m in (("c_fc", ROW), ("c_proj", ROW.transposed()))
        }
    ),
    "many-terms": DENSE.with_matrices(
        {
            "h.1.mlp.c_fc": Kron(m1=4, n1=64, m2=8, n2=2, terms=5),
            "h.2.mlp.c_fc": Kron(m1=16, n1=4, m2=2, n2=32, terms=2, scales=True),
        }
    ),
    "low-rank": DENSE.with_matrices({f"h.1.{role}": LowRank(rank=5) for role in ("attn.c_attn", "mlp.c_fc")}),
    "split": DENSE.with_matrices({f"h.1.attn.{part}": Kron(m1=32, n1=16, m2=1, n2=2) for part in "qkv"}),
    "fewer-blocks": replace(DENSE, blocks=DENSE.blocks[::2]),
    "narrow": replace(
        DENSE,
        blocks=(
            replace(DENSE.blocks[0], mlp_hidden=40, head_qk=5, head_vo=11, qkv_bias="query"),
            BlockSpec(
                source=2, mlp_hidden=128, head_qk=16, head_vo=3, qkv_bias="query", attn_c_attn=SplitQKV()
            ),
        ),
    ),
    "kronecker-table": replace(DENSE, embedding=Kron(m1=300, n1=16, m2=1, n2=2, terms=2, gather_out=True)),
    "thin-table": replace(DENSE, embedding=Kron(m1=300, n1=8, m2=1, n2=4, scales=True), tied=False),
}
IDX = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def auto():
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM


@pytest.fixture(params=SPECS)
def pair(request, toy, auto, tmp_path):
    """Our model, and its factored folder as transformers opens it."""
    return _opened(toy(SPECS[request.param]), auto, tmp_path)


def _opened(model, auto, folder):
    card = Card(name="toy", spec=model.spec, making=(), has_tokenizer=False)
    write_folders(model, folder, card=card, where="toy")
    theirs, info = auto.from_pretrained(folder / "factored", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    return model, theirs.eval()


@torch.no_grad()
def test_logits_are_ours(pair):
    model, theirs = pair
    assert type(theirs).__module__.startswith("transformers_modules"), "not the class of this repository"
    assert (theirs(IDX).logits - model(IDX)).abs().max() <= 1e-5
    assert sum(p.numel() for p in theirs.parameters()) == model.num_parameters()


@torch.no_grad()
def test_a_cache_changes_nothing(pair):
    model, theirs = pair
    whole = model(IDX)
    cache, parts = None, []
    for part in IDX.split([7, 1, 1, 10, 5], dim=1):
        out = theirs(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-5
    prompt, settings = IDX[:, :6], {"attention_mask": torch.ones(2, 6), "max_new_tokens": 20}
    cached = theirs.generate(prompt, do_sample=False, **settings)
    assert torch.equal(cached, theirs.generate(prompt, do_sample=False, use_cache=False, **settings))
    assert cached.shape[1] > 6
    step = prompt
    for expected in cached[:, 6:].T:  # greedy by hand with our own model, until a row ends
        following = model(step)[:, -1].argmax(-1)
        assert torch.equal(following, expected)
        if 299 in following:
            break
        step = torch.cat([step, following[:, None]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["krony", "split", "kronecker-table", "thin-table", "untied"])
def test_one_token_in_blocks_is_the_same_token(spec, toy, auto, tmp_path, monkeypatch):
    model, theirs = _opened(toy(SPECS[spec]), auto, tmp_path)
    code = sys.modules[type(theirs).__module__]
    first = theirs(IDX[:1, :9], use_cache=True)
    monkeypatch.setattr(code, "LARGE", 64)
    assert code._blocks(torch.zeros(1, 1, 32), theirs.wpe.weight, at_most=8) == 8
    out = theirs(IDX[:1, 9:10], past_key_values=first.past_key_values, use_cache=True)
    assert (out.logits[:, 0] - model(IDX[:1, :10])[:, 9]).abs().max() <= 1e-5
    for rows in (29, 31, 96, 131):  # 31 and 131 are prime: the large one has no blocks
        matrix, row, column = torch.randn(rows, 40), torch.randn(1, 1, rows), torch.randn(1, 1, 40)
        torch.testing.assert_close(code.times(row, matrix), row @ matrix)
        torch.testing.assert_close(code.scores(column, matrix), column @ matrix.mT)


@torch.no_grad()
def test_one_token_has_the_precision_of_many(toy, auto, tmp_path, monkeypatch):
    model, theirs = _opened(toy(SPECS["krony"]), auto, tmp_path)
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "LARGE", 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        many = theirs(IDX[:1, :9], use_cache=True)
        one = theirs(IDX[:1, 9:10], past_key_values=many.past_key_values, use_cache=True)
    assert one.logits.dtype == many.logits.dtype
    kept = one.past_key_values.layers[0]
    assert kept.keys.dtype == kept.values.dtype == torch.bfloat16
    assert (one.logits[:, 0] - model(IDX[:1, :10])[:, 9]).abs().max() <= 0.1


@pytest.fixture
def krony(toy, auto, tmp_path):
    return _opened(toy(SPECS["krony"]), auto, tmp_path)


@torch.no_grad()
def test_padding_on_the_left_takes_no_place(krony):
    _, theirs = krony
    long, short = IDX[0, :9], IDX[1, :5]
    padded = torch.cat([torch.full((4,), 299), short])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    both = theirs.generate(torch.stack([long, padded]), attention_mask=mask, **settings)
    for row, alone in ((both[0, 9:], long), (both[1, 9:], short)):
        mask = torch.ones(1, len(alone))
        assert torch.equal(
            row, theirs.generate(alone[None], attention_mask=mask, **settings)[0, len(alone) :]
        )
    beams = theirs.generate(long[None], attention_mask=torch.ones(1, 9), num_beams=3, **settings)
    assert beams.shape == (1, 21)


@torch.no_grad()
def test_a_cache_of_fixed_size_changes_nothing(krony):
    from transformers import StaticCache

    model, theirs = krony
    prompt, settings = (
        IDX[:, :6],
        {"attention_mask": torch.ones(2, 6), "max_new_tokens": 12, "do_sample": False},
    )
    fixed = theirs.generate(prompt, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(fixed, theirs.generate(prompt, **settings))
    cache = StaticCache(config=theirs.config, max_cache_len=40)
    parts = [theirs(part, past_key_values=cache).logits for part in IDX.split([7, 1, 1, 10, 5], dim=1)]
    assert (torch.cat(parts, dim=1) - model(IDX)).abs().max() <= 1e-5


def test_it_trains_as_ours_does(krony):
    model, theirs = krony
    targets = IDX.roll(-1, dims=1)
    targets[:, -1] = -100
    theirs.train()
    loss = theirs(IDX, labels=IDX).loss
    expected = model(IDX, targets) / (targets >= 0).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(theirs.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_it_is_small_and_is_saved_again_as_it_was(krony, auto, tmp_path):
    model, theirs = krony
    weights = tmp_path / "factored" / "model.safetensors"
    assert weights.stat().st_size < 4 * model.num_parameters() + 10_000
    assert weights.stat().st_size < 0.8 * (tmp_path / "stock" / "model.safetensors").stat().st_size
    stored = load_file(weights)
    assert sum(value.numel() for value in stored.values()) == model.num_parameters(), (
        "the table is there once"
    )
    theirs.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert torch.equal(again(IDX).logits, theirs(IDX).logits)
    half = auto.from_pretrained(tmp_path / "factored", trust_remote_code=True, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    assert (half(IDX).logits.float() - model(IDX)).abs().max() < 0.1 * model(IDX).abs().max()


def test_what_it_cannot_do_is_said(krony):
    _, theirs = krony
    with pytest.raises(ValueError, match="49 tokens do not fit the context of 48"):
        theirs(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="no attention maps"):
        theirs(IDX, output_attentions=True)
    states = theirs(IDX, output_hidden_states=True).hidden_states
    assert len(states) == 1 + len(theirs.h)


STRANGER = """
import sys
from importlib.abc import MetaPathFinder

class NoKrony(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("model", "pipeline", "jobs", "analysis"):
            raise ImportError(f"{name} is part of krony")

sys.meta_path.insert(0, NoKrony())
try:
    import pipeline
except ImportError:
    pass
else:
    raise SystemExit("krony can be imported: this test shows nothing")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.manual_seed(0)
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
text = tokenizer("the cat", return_tensors="pt")
out = model.generate(**text, max_new_tokens=8, do_sample=True)
new = out.shape[1] - text["input_ids"].shape[1]
print(model.generation_config.eos_token_id, new, repr(tokenizer.decode(out[0])))
"""


def test_a_stranger_without_krony_samples_text(toy, tmp_path):
    encoding = train_bpe(["the cat sat on the mat, and the dog sat on the log. " * 20] * 3, vocab_size=300)
    arch = replace(ARCH, vocab_size=encoding.n_vocab)
    matrices = {"h.0.mlp.c_fc": SUM, "h.2.mlp.c_proj": LowRank(rank=4)}
    model = toy(ModelSpec.dense(arch).with_matrices(matrices))
    card = Card(name="toy", spec=model.spec, making=())
    write_folders(model, tmp_path / "out", card=card, where="toy", encoding=encoding)
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "out" / "factored")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    eos, new, text = done.stdout.splitlines()[-1].split(" ", 2)
    assert int(eos) == encoding.eot_token
    assert 1 <= int(new) <= 8
    assert text.startswith("'the cat")


def test_the_folder_brings_its_code_and_says_what_it_is(toy, auto, tmp_path):
    model, _ = _opened(toy(SPECS["kronecker"]), auto, tmp_path)
    factored = tmp_path / "factored"
    assert {path.name for path in factored.iterdir()} == {
        "README.md",
        "config.json",
        "configuration_krony.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_krony.py",
    }
    config = json.loads((factored / "config.json").read_text())
    assert ModelSpec.from_json(config["spec"]) == model.spec
    for form in ("factored", "stock"):
        text = (tmp_path / form / "README.md").read_text()
        assert f"{model.num_parameters():,}" in text
        assert f"{model.num_parameters('krony_no_wpe'):,}" in text
        assert ("trust_remote_code" in text) == (form == "factored")
