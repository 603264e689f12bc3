"""Why a process was lost, in one line, from what Ray says of it."""

import pytest

from pipeline import stages
from pipeline.config.schema import RunConfig
from pipeline.errors import DataError
from pipeline.sweep.reasons import reason_of
from pipeline.sweep.trial import _finish
from pipeline.work import Work

KILLED = """Failure # 1 (occurred at 2026-01-01_00-00-00)
The actor died unexpectedly before finishing this task.
	class_name: Trial
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail:
Worker unexpectedly exits with a connection error code 2. End of file. There are some potential root
causes. (1) The
process is killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called."""
MEMORY = """Failure # 1 (occurred at 2026-01-01_00-00-00)
Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.1) was 15.1GB / 15.6GB (0.95), which exceeds the memory usage threshold."""
BUG = """Failure # 1 (occurred at 2026-01-01_00-00-00)
ray::Trial.train() (pid=1, ip=10.0.0.1)
  File "job.py", line 1, in perform
ZeroDivisionError: ours"""

PLACED = """Failure # 1 (occurred at 2026-01-01_00-00-00)
The actor is not schedulable.
	class_name: Trial"""


@pytest.mark.parametrize(
    ("text", "reason", "is_bug"),
    [
        (KILLED, "its process was lost: killed, or out of memory", False),
        (MEMORY, "its process was ended by Ray: the node ran out of memory", False),
        (BUG, "ZeroDivisionError: ours (a bug: please report it)", True),
        (PLACED, "its process was lost (The actor is not schedulable.)", False),
        ("", "its process was lost (Ray does not say why)", False),
    ],
)
def test_reasons(text, reason, is_bug):
    assert reason_of(text) == (reason, is_bug)


def test_a_trial_that_cannot_be_scored_says_why_in_a_line(monkeypatch):
    def scores(work: object) -> None:
        raise DataError("no text\n at all")

    monkeypatch.setattr(stages, "scores", scores)
    monkeypatch.setattr(Work, "on", lambda config, quiet: None)
    assert _finish(RunConfig()) == "no text at all"
