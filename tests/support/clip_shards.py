"""Tiny encoders of the real classes, and video shards made without `reblock pack`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLMochi
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from data.bucket import Bucket
from data.shards.folder import ShardFolder
from data.shards.format import VIDEO_FORMAT, shard_name
from data.synth.command import CAPTION_WORDS

TEXT_WIDTH = 16


def write_encoders(folder: Path, *, layers: int = 2) -> Path:
    """A pipeline folder with a VAE, a T5 and a tokenizer, random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            add_attention_block=(False,) * 5,
        )
        vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
        vocabulary += [(f"▁{word}", -2.0) for word in CAPTION_WORDS] + [(letter, -6.0) for letter in "abcdefgh,"]
        config = T5Config(
            vocab_size=len(vocabulary), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=layers, num_heads=2
        )
        T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=64).save_pretrained(folder / "tokenizer")
    return folder


def write_video_shards(
    out: Path, clips: Mapping[Bucket, Sequence[tuple[str, bytes, bytes, list[int]]]], *, per_shard: int
) -> Path:
    """Video shards of (key, mp4, caption, indices of the window), by bucket."""
    folder, names = ShardFolder(out, {"made": "by a test"}), []
    for bucket, rows in clips.items():
        for number in range(0, len(rows), per_shard):
            samples = []
            for key, clip, caption, indices in rows[number : number + per_shard]:
                facts = {
                    "source": f"{key}.mp4", "sha256": hashlib.sha256(clip).hexdigest(), "indices": indices,
                    "bucket": bucket.name,
                }  # fmt: skip
                samples.append({"__key__": key, "mp4": clip, "txt": caption, "json": json.dumps(facts)})
            names.append(shard_name(bucket, number // per_shard))
            folder.write(names[-1], bucket, samples, [])
    folder.finish(names, {"format": VIDEO_FORMAT})
    return out
