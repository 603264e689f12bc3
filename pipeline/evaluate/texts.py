"""Evaluation texts: by name, from a local folder or the hub, and held to one digest.

A text is its rows. The digest is that of the rows joined by a blank line, so the same text has the same
digest whether it came as the files of its authors, xz-compressed or not, or as the parquet files of the
hub; anything else is refused, for a number on another text is another number. `datasets` is imported only
when a hub file is read. Loads no torch.
"""

import hashlib
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.data.documents import CorpusError
from pipeline.data.files import open_bytes
from pipeline.errors import EvaluateError

LARGEST = 1 << 26
"""Bytes of an authors' file, decompressed; the largest of them has 1.3 million."""

JOINT = "\n\n"
"""What stands between two rows: Krony-PT's, and everybody's, way to make one string of WikiText."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Where a text lies, and what it must be."""

    files: tuple[str, ...]
    """Places below a local folder, the first that exists is read; `.xz` may follow each."""

    hub: str
    """Dataset repository."""

    revision: str
    """Its commit. `main` where no commit could be verified; the digest pins the text all the same."""

    hub_file: str
    """File in that repository; also looked for at `<folder>/<hub>/<hub_file>`."""

    rows: int
    sha256: str
    """Of the joined rows in UTF-8."""

    licence: str


_WIKITEXT = "b08601e04326c79dfdd32d625aee71d232d685c3"
_CC_BY_SA = "CC BY-SA, Merity et al. 2016"
_CC_BY = "CC BY 4.0, Paperno et al. 2016"

TEXTS: Mapping[str, TextSource] = {
    "wikitext-103-v1": TextSource(
        files=("wikitext-103-v1/wiki.test.tokens", "wikitext-103/wiki.test.tokens"),
        hub="Salesforce/wikitext",
        revision=_WIKITEXT,
        hub_file="wikitext-103-v1/test-00000-of-00001.parquet",
        rows=4_358,
        sha256="63627382e7508537414a0690fcfd5d2a2d2bcaad62af438fed4f81097dded534",
        licence=_CC_BY_SA,
    ),
    "wikitext-2-v1": TextSource(
        files=("wikitext-2-v1/wiki.test.tokens", "wikitext-2/wiki.test.tokens"),
        hub="Salesforce/wikitext",
        revision=_WIKITEXT,
        hub_file="wikitext-2-v1/test-00000-of-00001.parquet",
        rows=4_358,
        sha256="fe21babba142c1c7fb81c2f990fb14ef46d4db876affba15d0c9559a8b1abc9c",
        licence=_CC_BY_SA,
    ),
    "wikitext-2-raw-v1": TextSource(
        files=(
            "wikitext-raw-v1/wiki.test.raw",
            "wikitext-2-raw-v1/wiki.test.raw",
            "wikitext-2-raw/wiki.test.raw",
        ),
        hub="Salesforce/wikitext",
        revision=_WIKITEXT,
        hub_file="wikitext-2-raw-v1/test-00000-of-00001.parquet",
        rows=4_358,
        sha256="696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83",
        licence=_CC_BY_SA,
    ),
    "lambada": TextSource(
        files=("lambada/lambada_test_plain_text.txt", "lambada_test_plain_text.txt"),
        hub="cimec/lambada",
        revision="main",
        hub_file="plain_text/test-00000-of-00001.parquet",
        rows=5_153,
        sha256="d65ca6f4e1bd0b0ee71dcce68f4c26a87a862594136a837cbef4244d2707e47d",
        licence=_CC_BY,
    ),
    "lambada-openai": TextSource(
        files=("lambada/lambada_test.jsonl", "lambada_test.jsonl"),
        hub="EleutherAI/lambada_openai",
        revision="900124bf3b8235c6daf21033af9948b3f07346c4",
        hub_file="data/lambada_test_en.jsonl",
        rows=5_153,
        sha256="d363b828a52d4b313cc66af116392a712f0b99f8fa325b1dfce6db81174d60df",
        licence=_CC_BY,
    ),
}
"""Every text by name."""


@dataclass(frozen=True)
class Text:
    """A text in memory."""

    name: str
    rows: tuple[str, ...]
    where: str
    """File or hub address that it was read from."""

    @cached_property
    def joined(self) -> str:
        """All rows as one string."""
        return JOINT.join(self.rows)

    @cached_property
    def sha256(self) -> str:
        """Digest of the joined rows."""
        return hashlib.sha256(self.joined.encode()).hexdigest()


def read_text(name: str, folder: str | Path = "") -> Text:
    """The text `name` from a local folder, or from the hub when `folder` is empty; raises EvaluateError.

    A folder may be laid out as the archives of the authors are, or as the hub lays it
    (`<folder>/<repository>/<file>`).
    """
    source = TEXTS.get(name)
    if source is None:
        raise EvaluateError(f"unknown evaluation text {name!r}; known: {', '.join(TEXTS)}")
    if folder:
        where, rows = _read_local(name, source, Path(folder).expanduser())
    else:
        where = f"hf://datasets/{source.hub}@{source.revision}/{source.hub_file}"
        rows = read_hub_rows(where)
    text = Text(name, tuple(rows), where)
    if text.sha256 != source.sha256:
        raise EvaluateError(
            f"{where}: {len(text.rows):,} rows, sha256 {text.sha256[:12]}…, but {name} has {source.rows:,} "
            f"rows, {source.sha256[:12]}…; get the original file, or leave eval.texts empty for the hub"
        )
    return text


def read_hub_rows(address: str) -> list[str]:
    """The `text` column of a hub file (`hf://…`) or of a local .parquet or .jsonl file."""
    import datasets  # heavy, and only the hub path needs it

    hub_without_bars()
    loader = "parquet" if address.endswith(".parquet") else "json"
    try:
        table = datasets.load_dataset(loader, data_files={"test": address}, split="test")
    except Exception as err:  # the network clients below `datasets` raise families of their own
        raise EvaluateError(
            f"{address}: cannot be read ({' '.join(str(err).split())[:160]}); "
            "with no network, name a folder that holds the text in eval.texts"
        ) from err
    return [_wikitext_row(row) for row in table["text"]]


def hub_without_bars() -> None:
    """Keep `datasets` from drawing bars of its own between our progress lines."""
    import datasets

    datasets.disable_progress_bars()


def _read_local(name: str, source: TextSource, folder: Path) -> tuple[str, list[str]]:
    for file in source.files:
        for path in (folder / file, folder / f"{file}.xz"):
            if path.is_file():
                return str(path), _rows_of(path)
    laid_out = folder / source.hub / source.hub_file
    if laid_out.is_file():
        return str(laid_out), read_hub_rows(str(laid_out))
    places = ", ".join([f"{file}[.xz]" for file in source.files] + [f"{source.hub}/{source.hub_file}"])
    raise EvaluateError(f"{folder}: text {name!r} is not there; looked for {places}")


def _rows_of(path: Path) -> list[str]:
    """Rows of an authors' file: a `.txt` line is a passage, a WikiText line keeps its newline."""
    plain = path.name.removesuffix(".xz")
    try:
        with open_bytes(path) as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise EvaluateError(f"{path}: more than {LARGEST:,} bytes, no text here has them; fetch it again")
        lines = data.decode("utf-8").split("\n")
    except CorpusError as err:
        raise EvaluateError(str(err)) from err
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as err:
        raise EvaluateError(f"{path}: damaged ({err}); fetch it again") from err
    ended = [f"{line}\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])
    row: Callable[[str], str] = _wikitext_row
    if plain.endswith(".jsonl"):
        row = _json_row
    elif plain.endswith(".txt"):
        row = str.strip
    try:
        return [row(line) for line in ended]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise EvaluateError(
            f"{path}: a line is not JSON with a `text` field ({err}); fetch it again"
        ) from err


def _wikitext_row(line: str) -> str:
    return line if line.strip() else ""


def _json_row(line: str) -> str:
    return str(json.loads(line)["text"])


def word_counts(rows: Sequence[str]) -> tuple[int, int]:
    """Words of a text, and how many of them are `<unk>`."""
    words = JOINT.join(rows).split()
    return len(words), words.count("<unk>")
