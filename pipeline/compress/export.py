"""A trained model as folders that others can load, each reopened and compared before it is published.

`stock/` is a dense GPT-2 that plain transformers opens with no code of ours; `native/` keeps the factors. The
record is put only if the logits of both equal those of the model that was exported.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from model.export import load_native, save_native, save_stock
from model.gpt2 import GPT2
from pipeline.compress.load import load_model
from pipeline.data.tokenizer import load_tokenizer, write_hf_tokenizer
from pipeline.errors import CompressError
from pipeline.store.artifacts import Artifact, Identity, Store

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest logit, that float32 may explain."""


def export_model(
    identity: Identity, run: Artifact, tokenizer: Artifact, store: Store, *, force: bool = False
) -> Artifact:
    """Write, reopen and compare both folders, then publish; raises CompressError if a logit differs."""
    model = load_model(run)
    encoding = load_tokenizer(tokenizer.folder())
    if encoding.n_vocab != model.spec.arch.vocab_size:
        raise CompressError(
            f"{run.record.address}: model has {model.spec.arch.vocab_size:,} tokens, tokenizer "
            f"{tokenizer.record.address} has {encoding.n_vocab:,}; use the tokenizer that it was trained with"
        )
    with store.attempt(identity, force=force) as attempt, TemporaryDirectory(prefix="krony-") as scratch:
        stock, native = Path(scratch) / "stock", Path(scratch) / "native"
        stock.mkdir()
        native.mkdir()
        save_stock(model, stock, eos_id=encoding.eot_token)
        write_hf_tokenizer(encoding, stock)
        save_native(model, native)
        write_hf_tokenizer(encoding, native)
        differences = {
            "native": _difference(model, load_native(native).eval(), run.record.address),
            "stock": _difference(model, _plain_transformers(stock), run.record.address),
        }
        attempt.location.put_folder(Path(scratch))
        spec = model.spec
        metrics = {
            "parameters": spec.num_parameters("tied_all"),
            "krony_parameters": spec.num_parameters("krony_no_wpe"),
            "macs_per_token": spec.macs_per_token("factored"),
            "native_logit_difference": differences["native"],
            "stock_logit_difference": differences["stock"],
        }
        return attempt.publish(metrics=metrics)


def _probe(model: GPT2) -> "Tensor":
    """Token ids that both sides of a comparison read: (2, T), the same for every model of one size."""
    arch = model.spec.arch
    generator = torch.Generator().manual_seed(0)
    return torch.randint(arch.vocab_size, (2, min(arch.n_ctx, 128)), generator=generator)


def _plain_transformers(folder: Path) -> torch.nn.Module:
    """The folder as plain transformers opens it: nothing of ours takes part."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        reopened = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        transformers.logging.set_verbosity(level)
    eval_mode: torch.nn.Module = reopened.eval()
    return eval_mode


def _difference(model: GPT2, reopened: torch.nn.Module, address: str) -> float:
    """Largest absolute difference of the logits; raises CompressError if it is more than rounding."""
    idx = _probe(model)
    with torch.no_grad():
        expected = model(idx)
        found = reopened(idx)
    logits = found if isinstance(found, torch.Tensor) else found.logits
    difference = float((logits - expected).abs().max())
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise CompressError(
            f"{address}: the reopened {type(reopened).__name__} differs by {difference:.2g} in a logit, "
            f"at most {limit:.2g} is rounding; the export is not published"
        )
    return difference
