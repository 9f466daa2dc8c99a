"""`reblock synth`: procedural captioned clips as H.264 files. `scenes` chooses what they show, `draw` renders it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

from data.files import write_json, write_text
from data.synth.draw import render
from data.synth.scenes import CAPTION_WORDS, choose_scene
from data.video.write import write_video

__all__ = ["CAPTION_WORDS", "choose_scene", "render", "synth"]


def synth(out: Path, *, clips: int = 96, seed: int = 0, size: int = 64, frames: int = 19, fps: int = 12) -> None:
    """Writes `clip-000000.mp4` (H.264) and `clip-000000.txt` (its caption), ...

    Complete clips are kept: a stopped run can continue, and a run with more clips adds to one with fewer.

    Args:
        out: folder; made if it is absent.
        clips: number of clips.
        seed: clip i depends only on (seed, i), not on `clips`.
        size: side of the square frames in pixels, even.
        frames: number of frames of a clip.
        fps: frames per second.

    Raises:
        ValueError: for sizes that cannot be written, or a folder with clips of other settings.
    """
    out = Path(out)
    if clips < 1 or frames < 1 or fps < 1 or size < 16 or size % 2:
        raise ValueError(
            f"got clips {clips}, frames {frames}, fps {fps}, size {size}; "
            "expected clips, frames and fps of at least 1 and an even size of at least 16."
        )
    settings = {"seed": seed, "size": size, "frames": frames, "fps": fps}
    _check_settings(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "synth.json", settings)
    missing = [index for index in range(clips) if not _complete(out, index)]
    if len(missing) < clips:
        print(f"{out}: {clips - len(missing)} of {clips} clips are there already and are kept")

    def make(index: int) -> None:
        scene = choose_scene(seed, index)
        write_video(_stem(out, index).with_suffix(".mp4"), render(scene, size=size, frames=frames), fps)
        # The caption is written last: a clip that has a caption is complete.
        write_text(_stem(out, index).with_suffix(".txt"), scene.caption + "\n")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in track(pool.map(make, missing), description="synth", total=len(missing), disable=not missing):
            pass
    print(f"{out}: {clips} clips of {frames} frames, {size}x{size}")


def _stem(out: Path, index: int) -> Path:
    return out / f"clip-{index:06d}"


def _complete(out: Path, index: int) -> bool:
    return all(_stem(out, index).with_suffix(suffix).is_file() for suffix in (".mp4", ".txt"))


def _check_settings(out: Path, settings: dict[str, int]) -> None:
    note = out / "synth.json"
    if note.is_file() and (found := json.loads(note.read_text())) != settings:
        raise ValueError(f"{out} holds clips made with {found}, this call asks for {settings}; choose another folder.")
