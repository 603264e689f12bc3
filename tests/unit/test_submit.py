"""What a submitted job sees, and under which name it runs."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from jobs import cli
from pipeline import submit
from pipeline.errors import ConfigError, PreflightError

PROJECT = Path(__file__).resolve().parents[2]
SMOKE = PROJECT / "configs" / "smoke.toml"
PACKAGES = ("model", "pipeline", "jobs", "analysis", "configs")
IMPORT_ALL = """
import importlib, pkgutil, sys
count = 0
for package in ("model", "pipeline", "jobs", "analysis"):
    top = importlib.import_module(package)
    for found in pkgutil.walk_packages(top.__path__, package + "."):
        module = importlib.import_module(found.name)
        assert module.__file__.startswith(sys.argv[1]), module.__file__
        count += 1
print(count)
"""


def source_files(folder: Path) -> set[str]:
    """Every file that the packages and configs need at run time."""
    return {
        path.relative_to(folder).as_posix()
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.suffix in (".py", ".toml", ".csv", ".json", ".j2", ".html", ".md", ".css", ".js")
        and "cache" not in str(path)
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources with its ignore files, and rubbish that must stay at home."""
    folder = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(
            PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", ".*cache")
        )
    for name in (".gitignore", ".rayignore", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, folder / name)
    for rubbish in (
        "runs/store/x.bin",
        "data/x.bin",
        ".venv/lib/x.py",
        "report/index.html",
        "mlflow.db",
        "tests/test_x.py",
    ):
        (folder / rubbish).parent.mkdir(parents=True, exist_ok=True)
        (folder / rubbish).write_bytes(b"x" * 4096)
    return folder


def test_all_sources_are_sent_and_nothing_else(checkout: Path):
    sent = set(submit.plan_upload(checkout).files)
    assert source_files(checkout) <= sent
    assert not {
        name
        for name in sent
        if name.split("/")[0] in ("runs", "data", ".venv", "report", "mlflow.db", "tests")
    }


def test_a_job_gets_packages_configs_and_what_names_its_environment():
    sent = {name.split("/")[0] for name in submit.plan_upload().files}
    assert sent == {*PACKAGES, ".gitignore", ".rayignore", "LICENSE", "constraints.txt", "pyproject.toml"}


def test_what_is_shown_is_what_ray_packs(checkout: Path, tmp_path: Path):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(
        str(checkout),
        tmp_path / "sent.zip",
        include_gitignore=True,
        excludes=get_runtime_env_default_excludes(),
    )
    with zipfile.ZipFile(tmp_path / "sent.zip") as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/")}
    assert packed == set(submit.plan_upload(checkout).files)


@pytest.mark.slow
def test_everything_imports_from_what_is_sent(checkout: Path, tmp_path: Path, python):
    node = tmp_path / "node"
    for name in submit.plan_upload(checkout).files:
        (node / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, node / name)
    done = python("-c", IMPORT_ALL, str(node), cwd=node, env={"PYTHONPATH": str(node)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


@pytest.mark.parametrize("file", [".gitignore", ".rayignore"])
def test_an_unanchored_pattern_would_lose_sources(checkout: Path, file: str):
    # The trap itself: this is why the two tests above and below exist.
    with (checkout / file).open("a") as patterns:
        patterns.write("data/\n")
    assert not any(name.startswith("pipeline/data/") for name in submit.plan_upload(checkout).files)


@pytest.mark.parametrize("file", [".gitignore", ".rayignore"])
def test_ignore_patterns_are_anchored(file: str):
    patterns = [
        line for line in (PROJECT / file).read_text().splitlines() if line and not line.startswith("#")
    ]
    assert {pattern for pattern in patterns if not pattern.startswith("/")} <= {
        "__pycache__/",
        ".hypothesis/",
        ".import_linter_cache/",
        ".mypy_cache/",
        ".pytest_cache/",
        ".ruff_cache/",
    }


def test_too_much_to_send_names_the_largest_file(checkout: Path):
    (checkout / "configs" / "forgotten.npy").write_bytes(b"x" * 3 * 2**20)
    with pytest.raises(PreflightError, match=r"forgotten\.npy.*3\.0 MiB.*\.rayignore"):
        submit.plan_upload(checkout, limit_bytes=2 * 2**20)
    assert submit.plan_upload(checkout, limit_bytes=32 * 2**20).largest(1)[0][0] == "configs/forgotten.npy"


def name_of(*words: str, verb: str = "run") -> str:
    return submit.submission_id(verb, submit.read_study(SMOKE, words))


def test_the_name_follows_the_work():
    assert name_of() == name_of()
    assert name_of().startswith("krony-run-")
    assert name_of() == name_of(
        "--ray.workers", "2", "--quiet", "--train.log-every=1"
    )  # the result is the same
    different = {
        name_of(),
        name_of(verb="train"),
        name_of("--seed", "7"),
        name_of("--train.lr=1e-5"),
        name_of("--store", "/x"),
    }
    assert len(different) == 5


def test_the_command_runs_from_the_folder_that_is_sent(monkeypatch):
    monkeypatch.chdir(PROJECT / "configs")
    study = submit.read_study(Path("smoke.toml"), ["--store", "/shared/krony store"])
    upload = submit.plan_upload()
    words = ["--train.lr", "1e-4", "--store", "../relative"]
    command = submit.entrypoint(
        "train", Path("smoke.toml"), words, study=study, upload=upload, python="/opt/py/bin/python"
    )
    assert (
        command
        == "/opt/py/bin/python -m jobs.train configs/smoke.toml --train.lr 1e-4 --store '/shared/krony store'"
    )


def test_a_config_that_is_not_sent_is_refused(tmp_path: Path):
    config = tmp_path / "mine.toml"
    config.write_text('name = "mine"\n')
    study = submit.read_study(config, [])
    with pytest.raises(PreflightError, match=r"mine\.toml: would not be sent"):
        submit.entrypoint("train", config, [], study=study, upload=submit.plan_upload(), python="python")


def test_a_typo_is_found_before_anything_is_sent():
    with pytest.raises(ConfigError, match=r"train\.lrr.*did you mean 'lr'"):
        submit.read_study(SMOKE, ["--train.lrr", "1"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian", "configs/smoke.toml"], "invalid choice: 'trian'"),
        (["train"], "config"),
        (["train", "configs/nosuch.toml"], "no such config file"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(words: list[str], expected: str, capsys, monkeypatch):
    monkeypatch.chdir(PROJECT)
    assert cli.main(["submit", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


@pytest.mark.parametrize("address", ["", "auto", "127.0.0.1:6379"])
def test_an_address_that_is_no_dashboard_is_refused(address: str, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cli.main(["submit", "run", str(SMOKE)]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--address http://" in line


def test_nobody_at_the_address_is_one_line_and_exit_code_3(free_port: int, capsys):
    assert cli.main(["submit", "--address", f"http://127.0.0.1:{free_port}", "run", str(SMOKE)]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(free_port) in line


def test_a_plan_sends_nothing(capsys):
    assert cli.main(["submit", "--plan", "run", str(SMOKE)]) == 0
    shown = capsys.readouterr().out
    assert name_of() in shown
    assert "MiB" in shown


def test_what_a_job_wrote_is_shown_once_however_often_the_connection_breaks():
    text, shown = "one\ntwo\nthree\nfour\n", []
    echo = submit._Echo(shown.append)
    for parts in (["one\n", "tw"], ["on", "e\ntwo\nth"], [], ["one\ntwo\nthree\n"], [text]):
        echo.begin()
        for part in parts:
            echo.take(part)
    assert "".join(shown) == text
    assert all(shown)


@pytest.mark.parametrize(
    ("status", "code", "left_with"),
    [
        ("SUCCEEDED", 0, 0),
        ("STOPPED", -15, 130),
        ("FAILED", 2, 2),
        ("FAILED", 130, 130),
        ("FAILED", -9, 1),
        ("FAILED", 137, 1),
        ("FAILED", None, 1),
    ],
)
def test_the_exit_code_of_a_job_is_one_of_ours(status: str, code: int | None, left_with: int):
    state = submit.JobState(id="j", status=status, started="", ended="", command="", code=code)
    assert state.is_over
    assert state.exit_code == left_with


@pytest.mark.parametrize("words", [["follow"], ["stop"], ["list", "krony-run-1"]])
def test_a_job_needs_a_name_and_a_list_none(words: list[str], capsys):
    assert cli.main(["job", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "name" in line


def test_a_job_of_nobody_is_one_line_and_exit_code_3(free_port: int, capsys):
    address = f"http://127.0.0.1:{free_port}"
    assert cli.main(["job", "follow", "krony-run-1", "--address", address]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(free_port) in line


def test_git_and_ray_agree_on_what_is_source():
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert set(listed.stdout.split()) <= set(submit.plan_upload().files)
