"""Tokenizers: byte-level BPE, trained here or GPT-2's own, always served as a `tiktoken.Encoding`.

A tokenizer is one JSON file: pattern, ranks (the bytes of token i, base64) and special tokens. Training is
`tokenizers`' and is deterministic; what a text encodes to is tiktoken's, so it is one encoding everywhere,
also where another library does the work (`encoder.py`). Text that spells a special token is ordinary text:
only we put the end-of-text token, after each document.
"""

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken

from model.decode import parse_json
from pipeline.config.schema import RunConfig
from pipeline.config.sources import BpeTokenizer, DataConfig
from pipeline.errors import DataError
from pipeline.store.artifacts import Artifact, Identity, Store

EOT = "<|endoftext|>"
FILE = "tokenizer.json"
FORMAT = 1

# GPT-2's pattern (Radford et al. 2019), and the same language with possessive runs, which cannot backtrack.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
FAST_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_SPACES = (
    r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # White_Space of Unicode, as `\s`
)

GPT2_SHA256: Mapping[str, str] = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class TokenizerError(DataError):
    """A tokenizer cannot be read, trained or used with this model."""


# --- the alphabet of bytes ----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def byte_alphabet() -> Mapping[int, str]:
    """GPT-2's printable stand-in for each byte, in the order of the first 256 tokens."""
    plain = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def _spell(token: bytes) -> str:
    return "".join(byte_alphabet()[byte] for byte in token)


def _unspell(text: str) -> bytes:
    back = {char: byte for byte, char in byte_alphabet().items()}
    return bytes(back[char] for char in text)


# --- make ---------------------------------------------------------------------------------------------------


def train_bpe(texts: Iterable[str], *, vocab_size: int, name: str = "krony-bpe") -> tiktoken.Encoding:
    """Learn a byte-level BPE of `vocab_size` tokens, the end-of-text token included and last.

    Deterministic in the texts and their order. A text too small for so many merges gives fewer tokens.
    Raises TokenizerError if there is no text.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    model = Tokenizer(BPE())
    model.pre_tokenizer = Sequence(
        [Split(Regex(PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(byte_alphabet().values()),
        special_tokens=[],
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    ids: Mapping[str, int] = model.get_vocab(with_added_tokens=False)
    ranks = {_unspell(text): rank for text, rank in ids.items()}
    if len(ranks) <= 256:
        raise TokenizerError("the training split holds no text to learn merges from; take a larger corpus")
    return _encoding(name, ranks)


def read_gpt2(folder: Path) -> tiktoken.Encoding:
    """GPT-2's BPE from OpenAI's two files, `vocab.bpe` and `encoder.json`; both digests are checked."""
    data = {}
    for name, expected in GPT2_SHA256.items():
        try:
            data[name] = (folder / name).read_bytes()
        except OSError as err:
            raise TokenizerError(
                f"{folder / name}: {err.strerror}; tokenizer.path must hold vocab.bpe and encoder.json"
            ) from err
        found = hashlib.sha256(data[name]).hexdigest()
        if found != expected:
            raise TokenizerError(
                f"{folder / name}: sha256 {found[:12]}…, OpenAI's file has {expected[:12]}…; fetch it again"
            )
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_alphabet())}
    for merge in data["vocab.bpe"].decode().split("\n")[1:-1]:
        first, second = merge.split()
        ranks[_unspell(first + second)] = len(ranks)
    return _encoding("gpt2", ranks)


def fetch_gpt2() -> tiktoken.Encoding:
    """GPT-2's BPE as tiktoken fetches it, or has it in TIKTOKEN_CACHE_DIR."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as err:  # requests' errors are OSErrors
        raise TokenizerError(
            f"tiktoken cannot fetch GPT-2's BPE ({type(err).__name__}); set tokenizer.path to a folder with "
            "vocab.bpe and encoder.json, or TIKTOKEN_CACHE_DIR to a filled cache"
        ) from err


def build_tokenizer(
    config: RunConfig, identity: Identity, corpus: Artifact, store: Store, *, force: bool = False
) -> Artifact:
    """Store the tokenizer of a config: trained on the training split of `corpus`, or GPT-2's own."""
    if not force and (found := store.find(identity)):
        return found
    if isinstance(config.tokenizer, BpeTokenizer):
        encoding = train_bpe(
            training_texts(corpus, config.data, limit_bytes=int(config.tokenizer.train_megabytes * 1e6)),
            vocab_size=config.tokenizer.vocab_size,
            name=identity.name,
        )
    elif config.tokenizer.path:
        encoding = read_gpt2(Path(config.tokenizer.path).expanduser())
    else:
        encoding = fetch_gpt2()
    with store.attempt(identity, force=force) as attempt:
        attempt.location.put_bytes(FILE, tokenizer_json(encoding))
        return attempt.publish(metrics={"vocab_size": encoding.n_vocab, "eot": encoding.eot_token})


def training_texts(corpus: Artifact, config: DataConfig, *, limit_bytes: int) -> Iterator[str]:
    """Texts of the training split, in order, until `limit_bytes` of them are given."""
    from pipeline.data.rows import Corpus, Range, Split, sided_texts

    stored = Corpus.of(corpus)
    files = stored.manifest.files
    split = Split.of(config.split, fraction=config.validation_fraction, documents=stored.manifest.documents)
    ranges = [Range(number, 0, file.documents) for number, file in enumerate(files)]
    size = 0
    for side, text in sided_texts(stored, ranges, first=0, split=split, repeats=np.zeros(0, dtype=np.int64)):
        if side == "train":
            yield text
            size += len(text.encode())
            if size >= limit_bytes:
                return


# --- write and read -----------------------------------------------------------------------------------------


def tokenizer_json(encoding: tiktoken.Encoding) -> bytes:
    """The file that `load_tokenizer` reads; equal tokenizers give equal bytes."""
    body = {
        "format": FORMAT,
        "name": encoding.name,
        "pattern": FAST_PATTERN,
        "special_tokens": {EOT: encoding.eot_token},
        "ranks": [base64.b64encode(token).decode() for token in ranked_tokens(encoding)],
    }
    return (json.dumps(body, indent=0) + "\n").encode()


def load_tokenizer(folder: Path) -> tiktoken.Encoding:
    """The tokenizer of an artifact's folder. Raises TokenizerError if it is not one of ours."""
    path = folder / FILE
    try:
        body = parse_json(path.read_bytes())
        if body["format"] != FORMAT:
            raise TokenizerError(
                f"{path}: tokenizer format {body['format']}, this reads {FORMAT}; use a matching krony"
            )
        ranks = {base64.b64decode(token, validate=True): rank for rank, token in enumerate(body["ranks"])}
        # A pattern or a table of another making can bring the engine to its knees, or to an abort.
        if body["pattern"] != FAST_PATTERN or body["special_tokens"] != {EOT: len(ranks)}:
            raise ValueError("another pattern or other special tokens than ours")
        if len(ranks) != len(body["ranks"]) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
            raise ValueError("a token stands there twice, or a byte has none")
        return _encoding(str(body["name"]), ranks)
    except OSError as err:
        raise TokenizerError(f"{path}: {err.strerror}; build it with `krony prepare …`") from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise TokenizerError(f"{path}: not a krony tokenizer ({err}); run `krony prepare … --force`") from err


def write_hf_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write the files by which `transformers.AutoTokenizer` opens this tokenizer and gives the same ids.

    One difference remains: `AutoTokenizer` reads an end-of-text token where a text spells one, as GPT-2's.
    """
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tokens = ranked_tokens(encoding)
    vocab = {_spell(token): rank for rank, token in enumerate(tokens)} | {EOT: encoding.eot_token}
    merges = [(_spell(left), _spell(right)) for left, right in merges_of(tokens)]
    fast = Tokenizer(BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = Sequence(
        [Split(Regex(PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = ByteLevelDecoder()
    fast.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(fast.to_str(pretty=False) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- use ----------------------------------------------------------------------------------------------------


def encode_document(encoding: tiktoken.Encoding, text: str) -> npt.NDArray[np.uint32]:
    """The tokens of one document, its end-of-text token last. The text must be valid Unicode."""
    try:
        pieces = [encoding.encode_to_numpy(text, disallowed_special=())]
    except ValueError:  # the regex engine gives up on a million spaces in a row
        pieces = [encoding.encode_to_numpy(part, disallowed_special=()) for part in split_long_spaces(text)]
    return np.concatenate([*pieces, np.array([encoding.eot_token], dtype=np.uint32)])


def split_long_spaces(text: str, *, longest: int = 1000) -> list[str]:
    """`text` in parts that encode to the same tokens as the whole, cut within runs of `longest` spaces.

    Before a word GPT-2's pattern takes a run of spaces without its last one, and at the end of a text all of
    it: a cut before the last space gives the same pieces.
    """
    cuts = [match.end() - 1 for match in re.finditer(f"[{_SPACES}]{{{longest},}}(?=[^{_SPACES}])", text)]
    return [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]


def require_vocabulary(encoding: tiktoken.Encoding, vocab_size: int, *, what: str) -> None:
    """Raise TokenizerError unless a model of `vocab_size` tokens was made for this tokenizer."""
    if encoding.n_vocab != vocab_size:
        raise TokenizerError(
            f"{what} has {vocab_size:,} tokens, tokenizer {encoding.name} has {encoding.n_vocab:,}; "
            "they do not belong together: check [tokenizer] and [teacher] of the config"
        )


def _encoding(name: str, ranks: Mapping[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name,
        pat_str=FAST_PATTERN,
        mergeable_ranks=dict(ranks),
        special_tokens={EOT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


def ranked_tokens(encoding: tiktoken.Encoding) -> list[bytes]:
    """The bytes of every token but the special one, by id."""
    return [encoding.decode_single_token_bytes(token) for token in range(encoding.eot_token)]


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of more than one byte: the last two parts under the earlier ranks."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            made = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(range(len(made)), key=made.__getitem__)
            if made[best] >= rank:
                raise TokenizerError(f"token {rank} {token!r} is no merge of two earlier tokens")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append((parts[0], parts[1]))
    return merges
