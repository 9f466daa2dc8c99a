"""A few clips to encode, and readers of a folder of latents."""

import json

from safetensors.torch import load as load_safetensors

from data.bucket import Bucket
from data.shards.format import read_json, read_member, read_samples
from data.storage.store import Store
from data.synth.draw import render
from data.synth.scenes import choose_scene
from data.video.write import write_video

WIDE, TALL = Bucket(7, 32, 48), Bucket(7, 32, 32)
STORE = Store()
WINDOWS = {WIDE: [0, 2, 4, 6, 8, 10, 12], TALL: [3, 4, 5, 6, 7, 8, 9]}
FIRST, SECOND, THIRD = "7x32x32-000000.tar", "7x32x32-000001.tar", "7x32x48-000000.tar"


def make_clips(folder):
    """(key, mp4, caption) of seven clips; two of one caption, one of none."""
    found = []
    for number in range(7):
        scene = choose_scene(0, number)
        write_video(folder / "clip.mp4", render(scene, size=32, frames=13), 12)
        caption = {2: choose_scene(0, 0).caption, 3: ""}.get(number, scene.caption)
        found.append((f"clip-{number}", (folder / "clip.mp4").read_bytes(), caption.encode()))
    return found


def lay_out(clips):
    """Five clips of one bucket in two shards, two of another."""
    buckets = {TALL: clips[:5], WIDE: clips[5:]}
    return {bucket: [(*clip, WINDOWS[bucket]) for clip in rows] for bucket, rows in buckets.items()}


def read_all(folder):
    """key -> (tensors, text, facts), through the records alone."""
    found = {}
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        shard = str(folder / entry["name"])
        for key, members in read_samples(str(folder), entry["name"], STORE):
            tensors = load_safetensors(read_member(shard, members["safetensors"], STORE))
            text = load_safetensors(read_member(shard, members["text"], STORE))["text"]
            found[key] = (tensors, text, read_json(shard, members, STORE))
    return found


def files(folder):
    """Every file of a folder, also hidden ones: relative path -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def faults_of(folder):
    return [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
