"""`reblock pack`: captioned clips, of a folder, a table or archives, into video shards.

It has three steps, and a stopped run continues in each of them: probing every clip (`data.pack.probe_source`),
planning which sample goes into which shard (`data.pack.plan`), and writing the shards (`data.pack.write_shards`). The
shards depend only on the source and the settings, not on the number of processes or of interruptions.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.bucket import parse_buckets
from data.families import DEFAULT_FAMILY
from data.files import temporaries
from data.pack.entries import Columns
from data.pack.exclusions import write_exclusions
from data.pack.filters import Filters
from data.pack.folder_source import FolderSource
from data.pack.journal import ClipJournal
from data.pack.listing import SourceSummary, summarize
from data.pack.plan import PackPlan, make_plan
from data.pack.probe_clip import ProbeSettings
from data.pack.probe_source import FaultLimit, probe_source
from data.pack.sources import ClipSource, open_source
from data.pack.windows import WindowSettings
from data.pack.write_shards import PlannedShardsWriter
from data.shards.folder import ShardFolder
from data.shards.format import VIDEO_FORMAT
from data.storage.store import Store


def pack(
    src: str,
    out: Path,
    *,
    buckets: str | list[str] = ["19x64x64"],  # noqa: B006 - read only, and the command line shows it
    family: str = DEFAULT_FAMILY.name,
    fps: float | None = None,
    window: Literal["first", "middle", "all"] = "first",
    split_scenes: bool = False,
    scene_threshold: float = 0.3,
    upscale: bool = False,
    reencode: bool = False,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    filters: Filters = Filters(),  # noqa: B008 - frozen
    duplicates: Literal["keep", "drop"] = "keep",
    shard_bytes: int = 256 << 20,
    shard_samples: int = 1024,
    processes: int | None = None,
    deadline: float = 60.0,
    max_fault_share: float = 0.01,
    allow_pipe: bool = False,
) -> None:
    """Packs captioned clips into video shards, `19x64x64-000000.tar`, ... with an index; a stopped run can continue.

    `faults.jsonl` lists the clips that cannot be used, `filtered.jsonl` those that a filter excludes or that fit no
    bucket, `duplicates.jsonl` those with the key or the bytes of another clip.

    Args:
        src: folder of clips, also in subfolders, each with its caption beside it; or a .csv, .jsonl or .parquet table
            with a path or URL and a caption in each row; or webdataset archives, also by wildcards or {000..009}.
            Tables and archives may be URLs.
        out: folder of the shards.
        buckets: sizes of the samples, FRAMESxHEIGHTxWIDTH; each clip goes to the bucket that fits it best. Several as
            a list, or separated by commas.
        family: of the models that the clips are for, which decides the numbers of frames: mochi (6 k + 1), wan or
            hunyuan_video (4 k + 1), cogvideox (8 k + 1).
        fps: frames per second of a sample; without it, every frame is used.
        window: which part of a clip is used: the first, the middle, or all, as one sample after another.
        split_scenes: cut clips where the scene changes, and use each scene like a clip.
        scene_threshold: how much of the picture has to change for a cut, 0 to 1.
        upscale: use clips that are smaller than every bucket.
        reencode: encode the frames of each sample as H.264 at the bucket's size. Otherwise files are packed unchanged;
            of long files only the packets of the sample are copied.
        columns: names of clips and captions in the source.
        filters: which clips are packed.
        duplicates: whether to keep or drop clips with the bytes of another clip; they are listed in any case.
        shard_bytes: target size of a shard.
        shard_samples: most samples of a shard.
        processes: number of processes that read clips; without it, one for each core.
        deadline: seconds for one clip.
        max_fault_share: the run stops if more than this share of the clips is faulty, 0 to 1.
        allow_pipe: if `src` is a command, `pipe:...`, run it and pack the archive that it prints.

    Raises:
        ValueError: if there is nothing to pack, too many clips are faulty, or `out` holds shards of other clips or
            settings.
    """
    src, out = str(src), Path(out)
    processes = processes or os.cpu_count() or 1
    _check_options(shard_bytes, shard_samples, processes, deadline, max_fault_share, duplicates)
    sizes = parse_buckets(buckets.split(",") if isinstance(buckets, str) else buckets, family)
    windows = WindowSettings(tuple(sizes), fps, window, scene_threshold if split_scenes else None, upscale)
    store = Store()
    source = open_source(src, columns, store, out / "survey" / "archives", allow_pipe=allow_pipe)
    summary = summarize(source)
    _check_summary(summary, src, columns)
    settings = {
        "buckets": [bucket.name for bucket in sizes],
        "fps": fps,
        "window": window,
        "scene_threshold": windows.scene_threshold,
        "upscale": upscale,
        "reencode": reencode,
        "columns": asdict(columns),
        "filters": asdict(filters),
        "duplicates": duplicates,
        "shard_bytes": shard_bytes,
        "shard_samples": shard_samples,
        "clips": summary.clips,
        "listing": summary.digest,
    }
    # An index without a family is Mochi's, as it was before there were others.
    named = {} if family == DEFAULT_FAMILY.name else {"family": family}
    settings |= named
    with _exclusive(out):
        journal = ClipJournal(out / "survey", {**settings, "src": _absolute(src)})
        limit = FaultLimit(journal, src, summary.clips, max_fault_share)
        _print_source(out, src, source, summary)
        if not journal.finished:
            probing = probe_source(
                source, journal, ProbeSettings(filters, windows, store), limit, processes=processes, deadline=deadline
            )
            with _progress() as progress:
                task = progress.add_task("survey", total=summary.clips)
                for count in probing:
                    progress.advance(task, count)
        plan = make_plan(
            journal.lines(), sizes, shard_bytes=shard_bytes, shard_samples=shard_samples,
            drop_duplicates=duplicates == "drop",
        )  # fmt: skip
        faults, filtered = write_exclusions(out, journal, plan)
        limit.check(faults)
        if not plan.samples:
            raise ValueError(
                f"nothing is left of the {summary.clips} clips in {src}: {len(faults)} are faulty, filtered are "
                f"{_counts(filtered)}. See {out / 'filtered.jsonl'}; then choose other buckets or filters."
            )
        folder = ShardFolder(out, {**settings, "plan": plan.digest})
        writer = PlannedShardsWriter(folder, journal, plan, store, fps, reencode, processes, deadline)
        with _progress() as progress:
            task = progress.add_task("pack", total=plan.samples)
            shard_faults = writer.run(faults, limit, lambda count: progress.advance(task, count))
        index = folder.finish(list(plan.shards), {"format": VIDEO_FORMAT, **named}, faults)
        assert index is not None
        print("\n".join(_result_lines(out, index, filtered, plan, len(faults) + shard_faults)))


def _check_options(
    shard_bytes: int, shard_samples: int, processes: int, deadline: float, max_fault_share: float, duplicates: str
) -> None:
    if min(shard_bytes, shard_samples, processes) < 1 or not deadline > 0 or not 0 <= max_fault_share <= 1:
        raise ValueError(
            f"got shard_bytes {shard_bytes}, shard_samples {shard_samples}, processes {processes}, deadline "
            f"{deadline}, max_fault_share {max_fault_share}; expected 1 or more, seconds above 0, a share of 0 to 1."
        )
    if duplicates not in ("keep", "drop"):
        raise ValueError(f"got duplicates {duplicates!r}, expected keep or drop.")


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Locks a folder for this run, and removes temporary files that a killed run left.

    Raises:
        ValueError: if another run has locked it.
    """
    (out / "survey").mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "survey" / "lock", timeout=0)
    try:
        held = lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another `reblock pack` is at work in {out}; wait for it, or choose another folder."
        ) from error
    with held:
        for folder in (out, out / "records", out / "survey"):
            for leftover in temporaries(folder):
                leftover.unlink()
        yield


def _check_summary(summary: SourceSummary, src: str, columns: Columns) -> None:
    if summary.clips == 0:
        raise ValueError(f"{src} holds no clip; expected video files, or rows of a table, or samples of an archive.")
    if summary.captioned == 0:
        assert summary.uncaptioned is not None
        example = summary.uncaptioned
        stem = example.source.rpartition(".")[0] or example.source
        raise ValueError(
            f"none of the {summary.clips} clips in {src} has a caption; expected for example "
            f"{stem}{columns.caption_suffix} ({example.source}: {example.problem}). "
            "Name yours with columns.caption_suffix, columns.caption_field or columns.caption."
        )


def _absolute(src: str) -> str:
    return src if "://" in src or ":" in src.split("/")[0] else str(Path(src).absolute())


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def _print_source(out: Path, src: str, source: ClipSource, summary: SourceSummary) -> None:
    print(f"{out}: {summary.clips} clips found in {src}")
    if isinstance(source, FolderSource) and (ignored := source.count_ignored()):
        print(f"  passed over: {', '.join(f'{count} {what}' for what, count in ignored.most_common(8))}")


def _counts(filtered: Counter[str]) -> str:
    return ", ".join(f"{count} by {name}" for name, count in sorted(filtered.items())) or "none"


def _result_lines(
    out: Path, index: dict[str, Any], filtered: Counter[str], plan: PackPlan, faults: int
) -> Iterator[str]:
    mib = index["bytes"] / 2**20
    yield f"{out}: {index['samples']} samples in {len(index['shards'])} shards, {mib:.1f} MiB"
    for name, counts in index["buckets"].items():
        yield f"  {name}: {counts['samples']} samples in {counts['shards']} shards"
    yield f"  filtered: {_counts(filtered)}"
    kinds = Counter(duplicate.kind for duplicate in plan.duplicates)
    yield f"  duplicates: {kinds['content']} of content, {kinds['key']} of key"
    yield f"  faults: {faults}"
