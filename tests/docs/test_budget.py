"""The size and docstring budget: what ruff cannot say about our own files."""

import ast
import statistics
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path
    for package in ("model", "pipeline", "jobs", "analysis")
    for path in (PROJECT / package).rglob("*.py")
)
LINES = {path: len(path.read_text().splitlines()) for path in FILES}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_keeps_its_budget(path: Path):
    tree = ast.parse(path.read_text())
    assert LINES[path] <= (80 if path.parent.name == "jobs" and path.stem != "cli" else 400), (
        "it holds two ideas, or a job computes"
    )
    assert ast.get_docstring(tree), "a module opens with its thesis"
    if path.name == "__init__.py":
        assert len(tree.body) == 1, "an __init__.py is a docstring: importing one module must load no other"
    for node in ast.walk(tree):
        if isinstance(node, Function):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [
                each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")
            ]
            assert not bare, f"{node.name}: {bare} without a type"
            assert node.returns is not None, f"{node.name} does not say what it returns"
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)
            raises = any(isinstance(inside, ast.Raise) for inside in ast.walk(node))
            assert raises or not broad, f"line {node.lineno}: a broad except that swallows"
    for node in tree.body:
        owned = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for each in (node, *owned):
            if isinstance(each, Function | ast.ClassDef) and not each.name.startswith("_"):
                assert ast.get_docstring(each), f"{each.name} is public and has no docstring"


def test_no_file_of_the_project_holds_two_ideas():
    """Tests and benchmarks are read as well."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [PROJECT / line for line in listed.stdout.splitlines() if (PROJECT / line).is_file()]
    assert {*FILES, Path(__file__).resolve()} <= set(files)
    assert not {name(path): size for path in files if (size := len(path.read_text().splitlines())) > 400}


def test_half_of_all_files_fit_one_sitting():
    assert statistics.median(count for path, count in LINES.items() if path.name != "__init__.py") <= 150


def test_nothing_is_left_for_later():
    later = [
        f"{name(path)}: {word}"
        for path in FILES
        for word in ("TODO", "FIXME", "XXX")
        if word in path.read_text()
    ]
    assert not later
