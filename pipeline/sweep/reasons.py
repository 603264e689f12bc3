"""Why a process was lost, in one line, from what Tune wrote down of it."""

from pathlib import Path
from typing import Any


def error_text(trial: Any) -> str:
    """What Tune wrote down of the error; `Trial.get_error` looks where it is copied to later."""
    path = Path(trial.error_file) if trial.error_file else None
    return path.read_text() if path and path.is_file() else ""


def reason_of(error: str) -> tuple[str, bool]:
    """Why a job was lost, in one line, from Tune's text; and whether it is an error that a retry repeats."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    if "ray::" in error:  # where a remote error begins, its text says which method it left
        return f"{lines[-1]} (a bug: please report it)", True
    if "low on memory" in error or "OutOfMemoryError" in error:
        return "its process was ended by Ray: the node ran out of memory", False
    if "died unexpectedly" in error:
        return "its process was lost: killed, or out of memory", False
    said = next((line for line in lines if not line.startswith("Failure #")), "Ray does not say why")
    return f"its process was lost ({said})", False
