"""Where a result comes from: commit, dirty diff, lock, command line, host, versions.

Everything here is recorded and nothing of it is identity: two machines may build the same artifact. No
environment variable and no argument value that looks like a secret enters a record.
"""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import CONTROL, SECRET, hide_passwords

PROJECT = Path(__file__).resolve().parents[2]
_VERSIONS = (
    "torch",
    "ray",
    "transformers",
    "tokenizers",
    "tiktoken",
    "gigatoken",
    "datasets",
    "mlflow",
    "numpy",
    "pyarrow",
)


def provenance() -> dict[str, Any]:
    """What to write beside a result made by this process."""
    return {**_constant(), "argv": redact(sys.argv), "pid": os.getpid()}


def redact(argv: Sequence[str]) -> list[str]:
    """`argv` without values of options that look like secrets, passwords in URIs and control characters."""
    clean: list[str] = []
    hide_next = False
    for word in argv:
        if hide_next:
            clean.append("***")
            hide_next = False
        elif word.startswith("-") and SECRET.search(word.split("=", 1)[0]):
            option, equals, _ = word.partition("=")
            clean.append(f"{option}=***" if equals else option)
            hide_next = not equals
        else:
            clean.append(hide_passwords(word))
    return [CONTROL.sub("\N{REPLACEMENT CHARACTER}", word) for word in clean]


@lru_cache(maxsize=1)
def _constant() -> dict[str, Any]:
    diff = _git("diff", "HEAD")
    lock = PROJECT / "constraints.txt"
    return {
        "commit": _git("rev-parse", "HEAD").strip() or os.environ.get("KRONY_COMMIT", ""),
        "dirty": hashlib.sha256(diff.encode()).hexdigest()[:16]
        if diff.strip()
        else os.environ.get("KRONY_DIRTY", ""),
        "lock": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "accelerator": _accelerator(),
        "versions": {name: _version(name) for name in _VERSIONS},
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""  # a job on a cluster has no git; KRONY_COMMIT and KRONY_DIRTY come from the submitter
    return done.stdout if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _accelerator() -> str:
    torch = sys.modules.get("torch")  # never loaded for this: the light commands must stay light
    if torch is None:
        return ""
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
