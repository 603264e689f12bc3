"""The errors that people see, and the exit code of each.

Every message says where, what was wrong, what was expected and what to do. `jobs.cli` prints it as one line
and leaves with `exit_code`; anything that is not a `KronyError` is a bug of ours and keeps its traceback.

Exit codes: 0 done or already done, 1 failed, 2 bad usage or config, 3 preflight failed, 130 interrupted
(state saved).

A line is for a terminal and a log: it holds no password of an address, no control character that a file of
somebody else brought in, and ends after two thousand characters.
"""

import re
from typing import ClassVar

LONGEST_LINE = 2000
SECRET = re.compile(r"(?i)(token(?![a-z])|secret|passw(or)?d|api[-_]?key|access[-_]?key|credential|private)")
"""Names of options and variables whose values are for nobody's eyes; `--train.batch-tokens` is none."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no text of people holds: it would speak to terminals, or cannot be written as UTF-8."""

_USERINFO = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(?i)([?&][\w-]*(?:token|secret|password|passwd|pwd|key|credential)[\w-]*=)[^&\s#'\")]+")


def hide_passwords(text: str) -> str:
    """`text` with `***` for user and password of every address in it, and for secrets among its query."""
    return _QUERY.sub(r"\1***", _USERINFO.sub("***@", text))


class KronyError(Exception):
    """Base of all errors that a user can act on."""

    exit_code: ClassVar[int] = 1

    @property
    def line(self) -> str:
        """The message as one line, also where a library's words of several lines are part of it."""
        text = hide_passwords(" ".join(str(self).split()))
        text = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
        if len(text) <= LONGEST_LINE:
            return text
        return f"{text[: LONGEST_LINE - 500]} … {text[-490:]}"


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
