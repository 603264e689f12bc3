"""OpenWebText: the hub's layout in a folder, and the hub itself up to the network call."""

from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sources import OpenWebTextCorpus
from pipeline.data.corpora import corpus_identity, documents, source_of
from pipeline.data.documents import CorpusError
from pipeline.data.openwebtext import OpenWebText, fetch
from pipeline.data.rows import Corpus, Range
from pipeline.store.copies import sha256_file
from pipeline.store.location import Location

REVISION = OpenWebTextCorpus().revision


def lay(root, folder="plain_text", files=3, documents=5):
    """A folder as the hub lays it; document k of file f says so."""
    where = root / folder
    where.mkdir(parents=True)
    for f in range(files):
        texts = [f"file {f} document {k}" for k in range(documents)]
        name = f"train-{f:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.table({"text": texts}), where / name, row_group_size=2)
    return root


@pytest.mark.parametrize("folder", ["plain_text", "data", "."])
def test_a_local_folder_is_read_in_the_order_of_the_hub(tmp_path, folder):
    config = OpenWebTextCorpus(repo=str(lay(tmp_path / "owt", folder)))
    manifest = OpenWebText(config).tables()
    assert [file.name for file in manifest.files] == sorted(file.name for file in manifest.files)
    assert [file.documents for file in manifest.files] == [5, 5, 5]
    assert [rows for rows, _ in manifest.files[0].groups] == [2, 2, 1]
    corpus = Corpus(manifest=manifest, payload=Location.of(tmp_path))
    assert [text for _, text in corpus.rows(Range(1, 1, 4))] == [f"file 1 document {k}" for k in (1, 2, 3)]
    assert [each.text for each in documents(source_of(config))][:2] == [
        "file 0 document 0",
        "file 0 document 1",
    ]


def test_only_the_first_files_are_taken_if_asked(tmp_path):
    config = OpenWebTextCorpus(repo=str(lay(tmp_path / "owt")), max_files=2)
    assert OpenWebText(config).tables().documents == 10


def test_the_identity_of_a_folder_is_its_files_and_of_the_hub_the_revision(tmp_path):
    one, two = lay(tmp_path / "a"), lay(tmp_path / "b")
    assert corpus_identity(OpenWebTextCorpus(repo=str(one))) == corpus_identity(
        OpenWebTextCorpus(repo=str(two))
    )
    assert corpus_identity(OpenWebTextCorpus())["revision"] == REVISION


def test_a_folder_without_parquet_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"empty: no parquet files; expected plain_text/train-"):
        corpus_identity(OpenWebTextCorpus(repo=str(tmp_path / "empty")))


def test_without_a_network_the_way_out_is_named():
    with pytest.raises(CorpusError) as caught:
        OpenWebText(OpenWebTextCorpus()).tables()
    assert "Skylion007/openwebtext" in str(caught.value)
    assert "give a local folder as corpus.repo" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CorpusError, match="cannot be fetched"):
        fetch("Skylion007/openwebtext", REVISION, "plain_text/train-00000-of-00080.parquet")


def test_the_hub_is_listed_with_digests_and_footers_and_nothing_is_fetched(tmp_path, monkeypatch):
    """The answers of the hub stand in for the network; the calls are those of its client."""
    root = lay(tmp_path / "owt")
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.parquet"))
    asked = []

    def dataset_info(self, repo, *, revision, files_metadata):
        asked.append((repo, revision, files_metadata))
        siblings = [SimpleNamespace(rfilename="README.md", size=3, lfs=None)]
        for name in names:
            lfs = SimpleNamespace(sha256=sha256_file(root / name))
            siblings.append(SimpleNamespace(rfilename=name, size=(root / name).stat().st_size, lfs=lfs))
        return SimpleNamespace(siblings=siblings)

    def open_remote(self, path, mode):
        return (root / path.removeprefix(f"datasets/Skylion007/openwebtext@{REVISION}/")).open(mode)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "open", open_remote)
    manifest = OpenWebText(OpenWebTextCorpus()).tables()
    local = OpenWebText(OpenWebTextCorpus(repo=str(root))).tables()
    assert asked == [("Skylion007/openwebtext", REVISION, True)]
    assert manifest.place == "hub"
    assert manifest.files == local.files


def test_a_file_in_the_cache_of_the_hub_is_used_without_a_network(tmp_path, monkeypatch):
    snapshot = lay(tmp_path / "datasets--Skylion007--openwebtext/snapshots" / REVISION)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "plain_text/train-00002-of-00003.parquet"
    assert fetch("Skylion007/openwebtext", REVISION, name) == snapshot / name
