"""The digest of the source changes with any Python file and nothing else; packages that are missing have no version."""

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from launch.fit.rank_consistency import _software
from trainer.versions import package_versions, source_digest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("trainer", "data", "launch")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("file", ["trainer/ema.py", "data/bucket.py", "launch/fit/cli.py", "trainer/callbacks/new.py"])
def test_the_digest_changes_with_a_file_of_python(source, file):
    before = source_digest(*PACKAGES, root=source)
    with (source / file).open("a") as changed:
        changed.write("\n")
    assert source_digest(*PACKAGES, root=source) != before


def test_other_files_and_other_packages_do_not_count(source):
    before = source_digest("trainer", root=source)
    (source / "trainer" / "notes.txt").write_text("not source")
    (source / "data" / "new.py").touch()
    assert source_digest("trainer", root=source) == before


def test_a_copy_elsewhere_has_the_same_digest(source, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    assert source_digest(*PACKAGES, root=tmp_path / "copy") == source_digest(*PACKAGES, root=source)


def test_a_package_without_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no Python file"):
        source_digest("trainer", root=tmp_path)


def test_ranks_compare_the_source_of_all_our_packages():
    assert _software()["source of reblock"] == source_digest(*PACKAGES)[:16]


def test_versions_of_packages():
    assert package_versions(["torch", "no-such-package"]) == {"torch": version("torch"), "no-such-package": None}
