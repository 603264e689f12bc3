"""Documents to tokens, at the speed of gigatoken and with the ids of tiktoken.

tiktoken says what the tokens of a text are. gigatoken gives the same ones at ten to twenty times its speed,
so it makes the shards wherever it is installed, and every so many documents tiktoken has to agree. Which of
the two worked is recorded, and is no part of what the tokens are.
"""

import base64
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import psutil  # type: ignore[import-untyped]
import tiktoken

from pipeline.allocator import give_back
from pipeline.data.tokenizer import TokenizerError, encode_document, merges_of, ranked_tokens
from pipeline.store.scratch import scratch_folder

Ids = npt.NDArray[np.uint32]
Choice = Literal["auto", "tiktoken"]

CHECK_EVERY = 256
"""Documents between two that both encode; the first of every encoder is one."""

LONGEST_CHECK = 1_000_000
"""Characters of a document that are compared: more would take a second and longer."""

LOOK_EVERY = 1 << 22
"""Characters between two looks at the memory of this process."""

LONGEST_TOKEN = 1024
"""Bytes of a token, beyond which tiktoken does the work alone."""

MOST_GROWTH = 256 << 20
"""Bytes that a process may grow by before its engine is made anew: gigatoken 0.10 remembers every piece of
text that it has seen. English gets there after gigabytes, Chinese after some ten megabytes."""


class Engine(Protocol):
    """What turns text into ids of the vocabulary, special tokens excluded."""

    def encode(self, text: str, /) -> Ids:
        """Ids of ordinary text."""


class Encoder:
    """Encodes documents of one tokenizer, one after the other."""

    def __init__(self, encoding: tiktoken.Encoding, *, choice: Choice = "auto") -> None:
        """`auto` takes gigatoken where it is installed; raises TokenizerError for ranks that are no BPE."""
        self._encoding = encoding
        self._ranks = _rank_file(encoding) if installed(choice) else ""
        self._engine: Engine | None = None
        self._end = np.array([encoding.eot_token], dtype=np.uint32)
        self._unchecked = 0  # documents until the next comparison
        self._unseen = LOOK_EVERY  # characters until the next look at memory
        self._held = 0  # bytes of this process before the engine began to remember

    @property
    def name(self) -> str:
        """The library that does the work, and its version."""
        library = "gigatoken" if self._ranks else "tiktoken"
        return f"{library} {version(library)}"

    def document(self, text: str) -> Ids:
        """Tokens of one document, its end-of-text token last. The text must be valid Unicode.

        Raises TokenizerError if the engines differ.
        """
        if not self._ranks:
            return encode_document(self._encoding, text)
        if self._engine is None:
            self._engine, self._held = _gigatoken(self._ranks), _resident()
        found = self._engine.encode(text)
        if self._unchecked == 0:
            self._compare(self._engine, text[:LONGEST_CHECK])
            self._unchecked = CHECK_EVERY
        self._unchecked -= 1
        self._unseen -= len(text)
        if self._unseen < 0:
            self._forget()
        return np.concatenate([found, self._end])

    def _compare(self, engine: Engine, text: str) -> None:
        if not np.array_equal(engine.encode(text), encode_document(self._encoding, text)[:-1]):
            raise TokenizerError(
                f"gigatoken {version('gigatoken')} and tiktoken give different tokens for a document that "
                f"begins with {text[:40]!r}; run again with --data.encoder tiktoken --force"
            )

    def _forget(self) -> None:
        """Drop the engine if this process has grown too much; the next document has a new one."""
        self._unseen = LOOK_EVERY
        if _resident() - self._held > MOST_GROWTH:
            self._engine = None
            give_back()


def installed(choice: Choice) -> bool:
    """Whether gigatoken is there and wanted."""
    if choice == "tiktoken":
        return False
    try:
        version("gigatoken")
    except PackageNotFoundError:
        return False
    return True


def _rank_file(encoding: tiktoken.Encoding) -> str:
    """The ranks as gigatoken reads them; it ends the process for a table that does not come from merges.

    Empty where a token is as long as a page: to take it apart into merges would take minutes.
    """
    tokens = ranked_tokens(encoding)
    if max(map(len, tokens)) > LONGEST_TOKEN:
        return ""
    if any(len(token) != 1 for token in tokens[:256]):
        raise TokenizerError("the first 256 tokens are not the bytes; run `krony prepare … --force`")
    merges_of(tokens)
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def _gigatoken(ranks: str) -> Engine:
    """With GPT-2's pattern and without special tokens: text that spells one is ordinary text."""
    from gigatoken import Tokenizer

    with scratch_folder() as folder:
        path = folder / "ranks.tiktoken"
        path.write_text(ranks, encoding="ascii")
        engine: Engine = Tokenizer.from_tiktoken(path, pretokenizer="gpt2")
    return engine


def _resident() -> int:
    """Bytes that this process holds."""
    found: int = psutil.Process().memory_info().rss
    return found
