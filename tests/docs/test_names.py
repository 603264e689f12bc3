"""Flat packages are safe only while nobody else uses their names, and while `python` finds ours."""

import importlib.metadata
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
OURS = ("model", "pipeline", "jobs", "analysis", "benchmarks", "tests")


def top_level_names() -> set[str]:
    """Names that the standard library or an installed distribution other than ours can be imported by."""
    others = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if set(owners) != {"krony"}
    }
    return others | set(sys.stdlib_module_names)


def test_no_library_has_a_name_of_ours():
    assert not set(OURS) & top_level_names()


def test_a_job_started_as_a_file_shadows_no_library():
    # `python jobs/x.py` puts jobs/ first on the path: a library of the name of another verb would vanish.
    assert not {path.stem for path in (PROJECT / "jobs").glob("*.py")} & top_level_names() - {"__init__"}


def test_no_folder_of_tests_is_named_like_a_library():
    assert not {path.name for path in (PROJECT / "tests").iterdir() if path.is_dir()} & top_level_names()


def test_the_packages_that_run_are_those_of_this_checkout():
    import model

    assert Path(model.__file__).is_relative_to(PROJECT)
