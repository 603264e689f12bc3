"""The README keeps its word: what it says to type is typed here, and whatever it names exists.

A fenced block that opens with ```sh test runs, line by line under `set -e`, the blocks of one file in their
order and in one folder: a fresh copy of the sources, with the environment of this run on the PATH. A plain
```sh block is for other machines, or for longer; its krony verbs, modules, make targets and config files are
checked and nothing is run.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.cli import VERBS

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```sh([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of shell."""

    page: str
    line: int
    runs: bool
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page.name, text[: found.start()].count("\n") + 1, "test" in found[1].split(), found[2])
        for found in FENCE.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]
RUNNING = sorted({block.page for block in ALL if block.runs})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources as git tracks them, in a folder of their own."""
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (PROJECT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, tmp_path / name)
    return tmp_path


def test_the_readme_shows_commands_that_are_tested():
    assert "README.md" in RUNNING
    shown = "\n".join(block.text for block in ALL if block.page == "README.md")
    assert "make run" in shown
    assert "make test" in shown


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUNNING)
def test_the_commands_of_a_page_run(page: str, copy: Path):
    script = "\n".join(block.text for block in ALL if block.page == page and block.runs)
    surroundings = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")
    }
    surroundings |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(copy)}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=copy,
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{block.page}:{block.line}")
def test_whatever_a_page_names_exists(block: Block):
    targets = set(re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    for words in (re.split(r"\s+", line.strip()) for line in block.text.replace("\\\n", " ").splitlines()):
        for before, word in zip(["", *words], words, strict=False):
            if before == "make":
                assert word in targets, word
            if before == "krony" and not word.startswith("-"):
                assert word in VERBS, word
            if word.startswith("configs/") and "…" not in word:
                assert (PROJECT / word).exists(), word
            if before == "-m" and word.startswith(("jobs.", "benchmarks.")):
                assert (PROJECT / f"{word.replace('.', '/')}.py").is_file(), word


def test_links_between_pages_lead_somewhere():
    dead = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:\s]+)[^)]*\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not dead
