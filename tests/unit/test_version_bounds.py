"""The versions that were tried lie inside the bounds of pyproject.toml, and what may break us has an upper bound."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Installed with an extra that the tests do without, so that no version of theirs was tried.
NOT_TRIED = {"s3fs", "gcsfs", "deepspeed"}


def requirements() -> dict[str, Requirement]:
    listed = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    return {canonicalize_name(found.name): found for found in map(Requirement, listed)}


def tried() -> dict[str, Version]:
    lines = (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(name): Version(version) for name, equals, version in lines if equals}


@pytest.mark.parametrize("name", sorted(requirements().keys() - NOT_TRIED))
def test_the_version_that_was_tried_is_allowed(name):
    assert tried()[name] in requirements()[name].specifier


@pytest.mark.parametrize("name", ["lightning", "diffusers", "transformers"])
def test_the_next_minor_version_is_not_allowed(name):
    version, allowed = tried()[name], requirements()[name].specifier
    assert Version(f"{version.major}.{version.minor}.999") in allowed
    assert Version(f"{version.major}.{version.minor + 1}.0") not in allowed
    assert Version(f"{version.major + 1}.0.0") not in allowed


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3", "2.6.5"])
def test_versions_of_lightning_that_are_not_safe_are_not_allowed(version):
    assert Version(version) not in requirements()["lightning"].specifier
