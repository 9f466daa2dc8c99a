"""`reblock bench pack`: compares packing with FFmpeg's own probing, by files per second and memory of all processes.

Probing opens each file, reads its stream information (`avformat_open_input`, `avformat_find_stream_info`) and closes
it, as every packer must. Packing also counts and times every packet, decodes the first frame, hashes the file, and
copies it into a shard, which is hashed and synced to disk.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from data.pack.command import pack
from data.synth.command import synth
from launch.bench.result import BenchResult

#: Frames, pixels and frame rate of the clips: small, to save time and to show the costs per file.
FRAMES, SIZE, FPS = 19, 128, 12
PACK = "reblock pack"
PROBE = "FFmpeg's library (PyAV): open, find stream info, close"
FFPROBE = "the ffprobe command, a process for each file"
_INTERVAL = 0.05  # seconds between two samples of the memory


def _probe(path: str) -> int:
    import av

    with av.open(path) as container:
        return len(container.streams)


def probe_all(src: Path, workers: int) -> None:
    """Probes every clip of a folder, in processes that start like those of `pack`."""
    paths = sorted(map(str, src.glob("*.mp4")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(workers) as pool:
        assert min(pool.imap_unordered(_probe, paths, chunksize=8)) > 0


def ffprobe_all(src: Path, workers: int) -> None:
    """Probes every clip of a folder with the `ffprobe` command."""
    command = ["ffprobe", "-v", "error", "-show_streams", "-of", "json"]

    def probe(path: Path) -> None:
        subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(probe, sorted(src.glob("*.mp4"))))


def pack_all(src: Path, workers: int) -> None:
    """Packs a folder into a temporary folder."""
    with tempfile.TemporaryDirectory(dir=src.parent) as out:
        pack(str(src), Path(out), buckets=[f"{FRAMES}x{SIZE}x{SIZE}"], processes=workers)


_RUNS: dict[str, Callable[[Path, int], None]] = {PACK: pack_all, PROBE: probe_all, FFPROBE: ffprobe_all}


def timed(name: str, workers: str, *sources: str) -> None:
    """Runs one of `_RUNS` on each folder and prints the seconds of the last run; called in a new process."""
    for src in sources:
        start = time.perf_counter()
        _RUNS[name](Path(src), int(workers))
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}))


def measure(name: str, workers: int, sources: Sequence[Path], *, watch: bool) -> float:
    """Runs one of `_RUNS` on some folders in a new process.

    Returns:
        Seconds of the last folder; with `watch`, peak bytes of the process and its descendants together, with shared
        pages counted once. Watching takes time, so one run measures only one of the two.

    Raises:
        RuntimeError: if the process fails.
    """
    code = f"import sys; from {__name__} import timed; timed(*sys.argv[1:])"
    home = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = [sys.executable, "-c", code, name, str(workers), *map(str, sources)]
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=home)
        peak = 0
        while watch and process.poll() is None:
            peak = max(peak, sum(map(_resident, _family(process.pid))))
            time.sleep(_INTERVAL)
        process.wait()
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"{name} ended with {process.returncode}: {err.read().decode()[-2000:]}")
        return peak if watch else json.loads(out.read().splitlines()[-1])["seconds"]


def _family(root: int) -> Iterator[int]:
    """Yields the ids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):  # the process has ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    waiting = [root]
    while waiting:
        waiting += children.get(process := waiting.pop(), [])
        yield process


def _resident(process: int) -> int:
    """Resident bytes of a process; a page that n processes share counts 1/n."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def run(*, repeats: int = 7, clips: int = 1000, workers: int = 2) -> BenchResult:
    """Packs generated clips and probes the same files, first a tenth of them and then all.

    Args:
        repeats: number of timed, interleaved rounds of each.
        clips: number of clips to generate.
        workers: number of processes.

    Raises:
        ValueError: if there are fewer than 20 clips, or no worker.
    """
    if clips < 20 or workers < 1:
        raise ValueError(f"got clips {clips}, workers {workers}; expected at least 20, and 1.")
    names = [PACK, PROBE, *([FFPROBE] if shutil.which("ffprobe") else [])]
    few, many = clips // 10, clips
    with tempfile.TemporaryDirectory(prefix="reblock-") as folder:
        synth(Path(folder) / "many", clips=many, size=SIZE, frames=FRAMES, fps=FPS)
        (Path(folder) / "few").mkdir()
        for path in sorted((Path(folder) / "many").glob("clip-*"))[: 2 * few]:
            os.link(path, Path(folder) / "few" / path.name)
        sizes = [path.stat().st_size for path in (Path(folder) / "many").glob("*.mp4")]
        folders = [Path(folder) / "few", Path(folder) / "many"]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                # The first folder takes the one-time costs, such as the import of torch.
                seconds[name].append(measure(name, workers, folders, watch=False))
        peaks = {name: [measure(name, workers, [src], watch=True) for src in folders] for name in names}
    best = {name: many / min(times) for name, times in seconds.items()}
    kib = sum(sizes) / len(sizes) / 1024
    return BenchResult(
        title=f"Packing {many} clips of {FRAMES} frames, {SIZE}x{SIZE} (H.264, {kib:.0f} KiB each on average), "
        f"{workers} processes",
        columns=("", "files / s: best (worst)", "ratio", f"peak MiB, {few} clips", f"peak MiB, {many} clips"),
        rows=[
            [
                name,
                f"{best[name]:.0f} ({many / max(seconds[name]):.0f})",
                f"{best[name] / best[PROBE]:.2f}",
                *(f"{peak / 2**20:.0f}" for peak in peaks[name]),
            ]
            for name in names
        ],
        notes=(
            f"{repeats} runs of each, interleaved, each in a fresh process that has done {few} clips before; "
            "files are in the page cache. Processes are started within the time.",
            "Memory is that of all processes at one time, shared pages counted once (PSS), in runs of their own.",
            *([] if FFPROBE in names else ["There is no ffprobe command on this machine."]),
        ),
    )  # fmt: skip
