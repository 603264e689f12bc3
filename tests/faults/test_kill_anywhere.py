"""SIGKILL in every stage of the main job: the same command goes on, and the table is that of a quiet run.

The real command line in a real process on a small study. It is killed soon after each stage is finished, that
is inside the next one, again and again on one store until a run reaches the end by itself.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.store.artifacts import Store

PROJECT = Path(__file__).resolve().parents[2]
DETERMINISTIC = ("corpus", "tokenizer", "init", "model", "scores")
"""Kinds whose payload holds no trace of when it was made; histories hold speeds, checkpoints do not."""

STUDY = """
name = "small"
[corpus]
packages = ["numpy"]
max_megabytes = 0.3
[tokenizer]
vocab_size = 300
[data]
validation_fraction = 0.2
[teacher]
n_layer = 1
n_head  = 2
n_embd  = 16
n_ctx   = 32
[teacher.train]
max_steps = 60
batch_tokens = 512
seq_len = 32
checkpoint_every = 5
val_tokens = 512
log_every = 5
[train]
max_steps = 20
batch_tokens = 512
seq_len = 32
checkpoint_every = 5
val_tokens = 512
log_every = 5
[method]
name = "kron_vl"
shape = [16, 16]
"""


def command(folder: Path, store: str) -> list[str]:
    study = folder / "study.toml"
    study.write_text(STUDY)
    return [
        *(sys.executable, "-m", "jobs.run", str(study)),
        *("--store", str(folder / store), "--out", str(folder / f"{store}-report")),
    ]


def start(words: list[str]) -> subprocess.Popen[str]:
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"}
    surroundings.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        words, cwd=PROJECT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    expected = quiet_run(command(tmp_path, "quiet"))[0]
    words = command(tmp_path, "killed")
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
