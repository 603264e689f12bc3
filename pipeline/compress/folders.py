"""A model as folders that others can load, each reopened and compared before anybody relies on it.

`native/` is what krony reads; `stock/` is a dense GPT-2 that plain transformers opens; `factored/` keeps the
factors and brings the two source files that transformers runs for it. The last two carry a model card.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from model.export import load_native, save_factored, save_native, save_stock
from model.gpt2 import GPT2
from pipeline.compress.card import Card, CardForm, render
from pipeline.data.tokenizer import write_hf_tokenizer
from pipeline.errors import CompressError

if TYPE_CHECKING:
    import tiktoken

Form = Literal["native", "stock", "factored"]

SOURCES = Path(__file__).with_name("remote")
"""What travels with a factored folder, see `pipeline.compress.remote`."""

CODE = ("configuration_krony.py", "modeling_krony.py")
CARD = "README.md"

TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest logit, that float32 may explain."""


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_folders` found when it opened the folders again."""

    differences: dict[Form, float]
    """Largest difference of a logit from those of the model, by folder."""

    sizes: dict[Form, int]
    """Bytes of `model.safetensors`, by folder."""


def write_folders(
    model: GPT2, folder: Path, *, card: Card, where: str, encoding: "tiktoken.Encoding | None" = None
) -> Written:
    """Write all three below `folder`, with tokenizer files if there is an encoding; reopen and compare.

    Raises CompressError, naming `where` the model is from, if a logit differs by more than rounding.
    """
    eos_id = encoding.eot_token if encoding else None
    paths: dict[Form, Path] = {"native": folder / "native", "stock": folder / "stock"}
    paths["factored"] = folder / "factored"
    save_native(model, paths["native"])
    save_stock(model, paths["stock"], eos_id=eos_id)
    save_factored(model, paths["factored"], eos_id=eos_id)
    for name in CODE:
        shutil.copyfile(SOURCES / name, paths["factored"] / name)
    for path in paths.values():
        if encoding:
            write_hf_tokenizer(encoding, path)
    openers: dict[Form, Callable[[Path], torch.nn.Module]] = {
        "native": load_native,
        "stock": lambda path: _reopen(path, "AutoModelForCausalLM"),
        "factored": lambda path: _reopen(path, "KronyForCausalLM"),
    }
    differences = {
        form: check_logits(model, openers[form](path), where=where, so="the export is not published")
        for form, path in paths.items()
    }
    sizes = {form: (path / "model.safetensors").stat().st_size for form, path in paths.items()}
    write_cards(folder, card)
    return Written(differences, sizes)


def write_cards(folder: Path, card: Card) -> None:
    """Write, or write anew, the model card of the stock and of the factored folder."""
    forms: tuple[CardForm, ...] = ("stock", "factored")
    for form in forms:
        size = (folder / form / "model.safetensors").stat().st_size
        (folder / form / CARD).write_text(render(card, form, size_bytes=size), encoding="utf-8")


def _reopen(folder: Path, name: str) -> torch.nn.Module:
    """The folder as transformers opens it.

    The factored one is read by the source file that was copied: `trust_remote_code` would write to a cache
    in the home folder, which a worker may not have.
    """
    import transformers

    from pipeline.compress.remote.modeling_krony import KronyForCausalLM

    opener: Any = KronyForCausalLM if name == "KronyForCausalLM" else transformers.AutoModelForCausalLM
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        opened: torch.nn.Module = opener.from_pretrained(folder, dtype=torch.float32)
    finally:
        transformers.logging.set_verbosity(level)
    return opened


def _probe(model: GPT2) -> torch.Tensor:
    """Token ids that both sides of a comparison read: (2, T), the same for every model of one size."""
    arch = model.spec.arch
    generator = torch.Generator().manual_seed(0)
    return torch.randint(arch.vocab_size, (2, min(arch.n_ctx, 128)), generator=generator)


def check_logits(model: GPT2, reopened: torch.nn.Module, *, where: str, so: str) -> float:
    """Largest absolute difference of the logits; raises CompressError if it is more than rounding.

    `where` says which model, `so` what follows.
    """
    idx = _probe(model)
    with torch.no_grad():
        expected = model(idx)
        found = reopened.eval()(idx)
    logits = found if isinstance(found, torch.Tensor) else found.logits
    difference = float((logits - expected).abs().max())
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise CompressError(
            f"{where}: the reopened {type(reopened).__name__} differs by {difference:.2g} in a logit, "
            f"at most {limit:.2g} is rounding; {so}"
        )
    return difference
