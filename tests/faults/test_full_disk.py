"""Disks that are full or read-only, for real: one line for people, nothing lost, the same command goes on."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
SAID = 7


@cache
def own_mounts() -> tuple[str, ...]:
    """What starts a process that may mount a disk that nobody else sees; empty where that is not allowed."""
    for words in (("unshare", "--mount"), ("unshare", "--mount", "--map-root-user")):
        try:
            mounting = [*words, "mount", "-t", "tmpfs", "none", "/mnt"]
            done = subprocess.run(mounting, capture_output=True, check=False)
        except OSError:
            return ()
        if done.returncode == 0:
            return words
    return ()


@pytest.fixture
def scene(tmp_path: Path) -> Any:
    """Play a scene of `disk_lab.py`; what happened."""
    if not own_mounts():
        pytest.skip("mounting a disk of one's own is not allowed here")

    def play(name: str) -> dict[str, Any]:
        done = subprocess.run(
            [*own_mounts(), sys.executable, str(TESTS / "disk_lab.py"), name, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return play


def said(end: dict[str, Any], *words: str) -> None:
    assert end["code"] == SAID, end["text"]
    assert "\n" not in end["text"]
    assert all(word in end["text"] for word in words), end["text"]


def test_a_full_store_keeps_what_it_has_and_goes_on_when_there_is_room(scene: Any) -> None:
    found = scene("full_store")
    for room in ("none", "some"):
        said(found[room], "cannot be written (No space left on device)", "free or unlock the place")
        assert found[f"{room} left"] == {"code": 0, "text": "old"}
    assert found["again"]["code"] == 0, found["again"]["text"]
    assert found["after"] == {"code": 0, "text": "new"}


def test_a_full_scratch_folder_is_named_with_the_way_out(scene: Any) -> None:
    found = scene("full_scratch")
    said(found["first"], "cannot be written (No space left on device)", "set TMPDIR")
    said(found["model"], "cannot be written (No space left on device)", "set TMPDIR")
    assert found["left"] == {"code": 0, "text": "old"}
    assert found["again"]["code"] == 0, found["again"]["text"]
    assert found["after"] == {"code": 0, "text": "new"}


@pytest.mark.slow
def test_training_on_a_disk_that_fills_up_loses_nothing_and_ends_as_undisturbed(scene: Any) -> None:
    found = scene("full_training")
    assert found["quiet"] == {"code": 0, "text": "20"}
    assert found["begun"] == {"code": 0, "text": "5"}
    said(found["full"], "cannot be written (No space left on device)", "checkpoints/step-")
    assert found["again"] == {"code": 0, "text": "5"}
    assert found["same"] is True


def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(scene: Any) -> None:
    found = scene("read_only")
    assert found["read"] == {"code": 0, "text": "old"}
    said(found["written"], "cannot be written (Read-only file system)", "choose another --store")
    assert "Traceback" not in found["report"]["text"] + found["doctor"]["text"]
    assert "Read-only file system" not in found["report"]["text"]
    assert found["doctor"]["code"] == 3
    assert "Read-only file system" in found["doctor"]["text"]


def test_a_file_moves_to_another_mount_of_its_disk(scene: Any) -> None:
    found = scene("another_mount")
    assert found["same device"]
    assert found["moved"]["code"] == 0, found["moved"]["text"]
    assert (found["text"], found["left"]) == ("moved", False)
