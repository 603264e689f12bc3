"""A checkpoint of Krony-PT or nanoGPT becomes folders of ours: one to evaluate, to compress, or to train on.

Factors stay factors. The stock folder is a teacher like any published one; the native one is a teacher whose
structure the method `dense` carries on with, so an imported model can be trained further.
"""

from dataclasses import dataclass
from pathlib import Path

from model.config import ModelError
from model.nanogpt import Layout, from_checkpoint, read_checkpoint
from pipeline.compress.card import Card
from pipeline.compress.folders import write_folders
from pipeline.data.tokenizer import read_gpt2
from pipeline.errors import CompressError, PreflightError
from pipeline.store.copies import sha256_file
from pipeline.store.location import Location
from pipeline.store.scratch import scratch_folder

FAMILY: dict[Layout, str] = {
    "nanogpt": "nanoGPT",
    "krony-pt": "Krony-PT, stacked factors",
    "krony-pt-until-2024-03": "Krony-PT, a pair of factors per term (until March 2024)",
}


@dataclass(frozen=True, slots=True)
class Imported:
    """What was read, and how large it is."""

    layout: str
    parameters: int
    """Every unique number, counted once."""

    krony_parameters: int
    """Without the position table."""

    largest_difference: float
    """Of a logit, between the model and its reopened folders."""


def import_checkpoint(
    path: Path,
    out: Path,
    *,
    n_head: int = 0,
    vocab_size: int = 0,
    tokenizer: Path | None = None,
    force: bool = False,
) -> Imported:
    """Write `native/`, `stock/` and `factored/` below `out`, reopened and compared.

    `tokenizer` is a folder with OpenAI's vocab.bpe and encoder.json. Raises PreflightError if `out` holds a
    model already, CompressError if the checkpoint is none that can be read.
    """
    if not force and (out / "native" / "config.json").exists():
        raise PreflightError(f"{out} holds a model already; name another folder, or use --force")
    encoding = read_gpt2(tokenizer) if tokenizer else None
    try:
        checkpoint = read_checkpoint(path)
        model = from_checkpoint(checkpoint, n_head=n_head, vocab_size=vocab_size).eval()
    except ModelError as err:
        where = "" if str(err).startswith(str(path)) else f"{path}: "
        raise CompressError(f"{where}{err}") from err
    spec = model.spec
    if encoding and encoding.n_vocab != spec.arch.vocab_size:
        raise CompressError(
            f"{path}: model has {spec.arch.vocab_size:,} tokens, GPT-2's tokenizer has {encoding.n_vocab:,}; "
            f"use --vocab-size {encoding.n_vocab} if the table was padded"
        )
    card = Card(
        name=path.stem,
        spec=spec,
        making=(
            ("imported from", f"`{path.name}`, sha256 `{sha256_file(path)[:12]}…`"),
            ("layout", FAMILY[checkpoint.layout]),
        ),
        has_tokenizer=encoding is not None,
    )
    with scratch_folder() as scratch:
        written = write_folders(model, scratch, card=card, where=str(path), encoding=encoding)
        Location.of(out).put_folder(scratch)
    return Imported(
        layout=FAMILY[checkpoint.layout],
        parameters=spec.num_parameters("tied_all"),
        krony_parameters=spec.num_parameters("krony_no_wpe"),
        largest_difference=max(written.differences.values()),
    )
