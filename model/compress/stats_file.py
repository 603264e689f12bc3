"""Statistics in a folder: sums as safetensors, counts as JSON, read back strictly; and how stable they are.

Sums, never means: they are divided once, when a method reads them.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from scipy.stats import spearmanr

from model.compress.contract import Stats
from model.config import ModelError
from model.pretrained import read_json, read_tensors

SUMS, COUNTS = "sums.safetensors", "counts.json"
FORMAT, VERSION = "krony-stats", 1

HALF = "row_fisher_even"
"""Row Fisher of the sequences with even numbers: with the whole, two halves that can be compared."""


def save_stats(stats: Stats, folder: Path) -> None:
    """Write sums and counts; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = {key: value.contiguous() for key, value in stats.sums.items()}
    save_file(sums, folder / SUMS, metadata={FORMAT: str(VERSION)})
    counts = {"format": FORMAT, "version": VERSION, "tokens": stats.tokens, "sequences": stats.sequences}
    (folder / COUNTS).write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


def load_stats(folder: Path) -> Stats:
    """Read statistics back; ModelError for another format, or a damaged file."""
    counts = read_json(folder / COUNTS)
    sums, metadata = read_tensors(folder / SUMS)
    tokens, sequences = counts.get("tokens"), counts.get("sequences")
    is_ours = (counts.get("format"), counts.get("version")) == (FORMAT, VERSION) and FORMAT in metadata
    if not is_ours or not isinstance(tokens, int) or not isinstance(sequences, int):
        raise ModelError(f"{folder} holds no statistics of format {FORMAT} {VERSION}; collect them again")
    return Stats(tokens=tokens, sequences=sequences, sums=sums)


def half_correlation(stats: Stats) -> dict[str, float]:
    """Spearman's rank correlation of the row Fisher of even and of odd sequences, by module.

    Near 1: the order of the input features is no accident of the sample. Empty if it was not collected.
    """
    found = {}
    for key, even in stats.sums.items():
        field, _, module = key.partition("/")
        if field == HALF:
            odd = stats.sums[f"row_fisher/{module}"] - even
            if float(even.std()) > 0 and float(odd.std()) > 0:  # a constant has no order
                found[module] = float(spearmanr(even.numpy(), odd.numpy()).statistic)
    return found
