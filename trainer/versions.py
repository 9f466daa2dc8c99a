"""Which program runs: the versions of its packages, and a digest of our own source."""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

#: The folder that holds our packages.
_ROOT = Path(__file__).resolve().parents[1]


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Version of each package by the name that it is installed under; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def source_digest(*packages: str, root: Path = _ROOT) -> str:
    """SHA-256, in hex, of the names and contents of all Python files.

    Args:
        packages: whose files, e.g. "trainer" and "data".
        root: the folder that the packages lie in.

    Raises:
        ValueError: if a package holds no Python file.
    """
    digest = hashlib.sha256()
    for package in packages:
        paths = sorted((root / package).rglob("*.py"))
        if not paths:
            raise ValueError(f"{root / package} holds no Python file, expected one of our packages.")
        for path in paths:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
