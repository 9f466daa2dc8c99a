"""`reblock pack`: captioned clips, of a folder, a table or archives, into video shards.

Three steps, each of which goes on where it was stopped: a survey of every clip (`data.pack.survey`), a plan of what
goes into which shard (`data.pack.plan`), and the shards themselves (`data.pack.write_shard`). The shards are a
function of the source and the settings alone, whatever the number of processes and however often the run was killed.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.bucket import parse_buckets
from data.files import atomic_file, temporaries
from data.pack.entries import Columns
from data.pack.plan import Plan, make_plan
from data.pack.sources import Folder, open_source
from data.pack.survey import MEND, Listing, Rules, Survey, list_source
from data.pack.windows import Cutting, Filters
from data.pack.write_shard import Filler
from data.shards.folder import ShardFolder
from data.shards.format import VIDEO_FORMAT, Fault, check_fault_share
from data.storage.store import Store
from data.video.worker_pool import WorkerPool


def pack(
    src: str,
    out: Path,
    *,
    buckets: str | list[str] = ["19x64x64"],  # noqa: B006 - read only, and the command line shows it
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
    """Packs captioned clips into video shards, `19x64x64-000000.tar`, ... with an index; a stopped run goes on.

    Clips that cannot be used are left out and named in `faults.jsonl`, those that are not wanted or fit no bucket in
    `filtered.jsonl`, those that are there twice in `duplicates.jsonl`.

    Args:
        src: folder of clips, searched in depth, each with its caption beside it; or a .csv, .jsonl or .parquet table
            with a path or URL and a caption in each row; or webdataset archives, also by wildcards or {000..009}.
            Tables and archives may be URLs.
        out: folder of the shards.
        buckets: sizes that clips are brought to, FRAMESxHEIGHTxWIDTH; each clip goes to the one that fits it
            best. Several as a list, or separated by commas.
        fps: frames per second of the frames that are used; without it, every frame is.
        window: which part of a clip is used: the first, the middle, or all, as one sample after another.
        split_scenes: cut clips where the scene changes; each scene is used like a clip.
        scene_threshold: how much of the picture has to change for a cut, 0 to 1.
        upscale: take clips that are smaller than every bucket.
        reencode: write the frames that are used as H.264 at the bucket's size. Otherwise files are kept as they are;
            of long ones the part that is used is copied.
        columns: what clips and captions are called in the source.
        filters: which clips are wanted.
        duplicates: what happens to clips with the bytes of another one; they are reported in any case.
        shard_bytes: target size of a shard.
        shard_samples: most samples of a shard.
        processes: how many read clips at a time; without it, one for each core.
        deadline: seconds that a clip may take.
        max_fault_share: the run stops when more than this share of the clips is faulty.
        allow_pipe: run `src` if it is a command, `pipe:...`, for the archive that it prints.

    Raises:
        ValueError: if there is nothing to pack, too much is faulty, or `out` was packed from other clips or settings.
    """
    src, out = str(src), Path(out)
    processes = processes or os.cpu_count() or 1
    if min(shard_bytes, shard_samples, processes) < 1 or not deadline > 0 or not 0 <= max_fault_share <= 1:
        raise ValueError(
            f"got shard_bytes {shard_bytes}, shard_samples {shard_samples}, processes {processes}, deadline "
            f"{deadline}, max_fault_share {max_fault_share}; expected 1 or more, seconds above 0, a share of 0 to 1."
        )
    if duplicates not in ("keep", "drop"):
        raise ValueError(f"got duplicates {duplicates!r}, expected keep or drop.")
    sizes = parse_buckets(buckets.split(",") if isinstance(buckets, str) else buckets)
    cutting = Cutting(tuple(sizes), fps, window, scene_threshold if split_scenes else None, upscale)
    store = Store()
    journal = out / "survey"
    source = open_source(src, columns, store, journal / "archives", allow_pipe=allow_pipe)
    listing = list_source(source)
    _check_listing(listing, src, columns)
    settings = {
        "buckets": [bucket.name for bucket in sizes],
        "fps": fps,
        "window": window,
        "scene_threshold": cutting.scene_threshold,
        "upscale": upscale,
        "reencode": reencode,
        "columns": asdict(columns),
        "filters": asdict(filters),
        "duplicates": duplicates,
        "shard_bytes": shard_bytes,
        "shard_samples": shard_samples,
        "clips": listing.clips,
        "listing": listing.digest,
    }
    with _alone(out):
        survey = Survey(journal, {**settings, "src": _absolute(src)})
        print(f"{out}: {listing.clips} clips found in {src}")
        if isinstance(source, Folder) and (overlooked := source.overlooked()):
            print(f"  passed over: {', '.join(f'{count} {what}' for what, count in overlooked.most_common(8))}")
        if not survey.finished:
            with _progress() as progress:
                task = progress.add_task("survey", total=listing.clips)
                for count in survey.run(
                    source, Rules(filters, cutting, store), where=src, clips=listing.clips, processes=processes,
                    deadline=deadline, limit=max_fault_share,
                ):  # fmt: skip
                    progress.advance(task, count)
        plan = make_plan(
            survey.rows(), sizes, shard_bytes=shard_bytes, shard_samples=shard_samples,
            drop_duplicates=duplicates == "drop",
        )  # fmt: skip
        faults, filtered = _write_lists(out, survey, plan)
        check_fault_share(faults, listing.clips, max_fault_share, src, MEND, out / "faults.jsonl")
        if not plan.samples:
            raise ValueError(
                f"nothing is left of the {listing.clips} clips in {src}: {len(faults)} are faulty, filtered are "
                f"{_counts(filtered)}. See {out / 'filtered.jsonl'}; then choose other buckets or filters."
            )
        folder = ShardFolder(out, {**settings, "plan": plan.digest})
        writing = Writing(folder, survey, plan, store, fps, reencode, processes, deadline)
        with _progress() as progress:
            task = progress.add_task("pack", total=plan.samples)
            late = writing.run(faults, listing.clips, max_fault_share, src, lambda count: progress.advance(task, count))
        index = folder.finish(list(plan.shards), {"format": VIDEO_FORMAT}, faults)
        assert index is not None
        print("\n".join(_summary(out, index, filtered, plan, len(faults) + late)))


@dataclass
class Writing:
    """Shards in the making.

    Args:
        folder: where they go.
        survey: that knows the clips.
        plan: of what they hold.
        store: that reads the clips.
        fps: of the windows.
        reencode: whether they are encoded.
        processes: shards that are written at once.
        deadline: seconds for each clip.
    """

    folder: ShardFolder
    survey: Survey
    plan: Plan
    store: Store
    fps: float | None
    reencode: bool
    processes: int
    deadline: float

    def run(self, faults: Sequence[Fault], clips: int, limit: float, where: str, advance: Any) -> int:
        """Writes the shards that are missing; how many more faults there are.

        Raises:
            ValueError: if these and `faults` are more than `limit` of the clips, or finished shards do not belong.
        """
        late = []
        missing = []
        for name, (_, samples) in self.plan.shards.items():
            if record := self.folder.finished(name):
                late += [Fault(**fault) for fault in record["faults"]]
                advance(len(samples))
            else:
                missing.append(name)
        if len(missing) < len(self.plan.shards):
            kept = len(self.plan.shards) - len(missing)
            print(f"{self.folder.folder}: {kept} of {len(self.plan.shards)} shards are finished already and are kept")
        stop, own = threading.Event(), threading.local()

        def check() -> None:
            check_fault_share([*faults, *late], clips, limit, where, MEND, self.folder.folder / "faults.jsonl")

        with ExitStack() as stack, ThreadPoolExecutor(self.processes) as threads:

            def write(name: str) -> list[Fault]:
                if not hasattr(own, "filler"):
                    # Processes of its own for each thread: they start with the first clip that has to be cut.
                    workers = stack.enter_context(WorkerPool(1, self.deadline))
                    own.filler = Filler(self.survey, self.store, workers, self.fps, self.reencode)
                return self._write(name, own.filler, stop, advance)

            try:
                for done in as_completed([threads.submit(write, name) for name in missing]):
                    late += done.result()
                    check()
            except BaseException:
                stop.set()
                threads.shutdown(wait=True, cancel_futures=True)
                raise
        check()
        return len(late)

    def _write(self, name: str, filler: Filler, stop: threading.Event, advance: Any) -> list[Fault]:
        bucket, planned = self.plan.shards[name]
        faults: list[Fault] = []

        def samples() -> Iterator[dict[str, bytes | str]]:
            for sample in filler.samples(bucket, planned, faults):
                if stop.is_set():
                    raise InterruptedError("another shard failed")
                advance(1)
                if sample is not None:
                    yield sample

        self.folder.write(name, bucket, samples(), faults)
        return faults


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds a folder for this run alone, and removes what a killed run left half written.

    Raises:
        ValueError: if another run is at work in it.
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


def _check_listing(listing: Listing, src: str, columns: Columns) -> None:
    if listing.clips == 0:
        raise ValueError(f"{src} holds no clip; expected video files, or rows of a table, or samples of an archive.")
    if listing.captioned == 0:
        assert listing.example is not None
        example = listing.example
        stem = example.source.rpartition(".")[0] or example.source
        raise ValueError(
            f"none of the {listing.clips} clips in {src} has a caption; expected for example "
            f"{stem}{columns.caption_suffix} ({example.source}: {example.problem}). "
            "Name yours with columns.caption_suffix, columns.caption_field or columns.caption."
        )


def _absolute(src: str) -> str:
    return src if "://" in src or ":" in src.split("/")[0] else str(Path(src).absolute())


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def _write_lists(out: Path, survey: Survey, plan: Plan) -> tuple[list[Fault], Counter[str]]:
    """Writes what is left out and what is there twice; the faults, and how many clips each filter took."""
    faults, filtered = [], Counter[str]()
    with atomic_file(out / "filtered.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for _, _, row in survey.rows():
            if "fault" in row:
                faults.append(Fault(row["key"], row["fault"], row["shard"]))
            elif "filtered" in row:
                filtered[row["filtered"]] += 1
                line = {"key": row["key"], "filter": row["filtered"], "reason": row["reason"]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with atomic_file(out / "duplicates.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for twin in plan.duplicates:
            line = {"key": twin.key, "same_as": twin.same_as, "kind": twin.kind}
            # Keys do not tell a.mov from a.mp4.
            line |= {"source": survey.row(*twin.place)["source"], "first": survey.row(*twin.first)["source"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return faults, filtered


def _counts(filtered: Counter[str]) -> str:
    return ", ".join(f"{count} by {name}" for name, count in sorted(filtered.items())) or "none"


def _summary(out: Path, index: dict[str, Any], filtered: Counter[str], plan: Plan, faults: int) -> Iterator[str]:
    mib = index["bytes"] / 2**20
    yield f"{out}: {index['samples']} samples in {len(index['shards'])} shards, {mib:.1f} MiB"
    for name, counts in index["buckets"].items():
        yield f"  {name}: {counts['samples']} samples in {counts['shards']} shards"
    yield f"  filtered: {_counts(filtered)}"
    kinds = Counter(twin.kind for twin in plan.duplicates)
    yield f"  duplicates: {kinds['content']} of content, {kinds['key']} of key"
    yield f"  faults: {faults}"
