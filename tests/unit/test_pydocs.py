"""The embedded corpus: what a source file says, which files are read, and always the same."""

import subprocess
import sys

import pytest

from pipeline.config.sources import PydocsCorpus
from pipeline.data.corpora import corpus_identity, documents, source_of
from pipeline.data.docstrings import clean, description, docstrings, is_prose, topics
from pipeline.data.documents import CorpusError, Partition, document_id
from pipeline.data.pydocs import Pydocs

SOURCE = b'''
"""The module, described in one sentence.

And in another paragraph.
"""
raise SystemExit("nobody may run this")

def area(width, /, height, *rest, unit="m", **options):
    """The area of a rectangle, in square units."""
    def inner():
        """Not part of the documentation of anything."""

class Shape(Base):
    """Something that has an area and a name."""

    def __init__(self, name):
        """Remember the name of this shape here."""

    @classmethod
    def make(cls, kind):
        """short"""

    async def draw(self):
        """The area of a rectangle, in square units."""

try:
    import fast
except ImportError:
    def slow_path(x):
        """What is used where the fast one is missing."""
'''


def test_docstrings_stand_under_their_names_in_the_order_of_the_source():
    assert docstrings(SOURCE, module="shapes.flat", seen=set()) == (
        "shapes.flat\nThe module, described in one sentence.\n\nAnd in another paragraph.\n\n"
        "shapes.flat.area(width, height, *rest, unit, **options)\n"
        "The area of a rectangle, in square units.\n\n"
        "shapes.flat.Shape\nSomething that has an area and a name.\n\n"
        "shapes.flat.Shape.__init__(name)\nRemember the name of this shape here.\n\n"
        "shapes.flat.slow_path(x)\nWhat is used where the fast one is missing."
    )


def test_strings_seen_before_are_left_out():
    seen = set()
    first = docstrings(SOURCE, module="a", seen=seen)
    assert "area of a rectangle" in first
    assert docstrings(SOURCE, module="b", seen=seen) == ""


@pytest.mark.parametrize("source", [b"def (", b"\x00", b"print 'two'", b"# coding: nonsense\n", b"(" * 5000])
def test_a_source_that_cannot_be_parsed_says_nothing(source):
    assert docstrings(source, module="x", seen=set()) == ""


def test_text_is_cleaned():
    dirty = "e\u0301tat\x00  \r\n\n\n\nAll rights reserved by somebody.\n\nlast\tline\n" + "x" * 2000
    assert clean(dirty) == "état\n\nlast    line"


def test_prose_is_told_from_data():
    sentence = "The quick brown fox jumps over the lazy dog while we look at it. "
    assert is_prose((sentence + "\n") * 10)
    assert not is_prose("\n".join(str(i) for i in range(500)))
    assert not is_prose("word\n" * 500)


def test_a_description_loses_badges():
    body = (
        "# Name\n[![build](https://x)](y)\n<p>html</p>\n"
        + "It does one thing and does it well for you.\n" * 9
    )
    text = description(f"Metadata-Version: 2.1\nName: x\n\n{body}")
    assert "badge" not in text
    assert "html" not in text
    assert text.startswith("# Name\nIt does one thing")


def test_topics_are_read_without_running_them():
    assert dict(topics(b"topics = {'assert': 'The statement', 'bool': 'Two values'}")) == {
        "assert": "The statement",
        "bool": "Two values",
    }


def test_reading_twice_gives_the_same_documents():
    config = PydocsCorpus(packages=("tiktoken", "packaging"))
    first = list(documents(source_of(config)))
    assert first == list(documents(source_of(config)))
    assert len(first) > 5
    assert [each.source.split("/")[0] for each in first] == sorted(
        each.source.split("/")[0] for each in first
    )
    assert all(each.id == document_id(each.text) and len(each.text) >= 240 for each in first)


def test_the_standard_library_is_there_and_is_prose():
    (python,) = Pydocs(PydocsCorpus(packages=("python",))).partitions()
    found = Pydocs(PydocsCorpus()).read(python)
    some = [next(found) for _ in range(40)]
    assert all(each.source.startswith("python/") for each in some)
    assert not any("/test/" in each.source or "site-packages" in each.source for each in some)
    letters = sum(char.isalpha() or char.isspace() for each in some for char in each.text)
    assert letters > 0.75 * sum(len(each.text) for each in some)


def test_the_identity_is_versions():
    identity = corpus_identity(PydocsCorpus(packages=("numpy", "Python")))
    assert list(identity["packages"]) == ["python", "numpy"]
    assert identity["packages"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_everything_installed_is_python_and_all_distributions_but_this_one():
    names = [part.name for part in Pydocs(PydocsCorpus(packages=("*",))).partitions()]
    assert names[0] == "python"
    assert {"numpy", "ray", "torch"} < set(names)
    assert "krony" not in names
    assert names[1:] == sorted(set(names[1:]))


def test_a_package_that_is_not_installed_is_named_with_its_neighbour():
    with pytest.raises(CorpusError, match=r"'nmupy' is not installed; did you mean 'numpy'\?"):
        corpus_identity(PydocsCorpus(packages=("nmupy",)))


def test_a_node_with_another_version_is_refused():
    other = Partition(name="numpy", stamp="1.0")
    with pytest.raises(CorpusError, match=r"the corpus is made of 1\.0"):
        list(Pydocs(PydocsCorpus()).read(other))


def test_addresses_are_computed_without_a_heavy_library():
    heavy = ("datasets", "huggingface_hub", "numpy", "pandas", "pyarrow", "ray", "tokenizers", "torch")
    code = (
        "import sys; from pipeline.config.schema import PydocsCorpus; "
        "from pipeline.data.corpora import corpus_identity; corpus_identity(PydocsCorpus()); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
