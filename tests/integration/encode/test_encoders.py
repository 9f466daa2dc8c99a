"""The base's encoders, the batches that they get, and what they return for one batch."""

import contextlib
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from data.base_facts import read_base
from data.bucket import Bucket, check_size
from data.encode.clip_batches import DecodedBatch, DecodedClip, ShardTask, decode_batches
from data.encode.device import choose_device
from data.encode.encode_loop import encode_batch
from data.encode.encoders import Encoders
from data.encode.latent_shard_writer import EncodedCaption, EncodedClip
from data.encode.prefetch import prefetch
from data.shards.format import Fault, text_digest
from data.synth.draw import render
from data.synth.scenes import choose_scene
from data.video.worker_pool import WorkerPool

TALL, FIRST = Bucket(7, 32, 32), "7x32x32-000000.tar"


def test_numbers_that_are_not_finite_cost_their_clip(base):
    encoders = Encoders(base, "cpu", torch.float32, 64)

    def spoil(module, inputs, output):  # the darkest clip
        output[0][inputs[0].mean((1, 2, 3, 4)) < -0.9] = float("nan")

    encoders.vae.encoder.register_forward_hook(spoil)
    pixels = torch.full((3, 7, 32, 32, 3), 128, dtype=torch.uint8)
    pixels[1] = 0
    shard = ShardTask(FIRST, TALL, [])
    results = [
        DecodedClip("a", "red", "a.mp4", []),
        Fault("b", "hung", FIRST),
        DecodedClip("c", "blue", "c", []),
        DecodedClip("d", "red", "d", []),
    ]
    encoded = encode_batch(DecodedBatch(shard, results, pixels, last=False), encoders)
    assert [fault.key for fault in encoded.faults] == ["b", "c"]
    assert encoded.faults[1] == Fault("c", "the VAE gave numbers that are not finite", FIRST)
    kinds = [(type(e), e.digest if isinstance(e, EncodedCaption) else e.clip.key) for e in encoded.entries]
    assert kinds == [(EncodedCaption, text_digest("red")), (EncodedClip, "a"), (EncodedClip, "d")]

    encoders.text_encoder.shared.weight.data[:] = float("inf")
    results = [DecodedClip("e", "red", "e", []), DecodedClip("f", "green", "f", [])]
    encoded = encode_batch(DecodedBatch(shard, results, pixels[[0, 0]], last=True), encoders)
    assert [type(entry) for entry in encoded.entries] == [
        EncodedClip
    ]  # "red" was encoded before the weights were spoilt
    assert encoded.faults == [Fault("f", "the text encoder gave numbers that are not finite", FIRST)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "AutoencoderKLLTX"}, "describes 'AutoencoderKLLTX', expected 'AutoencoderKLMochi' or 'Auto"),
        ({"_class_name": "AutoencoderKLWan"}, "describes 'T5EncoderModel', expected 'UMT5EncoderModel'"),
        ({"temporal_expansions": [1, 2, 2]}, r"by \(4, 8\), expected Mochi's \(6, 8\)"),
        ({"latents_mean": [0.0]}, "has {'latents_mean': 1, 'latents_std': 12} values"),
    ],
)
def test_a_base_of_another_model_is_refused(base, tmp_path, change, message):
    copy = shutil.copytree(base, tmp_path / "base")
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_base(copy)


def test_weights_in_many_files_load_and_a_missing_one_is_named(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(copy / "text_encoder")
    T5EncoderModel.from_pretrained(base / "text_encoder").save_pretrained(copy / "text_encoder", max_shard_size="5KB")
    parts = sorted((copy / "text_encoder").glob("model-*.safetensors"))
    assert len(parts) > 1
    one, many = (Encoders(folder, "cpu", torch.float32, 64) for folder in (base, copy))
    torch.testing.assert_close(many.text(["red disc"]), one.text(["red disc"]), rtol=0, atol=0)
    read_base(copy)
    parts[0].unlink()
    with pytest.raises(ValueError, match=f"lacks {parts[0].name}; the base is incomplete"):
        read_base(copy)


def test_pickled_weights_are_refused_and_incomplete_ones_too(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if "layer_norm" not in name}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config: \d+ tensors are missing"):
        Encoders(copy, "cpu", torch.float32, 64)
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"holds pickled weights only \(pytorch_model\.bin\)"):
        read_base(copy)


def test_an_embedding_does_not_depend_on_the_captions_beside_it(base):
    encoders = Encoders(base, "cpu", torch.float32, 64)
    captions = ["red", "a large blue square moves left over a dark background", "", "green disc"]
    together = encoders.text(captions)
    for caption, text in zip(captions, together, strict=True):
        torch.testing.assert_close(encoders.text([caption])[0], text, rtol=0, atol=0)


def test_text_is_encoded_in_float32_beside_a_narrow_vae(base):
    narrow, whole, rough = (
        Encoders(base, "cpu", *options)
        for options in ((torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 64, False, torch.bfloat16))
    )
    assert narrow.vae.dtype == torch.bfloat16 and narrow.text_encoder.dtype == torch.float32
    stored, exact, other = (encoders.text(["a large blue square"])[0] for encoders in (narrow, whole, rough))
    assert (exact.dtype, stored.dtype, other.dtype) == (torch.float32, torch.float16, torch.float16)
    torch.testing.assert_close(stored, exact.half(), rtol=0, atol=0)  # rounded once, when it is stored
    assert (other.float() - exact).norm() > 5 * (stored.float() - exact).norm()


@pytest.mark.slow
def test_tiles_of_large_frames_give_nearly_the_same_latents(base):
    video = render(choose_scene(0, 0), size=272, frames=7)
    whole, _ = Encoders(base, "cpu", torch.float32, 64).latents([video])
    tiled, _ = Encoders(base, "cpu", torch.float32, 64, tiling=True).latents([video])
    assert tiled.shape == whole.shape == (1, 12, 2, 34, 34)
    difference = (tiled.float() - whole.float()).abs().mean() / whole.float().std()
    assert 0 < difference < 0.2


def test_clips_are_decoded_ahead_up_to_a_limit():
    taken = 0

    def tasks():
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield ShardTask(f"{number}", TALL, [Fault("a", "damaged", f"{number}")])

    with (
        WorkerPool(1, 60.0) as pool,
        contextlib.closing(prefetch(decode_batches(tasks(), pool, batch_size=2), 2)) as ready,
    ):
        names = [next(ready).results[0].shard for _ in range(3)]
        # Three were used, two wait in the queue, one waits for the queue, one is being assembled, two are in the pool.
        deadline = time.monotonic() + 10
        while taken < 9 and time.monotonic() < deadline:
            time.sleep(0.01)
        before, settled = -1, 0
        while settled < 10:
            settled, before = (settled + 1 if taken == before else 0), taken
            time.sleep(0.02)
        assert 9 <= taken <= 13 and names == ["0", "1", "2"]


def test_prefetch_propagates_errors():
    def values():
        yield 1
        raise KeyError("prefetched")

    ready = prefetch(values(), 1)
    assert next(ready) == 1
    with pytest.raises(KeyError, match="prefetched"):
        next(ready)


def test_each_task_of_a_node_gets_a_device_of_its_own(monkeypatch):
    assert choose_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto") == "cpu"
        for device in ("cuda", "cuda:3"):
            with pytest.raises(ValueError, match=f"got device '{device}', but torch finds no CUDA device"):
                choose_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("cuda:3") == "cuda:3"
    with pytest.raises(ValueError, match="got device 'cuda:4', but torch finds 4 CUDA devices"):
        choose_device("cuda:4")
    for device in ("blah", "cuda:", "cuda:x", "meta", ""):
        with pytest.raises(ValueError, match=f"got device '{device}', expected cpu, cuda, cuda:N"):
            choose_device(device)
    monkeypatch.setenv("SLURM_LOCALID", "2")
    assert choose_device("cuda") == choose_device("auto") == "cuda:2"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("cuda") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the task sees only its own device
    assert choose_device("cuda") == "cuda:0"


@pytest.mark.parametrize("frames", [1, 7, 163])
def test_sizes_that_fit(frames):
    check_size(frames, 480, 848)
