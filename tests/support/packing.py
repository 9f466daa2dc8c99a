"""Runs `reblock pack` on few small clips, and reads what it wrote."""

import csv
import io
import json
import tarfile

import webdataset

from data.pack.command import pack

SMALL = ["7x32x32"]


def pack_small(src, out, **options):
    """Packs clips of 7 frames in one process; the index."""
    pack(str(src), out, **{"buckets": SMALL, "processes": 1, **options})
    return json.loads((out / "index.json").read_text())


def read_lines(path):
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_shards(out):
    """All samples of all shards, as webdataset reads them."""
    shards = [str(out / shard["name"]) for shard in json.loads((out / "index.json").read_text())["shards"]]
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))


def packed_files(out):
    """Every file of the shards, without the journal: relative path -> bytes."""
    paths = [p for p in out.rglob("*") if p.is_file() and "survey" not in p.relative_to(out).parts]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths}


def pack_all(src, out, **options):
    """Packs whatever can be packed: key -> (caption, clip) of the samples, and key -> reason of the faults."""
    pack(str(src), out, **{"buckets": SMALL, "processes": 1, "max_fault_share": 1.0, **options})
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                found[member.name] = archive.extractfile(member).read()
    keys = [name.removesuffix(".txt") for name in found if name.endswith(".txt")]
    faults = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    return {key: (found[f"{key}.txt"].decode(), found[f"{key}.mp4"]) for key in keys}, {
        fault["key"]: f"{fault['shard'].rpartition('/')[2]}: {fault['reason']}" for fault in faults
    }


def write_table(path, rows, names=("clip", "caption")):
    """Writes rows as CSV, JSON lines or Parquet, by the suffix of the path."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    else:
        import pyarrow
        from pyarrow import parquet

        columns = list(zip(*rows, strict=True))
        parquet.write_table(pyarrow.table(dict(zip(names, columns, strict=True))), path)
    return path


def write_tar(path, members):
    """Writes an archive with members of any name: (name, bytes) or a TarInfo."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
