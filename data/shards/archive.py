"""The members of a tar archive, found by its headers: nothing is extracted, no name is trusted."""

import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Extensions of members whose usual readers run code: refused in every archive.
CODE_SUFFIXES = ("pyd", "pickle", "pkl", "pt", "pth", "ckpt", "joblib", "dill")
_BLOCK = 512


@dataclass(frozen=True)
class Member:
    """The byte range of a file inside an archive.

    Args:
        offset: of its first byte.
        size: in bytes.
        version: of the archive, which tells a cache from another archive of the same name; empty if unknown.
    """

    offset: int
    size: int
    version: str = field(default="", compare=False)


Members = Mapping[str, Member]


@dataclass
class Scan:
    """What the headers of an archive list.

    Args:
        samples: (key, extension -> member), in the order of the archive.
        refused: (name, reason) of members that are not read.
        damage: what is wrong with the archive itself; the samples are those before the damage.
    """

    samples: list[tuple[str, dict[str, Member]]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    damage: str | None = None


def refusal(name: str) -> str | None:
    """Why a member of this name is not read; None if it may be."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name):
        return "its name is absolute"
    if ".." in name.replace("\\", "/").split("/"):
        return "its name leads out of the archive"
    suffix = name.rpartition(".")[2].lower()
    if suffix in CODE_SUFFIXES:
        return f".{suffix} files can hold code; shards are data"
    return None


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member, by webdataset's rule: the name is cut at its last part's first dot."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def scan_tar(path: Path) -> Scan:
    """Reads the headers of a webdataset archive.

    Raises:
        OSError: if the file cannot be opened.
    """
    scan = Scan()
    size = path.stat().st_size
    found: dict[str, dict[str, Member]] = {}
    if size == 0:
        scan.damage = "is empty (0 bytes)"
        return scan
    try:
        with tarfile.open(path, "r:") as archive:
            while (info := archive.next()) is not None:
                _add(info, size, found, scan)
            # tarfile takes a damaged header in the middle for the end: a whole archive ends with a block of zeros.
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        scan.damage = scan.damage or f"is not a whole tar archive ({error})"
    else:
        with path.open("rb") as file:
            file.seek(end)
            last = file.read(_BLOCK)
        if scan.damage is None and last != bytes(_BLOCK):
            scan.damage = f"is cut or damaged at byte {end} of {size}"
    scan.samples = list(found.items())
    return scan


def _add(info: tarfile.TarInfo, size: int, found: dict[str, dict[str, Member]], scan: Scan) -> None:
    """Adds a member to its sample, or to what is refused."""
    if info.isdir():
        return
    reason = refusal(info.name)
    if not info.isreg() or info.issparse():
        reason = "it is a link, a device or a sparse file"
    if reason:
        scan.refused.append((info.name, reason))
        return
    key, extension = split_name(info.name)
    if info.offset_data + info.size > size:
        scan.damage = f"is cut inside {info.name}: {size} bytes, expected {info.offset_data + info.size} or more"
        return
    members = found.setdefault(key, {})
    if extension in members:
        scan.refused.append((info.name, "another member of this name comes before it"))
        return
    members[extension] = Member(info.offset_data, info.size)
