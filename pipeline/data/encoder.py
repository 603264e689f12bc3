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
import tiktoken

from pipeline.data.tokenizer import TokenizerError, encode_document, ranked_tokens
from pipeline.store.scratch import scratch_folder

Ids = npt.NDArray[np.uint32]
Choice = Literal["auto", "tiktoken"]

CHECK_EVERY = 256
"""Documents between two that both encode; the first of every encoder is one."""

LONGEST_CHECK = 1_000_000
"""Characters of a document beyond which the next one is compared: that would take a second and more."""


class Engine(Protocol):
    """What turns text into ids of the vocabulary, special tokens excluded."""

    def encode(self, text: str, /) -> Ids:
        """Ids of ordinary text."""


class Encoder:
    """Encodes documents of one tokenizer, one after the other."""

    def __init__(self, encoding: tiktoken.Encoding, *, choice: Choice = "auto") -> None:
        """`auto` takes gigatoken where it is installed."""
        self._encoding = encoding
        self._engine = _gigatoken(encoding) if installed(choice) else None
        self._end = np.array([encoding.eot_token], dtype=np.uint32)
        self._left = 0  # documents until the next comparison

    def document(self, text: str) -> Ids:
        """Tokens of one document, its end-of-text token last. The text must be valid Unicode.

        Raises TokenizerError if the engines differ.
        """
        if self._engine is None:
            return encode_document(self._encoding, text)
        found = np.concatenate([self._engine.encode(text), self._end])
        if self._left > 0 or len(text) > LONGEST_CHECK:
            self._left -= 1
            return found
        self._left = CHECK_EVERY - 1
        if not np.array_equal(found, encode_document(self._encoding, text)):
            raise TokenizerError(
                f"gigatoken {version('gigatoken')} and tiktoken give different tokens for a document that "
                f"begins with {text[:40]!r}; run again with --data.encoder tiktoken --force"
            )
        return found


def installed(choice: Choice) -> bool:
    """Whether gigatoken does the work."""
    if choice == "tiktoken":
        return False
    try:
        version("gigatoken")
    except PackageNotFoundError:
        return False
    return True


def engine_name(choice: Choice) -> str:
    """The library that does the work, and its version."""
    name = "gigatoken" if installed(choice) else "tiktoken"
    return f"{name} {version(name)}"


def _gigatoken(encoding: tiktoken.Encoding) -> Engine:
    """The same ranks and GPT-2's pattern, without special tokens: text that spells one is ordinary text."""
    from gigatoken import Tokenizer

    lines = (
        f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranked_tokens(encoding))
    )
    with scratch_folder() as folder:
        path = folder / "ranks.tiktoken"
        path.write_text("\n".join(lines) + "\n", encoding="ascii")
        engine: Engine = Tokenizer.from_tiktoken(path, pretokenizer="gpt2")
    return engine
