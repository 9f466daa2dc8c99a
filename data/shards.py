"""What video and latent shards have in common: the archives, the record of each, the index of a folder.

A folder of shards holds `19x64x64-000000.tar`, ... (bucket and number), `records/19x64x64-000000.json` (settings,
counts, checksum, faults, and where every sample lies), `faults.jsonl` and, when all shards are there, `index.json`.
docs/data.md has the formats to the byte.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import webdataset

from data.bucket import Bucket
from data.storage.archive import Member, Members, scan_tar
from data.storage.files import beside, put_in_place, settings_hash, sha256, write_json, write_text
from data.storage.store import Store, is_remote, join

VIDEO_FORMAT = "reblock-videos-2"
LATENT_FORMAT = "reblock-latents-2"
_MADE_BY = {VIDEO_FORMAT: "`reblock pack`", LATENT_FORMAT: "`reblock encode`"}

#: Of an entry of a latent shard that is drawn by `ShardFolder.write`: the digest of its caption.
TEXT = "__text__"


@dataclass(frozen=True)
class Fault:
    """An item that was left out, and why."""

    key: str
    reason: str
    shard: str = ""

    def line(self) -> str:
        """As it stands in `faults.jsonl`."""
        return json.dumps({"shard": self.shard, "key": self.key, "reason": self.reason}, ensure_ascii=False) + "\n"


# -- reading ---------------------------------------------------------------------------------------------------------


def read_index(folder: str, store: Store, expected: str | None = None) -> dict[str, Any]:
    """The index of a folder of shards.

    Args:
        folder: path or URL.
        store: that reads it.
        expected: its format, `VIDEO_FORMAT` or `LATENT_FORMAT`; None takes either.

    Raises:
        ValueError: if there is none, it is of another format, or it lists no sample.
        StoreError: if a store does not answer.
    """
    formats = [expected] if expected else list(_MADE_BY)
    made_by = " or ".join(_MADE_BY[name] for name in formats)
    location = join(folder, "index.json")
    if not store.exists(location):
        there = is_remote(folder) or Path(folder).exists()
        seen = "has no index.json: no shards, or not all of them are made" if there else "does not exist"
        raise ValueError(f"{folder} {seen}; expected a folder written by {made_by}.")
    try:
        index = json.loads(store.read(location))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{location} is not JSON ({error}); make the shards again with {made_by}.") from error
    got = index.get("format") if isinstance(index, dict) else None
    if got not in formats:
        hint = ""
        if got == VIDEO_FORMAT:
            hint = " Encode them first with `reblock encode`."
        elif got == LATENT_FORMAT:
            hint = " They are latents already; give the video shards that `reblock pack` wrote."
        elif str(got).startswith("reblock-"):
            hint = f" It was written by another version; make the shards again with {made_by}."
        raise ValueError(f"{location} has format {got!r}, expected {' or '.join(map(repr, formats))}.{hint}")
    if not sum(shard["samples"] for shard in index["shards"]):
        raise ValueError(f"{folder} lists no sample, expected at least one; make it again with {made_by}.")
    return index


def record_name(shard: str) -> str:
    """Where the record of a shard lies in its folder."""
    return f"records/{shard.removesuffix('.tar')}.json"


def read_samples(folder: str, shard: str, store: Store) -> list[tuple[str, Members]]:
    """Samples of a shard in its order, (key, extension -> place), from its record: no archive is touched.

    Raises:
        ValueError: if the record is damaged.
        OSError: if it cannot be read.
    """
    location = join(folder, record_name(shard))
    try:
        record = json.loads(store.read(location))
        version = record["entry"]["sha256"]
        return [
            (key, {name: Member(place[0], place[1], version) for name, place in members.items()})
            for key, members in record["samples"]
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{location} is damaged ({error}); make the shard again.") from error


def read_member(shard: str, member: Member, store: Store) -> bytes:
    """The bytes of one file inside an archive.

    Raises:
        ValueError: if the archive ends before.
        OSError: if it cannot be read.
    """
    return store.read(shard, member.offset, member.size, version=member.version)


def clip_extension(shard: str, members: Members) -> str:
    """The extension of a sample's video: the member that is neither caption nor facts.

    Raises:
        ValueError: if there is none, or more than one.
    """
    extensions = [extension for extension in members if extension not in ("txt", "json")]
    if len(extensions) != 1:
        raise ValueError(f"{shard} has a sample with members {sorted(members)}, expected one video, txt and json")
    return extensions[0]


def read_clip(shard: str, members: Members, store: Store) -> bytes:
    """The video file of a sample; errors as `read_member` and `clip_extension`."""
    return read_member(shard, members[clip_extension(shard, members)], store)


def read_json(shard: str, members: Members, store: Store) -> dict[str, Any]:
    """The facts of a sample.

    Raises:
        ValueError: if it has none, or they are no JSON object.
    """
    try:
        facts = json.loads(read_member(shard, members["json"], store))
    except (KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{shard} has a sample whose json is missing or damaged ({error})") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{shard} has a sample whose json is a {type(facts).__name__}, expected an object")
    return facts


def cut_samples(folder: str, index: Mapping[str, Any], store: Store) -> list[Fault]:
    """Samples of a local folder that lie behind the end of a shard that is cut short or absent; sizes are compared.

    Nothing is asked of a remote store: a request for every shard would take minutes. Its faults show as they are read.
    """
    faults: list[Fault] = []
    if is_remote(folder):
        return faults
    for entry in index["shards"]:
        shard = join(folder, entry["name"])
        size = store.size(shard)
        if size is not None and size >= entry["bytes"]:
            continue
        reason = "its shard is absent" if size is None else f"its shard has {size} of {entry['bytes']} bytes"
        try:
            listed = read_samples(folder, entry["name"], store)
        except (ValueError, OSError) as error:
            faults += [Fault(f"sample {n}", f"{reason}, its record: {error}", shard) for n in range(entry["samples"])]
            continue
        for key, members in listed:
            if size is None or max(m.offset + m.size for m in members.values()) > size:
                faults.append(Fault(key, reason, shard))
    return faults


def text_digest(caption: str) -> str:
    """What a caption is called inside a shard."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


def caption_key(digest: str) -> str:
    """Key of the embedding of a caption in a latent shard; no sample has it: keys of `reblock pack` hold no slash."""
    return f"text/{digest}"


# -- writing ---------------------------------------------------------------------------------------------------------

Sample = Mapping[str, bytes | str]


def write_tar(path: Path, samples: Iterable[Sample]) -> dict[str, str]:
    """Writes samples ({"__key__": name, extension: bytes}) as a webdataset archive; equal samples give equal bytes.

    Members of a sample are sorted by extension. The archive is written beside its place, forced to the disk, renamed.

    Returns:
        Key -> digest of its caption, of the samples that name one under `TEXT`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path)
    texts: dict[str, str] = {}
    try:
        with webdataset.TarWriter(str(part), encoder=False, mtime=0) as writer:
            for sample in samples:
                if TEXT in sample:
                    texts[str(sample["__key__"])] = str(sample[TEXT])
                writer.write({k: _bytes(v) if k != "__key__" else v for k, v in sample.items() if k != TEXT})
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)
    return texts


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


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

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record of a finished shard, None if it is still to be made.

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

    def write(self, name: str, bucket: Bucket, samples: Iterable[Sample], faults: list[Fault]) -> dict[str, Any]:
        """Writes a shard and its record.

        Args:
            name: file name of the shard.
            bucket: of all its samples.
            samples: as for `write_tar`. Samples of latents name their caption's digest under `TEXT`; before the first
                that does comes {"__key__": caption_key(DIGEST), "safetensors": ...}.
            faults: may grow while `samples` is drawn from.

        Raises:
            ValueError: if the archive does not list every sample under its key.
        """
        path = self.folder / name
        keys: list[str] = []

        def noted() -> Iterator[Sample]:
            for sample in samples:
                keys.append(str(sample["__key__"]))
                yield sample

        texts = write_tar(path, noted())
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
            faults: of items that came to no shard; they stand before those of the shards.
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
    """What differs between two settings, in a few words."""
    changed = [key for key in sorted({*there, *now}) if there.get(key) != now.get(key)]
    named = [f"{key} is {there.get(key)!r:.60} there, {now.get(key)!r:.60} now" for key in changed[:5]]
    return "; ".join(named) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")


def _text_of(key: str, texts: Mapping[str, str], shared: Mapping[str, Member]) -> list[tuple[str, Member]]:
    return [("text", shared[texts[key]])] if key in texts else []


def shard_name(bucket: Bucket, number: int) -> str:
    """File name of a bucket's shard: brace notation works, `19x64x64-{000000..000041}.tar`."""
    return f"{bucket.name}-{number:06d}.tar"


def check_fault_share(
    faults: Sequence[Fault],
    total: int,
    limit: float,
    where: str,
    mend: str = "Mend or remove them, or raise max_fault_share.",
) -> None:
    """Stops a run that leaves out too much, and says how to `mend` that.

    Raises:
        ValueError: if faults are more than `limit` of `total`; names the first few.
    """
    if len(faults) > limit * total:
        named = "; ".join(f"{fault.key}: {fault.reason.rstrip('.')}" for fault in faults[:3])
        raise ValueError(
            f"{len(faults)} of {total} items in {where} are faulty, more than max_fault_share {limit} allows. "
            f"First: {named}. {mend}"
        )
