"""Every call that changes a file, of every writer of the store, fails or kills; nothing wrong is left.

The faults are put below Python, in the C library, so Arrow and safetensors meet them too: see `crash_lab.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SAID = 7


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`faulty_files.c`, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("faults are put into the C library of Linux, which takes a C compiler")
    target = tmp_path_factory.mktemp("faulty") / "faulty.so"
    words = [compiler, "-O1", "-shared", "-fPIC", "-o", target, TESTS / "faulty_files.c", "-ldl"]
    subprocess.run(words, check=True, timeout=60)
    return target


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsyncs of nothing cost nothing there."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kt-") as folder:
        yield Path(folder)


def faults(library: Path, writer: str, folder: Path) -> list[dict]:
    surroundings = os.environ | {
        "LD_PRELOAD": str(library),
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "KRONY_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, str(TESTS / "crash_lab.py"), writer, str(folder / "lab")],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writer", "fewest", "may_be_left", "ends_as"),
    [
        ("publishing", 40, {"old", "new"}, "new"),
        ("checkpointing", 20, {"old", "new"}, "new"),
        ("tokenizing", 10, {"corpus", "corpus+tokenizer"}, "corpus+tokenizer"),
        ("telling", 20, {*(f"{n} rows" for n in range(7)), "new"}, "new"),
        ("taking over", 10, {"nothing", "taken over", "new"}, "new"),
        pytest.param(
            "preparing",
            60,
            {"nothing", "corpus", "tokenizer", "corpus+tokenizer", "new"},
            "new",
            marks=[pytest.mark.nightly, pytest.mark.timeout(1200)],
        ),
    ],
)
def test_a_fault_at_any_call_leaves_what_was_there_or_what_was_meant(
    library: Path, memory: Path, writer: str, fewest: int, may_be_left: set[str], ends_as: str
) -> None:
    found = faults(library, writer, memory)
    assert found[-1]["of"] >= fewest
    assert len(found) == 3 * found[-1]["of"]
    for row in found:
        where, met, mended = json.dumps(row), row["met"], row["mended"]
        assert met["code"] == -9 if row["kind"].startswith("killed") else met["code"] in (0, SAID), where
        assert mended["code"] == 0, where
        left, _, after = mended["text"].partition(", then ")
        assert left in may_be_left, where
        assert after == ends_as, where
        if met["code"] == SAID:
            assert "\n" not in met["text"], where
            assert "cannot be" in met["text"], where
    ends = Counter(row["met"]["code"] for row in found)
    assert ends[-9] == 2 * found[-1]["of"]
    assert ends[SAID] > ends[0]
