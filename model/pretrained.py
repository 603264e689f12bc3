"""Stock GPT-2 weights, in the layout that Hugging Face publishes, to our model and back.

Our dense names are the stock names without `transformer.`, and our weights lie (in, out) as theirs do, so
nothing is transposed. Keys are matched strictly: whatever is missing, left over or of another shape is named.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import Dense, GPT2Config, ModelError, ModelSpec
from model.decode import parse_json
from model.gpt2 import GPT2

PREFIX = "transformer."
HEAD = "lm_head.weight"
MASKS = (".attn.bias", ".attn.masked_bias")
"""Buffers of old checkpoints that hold the causal mask; not weights."""

FIXED: Mapping[str, Any] = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
"""Settings of a stock config that are GPT-2; any other value is a model that we do not compute."""


def config_from_stock(values: Mapping[str, Any], *, where: str = "config.json") -> GPT2Config:
    """Our sizes from the values of a stock `config.json`; refuses what is not plain GPT-2."""
    for key, expected in FIXED.items():
        if values.get(key, expected) != expected:
            raise ModelError(
                f"{where}: {key} is {values[key]!r}; only {expected!r} is GPT-2 as computed here"
            )
    activation = values.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu"):
        raise ModelError(f"{where}: activation_function is {activation!r}; 'gelu_new' and 'gelu' can be read")
    names = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "vocab_size": "vocab_size"}
    names["n_ctx"] = "n_positions" if "n_positions" in values else "n_ctx"
    for name, key in names.items():
        if type(values.get(key)) is not int:
            raise ModelError(f"{where}: {name} is {values.get(key)!r}, expected a whole number")
    sizes = {name: values[key] for name, key in names.items()}
    epsilon = values.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, float):
        raise ModelError(f"{where}: layer_norm_epsilon is {epsilon!r}, expected a small number")
    config = GPT2Config(**sizes, layer_norm_epsilon=epsilon, activation=activation)
    if values.get("n_inner") not in (None, config.n_inner):
        raise ModelError(
            f"{where}: n_inner is {values['n_inner']}; only 4 n_embd = {config.n_inner} is supported"
        )
    return config


def from_stock(state: Mapping[str, Tensor], config: GPT2Config) -> GPT2:
    """A dense model with stock weights; names with or without `transformer.`, any float type, kept as fp32.

    The head is tied unless `lm_head.weight` is there and differs from the token table.
    """
    ours = {name.removeprefix(PREFIX): value for name, value in state.items() if not name.endswith(MASKS)}
    head = ours.pop(HEAD, None)
    tied = head is None or "wte.weight" not in ours or torch.equal(head, ours["wte.weight"])
    if head is not None and not tied:
        ours[HEAD] = head
    spec = ModelSpec.dense(config, tied=tied)
    require_room(spec, ours, where="stock GPT-2 weights")
    model = GPT2(spec)
    load_strict(model, ours, where="stock GPT-2 weights")
    return model


def require_room(spec: ModelSpec, state: Mapping[str, Tensor], *, where: str) -> None:
    """ModelError, before anything is allocated, if a spec asks for far more numbers than the tensors hold."""
    asked, held = spec.num_parameters("tied_all"), sum(value.numel() for value in state.values())
    if asked > 4 * held + 1_000_000:
        raise ModelError(
            f"{where}: its config asks for {asked:,} parameters, its tensors hold {held:,} numbers; "
            "they do not belong together"
        )


def to_stock_state_dict(model: GPT2) -> dict[str, Tensor]:
    """Stock names and contiguous tensors of a dense model of full width; a tied head is left out.

    Raises ModelError for a compressed model: `model.export.to_dense` makes it dense first.
    """
    spec = model.spec
    full = ModelSpec.dense(spec.arch, tied=spec.tied)
    if spec != full:
        odd = next(
            (site.name for site in spec.sites() if not isinstance(site.matrix, Dense)), "a block or table"
        )
        raise ModelError(f"{odd} is not as in stock GPT-2; export the dense form of the model instead")
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    return {name if name == HEAD else PREFIX + name: value for name, value in state.items()}


def load_stock(folder: Path) -> GPT2:
    """A dense model from a local folder with a stock `config.json` and `model.safetensors`."""
    config = config_from_stock(read_json(folder / "config.json"), where=str(folder / "config.json"))
    state, _ = read_tensors(folder / "model.safetensors")
    try:
        return from_stock(state, config)
    except ModelError as err:
        raise ModelError(f"{folder}: {err}") from err


def load_strict(model: GPT2, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copy tensors by name into a model; ModelError names what is missing, left over or of another shape."""
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(state)):
        raise ModelError(f"{where}: {len(missing)} tensors are missing, such as {missing[0]!r}")
    if unexpected := sorted(set(state) - set(wanted)):
        raise ModelError(f"{where}: {len(unexpected)} tensors have no place, such as {unexpected[0]!r}")
    for name, value in wanted.items():
        if value.shape != state[name].shape:
            raise ModelError(f"{where}: {name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}")
        if value.is_floating_point() != state[name].is_floating_point():
            raise ModelError(f"{where}: {name} holds {state[name].dtype}, expected {value.dtype}")
    model.load_state_dict(dict(state), strict=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError if there is none."""
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError as err:
        raise ModelError(f"{path} does not exist; this folder holds no model") from err
    except OSError as err:
        raise ModelError(f"{path} cannot be read ({err.strerror}); expected a JSON file") from err
    except ValueError as err:
        raise ModelError(f"{path} is not valid JSON ({err}); it was cut short or edited") from err
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ModelError if it is absent or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as err:
        raise ModelError(f"{path} does not exist; only safetensors weights are read, never pickles") from err
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as err:
        raise ModelError(f"{path} cannot be read ({err}); it was cut short or damaged, get it again") from err
