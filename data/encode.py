"""Video shards to latent shards: the VAE's posterior of every clip, the T5 embedding of every caption.

Legend: B batch, T video frames, C latent channels, F latent frames, H W latent grid, L text tokens, D text width.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLMochi
from numpy.typing import NDArray
from rich.progress import Progress, TaskID
from safetensors.torch import save as save_safetensors
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from data.base import BaseFacts, check_size, read_base
from data.shards import (
    LATENT_FORMAT,
    VIDEO_FORMAT,
    Fault,
    Member,
    ShardFolder,
    check_fault_share,
    list_samples,
    read_index,
    read_member,
    settings_hash,
)
from data.stream import read_clip
from data.video import decode_video

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Clip:
    """A decoded clip with its caption."""

    key: str
    video: NDArray[np.uint8]  # (T, H, W, 3) pixels
    caption: str


class Encoders:
    """The frozen encoders of a base.

    Args:
        base: diffusers pipeline folder.
        device: where they run.
        dtype: of their weights.
        max_text_tokens: longer captions are cut.
        tiling: encode large frames in overlapping tiles: less memory, slightly other latents.
    """

    def __init__(self, base: Path, device: str, dtype: torch.dtype, max_text_tokens: int, tiling: bool) -> None:
        self.device, self.dtype, self.max_text_tokens = device, dtype, max_text_tokens
        local = {"local_files_only": True}
        self.vae = AutoencoderKLMochi.from_pretrained(base / "vae", torch_dtype=dtype, **local).to(device).eval()
        if tiling:
            self.vae.enable_tiling()
        self.tokenizer = AutoTokenizer.from_pretrained(base / "tokenizer", **local)
        self.text_encoder = T5EncoderModel.from_pretrained(base / "text_encoder", dtype=dtype, **local)
        self.text_encoder.to(device).eval()

    @torch.inference_mode()
    def latents(self, videos: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, raw (not normalised), each (B, C, F, H, W) float16 on the CPU.

        Args:
            videos: B clips (T, H, W, 3) of one size.
        """
        pixels = torch.from_numpy(np.stack(videos)).to(self.device).permute(0, 4, 1, 2, 3)
        posterior = self.vae.encode(pixels.to(self.dtype) / 127.5 - 1).latent_dist
        return posterior.mean.half().cpu(), posterior.logvar.half().cpu()

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings of the valid tokens of each caption, (L, D); L is 0 for an empty caption."""
        kept = torch.float32 if self.dtype == torch.float32 else torch.float16
        tokens = self.tokenizer(
            list(captions), padding="longest", truncation=True, max_length=self.max_text_tokens, return_tensors="pt"
        ).to(self.device)
        hidden = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0].to(kept).cpu()
        lengths = [0 if not caption else int(mask.sum()) for caption, mask in
                   zip(captions, tokens.attention_mask, strict=True)]  # fmt: skip
        return [row[:length].clone() for row, length in zip(hidden, lengths, strict=True)]


def encode(
    shards: Path,
    out: Path,
    *,
    base: Path,
    frames: int = 19,
    height: int = 64,
    width: int = 64,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    max_text_tokens: int = 256,
    max_fault_share: float = 0.01,
    tiling: bool = False,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Encodes video shards into latent shards, one for one; finished ones are kept.

    A sample is KEY.safetensors {"mean", "logvar": float16 (C, F, H, W), raw; "text": (L, D), valid tokens only} and
    KEY.json {caption, frames, height, width, source}.

    Args:
        shards: folder of video shards.
        out: folder of the latent shards.
        base: diffusers pipeline folder with `vae`, `text_encoder` and `tokenizer`.
        frames: first frames of each clip, 6 k + 1.
        height: of the clips in pixels, a multiple of 16; others are scaled and cropped about the centre.
        width: likewise.
        batch_size: clips encoded at once.
        device: where the encoders run.
        dtype: of the encoders: float32, bfloat16 or float16. Embeddings are kept in float16 unless it is float32.
        max_text_tokens: longer captions are cut.
        max_fault_share: the run fails when more than this share of the clips cannot be decoded.
        tiling: encode large frames in overlapping tiles: less memory, slightly other latents.
        part: which share of the shards this process encodes, for SLURM arrays.
        parts: number of shares; the process that finishes last writes the index.

    Raises:
        ValueError: for sizes the VAE cannot encode, a base that lacks a part, shards that are absent, too many faults,
            or an `out` that was encoded with other settings.
    """
    shards, out, base = Path(shards), Path(out), Path(base)
    check_size(frames, height, width)
    if dtype not in _DTYPES or batch_size < 1 or not 0 <= part < parts or max_text_tokens < 1:
        raise ValueError(
            f"got dtype {dtype!r}, batch_size {batch_size}, part {part} of {parts}, max_text_tokens {max_text_tokens}; "
            f"expected a dtype of {_DTYPES}, part below parts, and 1 or more of the others."
        )
    facts = read_base(base)
    index = read_index(shards, VIDEO_FORMAT)
    source = settings_hash({"shards": [shard["sha256"] for shard in index["shards"]]})
    settings = {"source": source, "base": facts.fingerprint, "frames": frames, "height": height, "width": width}
    settings |= {"dtype": dtype, "max_text_tokens": max_text_tokens, "tiling": tiling}
    folder = ShardFolder(out, settings)
    mine = index["shards"][part::parts]
    records = [record for shard in mine if (record := folder.finished(shard["name"]))]
    missing = [shard for shard in mine if not folder.finished(shard["name"])]
    if records:
        print(f"{out}: {len(records)} of {len(mine)} shards are finished already and are kept")
    faults = [Fault(**fault) for record in records for fault in record["faults"]]
    total = sum(shard["samples"] for shard in mine)
    if missing:
        encoders = Encoders(base, device, getattr(torch, dtype), max_text_tokens, tiling)
        with Progress() as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            task = progress.add_task("encode", total=sum(shard["samples"] for shard in missing))
            for shard in missing:
                found: list[Fault] = []
                clips = _decoded(shards / shard["name"], (frames, height, width), batch_size, pool, found)
                folder.write(shard["name"], _encoded(clips, encoders, progress, task), found)
                faults += found
                check_fault_share(faults, total, max_fault_share, str(shards))
    check_fault_share(faults, total, max_fault_share, str(shards))
    head = {"format": LATENT_FORMAT, **_head(facts, frames, height, width), "settings": settings}
    done = folder.finish([shard["name"] for shard in index["shards"]], head)
    if done is None:
        print(f"{out}: part {part} of {parts} is done; the part that finishes last writes the index")
    else:
        print(f"{out}: {done['samples']} latents {tuple(done['latent_shape'])}, {done['faults']} faults")


def _head(facts: BaseFacts, frames: int, height: int, width: int) -> dict[str, Any]:
    shape = [facts.channels, (frames - 1) // 6 + 1, height // 8, width // 8]
    return {
        "latents_mean": facts.mean,
        "latents_std": facts.std,
        "latent_shape": shape,
        "text_width": facts.text_width,
    }


def _decode(shard: Path, key: str, members: Mapping[str, Member], size: tuple[int, int, int]) -> Clip | Fault:
    try:
        video = decode_video(read_clip(shard, members), *size)
        return Clip(key, video, read_member(shard, members["txt"]).decode())
    except (ValueError, KeyError, OSError) as error:
        return Fault(key, str(error))


def _decoded(
    shard: Path, size: tuple[int, int, int], batch_size: int, pool: ThreadPoolExecutor, faults: list[Fault]
) -> Iterator[list[Clip]]:
    """Batches of clips; the next one is decoded while the caller works on this one."""
    samples = list(list_samples(shard).items())
    ahead: list[Future[Clip | Fault]] = []
    for start in range(0, len(samples) + batch_size, batch_size):
        results = [future.result() for future in ahead]
        batch = samples[start : start + batch_size]
        ahead = [pool.submit(_decode, shard, key, members, size) for key, members in batch]
        faults += [result for result in results if isinstance(result, Fault)]
        if clips := [result for result in results if isinstance(result, Clip)]:
            yield clips


def _encoded(
    batches: Iterator[list[Clip]], encoders: Encoders, progress: Progress, task: TaskID
) -> Iterator[dict[str, bytes | str]]:
    """Samples of a latent shard."""
    for clips in batches:
        mean, logvar = encoders.latents([clip.video for clip in clips])
        texts = encoders.text([clip.caption for clip in clips])
        for clip, m, v, text in zip(clips, mean, logvar, texts, strict=True):
            tensors = {"mean": m.contiguous(), "logvar": v.contiguous(), "text": text.contiguous()}
            frames, height, width, _ = clip.video.shape
            facts = {"caption": clip.caption, "frames": frames, "height": height, "width": width, "source": clip.key}
            yield {
                "__key__": clip.key,
                "safetensors": save_safetensors(tensors),
                "json": json.dumps(facts, ensure_ascii=False),
            }
        progress.advance(task, len(clips))
