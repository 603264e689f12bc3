"""What a file of a Python package says in words: docstrings, guides, package descriptions. Pure.

Sources are parsed with `ast`; nothing is imported and nothing is run. Standard library only.
"""

import ast
import hashlib
import inspect
import itertools
import re
import unicodedata
import warnings
from collections.abc import Iterator

MIN_STRING = 24
MIN_DOCUMENT = 240
"""Characters below which a docstring, a document is dropped."""

_MAX_SOURCE_BYTES = 4_000_000
_CONTROL = re.compile(r"[^\n\x20-\x7e\xa0-\U0010ffff]")
_LICENCE = re.compile(
    r"(?i)licensed under the|permission is hereby granted|redistribution and use in source|"
    r"without warrant(y|ies)|all rights reserved"
)
_MARKUP = ("[![", "![", "<", "|", ".. ", "http")


def docstrings(source: bytes, *, module: str, seen: set[bytes]) -> str:
    """All docstrings of a Python source, each under its qualified name; empty if it cannot be parsed.

    `seen` holds digests of strings that came before; they are left out here and the new ones are added.
    """
    if len(source) > _MAX_SOURCE_BYTES:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    found = []
    for name, text in _walk(tree, module):
        cleaned = clean(inspect.cleandoc(text))
        if len(cleaned) >= MIN_STRING and " " in cleaned and is_new(cleaned, seen):
            found.append(f"{name}\n{cleaned}")
    return "\n\n".join(found)


def topics(source: bytes) -> Iterator[tuple[str, str]]:
    """Name and text of each entry of `pydoc_data/topics.py`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value), str(value.value)


def description(core_metadata: str) -> str:
    """The long description in a METADATA file, mostly a README, without badges and HTML; empty if none."""
    text = core_metadata.partition("\n\n")[2]
    kept = (line for line in text.splitlines() if not line.lstrip().startswith(_MARKUP))
    return "\n".join(kept) if is_prose(text) else ""


def clean(text: str) -> str:
    """NFC, no control characters, no trailing spaces, no runs of blank lines, no licence paragraphs."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").expandtabs(8))
    text = _CONTROL.sub("", text)
    text = "\n".join(line.rstrip() for line in text.split("\n") if len(line) < 1000)
    paragraphs = (part for part in re.split(r"\n{2,}", text) if not _LICENCE.search(part))
    return "\n\n".join(paragraphs).strip("\n")


def is_prose(text: str) -> bool:
    """Whether a text file reads like sentences: enough words, of letters, several to a line."""
    lines = [line for line in text.splitlines() if line.strip()]
    letters = sum(char.isalpha() or char == " " for char in text)
    wordy = sum(len(line.split()) >= 5 for line in lines)
    return len(text) >= MIN_DOCUMENT and letters >= 0.7 * len(text) and wordy >= 0.4 * len(lines)


def _walk(node: ast.AST, name: str, arguments: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield f"{name}{arguments}", text
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}", _signature(child.args))
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _walk(child, name)


def _signature(arguments: ast.arguments) -> str:
    names = [each.arg for each in itertools.chain(arguments.posonlyargs, arguments.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    names += [each.arg for each in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(names)})"


def is_new(text: str, seen: set[bytes]) -> bool:
    """Whether this text is not among the digests in `seen`; it is from now on."""
    digest = hashlib.sha256(text.encode(errors="replace")).digest()[:16]
    if digest in seen:
        return False
    seen.add(digest)
    return True
