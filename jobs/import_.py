"""`krony import`: a Krony-PT or nanoGPT checkpoint to folders that krony and transformers open."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jobs import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Read one checkpoint, and say what it was and how to go on."""
    parser = argparse.ArgumentParser(prog="krony import", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help=".pt, read as tensors only, or .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for native/, stock/ and factored/")
    parser.add_argument("--n-head", type=int, default=0, help="attention heads, where nothing tells them")
    parser.add_argument(
        "--vocab-size", type=int, default=0, help="keep this many rows of a padded table (GPT-2: 50257)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder with GPT-2's vocab.bpe and encoder.json, to go with the models"
    )
    parser.add_argument("--force", action="store_true", help="replace a model that is there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    from pipeline.compress.foreign import import_checkpoint

    found = import_checkpoint(
        options.checkpoint,
        options.out,
        n_head=options.n_head,
        vocab_size=options.vocab_size,
        tokenizer=options.tokenizer,
        force=options.force,
    )
    if options.json:
        print(json.dumps(asdict(found)))
        return 0
    print(
        f"{options.checkpoint}: {found.layout}, {found.parameters:,} parameters "
        f"({found.krony_parameters:,} without the position table)\n"
        f'measure or compress:  teacher = {{ name = "hub", id = "{options.out / "stock"}" }}\n'
        f'train on:             teacher = {{ name = "hub", id = "{options.out / "native"}" }}, '
        'method = { name = "dense" }\n'
        f'transformers:         from_pretrained("{options.out / "factored"}", trust_remote_code=True)'
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("import"))
