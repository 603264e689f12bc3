"""Nothing that we read can run: no pickle, no code in YAML, no unpacked archive, no evaluated text."""

import ast
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "pipeline", "jobs", "analysis", "benchmarks", "docs")
FILES = sorted(path for package in PACKAGES for path in (PROJECT / package).rglob("*.py"))
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pd.read_pickle"}
CALLS |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")}
UNPACKERS = (".extractall", ".extract", ".unpack_archive")
OWN_EXPORTS = {"benchmarks/decode_export.py", "benchmarks/gpu.py"}
"""They time our own factored folder, which they have just written, as others open it."""


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None if there is none."""
    found = [
        each.value.value
        for each in call.keywords
        if each.arg == name and isinstance(each.value, ast.Constant)
    ]
    return found[0] if found else None


def complaints(path: Path, tree: ast.Module) -> list[str]:
    """Every place of a file that could run what it reads."""
    where = path.relative_to(PROJECT).as_posix() if path.is_relative_to(PROJECT) else path.name
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [each.name for each in node.names]
            origin = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            found += [
                f"{where}:{node.lineno}: imports {name}" for name in origin if name.split(".")[0] in MODULES
            ]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rsplit(".", 1)[-1]
        bad = [
            name in CALLS,
            name.endswith(UNPACKERS),
            name in ("torch.load", "torch.jit.load", "torch.hub.load")
            and keyword(node, "weights_only") is not True,
            keyword(node, "weights_only") is False,
            last in ("load", "open_memmap") and keyword(node, "allow_pickle") not in (None, False),
            keyword(node, "trust_remote_code") not in (None, False) and where not in OWN_EXPORTS,
            keyword(node, "shell") not in (None, False),
            keyword(node, "use_safetensors") is False,
        ]
        found += [f"{where}:{node.lineno}: {name}"] * any(bad)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_a_file_runs_nothing_that_it_reads(path: Path):
    assert complaints(path, ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "tarfile.open(path).extractall()",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str):
    assert complaints(Path("x.py"), ast.parse(line))


def test_nothing_that_could_run_lies_in_the_repository():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    endings = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib", ".so")
    assert not [line for line in listed.stdout.splitlines() if line.endswith(endings)]
