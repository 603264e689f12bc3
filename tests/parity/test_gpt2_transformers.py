"""Our GPT-2 is transformers' GPT-2: logits, loss and gradients, read in and written out."""

import io
import lzma

import numpy as np
import pytest
import torch

from model.compress.budget import Budget
from model.compress.kron_recipe import KronPrune, KronVL
from model.compress.methods import make_method
from model.config import SIZES, GPT2Config, ModelSpec
from model.export import save_stock
from model.gpt2 import GPT2
from model.pretrained import config_from_stock, from_stock, load_stock

ARCH = GPT2Config(n_layer=3, n_head=4, n_embd=64, n_ctx=48, vocab_size=211)
IDX = torch.randint(211, (3, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return transformers


@pytest.fixture(scope="module")
def stock(transformers):
    """A stock model in which no bias and no LayerNorm is trivial."""
    config = transformers.GPT2Config(
        n_layer=3,
        n_head=4,
        n_embd=64,
        n_positions=48,
        vocab_size=211,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    generator = torch.Generator().manual_seed(1)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def ours(stock):
    return from_stock(stock.state_dict(), config_from_stock(stock.config.to_dict())).eval()


def test_random_weights_give_the_same_logits(stock, ours):
    assert ours.spec == ModelSpec.dense(ARCH)
    assert ours.num_parameters() == stock.num_parameters()
    with torch.no_grad():
        assert (ours(IDX) - stock(IDX).logits).abs().max() <= 1e-4


def test_random_weights_give_the_same_loss_and_gradients(stock, ours):
    theirs = stock(IDX, labels=IDX).loss
    targets = IDX.roll(-1, dims=1)
    targets[:, -1] = -100
    loss = ours(IDX, targets) / (targets >= 0).sum()
    torch.testing.assert_close(loss, theirs)
    theirs.backward()
    loss.backward()
    for name, parameter in ours.named_parameters():
        expected = stock.get_parameter(f"transformer.{name}").grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)


def test_a_folder_that_transformers_wrote_is_read(stock, ours, tmp_path):
    stock.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_stock(tmp_path).eval()(IDX), ours(IDX))


@pytest.mark.parametrize(
    "recipe", [None, KronVL(shape=(32, 64), terms=2, scales=True), KronPrune(shape=(32, 256))]
)
def test_plain_transformers_opens_what_we_write(transformers, ours, tmp_path, recipe):
    model = ours
    if recipe:
        method = make_method(recipe)
        model = method.compress(ours, method.plan(ours.spec, Budget()), seed=0).model
    save_stock(model, tmp_path)
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(opened).__name__ == "GPT2LMHeadModel"
    assert opened.lm_head.weight.data_ptr() == opened.transformer.wte.weight.data_ptr(), "the head stays tied"
    with torch.no_grad():
        assert (opened.eval()(IDX).logits - model(IDX)).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_head_stays_untied(transformers, toy, tmp_path, tied):
    model = toy(ModelSpec.dense(ARCH, tied=tied))
    save_stock(model, tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert opened.num_parameters() == model.num_parameters()
    with torch.no_grad():
        assert (opened(IDX).logits - model(IDX)).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def real(shared_data):
    """The true position table, layer-0 attention and LayerNorms of GPT-2 small, by stock name."""
    path = shared_data / "weights" / "gpt2-small-wpe-h0attn.npz.xz"
    if not path.is_file():
        pytest.skip(f"no real GPT-2 tensors at {path}")
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def test_real_tensors_give_the_same_logits(transformers, real):
    """Real positions and attention, whose values are unlike random ones; MLP and table are random."""
    size = SIZES["gpt2"]
    one = GPT2Config(n_layer=1, n_head=size.n_head, n_embd=size.n_embd, n_ctx=size.n_ctx, vocab_size=997)
    random = GPT2(ModelSpec.dense(one)).init_weights(seed=0).state_dict()
    known = {"wpe.weight" if name == "wpe" else name: value for name, value in real.items()}
    assert set(known) < set(random)
    state = {f"transformer.{name}": known.get(name, value) for name, value in random.items()}
    ours = from_stock(state, one).eval()
    config = transformers.GPT2Config(n_layer=1, vocab_size=997)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]}, strict=True)
    idx = torch.randint(997, (1, 1024), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() <= 1e-4
