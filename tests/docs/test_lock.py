"""The lock: it pins what pyproject.toml asks for, it is what is installed, and it names no place."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[2]
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
ASKED = [
    *METADATA["dependencies"],
    *(each for extra in METADATA["optional-dependencies"].values() for each in extra),
]
PINS = [Requirement(line) for line in (PROJECT / "constraints.txt").read_text().splitlines() if line]


def pinned(name: str) -> str:
    """The version that the lock gives this interpreter on this machine."""
    here = [
        pin
        for pin in PINS
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate())
    ]
    assert len(here) == 1, f"{name} is pinned {len(here)} times"
    (version,) = here[0].specifier
    assert version.operator == "=="
    return version.version


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_for_is_pinned_within_its_range(asked: str):
    wanted = Requirement(asked)
    assert wanted.specifier.contains(pinned(wanted.name)), "pyproject.toml changed: run `make lock`"


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_pinned_is_what_runs(asked: str):
    name = Requirement(asked).name
    installed = importlib.metadata.version(name).split("+")[0]  # torch says which build it is
    assert installed == pinned(name), "run `make bootstrap`"


def test_a_cpu_build_brings_no_gpu_library():
    if "+cpu" not in importlib.metadata.version("torch"):
        pytest.skip("this torch is a CUDA build")
    names = {canonicalize_name(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    assert not {name for name in names if name.startswith("nvidia-") or name == "triton"}


@pytest.mark.parametrize(
    "file", ["constraints.txt", "pyproject.toml", "Makefile", ".ci/bootstrap", "cluster.yaml"]
)
def test_no_file_decides_where_packages_come_from(file: str):
    text = (PROJECT / file).read_text()
    assert not re.search(r"--(extra-)?index-url|--find-links|find-links *=|tool\.uv\.index", text)
    assert not re.search(r"==[^\s;]*\+(cpu|cu\d+)", text), "the build of torch is the choice of the user"
