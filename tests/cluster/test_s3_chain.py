"""The main job with its store on a real S3 API behind a bad network: the same artifacts as on a disk.

Corpus to table by the real command line, Ray and its workers included. One request in seven meets a fault.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.artifacts import Store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(1500),
]
PROJECT = Path(__file__).resolve().parents[2]
DETERMINISTIC = ("corpus", "tokenizer", "tokens", "init", "model", "scores")
KINDS = ("503", "reset", "500", "cut", "reset-after", "flip", "429")
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
max_steps = 20
batch_tokens = 512
seq_len = 32
checkpoint_every = 10
val_tokens = 512
log_every = 10
[train]
max_steps = 10
batch_tokens = 512
seq_len = 32
checkpoint_every = 5
val_tokens = 512
log_every = 5
[method]
name = "kron_vl"
shape = [16, 16]
[tracking]
uri = "off"
"""


def krony(verb: str, folder: Path, store: str) -> subprocess.CompletedProcess[str]:
    study = folder / "study.toml"
    study.write_text(STUDY)
    words = [sys.executable, "-m", "jobs.cli", verb, str(study), "--store", store]
    words += ["--out", str(folder / "out")] if verb in ("run", "report") else []
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    surroundings.pop("RAY_ADDRESS", None)
    return subprocess.run(
        words, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=700, check=False
    )


def table_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\nreport ")[0]


@pytest.fixture
def bucket(s3_lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A network on which one request in seven meets a fault, of each kind in turn."""
    with s3_lab.server(tmp_path / "moto.log") as port, s3_lab.network(port) as net:
        for name, value in s3_lab.environment(net).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("KRONY_CACHE", str(tmp_path / "cache"))
        passed, turns = itertools.count(1), itertools.cycle(KINDS)
        turn = next(turns)

        def due(kind: str) -> Any:
            def is_due(request: Any) -> bool:
                nonlocal turn
                can_be = kind not in ("cut", "flip") or request.path.endswith((".bin", ".safetensors"))
                if kind != turn or not can_be or next(passed) % 7:
                    return False
                turn = next(turns)
                return True

            return is_due

        net.faults += [s3_lab.Fault(kind, due(kind), times=10**6) for kind in KINDS]
        yield net


def test_the_main_job_on_object_storage_makes_what_it_makes_on_a_disk(bucket: Any, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("disk", "remote")]
    for folder in folders:
        folder.mkdir()
    disk, remote = str(tmp_path / "store"), "s3://lab/krony"
    expected = table_of(krony("run", folders[0], disk))
    assert table_of(krony("run", folders[1], remote)) == expected
    met = {fault.kind: fault.done for fault in bucket.faults}
    assert sum(met.values()) >= 20, met
    assert all(met.values()), met

    again = krony("run", folders[1], remote)
    assert table_of(again) == expected
    assert "built" not in again.stderr
    status = krony("status", folders[1], remote)
    assert "nothing is left to do" in status.stdout, status.stderr
    assert table_of(krony("report", folders[1], remote)) == table_of(krony("report", folders[0], disk))
    for store in (Store(disk), Store(remote)):
        for record in store.records():
            store.open(record.address).verify()
    digests = [
        {record.address: record.digest for record in Store(uri).records() if record.kind in DETERMINISTIC}
        for uri in (disk, remote)
    ]
    assert digests[0] == digests[1]
    everything = "".join(
        path.read_text() for path in folders[1].rglob("*") if path.suffix in (".md", ".html")
    )
    assert "planted-secret" not in everything + again.stdout + again.stderr
