"""Where text comes from, one source per kind of corpus, and how it becomes a stored corpus.

A source says what it is (identity), into which partitions its reading falls, and reads one of them; or it
names parquet tables that already hold the documents, which are then left where they are. A new corpus is a
config class, a file with its source, and a line here. Light to import: addresses are computed with it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config.schema import RayConfig
from pipeline.config.sources import Corpus, FilesCorpus, OpenWebTextCorpus, PydocsCorpus
from pipeline.data.documents import CorpusError, Document, Partition
from pipeline.data.files import LocalFiles
from pipeline.data.openwebtext import OpenWebText
from pipeline.data.pydocs import Pydocs
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.data.tables import TextFile
    from pipeline.store.artifacts import Artifact, Identity, Store
    from pipeline.store.location import Location


class Source(Protocol):
    """What a corpus is made of."""

    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the documents, as JSON."""

    def partitions(self) -> list[Partition]:
        """Parts that can be read at the same time, in the order of the corpus."""

    def read(self, partition: Partition) -> Iterator[Document]:
        """The documents of one partition, always the same in the same order."""


CORPORA: Mapping[type, Callable[[Any], Source]] = {
    PydocsCorpus: Pydocs,
    FilesCorpus: LocalFiles,
    OpenWebTextCorpus: OpenWebText,
}
"""The only list of corpora: config class → source."""


def source_of(config: Corpus) -> Source:
    """The source that a `[corpus]` table of the config names."""
    return CORPORA[type(config)](config)


def corpus_identity(config: Corpus) -> Mapping[str, Any]:
    """What decides the documents: versions, revisions, digests. Raises CorpusError if one is not there."""
    return source_of(config).identity()


def documents(source: Source) -> Iterator[Document]:
    """All documents of a source in order, in this process."""
    for partition in source.partitions():
        yield from source.read(partition)


# --- store ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """One task: read a partition, write its documents to `target` under its number."""

    config: Corpus
    partition: Partition
    number: int
    target: "Location"
    limit_bytes: int
    """Stop after so much text; 0 takes all."""


def build_corpus(
    config: Corpus,
    identity: "Identity",
    store: "Store",
    *,
    ray: RayConfig,
    force: bool = False,
    quiet: bool = False,
) -> "Artifact":
    """Store a corpus: its documents, extracted by a task per partition, or the list of files they are in.

    Payload `corpus.json` and, where extracted, `documents-*.parquet` with columns id, text, source. Raises
    CorpusError if there is no document in it.
    """
    from pipeline.data.tables import FILE, Manifest

    if not force and (artifact := store.find(identity)):
        return artifact
    with store.attempt(identity, force=force) as attempt:
        if isinstance(config, OpenWebTextCorpus):
            manifest = OpenWebText(config).tables()
        else:
            found = _extract_all(config, attempt.location, ray=ray, quiet=quiet)
            manifest = Manifest(files=tuple(found))
            for key in set(attempt.location.list()) - {file.name for file in found}:
                attempt.location.delete(key)  # read ahead, beyond max_megabytes
        if not manifest.documents:
            raise CorpusError(
                f"corpus {config.name!r} holds no document; check what [corpus] names: empty files and "
                "texts of spaces do not count"
            )
        attempt.location.put_bytes(FILE, manifest.to_json())
        return attempt.publish(
            metrics={
                "documents": manifest.documents,
                "text_bytes": manifest.text_bytes,
                "files": len(manifest.files),
            },
            written={file.name: file.sha256 for file in manifest.files},
        )


def extract(task: Extraction) -> "list[TextFile]":
    """Write the documents of one partition; what a task does."""
    from pipeline.data.tables import write_documents
    from pipeline.store.scratch import scratch_folder

    with scratch_folder() as folder:
        return write_documents(
            source_of(task.config).read(task.partition),
            scratch=folder,
            location=task.target,
            stem=f"documents-{task.number:05d}",
            side=task.partition.side,
            limit_bytes=task.limit_bytes,
        )


def _extract_all(
    config: PydocsCorpus | FilesCorpus, target: "Location", *, ray: RayConfig, quiet: bool
) -> "list[TextFile]":
    """All partitions in order, up to `max_megabytes`.

    Tasks do not know how much text came before them: each stops at the whole limit, and the one in which it
    is reached is done again with what was left.
    """
    from pipeline.data.prepare import run_tasks

    limit = int(config.max_megabytes * 1e6)
    tasks = [
        Extraction(config=config, partition=partition, number=number, target=target, limit_bytes=limit)
        for number, partition in enumerate(source_of(config).partitions())
    ]
    found: list[TextFile] = []
    size = 0
    with Progress("corpus", len(tasks), unit="parts", quiet=quiet) as progress:
        for task, whole in zip(tasks, run_tasks(extract, tasks, ray=ray, quiet=quiet), strict=False):
            files = whole
            if limit and size and size + _text_bytes(whole) > limit:
                files = extract(replace(task, limit_bytes=limit - size))
            found += files
            size += _text_bytes(files)
            progress.update(task.number + 1, megabytes=size / 1e6)
            if limit and size >= limit:
                break
    return found


def _text_bytes(files: "list[TextFile]") -> int:
    return sum(file.text_bytes for file in files)
