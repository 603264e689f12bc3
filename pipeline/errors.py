"""The errors that people see, and the exit code of each.

Every message says where, what was wrong, what was expected and what to do. `jobs.cli` prints it as one line
and leaves with `exit_code`; anything that is not a `KronyError` is a bug of ours and keeps its traceback.

Exit codes: 0 done or already done, 1 failed, 2 bad usage or config, 3 preflight failed, 130 interrupted
(state saved).
"""

from typing import ClassVar


class KronyError(Exception):
    """Base of all errors that a user can act on."""

    exit_code: ClassVar[int] = 1

    @property
    def line(self) -> str:
        """The message as one line, also where a library's words of several lines are part of it."""
        return " ".join(str(self).split())


class ConfigError(KronyError):
    """The configuration or the command line is wrong."""

    exit_code: ClassVar[int] = 2


class PreflightError(KronyError):
    """Something outside the run is not ready: store, cluster, tracker, disk."""

    exit_code: ClassVar[int] = 3


class Interrupted(KronyError):
    """The user or the system asked to stop; the state is saved."""

    exit_code: ClassVar[int] = 130


class StoreError(KronyError):
    """An artifact is missing, damaged, or not what its record says."""


class DataError(KronyError):
    """A corpus, tokenizer or shard is wrong."""


class CompressError(KronyError):
    """A compression method cannot do what was asked."""


class TrainError(KronyError):
    """Training cannot start or go on."""


class EvaluateError(KronyError):
    """An evaluation cannot be made."""
