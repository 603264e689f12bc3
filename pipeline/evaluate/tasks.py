"""What lm-evaluation-harness is asked: a task of its own on a text of ours, or a task as its file stands.

`lambada_openai`, `lambada_standard` and `wikitext` keep the harness's file, with its questions, its counting
and its version; only their documents are ours, from the text whose digest we pin. So they need no network,
and the same text gives the same number here and there. Any other task is taken as it is: from `eval.tasks`,
or from the harness, which then fetches its data. Does not import the harness.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipeline.errors import EvaluateError, PreflightError
from pipeline.evaluate.protocols import Protocol
from pipeline.evaluate.texts import TEXTS, Text

_FILES: Mapping[str, str] = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "lambada_standard": "lambada/lambada_standard.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
"""Where the harness keeps the tasks that are bound to our texts."""

VERSIONS: Mapping[str, float] = {"lambada_openai": 1.0, "lambada_standard": 1.0, "wikitext": 2.0}
"""What the harness calls the definitions that our protocols of these names mean."""

_GROUP = re.compile(r"^group:", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task with what it is asked about."""

    name: str
    """As the harness calls it."""

    text: Text | None = None
    """Our text, where the task is bound to one."""

    folder: str = ""
    """Folder with task files, `eval.tasks`."""


def harness_version() -> str:
    """The version of the installed harness; raises PreflightError, with what to install, without one."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError as err:
        raise PreflightError(
            "protocols lm_eval/… need lm-evaluation-harness, which is not installed: "
            "pip install 'krony[lm-eval]'"
        ) from err


def text_identity(protocol: Protocol, folder: str) -> str:
    """What an address says about the documents of a harness protocol.

    The digest of our text; for a task in `folder` that of all its files; else the version of the harness,
    whose own file then names the data.
    """
    if protocol.text:
        return TEXTS[protocol.text].sha256
    if folder and task_file(protocol.task, folder):
        return _digest(Path(folder).expanduser())
    return f"lm_eval {harness_version()}"


def require_known_version(task: HarnessTask, version: object) -> None:
    """Raise EvaluateError if the harness asks otherwise than the protocol says that bears its name.

    Only for tasks on our texts: of others the address holds the files, or the version of the harness.
    """
    if task.text is not None and version != VERSIONS[task.name]:
        raise EvaluateError(
            f"lm_eval/{task.name} is version {VERSIONS[task.name]} of the task, the installed harness has "
            f"{version}: install lm-eval 0.4.13"
        )


def task_file(name: str, folder: str) -> Path | None:
    """The file below `folder` that defines a task or a group; raises EvaluateError if there is no folder."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise EvaluateError(
            f"eval.tasks={folder!r} is not a folder; name one with task files (.yaml), or leave it"
        )
    return _defining(name, root)


def own_task_file(name: str) -> Path | None:
    """The file that defines a task, or a group, in the installed harness.

    Text is searched: the harness would parse its 14,000 files first.
    """
    return _defining(name, own_folder())


def is_group(file: Path) -> bool:
    """Whether a file defines a group of tasks."""
    return _GROUP.search(file.read_text(encoding="utf-8")) is not None


def write_bound(task: HarnessTask, folder: Path) -> None:
    """The harness's task on our text: a task file that includes its own, and the documents beside it.

    Afterwards `folder` is all that the harness needs, from our code or from its own command line.
    """
    assert task.text is not None, "only a task of ours is written"
    documents = folder / "documents.jsonl"
    rows = documents_of(task)
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = {  # JSON is YAML
        "include": str(own_folder() / _FILES[task.name]),
        "task": task.name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(documents)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": None,
    }
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
    (folder / f"{task.name}.yaml").write_text(text, encoding="utf-8")


def documents_of(task: HarnessTask) -> list[dict[str, str]]:
    """The documents as the harness's data sets hold them: passages as `text`, pages of WikiText as `page`."""
    assert task.text is not None, "a task as its file stands has documents of its own"
    if task.name == "wikitext":
        return [{"page": page} for page in pages(task.text.rows)]
    return [{"text": row} for row in task.text.rows]


def pages(rows: Sequence[str]) -> list[str]:
    """Raw WikiText in pages, each from its title on, as the harness cuts it.

    A row that is blank stands for the line of one space that the file has there.
    """
    found: list[list[str]] = [[]]
    lines = [row.removesuffix("\n") if row else " " for row in rows]
    for line in [*lines, ""]:  # the file ends with a newline
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            found.append([])
        found[-1].append(line)
    texts = ["\n".join(page) for page in found]
    return [text for text in texts if text.strip()]


def own_folder() -> Path:
    """Where the installed harness keeps its tasks; raises PreflightError without one."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        harness_version()  # raises, with what to install
        raise AssertionError("an installed harness has a folder")
    return Path(spec.origin).parent / "tasks"


def _defining(name: str, root: Path) -> Path | None:
    named = re.compile(rf"^(task|group):\s*['\"]?{re.escape(name)}['\"]?\s*(#.*)?$", re.MULTILINE)
    for path in sorted(root.rglob("*.yaml")):
        if named.search(path.read_text(encoding="utf-8", errors="replace")):
            return path
    return None


def _digest(root: Path) -> str:
    """Of the names and contents of all files below a folder."""
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            whole.update(path.relative_to(root).as_posix().encode() + b"\0")
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()
