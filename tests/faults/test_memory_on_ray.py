"""A node on Ray whose memory runs out: Ray ends workers, the command says so, and no checkpoint is lost.

The workers really eat it: a micro-batch of all rows at once takes gigabytes. Ray is told to call the node
full that much earlier; what of the machine is in use when the test begins counts as the machine's own.
"""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import sweep_lab
from small_study import surroundings

from pipeline import stages
from pipeline.store.artifacts import Store
from pipeline.work import Work

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]
ROOM = 3e9
"""Bytes that a private Ray and two workers may take: with micro-batches of 64 some 2e9, greedy ones 5e9."""

TRAIN = (
    *("--ray.workers", "2", "--ray.max-failures", "1", "--train.batch-tokens", str(2**19)),
    *("--train.max-steps", "3", "--train.checkpoint-every", "1", "--train.log-every", "1"),
)
MODEST, GREEDY = 64, 2**14


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store that holds tokens, teacher and start."""
    folder = tmp_path_factory.mktemp("study")
    stages.init(Work.on(sweep_lab.build(folder).first, quiet=True))
    (folder / "train.toml").write_text(sweep_lab.BASE.replace("WORDS", str(folder / "words.txt")))
    return folder


def train(folder: Path, store: str, *, micro_batch: int, log: Path) -> subprocess.Popen[bytes]:
    """`krony train` on a private Ray whose node counts as full `ROOM` above what is in use now."""
    memory = psutil.virtual_memory()
    full = min(0.95, (memory.total - memory.available + ROOM) / memory.total)
    words = ["-m", "jobs.cli", "train", "train.toml", "--store", store, *TRAIN]
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *words, "--train.micro-batch", str(micro_batch)],
            cwd=folder,
            env=surroundings() | {"RAY_memory_usage_threshold": f"{full:.4f}"},
            stdout=file,
            stderr=file,
        )


def weights(store: Path) -> list[str]:
    """Digests of trained weights."""
    return [record.files["model.safetensors"].sha256 for record in Store(store).records("run")]


def test_memory_that_runs_out_is_one_line_and_costs_no_checkpoint_on_ray(study: Path, tmp_path: Path) -> None:
    for name in ("plain", "starved"):
        subprocess.run(["cp", "-r", study / "store", tmp_path / name], check=True)
    plain, log = tmp_path / "plain", tmp_path / "log"
    assert train(study, str(plain), micro_batch=MODEST, log=log).wait(400) == 0, log.read_text()

    starved = tmp_path / "starved"
    first = train(study, str(starved), micro_batch=MODEST, log=log)
    until = time.monotonic() + 300
    while not list(starved.glob("run/*/*/checkpoints/step-*1.json")):
        assert first.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 130, log.read_text()
    kept = sorted(path.name for path in starved.glob("run/*/*/checkpoints/*"))

    greedy = train(study, str(starved), micro_batch=GREEDY, log=log)
    code, said = greedy.wait(500), log.read_text()
    print(said)
    assert code == 1, said
    line = said.splitlines()[-1]
    # Ray chooses whom to end: workers alone, or all that belongs to the run, also while it starts again.
    assert re.match(r"krony train: (worker \d.*: )?the memory of node .* ran out, and Ray ended ", line), said
    assert "lower train.micro_batch" in line
    assert "the same command continues from the last checkpoint" in line
    assert "Traceback" not in said
    assert said.count("starting again") <= 1, said
    assert sorted(path.name for path in starved.glob("run/*/*/checkpoints/*")) == kept

    last = train(study, str(starved), micro_batch=MODEST, log=log)
    assert last.wait(400) == 0, log.read_text()
    assert "continues at step" in log.read_text()
    assert weights(starved) == weights(plain)
    assert len(weights(plain)) == 1
