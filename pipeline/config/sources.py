"""The text and its tokens: sections `[corpus]`, `[tokenizer]`, `[data]`. Loads no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from model.marks import NOT_IDENTITY
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PydocsCorpus:
    """Documentation text of the installed Python and its packages: the embedded default."""

    name: Literal["pydocs"] = "pydocs"

    packages: tuple[str, ...] = ("python", "numpy")
    """Distributions to read; `python` is the standard library, `*` is everything installed."""

    max_megabytes: float = 0.0
    """Stop after this much text, in MB (10^6 bytes); 0 takes all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesCorpus:
    """Text files of yours: .txt, .jsonl, .parquet, each also .xz, .gz or .zst."""

    name: Literal["files"] = "files"

    paths: tuple[str, ...] = ()
    """Files, folders or glob patterns, relative to the config file that names them."""

    validation_paths: tuple[str, ...] = ()
    """Files whose documents are all validation; empty splits by content hash."""

    text_field: str = "text"
    """Field of a JSON line or column of a parquet file that holds the text."""

    max_megabytes: float = 0.0
    """Stop after this much text, in MB; 0 takes all of it."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("corpus.paths is empty; name at least one file, folder or glob pattern")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenWebTextCorpus:
    """OpenWebText from the Hugging Face hub, or from a local folder laid out as the hub lays it."""

    name: Literal["openwebtext"] = "openwebtext"

    repo: str = "Skylion007/openwebtext"
    """Hub dataset id, or a local folder that holds its parquet files."""

    revision: str = "79d93d786212f7344586290adb811d4ae6a1762c"
    """Pinned commit of the dataset repository; ignored for a local folder."""

    max_files: int = 0
    """Take only the first parquet files; 0 takes all."""


Corpus = Annotated[PydocsCorpus | FilesCorpus | OpenWebTextCorpus, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True, slots=True)
class BpeTokenizer:
    """Byte-level BPE with GPT-2's pattern, trained on the corpus."""

    name: Literal["bpe"] = "bpe"

    vocab_size: int = 4096
    """Tokens, the end-of-text token included; at most 65,536, so that a token is a uint16."""

    train_megabytes: float = 16.0
    """Text that the merges are learned on, in MB, from the start of the training split."""

    def __post_init__(self) -> None:
        if not 257 < self.vocab_size <= 65_536:
            raise ConfigError(f"tokenizer.vocab_size={self.vocab_size:,} must lie between 258 and 65,536")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpt2Tokenizer:
    """GPT-2's own BPE, 50,257 tokens."""

    name: Literal["gpt2"] = "gpt2"

    path: str = field(default="", metadata=NOT_IDENTITY)
    """Folder with `vocab.bpe` and `encoder.json`; empty lets tiktoken fetch them. Their hashes are
    checked.
    """


Tokenizer = Annotated[BpeTokenizer | Gpt2Tokenizer, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How documents become shards of tokens."""

    split: Literal["hash", "nanogpt"] = "hash"
    """`hash`: by content hash, stable as a corpus grows. `nanogpt`: nanoGPT's split by position
    (OpenWebText).
    """

    validation_fraction: float = 0.02
    """Share of the documents that is validation, for `hash`; `nanogpt` fixes its own 0.0005."""

    dedup: bool = True
    """Drop exact repeats of a document; counted. `nanogpt` keeps them."""

    shard_tokens: int = 100_000_000
    """Upper bound on tokens per shard; an estimate from bytes decides the plan, so real shards are
    smaller.
    """

    tokenize_workers: int = field(default=0, metadata=NOT_IDENTITY)
    """Tokenizing tasks at once; 0 uses every core of the cluster."""

    encoder: Literal["auto", "tiktoken"] = field(default="auto", metadata=NOT_IDENTITY)
    """`auto`: gigatoken where it is installed, many times as fast, and held against tiktoken as it works."""

    def __post_init__(self) -> None:
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1")
        if self.shard_tokens < 1024:
            raise ConfigError(f"data.shard_tokens={self.shard_tokens:,} must be at least 1,024")
