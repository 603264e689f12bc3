"""The main job with its store on a real S3 API behind a bad network: the same artifacts as on a disk.

Corpus to table by the real command line, Ray and its workers included. After six requests that
are left alone the next one meets a fault.
"""

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_study import DETERMINISTIC, command, surroundings

from pipeline.store.artifacts import Store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(1500),
]
STEADY = (*DETERMINISTIC, "tokens")
EVERY = 7
KINDS = ("503", "reset", "500", "cut", "reset-after", "flip", "429")


def krony(verb: str, folder: Path, store: str) -> subprocess.CompletedProcess[str]:
    out = ["--out", str(folder / "out")] if verb in ("run", "report") else []
    words = command(verb, folder, "--store", store, "--tracking.uri", "off", *out)
    return subprocess.run(
        words, cwd=folder, env=surroundings(), capture_output=True, text=True, timeout=700, check=False
    )


def table_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\nreport ")[0]


@pytest.fixture
def bucket(s3_lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A network on which every seventh request meets a fault, of each kind in turn."""
    with s3_lab.server(tmp_path / "moto.log") as port, s3_lab.network(port) as net:
        for name, value in s3_lab.environment(net).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("KRONY_CACHE", str(tmp_path / "cache"))
        turns, passed = itertools.cycle(KINDS), 0
        turn = next(turns)

        def due(kind: str) -> Any:
            def is_due(request: Any) -> bool:
                nonlocal turn, passed
                if kind != turn:
                    return False
                passed += 1
                can_be = kind not in ("cut", "flip") or request.path.endswith((".bin", ".safetensors"))
                if passed < EVERY or not can_be:
                    return False
                turn, passed = next(turns), 0
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
    assert min(met.values()) >= 2, met
    assert sum(met.values()) >= len(bucket.log) // (3 * EVERY), met

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
        {record.address: record.digest for record in Store(uri).records() if record.kind in STEADY}
        for uri in (disk, remote)
    ]
    assert digests[0] == digests[1]
    everything = "".join(
        path.read_text() for path in folders[1].rglob("*") if path.suffix in (".md", ".html")
    )
    assert "planted-secret" not in everything + again.stdout + again.stderr
