"""Checkpoints of nanoGPT and of Krony-PT, to our model; dense models back to nanoGPT's names.

Both keep weights as `nn.Linear` does, (out, in), tie the head to the table and use the exact GELU. Krony-PT
holds the two MLP matrices as factors, in one of two layouts: stacked (k, rows, columns) for y = xW, and,
until March 2024, one pair per term for the transposed weight. A pickle is read as tensors only: one that
would run code is refused. Names are matched strictly, and what no name says (heads) is asked for.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from model.config import Dense, GPT2Config, Kron, Matrix, ModelError, ModelSpec
from model.export import to_dense
from model.gpt2 import GPT2
from model.pretrained import HEAD, MASKS, PREFIX, load_strict, read_tensors, require_room

Layout = Literal["nanogpt", "krony-pt", "krony-pt-until-2024-03"]

WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and DDP put before every name."""

HEADS: Mapping[int, int] = {768: 12, 1024: 16, 1280: 20, 1600: 25}
"""Attention heads by width in the published sizes, for checkpoints that do not say."""

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
STACKED = re.compile(r"h\.(\d+)\.mlp\.(c_fc|c_proj)_[01]")
PAIRS = re.compile(r"h\.(\d+)\.mlp\.(c_fc|c_proj)_(\d+)_[01]")
FACTORS = re.compile(r"h\.\d+\.mlp\.((c_fc|c_proj)_(\d+_)?([01]|bias)|scalers_(fc|proj))")
"""What only Krony-PT has."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file as it was read: its tensors under bare names, as float32, and what it says of itself."""

    layout: Layout
    state: Mapping[str, Tensor]
    model_args: Mapping[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a `.safetensors` file or of a torch checkpoint, which may hold tensors and values only.

    Raises ModelError for what cannot be read, would run code, or is of neither family.
    """
    if path.suffix == ".safetensors":
        found: Any = read_tensors(path)[0]
    else:
        found = _read_pickle(path)
    args = found.get("model_args", {}) if isinstance(found, dict) else {}
    state = found.get("model", found) if isinstance(found, dict) else {}
    state = state if isinstance(state, dict) else {}
    state = {
        name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    for wrapper in WRAPPERS:
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
    if f"{PREFIX}wte.weight" not in state:
        raise ModelError(
            f"{path}: no tensor {PREFIX}wte.weight; expected the state of a nanoGPT or Krony-PT model, "
            "alone or under 'model'"
        )
    state = {name.removeprefix(PREFIX): value for name, value in state.items() if not name.endswith(MASKS)}
    for name, value in state.items():
        _require_plain(value, where=f"{path}: {name}")
    stored = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()
    }
    if sum(value.nbytes for value in state.values()) > 2 * sum(stored.values()):  # a tied head is there twice
        raise ModelError(f"{path}: many tensors are made of the same few numbers; expected each by itself")
    ours = {name: value.float() for name, value in state.items()}
    layout: Layout = "nanogpt"
    if any(PAIRS.fullmatch(name) for name in ours):
        layout = "krony-pt-until-2024-03"
    elif any(STACKED.fullmatch(name) for name in ours):
        layout = "krony-pt"
    return Checkpoint(layout, ours, args if isinstance(args, dict) else {})


def from_checkpoint(checkpoint: Checkpoint, *, n_head: int = 0, vocab_size: int = 0) -> GPT2:
    """The model of a checkpoint, factors kept, with the exact GELU.

    `n_head` is needed where neither the file nor a published width tells it; `vocab_size` > 0 keeps the
    first rows of a padded table. Biases that the whole file lacks are zero. ModelError names what is missing.
    """
    state = dict(checkpoint.state)
    arch = _arch(state, checkpoint.model_args, n_head=n_head)
    if vocab_size > arch.vocab_size:
        raise ModelError(f"vocab_size={vocab_size:,}, but the table has {arch.vocab_size:,} rows")
    if vocab_size:
        arch = GPT2Config(**{**_values(arch), "vocab_size": vocab_size})
        state |= {name: state[name][:vocab_size] for name in ("wte.weight", HEAD) if name in state}
    if HEAD in state and torch.equal(state[HEAD], state["wte.weight"]):
        del state[HEAD]
    matrices: dict[str, Matrix] = {}
    ours = {name: value for name, value in state.items() if not FACTORS.fullmatch(name)}
    if checkpoint.layout != "nanogpt":
        for layer in range(arch.n_layer):
            for role, scales in (("c_fc", "scalers_fc"), ("c_proj", "scalers_proj")):
                here = f"h.{layer}.mlp.{role}"
                kron, tensors = _factors(state, here, f"h.{layer}.mlp.{scales}", checkpoint.layout)
                matrices[here] = kron
                ours |= {f"{here}.{name}": value for name, value in tensors.items()}
    ours = {name: value.mT if name.endswith(TRANSPOSED) else value for name, value in ours.items()}
    spec = ModelSpec.dense(arch, tied=HEAD not in state).with_matrices(matrices)
    require_room(spec, ours, where="checkpoint")
    model, kinds = GPT2(spec), {_kind(name) for name in ours}
    for name, parameter in model.state_dict().items():
        if name.endswith(".bias") and _kind(name) not in kinds:
            ours[name] = torch.zeros_like(parameter)
    load_strict(model, {name: value.contiguous() for name, value in ours.items()}, where="checkpoint")
    return model


def to_nanogpt(model: GPT2) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and `model_args` of the dense form, as nanoGPT's `GPT` loads them.

    ModelError for an untied head, which nanoGPT cannot hold.
    """
    if not model.spec.tied:
        raise ModelError("the output head is a matrix of its own; nanoGPT ties it to the token table")
    dense = to_dense(model)
    arch = dense.spec.arch
    state = {
        PREFIX + name: (value.mT if name.endswith(TRANSPOSED) else value).detach().cpu().contiguous()
        for name, value in dense.state_dict().items()
    }
    state[HEAD] = state[f"{PREFIX}wte.weight"]
    sizes = {name: getattr(arch, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    return state, {**sizes, "block_size": arch.n_ctx, "bias": True, "dropout": 0.0}


def save_nanogpt(model: GPT2, path: Path) -> None:
    """Write `ckpt.pt` for nanoGPT's `sample.py --init_from=resume`; no optimizer, so training starts anew.

    nanoGPT computes the exact GELU: logits of a model with the tanh form move by about 1e-3.
    """
    state, model_args = to_nanogpt(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "model_args": model_args}, path)


def _read_pickle(path: Path) -> Any:
    try:
        file = path.open("rb")
    except OSError as err:
        raise ModelError(f"{path}: {err.strerror}; expected a checkpoint file") from err
    try:
        with file:
            if zipfile.is_zipfile(file):
                _require_stored(file, where=path)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except Exception as err:  # whatever a damaged or hostile pickle brings up
        wanted = re.search(r"GLOBAL (\S+)", str(err))
        if wanted:
            raise ModelError(
                f"{path}: asks for the Python object {wanted[1]}, which could run code; only tensors and "
                "plain values are read: save `model.state_dict()` alone"
            ) from err
        raise ModelError(
            f"{path}: no torch checkpoint; it was cut short, damaged or is something else"
        ) from err


def _require_stored(file: BinaryIO, *, where: Path) -> None:
    """ModelError for an archive that grows when it is read: torch stores every member as it is."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > (packed := where.stat().st_size):
        raise ModelError(
            f"{where}: its members unpack to {unpacked:,} bytes from {packed:,}; torch compresses nothing, "
            "so this is no checkpoint as torch writes it: save it again with torch.save"
        )


def _require_plain(value: Tensor, *, where: str) -> None:
    """ModelError for a tensor that is not simply there: a few numbers spread over a huge shape, or none."""
    is_plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not is_plain or value.is_complex() or value.nbytes > value.untyped_storage().nbytes():
        raise ModelError(f"{where} is no plain tensor; expected real numbers, each stored in the file")


def _arch(state: Mapping[str, Tensor], args: Mapping[str, Any], *, n_head: int) -> GPT2Config:
    """Sizes by the shapes of the tables and the numbers of the blocks."""
    if "wpe.weight" not in state:
        raise ModelError("checkpoint: 1 tensors are missing, such as 'wpe.weight'")
    for name, value in state.items():
        if value.ndim != 2 and (name in (HEAD, "wte.weight", "wpe.weight") or name.endswith(TRANSPOSED)):
            raise ModelError(f"checkpoint: {name} is {tuple(value.shape)}, expected a matrix")
    (vocab_size, width), (n_ctx, _) = state["wte.weight"].shape, state["wpe.weight"].shape
    layers = {int(name.split(".")[1]) for name in state if re.match(r"h\.\d+\.", name)}
    heads = n_head or args.get("n_head", HEADS.get(width))
    if type(heads) is not int:
        raise ModelError(f"checkpoint: nothing tells how many heads share width {width}; give n_head")
    return GPT2Config(
        n_layer=max(layers, default=-1) + 1,
        n_head=heads,
        n_embd=width,
        n_ctx=n_ctx,
        vocab_size=vocab_size,
        activation="gelu",
    )


def _factors(
    state: Mapping[str, Tensor], here: str, scales: str, layout: Layout
) -> tuple[Matrix, dict[str, Tensor]]:
    """One MLP matrix of Krony-PT as ours: what stands there, and its tensors by local name."""
    stacked = layout == "krony-pt"
    pairs = [(f"{here}_0", f"{here}_1")]
    if not stacked:
        terms = sum(bool(re.fullmatch(re.escape(here) + r"_\d+_0", name)) for name in state)
        pairs = [(f"{here}_{k}_0", f"{here}_{k}_1") for k in range(max(1, terms))]
    for name in (name for pair in pairs for name in pair):
        if name not in state:
            if f"{here}.weight" in state:
                return Dense(), {}
            raise ModelError(f"checkpoint: {name} is missing, one factor of {here}")
        if state[name].ndim != (3 if stacked else 2):
            raise ModelError(f"checkpoint: {name} is {tuple(state[name].shape)}, expected a {layout} factor")
        if state[name].shape != state[pairs[0][int(name.endswith("_1"))]].shape:
            raise ModelError(f"checkpoint: {name} has another shape than the same factor of the first term")
    if stacked:
        left, right = state[pairs[0][0]], state[pairs[0][1]]
    else:  # kept for the transposed weight, so each factor is turned
        left, right = (torch.stack([state[pair[side]].mT for pair in pairs]) for side in (0, 1))
    if len(left) != len(right):
        raise ModelError(f"checkpoint: {here} has {len(left)} left and {len(right)} right factors")
    (terms, m1, n1), (_, m2, n2) = left.shape, right.shape
    tensors = {"left": left, "right": right}
    if scales in state:
        tensors["scales"] = state[scales]
    if f"{here}_bias" in state:
        tensors["bias"] = state[f"{here}_bias"]
    return Kron(m1=m1, n1=n1, m2=m2, n2=n2, terms=terms, scales=scales in state), tensors


def _kind(name: str) -> str:
    """A name without its block: `mlp.c_fc.bias`."""
    return name.split(".", 2)[-1] if name.startswith("h.") else name


def _values(arch: GPT2Config) -> dict[str, Any]:
    return {name: getattr(arch, name) for name in GPT2Config.__dataclass_fields__}
