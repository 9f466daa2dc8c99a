"""Writes shards: the archive, its record, and the index of the folder, each complete or absent."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import webdataset

from data.bucket import Bucket
from data.files import atomic_file, settings_hash, sha256, write_json, write_text
from data.shards.archive import Member, scan_tar
from data.shards.format import Fault, caption_key, record_name

#: Key of a latent's entry for `ShardFolder.write`: the digest of its caption.
TEXT = "__text__"

TarSample = Mapping[str, bytes | str]


def write_tar(path: Path, samples: Iterable[TarSample]) -> dict[str, str]:
    """Writes samples ({"__key__": name, extension: bytes}) as a webdataset archive; equal samples give equal bytes.

    Members of a sample are sorted by extension. The archive is complete or absent.

    Returns:
        Key -> digest of its caption, of the samples that name one under `TEXT`.
    """
    texts: dict[str, str] = {}
    with atomic_file(path) as temporary, webdataset.TarWriter(str(temporary), encoder=False, mtime=0) as writer:
        for sample in samples:
            if TEXT in sample:
                texts[str(sample["__key__"])] = str(sample[TEXT])
            writer.write({k: _bytes(v) if k != "__key__" else v for k, v in sample.items() if k != TEXT})
    return texts


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


class ShardFolder:
    """A folder of shards that are written one by one, in any order, by any number of processes.

    Args:
        folder: that they are written to.
        settings: that they are made with; finished shards of other settings are refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.hash = settings_hash(settings)

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record of a finished shard; None if it has yet to be made.

        Raises:
            ValueError: if it was made with other settings.
        """
        path = self.folder / record_name(name)
        # The record is written after the archive: where it is, the archive is whole.
        if not path.is_file() or not (self.folder / name).is_file():
            return None
        try:
            record = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError):
            return None  # damaged from outside: made again
        if record["hash"] != self.hash:
            raise ValueError(
                f"{self.folder} holds shards made with other settings: {changes(record['settings'], self.settings)}. "
                "Choose another folder, or delete this one."
            )
        return record

    def write(self, name: str, bucket: Bucket, samples: Iterable[TarSample], faults: list[Fault]) -> dict[str, Any]:
        """Writes a shard and its record.

        Args:
            name: file name of the shard.
            bucket: of all its samples.
            samples: as for `write_tar`. Samples of latents name their caption's digest under `TEXT`; before the first
                that does comes {"__key__": caption_key(DIGEST), "safetensors": ...}.
            faults: of the shard; may grow while `samples` is iterated over.

        Raises:
            ValueError: if the archive does not list every sample under its key.
        """
        path = self.folder / name
        keys: list[str] = []

        def with_keys() -> Iterator[TarSample]:
            for sample in samples:
                keys.append(str(sample["__key__"]))
                yield sample

        texts = write_tar(path, with_keys())
        listed = dict(scan_tar(path).samples)
        captions = {digest: caption_key(digest) for digest in texts.values()}
        if lost := list((Counter(keys) - Counter([*listed])).elements()):
            raise ValueError(
                f"{path} does not list {len(lost)} of the {len(keys)} entries that were written to it, first "
                f"{lost[0]!r}; expected a key of its own for each, without dots. Rename the clips and pack them again."
            )
        shared = {digest: listed.pop(key)["safetensors"] for digest, key in captions.items()}
        rows = [
            (key, {e: (m.offset, m.size) for e, m in [*members.items(), *_text_of(key, texts, shared)]})
            for key, members in listed.items()
        ]
        entry = {
            "name": name,
            "bucket": bucket.name,
            "samples": len(rows),
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        named = [asdict(fault) for fault in faults]
        record = {"hash": self.hash, "settings": self.settings, "entry": entry, "faults": named, "samples": rows}
        write_json(self.folder / record_name(name), record, compact=True)
        return record

    def finish(
        self, names: Sequence[str], head: Mapping[str, Any], faults: Sequence[Fault] = ()
    ) -> dict[str, Any] | None:
        """Writes `faults.jsonl` and `index.json` once every shard is finished; None before.

        Args:
            names: of all shards, in the order of the index.
            head: what else the index says; `format` among it.
            faults: of items that are in no shard; they come first in `faults.jsonl`.
        """
        entries, named = [], list(faults)
        for name in names:
            record = self.finished(name)
            if record is None:
                return None
            named += [Fault(**fault) for fault in record["faults"]]
            if record["entry"]["samples"]:
                entries.append(record["entry"])
        write_text(self.folder / "faults.jsonl", "".join(fault.line() for fault in named))
        buckets: dict[str, dict[str, int]] = {}
        for entry in entries:
            counts = buckets.setdefault(entry["bucket"], {"samples": 0, "shards": 0})
            counts["samples"] += entry["samples"]
            counts["shards"] += 1
        index = {
            **head,
            "settings": self.settings,
            "buckets": buckets,
            "samples": sum(entry["samples"] for entry in entries),
            "bytes": sum(entry["bytes"] for entry in entries),
            "faults": len(named),
            "shards": entries,
        }
        write_json(self.folder / "index.json", index)
        return index


def changes(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A short text on how two settings differ."""
    changed = [key for key in sorted({*there, *now}) if there.get(key) != now.get(key)]
    named = [f"{key} is {there.get(key)!r:.60} there, {now.get(key)!r:.60} now" for key in changed[:5]]
    return "; ".join(named) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")


def _text_of(key: str, texts: Mapping[str, str], shared: Mapping[str, Member]) -> list[tuple[str, Member]]:
    return [("text", shared[texts[key]])] if key in texts else []
