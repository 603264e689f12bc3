"""A model in a folder: native and factored, which keep the factors, and stock, which is dense.

Native: `config.json` with the spec, `model.safetensors` with the tensors; read back strictly. Factored: the
same tensors and spec as transformers wants them beside code that it can load. Stock: every structure is
multiplied out and every narrow head or MLP padded with zeros; logits change by rounding alone.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import BlockSpec, GPT2Config, ModelError, ModelSpec, SplitQKV
from model.gpt2 import GPT2
from model.pretrained import load_strict, read_json, read_tensors, require_room, to_stock_state_dict

FORMAT = "krony-native"
VERSION = 1
"""Raised when the meaning of a native folder changes; other versions are refused."""

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"


def save_native(model: GPT2, folder: Path) -> None:
    """Write spec and weights; the bytes depend on nothing else. The folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # One key alone: safetensors writes several in random order, and equal models would differ in bytes.
    save_file(state, folder / WEIGHTS, metadata={FORMAT: str(VERSION)})
    _write_json(folder / CONFIG, {"format": FORMAT, "version": VERSION, "model": model.spec.to_json()})


def load_native(folder: Path) -> GPT2:
    """Read a native folder back, on the CPU; ModelError for another format or version, or a damaged file."""
    path = folder / CONFIG
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise ModelError(f"{path} is no {FORMAT} model; a stock GPT-2 folder is read as a teacher instead")
    if values.get("version") != VERSION:
        raise ModelError(f"{path} has format version {values.get('version')!r}, this krony reads {VERSION}")
    try:
        spec = ModelSpec.from_json(values.get("model"))
    except ModelError as err:
        raise ModelError(f"{path}: {err}") from err
    state, metadata = read_tensors(folder / WEIGHTS)
    if metadata.get(FORMAT) != str(VERSION):
        raise ModelError(
            f"{folder / WEIGHTS} does not belong to {path}: it was not written as {FORMAT} {VERSION}"
        )
    require_room(spec, state, where=str(folder))
    model = GPT2(spec)
    load_strict(model, state, where=str(folder / WEIGHTS))
    return model


@torch.no_grad()
def to_dense(model: GPT2) -> GPT2:
    """A new dense model of full width with the same logits up to rounding; `model` is left alone.

    Dropped blocks stay dropped. Narrow widths are padded with zeros: a hidden unit or head column that is
    fed and read by zeros adds nothing.
    """
    arch = replace(model.spec.arch, n_layer=len(model.spec.blocks))
    dense = GPT2(ModelSpec.dense(arch, tied=model.spec.tied)).to(model.wpe.weight)
    state = {
        name: value for name, value in model.state_dict().items() if name.split(".")[0] in ("wpe", "ln_f")
    }
    state["wte.weight"] = model.wte.table()
    if model.lm_head is not None:
        state["lm_head.weight"] = model.lm_head.table()
    for i, block in enumerate(model.spec.blocks):
        here = f"h.{i}"
        for norm in ("ln_1", "ln_2"):
            for part in ("weight", "bias"):
                state[f"{here}.{norm}.{part}"] = model.get_parameter(f"{here}.{norm}.{part}")
        matrices = {"attn.c_attn": _dense_qkv(model, here, block), **_dense_others(model, here, block)}
        for role, (weight, bias) in matrices.items():
            state[f"{here}.{role}.weight"], state[f"{here}.{role}.bias"] = weight, bias
    dense.load_state_dict(state, strict=True)
    return dense.train(model.training)


def save_factored(model: GPT2, folder: Path, *, eos_id: int | None = None) -> None:
    """Write the factors for transformers; the folder opens once the two files of `auto_map` lie in it.

    `eos_id` is as in `save_stock`. Tensors have the names of the native folder.
    """
    spec = model.spec
    eos_id = _eos(spec.arch, eos_id)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "architectures": ["KronyForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_krony.KronyConfig",
            "AutoModelForCausalLM": "modeling_krony.KronyForCausalLM",
        },
        "model_type": "krony",
        "spec": spec.to_json(),
        "tie_word_embeddings": False,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
    }
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION, {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id})


def save_stock(model: GPT2, folder: Path, *, eos_id: int | None = None) -> None:
    """Write the dense form in the layout of the published GPT-2, without dropout.

    `eos_id` is the token that begins and ends documents; by default the last one, as in GPT-2.
    """
    dense = to_dense(model)
    arch = dense.spec.arch
    eos_id = _eos(arch, eos_id)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu() for name, value in to_stock_state_dict(dense).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": arch.activation,
        "n_layer": arch.n_layer,
        "n_head": arch.n_head,
        "n_embd": arch.n_embd,
        "n_ctx": arch.n_ctx,
        "n_positions": arch.n_ctx,
        "vocab_size": arch.vocab_size,
        "layer_norm_epsilon": arch.layer_norm_epsilon,
        "tie_word_embeddings": dense.spec.tied,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "dtype": "float32",
    }
    _write_json(folder / CONFIG, config)


def _dense_qkv(model: GPT2, here: str, block: BlockSpec) -> tuple[Tensor, Tensor]:
    """`c_attn` of one block: q, k and v packed, every head padded to the stock width."""
    arch = model.spec.arch
    widths = [arch.n_head * width for width in (block.head_qk, block.head_qk, block.head_vo)]
    if isinstance(block.attn_c_attn, SplitQKV):
        parts = [model.site(f"{here}.attn.{name}").to_dense() for name in ("q", "k", "v")]
    else:
        weight, bias = model.site(f"{here}.attn.c_attn").to_dense()
        parts = list(zip(torch.split(weight, widths, dim=1), torch.split(bias, widths), strict=True))
    weights = [_pad_heads(weight, heads=arch.n_head, width=arch.head_dim) for weight, _ in parts]
    biases = [_pad_heads(bias, heads=arch.n_head, width=arch.head_dim) for _, bias in parts]
    return torch.cat(weights, dim=1), torch.cat(biases)


def _dense_others(model: GPT2, here: str, block: BlockSpec) -> dict[str, tuple[Tensor, Tensor]]:
    """The other three matrices of one block, padded where a head or the MLP is narrow."""
    arch, extra = model.spec.arch, model.spec.arch.n_inner - block.mlp_hidden
    weight_o, bias_o = model.site(f"{here}.attn.c_proj").to_dense()
    weight_u, bias_u = model.site(f"{here}.mlp.c_fc").to_dense()
    weight_d, bias_d = model.site(f"{here}.mlp.c_proj").to_dense()
    pad = torch.nn.functional.pad
    return {
        "attn.c_proj": (_pad_heads(weight_o.mT, heads=arch.n_head, width=arch.head_dim).mT, bias_o),
        "mlp.c_fc": (pad(weight_u, (0, extra)), pad(bias_u, (0, extra))),
        "mlp.c_proj": (pad(weight_d, (0, 0, 0, extra)), bias_d),
    }


def _pad_heads(columns: Tensor, *, heads: int, width: int) -> Tensor:
    """(..., heads * r) -> (..., heads * width): zero columns behind the r of each head."""
    apart = columns.reshape(*columns.shape[:-1], heads, -1)
    return torch.nn.functional.pad(apart, (0, width - apart.shape[-1])).flatten(-2)


def _eos(arch: GPT2Config, eos_id: int | None) -> int:
    """The end-of-text token; ModelError if the vocabulary has none of that number."""
    eos_id = arch.vocab_size - 1 if eos_id is None else eos_id
    if not 0 <= eos_id < arch.vocab_size:
        raise ModelError(f"eos_id={eos_id} is no token of a vocabulary of {arch.vocab_size:,}")
    return eos_id


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
