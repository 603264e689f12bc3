"""`openwebtext`: the parquet files of OpenWebText, in their order, at a pinned revision of the hub.

80 files `plain_text/train-*.parquet`, 8,013,769 documents. Nothing is copied into the store: the corpus is a
list of files with digests and row groups, read from the footers alone; a file is fetched by the task that
encodes it. A local folder laid out as the hub lays it takes the place of the hub. Standard library at import.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.sources import OpenWebTextCorpus
from pipeline.data.documents import CorpusError, Document, Partition
from pipeline.data.files import digest

if TYPE_CHECKING:
    from pipeline.data.tables import Manifest, TextFile

READER = 1
DOCUMENTS = 8_013_769
"""Documents of the whole corpus."""

NANOGPT_TOKENS = {"train": 9_035_582_198, "val": 4_434_897}
"""What nanoGPT publishes for its split under GPT-2's tokens, end-of-text tokens included."""

_FOLDERS = ("plain_text", "data", "")
_ADVICE = "give a local folder as corpus.repo, or check the network, HF_HUB_OFFLINE and corpus.revision"


class OpenWebText:
    """The source: tables that are already there, one partition per parquet file."""

    def __init__(self, config: OpenWebTextCorpus) -> None:
        """Nothing is read before it is asked for."""
        self._config = config
        self._folder = Path(config.repo).expanduser() if Path(config.repo).expanduser().is_dir() else None

    def identity(self) -> Mapping[str, Any]:
        """The pinned revision; for a local folder names and digests of its files."""
        if self._folder is None:
            where: dict[str, Any] = {"repo": self._config.repo, "revision": self._config.revision}
        else:
            files = self._local_files(self._folder)
            where = {"files": [{"name": name, "sha256": digest(self._folder / name)} for name in files]}
        return {"name": "openwebtext", "reader": READER, "max_files": self._config.max_files, **where}

    def partitions(self) -> list[Partition]:
        """One per local file, `stamp` its path. On the hub there is nothing to read before `tables`."""
        if self._folder is None:
            return []
        paths = [(name, self._folder / name) for name in self._local_files(self._folder)]
        return [
            Partition(name=name, stamp=str(path), text_bytes=int(path.stat().st_size * 1.7))
            for name, path in paths
        ]

    def read(self, partition: Partition) -> Iterator[Document]:
        """The documents of one local file."""
        from pipeline.data.tables import read_rows, row_groups

        path = Path(partition.stamp)
        rows = sum(count for count, _ in row_groups(path, name=str(path), text_column="text"))
        for number, (text,) in enumerate(read_rows(path, ["text"], stop=rows)):
            yield Document.of(text, f"{partition.name}:{number}")

    def tables(self) -> "Manifest":
        """The files, their digests and row groups. On the hub this reads 80 footers, not the files."""
        from pipeline.data.tables import Manifest, TextFile, row_groups

        if self._folder is None:
            return Manifest(
                place="hub",
                root=self._config.repo,
                revision=self._config.revision,
                files=tuple(self._hub_files()),
            )
        files = tuple(
            TextFile(
                name=name,
                size_bytes=(self._folder / name).stat().st_size,
                sha256=digest(self._folder / name),
                groups=row_groups(self._folder / name, name=name, text_column="text"),
            )
            for name in self._local_files(self._folder)
        )
        return Manifest(place="folder", root=str(self._folder.resolve()), files=files)

    def _local_files(self, folder: Path) -> list[str]:
        found = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
        return self._train_files(found, where=str(folder))

    def _hub_files(self) -> "Iterator[TextFile]":
        from huggingface_hub import HfApi, HfFileSystem

        from pipeline.data.tables import TextFile, row_groups

        repo, revision = self._config.repo, self._config.revision
        try:
            listing = HfApi().dataset_info(repo, revision=revision, files_metadata=True).siblings or []
            known = {each.rfilename: each for each in listing if each.rfilename.endswith(".parquet")}
            for name in self._train_files(list(known), where=f"{repo}@{revision}"):
                with HfFileSystem().open(f"datasets/{repo}@{revision}/{name}", "rb") as file:
                    groups = row_groups(file, name=name, text_column="text")
                lfs = known[name].lfs
                yield TextFile(
                    name=name,
                    size_bytes=known[name].size or 0,
                    sha256=lfs.sha256 if lfs is not None else "",
                    groups=groups,
                )
        except (OSError, ValueError, RuntimeError) as err:  # what the hub's client raises, offline included
            first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
            raise CorpusError(f"{repo}@{revision}: the hub cannot be read ({first}); {_ADVICE}") from err

    def _train_files(self, names: list[str], *, where: str) -> list[str]:
        for folder in _FOLDERS:
            prefix = f"{folder}/train-" if folder else ""
            found = sorted(name for name in names if name.startswith(prefix) and name.endswith(".parquet"))
            if found:
                return found[: self._config.max_files or None]
        raise CorpusError(
            f"{where}: no parquet files; expected plain_text/train-*.parquet as the hub lays them: {_ADVICE}"
        )


def fetch(repo: str, revision: str, name: str) -> Path:
    """One file of the hub in this node's cache. Raises CorpusError if the hub cannot be reached."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision))
    except (OSError, ValueError, RuntimeError) as err:
        first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise CorpusError(f"{repo}@{revision}/{name}: cannot be fetched ({first}); {_ADVICE}") from err
