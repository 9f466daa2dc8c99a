"""What video and latent shards have in common: tar archives, the record of each, the index of a folder, faults.

A folder of shards holds `shard-000000.tar`, ..., `records/shard-000000.json` (settings, counts, checksum and faults of
each finished shard), `faults.jsonl` and, when all shards are there, `index.json`.
"""

import hashlib
import json
import os
import tarfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import webdataset

VIDEO_FORMAT = "reblock-videos-1"
LATENT_FORMAT = "reblock-latents-1"


@dataclass(frozen=True)
class Fault:
    """An item that was left out, and why."""

    key: str
    reason: str


def beside(path: Path) -> Path:
    """A hidden name next to `path`, of its own for every process on every machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def write_text(path: Path, text: str) -> None:
    """Writes text beside `path` and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and renames it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A short name for settings, to know that a finished shard was made with the same ones."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


# -- archives --------------------------------------------------------------------------------------------------------


def write_tar(path: Path, samples: Iterable[Mapping[str, bytes | str]]) -> dict[str, Any]:
    """Writes samples ({"__key__": name, extension: bytes}) as a webdataset archive; equal samples give equal bytes.

    Returns:
        The shard's entry in the index: name, samples, bytes, sha256.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path)
    count = 0
    try:
        with webdataset.TarWriter(str(part), encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write({k: v.encode() if isinstance(v, str) and k != "__key__" else v for k, v in sample.items()})
                count += 1
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return {"name": path.name, "samples": count, "bytes": path.stat().st_size, "sha256": sha256(path)}


@dataclass(frozen=True)
class Member:
    """Where a file lies inside an archive."""

    offset: int
    size: int


def list_samples(path: Path) -> dict[str, dict[str, Member]]:
    """Samples of an archive in its order: key -> extension -> place. Only headers are read.

    Raises:
        ValueError: if the archive is damaged or truncated.
    """
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, {})[extension] = Member(info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} is not a whole tar archive ({error}); make it again.") from error
    return samples


def read_member(path: Path, member: Member) -> bytes:
    """The bytes of one file inside an archive."""
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


# -- folders ---------------------------------------------------------------------------------------------------------


def read_index(folder: Path, expected: str | None = None) -> dict[str, Any]:
    """The index of a folder of shards.

    Args:
        folder: of the shards.
        expected: its format, `VIDEO_FORMAT` or `LATENT_FORMAT`; None takes either.

    Raises:
        ValueError: if there is none, it is of another format, or it lists no sample or an absent shard.
    """
    commands = {VIDEO_FORMAT: "`reblock pack`", LATENT_FORMAT: "`reblock encode`"}
    made_by = commands.get(expected or "", " or ".join(commands.values()))
    path = folder / "index.json"
    if not path.is_file():
        seen = "does not exist" if not folder.exists() else "has no index.json: no shards, or not all of them are made"
        raise ValueError(f"{folder} {seen}; expected a folder written by {made_by}.")
    try:
        index = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); make the shards again with {made_by}.") from error
    got = index.get("format") if isinstance(index, dict) else None
    if got not in ([expected] if expected else list(commands)):
        hint = " Encode them first with `reblock encode`." if got == VIDEO_FORMAT else ""
        raise ValueError(f"{path} has format {got!r}, expected {expected or list(commands)}.{hint}")
    if not sum(shard["samples"] for shard in index["shards"]):
        raise ValueError(f"{folder} lists no sample, expected at least one; make it again with {made_by}.")
    absent = [shard["name"] for shard in index["shards"] if not (folder / shard["name"]).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {absent[:3]} of its {len(index['shards'])} shards; copy or make them again.")
    return index


class ShardFolder:
    """Shards that are made one by one, in any order, by any number of processes.

    Args:
        folder: where they go.
        settings: what they are made with; finished shards of other settings are refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.hash = settings_hash(settings)

    def _record(self, name: str) -> Path:
        return self.folder / "records" / f"{Path(name).stem}.json"

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record of a finished shard, None if it is still to be made.

        Raises:
            ValueError: if it was made with other settings.
        """
        path = self._record(name)
        if not path.is_file() or not (self.folder / name).is_file():
            return None
        record = json.loads(path.read_text())
        if record["hash"] != self.hash:
            changed = {
                key: (record["settings"].get(key), self.settings.get(key))
                for key in sorted({*record["settings"], *self.settings})
                if record["settings"].get(key) != self.settings.get(key)
            }
            raise ValueError(
                f"{self.folder} holds shards made with other settings (there, now): {changed}. "
                "Choose another folder, or delete this one."
            )
        return record

    def write(self, name: str, samples: Iterable[Mapping[str, bytes | str]], faults: list[Fault]) -> dict[str, Any]:
        """Writes a shard and its record; `faults` may grow while `samples` is drawn from."""
        entry = write_tar(self.folder / name, samples)
        record = {"hash": self.hash, "settings": self.settings, "entry": entry, "faults": [asdict(f) for f in faults]}
        write_json(self._record(name), record)
        return record

    def finish(self, names: Sequence[str], head: Mapping[str, Any]) -> dict[str, Any] | None:
        """Writes `faults.jsonl` and `index.json` once every shard is finished; None before."""
        records = [self.finished(name) for name in names]
        if any(record is None for record in records):
            return None
        done = [record for record in records if record is not None]
        faults = [fault for record in done for fault in record["faults"]]
        write_text(self.folder / "faults.jsonl", "".join(json.dumps(f, ensure_ascii=False) + "\n" for f in faults))
        shards = [record["entry"] for record in done if record["entry"]["samples"]]
        index = {
            **head,
            "samples": sum(shard["samples"] for shard in shards),
            "bytes": sum(shard["bytes"] for shard in shards),
            "faults": len(faults),
            "shards": shards,
        }
        write_json(self.folder / "index.json", index)
        return index


def check_fault_share(faults: Sequence[Fault], total: int, limit: float, where: str) -> None:
    """Stops a run that leaves out too much.

    Raises:
        ValueError: if faults are more than `limit` of `total`; names the first few.
    """
    if len(faults) > limit * total:
        named = "; ".join(f"{fault.key}: {fault.reason}" for fault in faults[:3])
        raise ValueError(
            f"{len(faults)} of {total} items in {where} are faulty, more than max_fault_share {limit} allows. "
            f"First: {named}. Mend or remove them, or raise max_fault_share."
        )
