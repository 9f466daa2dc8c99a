"""The format that video and latent shards share: archives, the record of each, the index of a folder.

A folder of shards holds `19x64x64-000000.tar`, ... (bucket and number), `records/19x64x64-000000.json` (settings,
counts, checksum, faults, and the byte range of every member), `faults.jsonl` and, when all shards are complete,
`index.json`. docs/data.md has the formats to the byte.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.bucket import Bucket
from data.files import write_text
from data.shards.archive import Member, Members
from data.storage.store import Store, is_remote, join

VIDEO_FORMAT = "reblock-videos-2"
LATENT_FORMAT = "reblock-latents-2"
#: Fields of a clip's JSON, besides its source and window.
FACTS = ("codec", "frames", "fps", "height", "width", "duration")
_MADE_BY = {VIDEO_FORMAT: "`reblock pack`", LATENT_FORMAT: "`reblock encode`"}


@dataclass(frozen=True)
class Fault:
    """An item that was left out, and why."""

    key: str
    reason: str
    shard: str = ""

    def line(self) -> str:
        """The fault as a line of `faults.jsonl`."""
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
    """Path of a shard's record in its folder."""
    return f"records/{shard.removesuffix('.tar')}.json"


def read_samples(folder: str, shard: str, store: Store) -> list[tuple[str, Members]]:
    """Samples of a shard in its order, (key, extension -> member), from its record; the archive is not read.

    Raises:
        ValueError: if the record is damaged.
        OSError: if it cannot be read.
    """
    location = join(folder, record_name(shard))
    try:
        record = json.loads(store.read(location))
        version = record["entry"]["sha256"]
        return [
            (key, {name: Member(start, size, version) for name, (start, size) in members.items()})
            for key, members in record["samples"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{location} is damaged ({error}); make the shard again.") from error


def read_member(shard: str, member: Member, store: Store) -> bytes:
    """The bytes of one file inside an archive.

    Raises:
        ValueError: if the archive ends before.
        OSError: if it cannot be read.
    """
    return store.read(shard, member.offset, member.size, version=member.version)


def clip_extension(members: Iterable[str]) -> str:
    """The extension of a sample's video: the member that is neither caption nor facts.

    Raises:
        ValueError: if there is none, or more than one.
    """
    extensions = [extension for extension in members if extension not in ("txt", "json")]
    if len(extensions) != 1:
        raise ValueError(f"it has members {sorted(members)}, expected one video, txt and json")
    return extensions[0]


def read_clip(shard: str, members: Members, store: Store) -> bytes:
    """The video file of a sample; errors as `read_member` and `clip_extension`."""
    return read_member(shard, members[clip_extension(members)], store)


def read_json(shard: str, members: Members, store: Store) -> dict[str, Any]:
    """The facts of a sample.

    Raises:
        ValueError: if it has none, or they are no JSON object.
    """
    if "json" not in members:
        raise ValueError("its json is missing")
    return parse_facts(read_member(shard, members["json"], store))


def parse_facts(content: bytes) -> dict[str, Any]:
    """The facts of a sample, of the content of its json.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        facts = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its json is damaged ({error})") from error
    if not isinstance(facts, dict):
        raise ValueError(f"its json is a {type(facts).__name__}, expected an object")
    return facts


def truncated_samples(folder: str, index: Mapping[str, Any], store: Store) -> list[Fault]:
    """Samples of a local folder that lie beyond the end of a truncated or absent shard; sizes are compared.

    A remote store is not asked: a request for every shard would take minutes. Its faults show when samples are read.
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
    """Digest that names a caption inside a shard."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


def caption_key(digest: str) -> str:
    """Key of the embedding of a caption in a latent shard; no sample has it: keys of `reblock pack` hold no slash."""
    return f"text/{digest}"


# -- writing ---------------------------------------------------------------------------------------------------------


def shard_name(bucket: Bucket, number: int) -> str:
    """File name of a bucket's shard; brace notation finds a range of them, `19x64x64-{000000..000041}.tar`."""
    return f"{bucket.name}-{number:06d}.tar"


def check_fault_share(
    faults: Sequence[Fault],
    total: int,
    limit: float,
    where: str,
    mend: str = "Mend or remove them, or raise max_fault_share.",
    listing: Path | None = None,
) -> None:
    """Stops a run that leaves out too many items.

    Raises:
        ValueError: if faults are more than `limit` of `total`; names the first few, and all that are known in the file
            `listing`.
    """
    if len(faults) > limit * total:
        if listing is not None:
            write_text(listing, "".join(fault.line() for fault in faults))
            mend = f"All that are known so far are in {listing}. {mend}"
        named = "; ".join(f"{fault.key}: {fault.reason.rstrip('.')}" for fault in faults[:3])
        raise ValueError(
            f"{len(faults)} of {total} items in {where} are faulty, more than max_fault_share {limit} allows. "
            f"First: {named}. {mend}"
        )
