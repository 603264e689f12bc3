"""`pydocs`: the documentation text of the installed Python and its packages, the corpus that is always there.

One document per source file: the docstrings of its module, classes and functions, each under its name and
arguments; one per shipped guide (.rst, .md, .txt) and one per package description. Sources are parsed with
`ast`; nothing is imported and nothing is run. Short strings, exact repeats within a distribution, licences,
tests and data are left out. Standard library only, because addresses are computed with it.
"""

import platform
import re
import sysconfig
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config.sources import PydocsCorpus
from pipeline.data.docstrings import MIN_DOCUMENT, clean, description, docstrings, is_new, is_prose, topics
from pipeline.data.documents import CorpusError, Document, Partition

EXTRACTOR = 1
"""Raised whenever the same packages give another text."""

PYTHON = "python"
OURSELVES = "krony"
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "test", "tests", "_tests", "idle_test", "vendor", "_vendor", "vendored", "_bundled"}
    | {"site-packages", "dist-packages", "lib2to3", "turtledemo", "licenses", "fixtures"}
)
_SKIPPED_TEXTS = re.compile(
    r"(?i)licen[cs]e|copying|copyright|notice|authors|contribut|credits|requirements|constraints|sources|"
    r"top_level|entry_points|grammar|vendor|changelog|changes|news|history"
)
_TEXTS = (".rst", ".md", ".txt")


class Pydocs:
    """The source: one partition per distribution, `python` first where it is asked for, then by name."""

    def __init__(self, config: PydocsCorpus) -> None:
        """Nothing is read before it is asked for."""
        self._config = config

    def identity(self) -> Mapping[str, Any]:
        """Distributions with versions, and the version of the extraction."""
        return {
            "name": "pydocs",
            "extractor": EXTRACTOR,
            "max_megabytes": self._config.max_megabytes,
            "packages": self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """Version by distribution, in the order of the corpus. Raises CorpusError for one not installed."""
        installed = {_canonical(found.metadata["Name"]): found.version for found in metadata.distributions()}
        installed[PYTHON] = platform.python_version()
        wanted = {_canonical(name) for name in self._config.packages}
        if "*" in wanted:
            wanted = set(installed) - {OURSELVES}
        for name in sorted(wanted - set(installed)):
            near = get_close_matches(name, installed)
            hint = f"did you mean {near[0]!r}?" if near else "install it, or take '*' for everything"
            raise CorpusError(f"corpus.packages: {name!r} is not installed; {hint}")
        return {name: installed[name] for name in sorted(wanted, key=lambda name: (name != PYTHON, name))}

    def partitions(self) -> list[Partition]:
        """One per distribution; `stamp` is its version."""
        return [
            Partition(name=name, stamp=version, text_bytes=_estimate(name))
            for name, version in self.versions().items()
        ]

    def read(self, partition: Partition) -> Iterator[Document]:
        """Its documents, by path. Raises CorpusError if this node has another version of the distribution."""
        name = partition.name
        here = platform.python_version() if name == PYTHON else metadata.version(name)
        if here != partition.stamp:
            raise CorpusError(
                f"{name} {here} is installed here, the corpus is made of {partition.stamp}; "
                "give every node the locked environment"
            )
        seen: set[bytes] = set()
        for where, text in self._texts(name, seen):
            cleaned = clean(text)
            if len(cleaned) >= MIN_DOCUMENT and is_new(cleaned, seen):
                yield Document.of(cleaned, f"{name}/{where}")

    def _texts(self, name: str, seen: set[bytes]) -> Iterator[tuple[str, str]]:
        if name != PYTHON:
            yield "METADATA", description(metadata.distribution(name).read_text("METADATA") or "")
        for where, path in sorted(_files(name)):
            if where == "pydoc_data/topics.py":  # the language reference, as strings of one dictionary
                for topic, text in topics(path.read_bytes()):
                    yield f"{where}#{topic}", text
            elif path.suffix == ".py":
                yield where, docstrings(path.read_bytes(), module=_module(where), seen=seen)
            else:
                text = path.read_text(encoding="utf-8", errors="ignore")
                if is_prose(text):
                    yield where, text


# --- which files ------------------------------------------------------------------------------------------


def _files(name: str) -> Iterator[tuple[str, Path]]:
    """Path within the distribution and on disk, of every source and guide worth reading."""
    if name == PYTHON:
        root = Path(sysconfig.get_path("stdlib"))
        found = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    else:
        files = metadata.distribution(name).files or []
        found = ((file.as_posix(), Path(str(file.locate()))) for file in files)
    return ((where, path) for where, path in found if _is_wanted(PurePosixPath(where)) and path.is_file())


def _is_wanted(where: PurePosixPath) -> bool:
    if where.suffix not in (".py", *_TEXTS) or ".." in where.parts or where.is_absolute():
        return False
    folders = where.parts[:-1]
    if _SKIPPED_FOLDERS & set(folders) or any(part.endswith((".dist-info", ".egg-info")) for part in folders):
        return False
    if where.suffix in _TEXTS:
        return not _SKIPPED_TEXTS.search(where.stem)
    return not where.stem.startswith("test_") and not where.stem.endswith("_test")


def _module(where: str) -> str:
    return where.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _estimate(name: str) -> int:
    if name == PYTHON:
        return 2_400_000
    sizes = (file.size or 0 for file in metadata.distribution(name).files or () if file.suffix == ".py")
    return sum(sizes) // 5
