"""A trained model as folders that others can load, published once each was reopened and compared.

What is published never changes; a card that knows later scores is written where the folders are handed out.
"""

import shutil
from pathlib import Path

from model.config import ModelError
from model.export import load_native
from model.nanogpt import save_nanogpt
from pipeline.compress.card import card_of, with_scores
from pipeline.compress.folders import write_cards, write_folders
from pipeline.compress.load import load_model
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import CompressError
from pipeline.store.artifacts import Artifact, Identity, Store
from pipeline.store.location import Location
from pipeline.store.scratch import scratch_folder

NANOGPT = "nanogpt/ckpt.pt"


def export_model(
    identity: Identity, run: Artifact, tokenizer: Artifact, store: Store, *, force: bool = False
) -> Artifact:
    """Write, reopen and compare the folders, then publish; raises CompressError if a logit differs."""
    model = load_model(run)
    encoding = load_tokenizer(tokenizer.folder())
    if encoding.n_vocab != model.spec.arch.vocab_size:
        raise CompressError(
            f"{run.record.address}: model has {model.spec.arch.vocab_size:,} tokens, tokenizer "
            f"{tokenizer.record.address} has {encoding.n_vocab:,}; use the tokenizer that it was trained with"
        )
    with store.attempt(identity, force=force) as attempt, scratch_folder() as scratch:
        card = card_of(run, tokenizer, store)
        written = write_folders(model, scratch, card=card, where=run.record.address, encoding=encoding)
        attempt.location.put_folder(scratch)
        spec = model.spec
        metrics = {
            "parameters": spec.num_parameters("tied_all"),
            "krony_parameters": spec.num_parameters("krony_no_wpe"),
            "macs_per_token": spec.macs_per_token("factored"),
            **{f"{form}_logit_difference": value for form, value in written.differences.items()},
            **{f"{form}_bytes": value for form, value in written.sizes.items()},
        }
        return attempt.publish(metrics=metrics)


def hand_out(
    model: Artifact, run: Artifact, tokenizer: Artifact, store: Store, folder: Path, *, nanogpt: bool = False
) -> None:
    """Copy a published model to `folder`, its cards written anew with the scores that are known by now.

    `nanogpt` adds the dense form as nanoGPT names it. Files of the same name are replaced one by one.
    """
    with scratch_folder() as scratch:
        here = scratch / "model"
        shutil.copytree(model.folder(), here)
        write_cards(here, with_scores(card_of(run, tokenizer, store), run, store))
        if nanogpt:
            try:
                save_nanogpt(load_native(here / "native"), here / NANOGPT)
            except ModelError as err:
                raise CompressError(f"{model.record.address}: {err}") from err
        Location.of(folder).put_folder(here)
