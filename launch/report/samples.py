"""Sampled videos, as pages embed them."""

import base64
from pathlib import Path
from typing import Any

from launch.report.results import RunResults
from launch.sample.variants import TITLES, sample_note


def data_uri(path: Path, kind: str) -> str:
    """Encodes a file as a data URI of media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def sample_groups(results: RunResults) -> list[dict[str, Any]]:
    """Videos of a run, grouped by caption and seed; variants are in the order in which they were sampled."""
    groups: dict[tuple[str, int], list[dict[str, str]]] = {}
    for entry in results.samples:
        clip = {
            "uri": data_uri(results.run.samples / entry["file"], "video/mp4"),
            "variant": entry["variant"],
            "title": TITLES.get(entry["variant"], entry["variant"]),
            "note": sample_note(entry),
        }
        groups.setdefault((entry["caption"], entry["seed"]), []).append(clip)
    return [{"caption": caption, "seed": seed, "clips": clips} for (caption, seed), clips in groups.items()]
