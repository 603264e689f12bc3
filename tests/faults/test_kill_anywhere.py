"""SIGKILL in every stage of the main job: the same command goes on, and the table is that of a quiet run.

The real command line in a real process on a small study. It is killed soon after each stage is finished, that
is inside the next one, again and again on one store until a run reaches the end by itself.
"""

import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from small_study import DETERMINISTIC, command, surroundings

from pipeline.store.artifacts import Store


def command_for(folder: Path, store: str) -> list[str]:
    return command("run", folder, "--store", str(folder / store), "--out", str(folder / f"{store}-report"))


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def killed_after(words: list[str], stages: int, *, delay_s: float) -> tuple[int, list[str]]:
    """Run until so many stages were built in this process, then SIGKILL; exit code and the stages built."""
    built = []
    with start(words) as process:
        assert process.stderr
        assert process.stdout
        drain = threading.Thread(target=process.stdout.read)
        drain.start()
        for line in process.stderr:
            if found := re.match(r"(\w+) +built · (\S+)", line):
                built.append(found[2])
                if len(built) == stages:
                    threading.Timer(delay_s, process.send_signal, [signal.SIGKILL]).start()
        code = process.wait()
        drain.join()
    return code, built


def quiet_run(words: list[str]) -> tuple[str, str]:
    """Output and progress of a run that nobody disturbs."""
    with start(words) as process:
        output, progress = process.communicate()
    assert process.returncode == 0, progress
    return output, progress


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_killed_in_every_stage_it_ends_with_the_table_of_a_quiet_run(tmp_path: Path) -> None:
    expected = quiet_run(command_for(tmp_path, "quiet"))[0]
    words = command_for(tmp_path, "killed")
    built: list[str] = []
    kills = 0
    for round_ in range(20):
        code, found = killed_after(words, stages=1, delay_s=0.2 * (round_ % 4))
        assert not set(found) & set(built), "a finished stage was built again"
        built += found
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        time.sleep(0.5)
    assert kills >= 5, "too few kills to mean anything"
    table, progress = quiet_run(words)
    assert "built" not in progress
    assert table.replace("killed-report", "quiet-report") == expected
    stores = [Store(tmp_path / name) for name in ("quiet", "killed")]
    digests = [
        {record.address: record.digest for record in store.records() if record.kind in DETERMINISTIC}
        for store in stores
    ]
    assert digests[0] == digests[1]
