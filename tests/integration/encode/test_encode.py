"""From video shards to latent shards, through the classes that the real base has."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLMochi, MochiPipeline
from transformers import T5EncoderModel, T5Tokenizer

from data.base_facts import read_base
from data.bucket import Bucket
from data.encode.command import encode
from data.encode.encoders import Encoders
from data.inspect.command import inspect
from data.shards.format import read_json, read_samples, text_digest
from data.video.decode import decode_video
from launch.bench.encode import BARE, STAGE, run
from tests.support.clip_shards import TEXT_WIDTH, write_video_shards
from tests.support.encoded_shards import (
    FIRST,
    SECOND,
    STORE,
    TALL,
    THIRD,
    WIDE,
    WINDOWS,
    faults_of,
    files,
    read_all,
)
from tests.support.http_store import WebStore


@pytest.fixture(scope="module")
def latents(shards, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    encode(str(shards), folder, base=base, batch_size=2)
    return folder


def test_latents_are_what_the_vae_gives_for_the_window_of_each_clip(latents, clips, base):
    vae = AutoencoderKLMochi.from_pretrained(base / "vae")
    found = read_all(latents)
    assert list(found) == [key for key, *_ in clips]
    for key, clip, _ in clips:
        bucket = TALL if int(key[-1]) < 5 else WIDE
        video = torch.from_numpy(decode_video(clip, WINDOWS[bucket], bucket.height, bucket.width))
        with torch.no_grad():
            posterior = vae.encode(video.permute(3, 0, 1, 2)[None] / 127.5 - 1).latent_dist
        tensors, _, facts = found[key]
        assert tensors["mean"].dtype == torch.float16 and tuple(tensors["mean"].shape) == bucket.latent_shape(12)
        torch.testing.assert_close(tensors["mean"].float(), posterior.mean[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(tensors["logvar"].float(), posterior.logvar[0], atol=2e-3, rtol=2e-3)
        assert facts["indices"] == WINDOWS[bucket]


def test_text_is_what_the_pipeline_gives_on_its_valid_tokens(latents, clips, base):
    encoder = T5EncoderModel.from_pretrained(base / "text_encoder")
    tokenizer = T5Tokenizer.from_pretrained(base / "tokenizer")
    pipeline = MochiPipeline(scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None)
    found = read_all(latents)
    for key, _, caption in clips:
        text = found[key][1]
        if not caption:
            assert text.shape == (0, TEXT_WIDTH)
            continue
        with torch.no_grad():
            embeds, mask = pipeline._get_t5_prompt_embeds(caption.decode(), max_sequence_length=64, device="cpu")
        torch.testing.assert_close(text, embeds[0][mask[0]], atol=1e-5, rtol=1e-5)
        assert len(text) > len(caption.split())  # words and the end


def test_index_members_and_facts(latents, clips, base):
    index = json.loads((latents / "index.json").read_text())
    facts = read_base(base)
    head = {"format": "reblock-latents-2", "channels": 12, "text_width": TEXT_WIDTH}
    head |= {"latents_mean": facts.mean, "latents_std": facts.std}
    assert {name: index[name] for name in head} == head
    assert [(s["name"], s["samples"]) for s in index["shards"]] == [(FIRST, 3), (SECOND, 2), (THIRD, 2)]
    members = dict(read_samples(str(latents), FIRST, STORE))
    assert all(set(each) == {"safetensors", "json", "text"} for each in members.values())
    caption = clips[2][2].decode()
    assert read_json(str(latents / FIRST), members["clip-2"], STORE) == {
        "caption": caption, "text": text_digest(caption), "frames": 7, "height": 32, "width": 32,
        "source": "clip-2.mp4", "indices": WINDOWS[TALL],
    }  # fmt: skip


def test_a_caption_is_stored_once_per_shard_before_its_first_use(latents):
    members = dict(read_samples(str(latents), FIRST, STORE))
    shared = members["clip-0"]["text"]
    assert members["clip-2"]["text"] == shared != members["clip-1"]["text"]
    assert all(shared.offset < members["clip-0"][name].offset for name in ("safetensors", "json"))
    assert (latents / FIRST).read_bytes().count(b"text/") == 2


def test_the_folder_holds_only_the_files_of_the_format(latents):
    expected = {"index.json", "faults.jsonl", FIRST, SECOND, THIRD}
    expected |= {f"records/{name[:-4]}.json" for name in (FIRST, SECOND, THIRD)}
    assert set(files(latents)) == expected and not (latents / "claims").exists()


def test_finished_shards_are_kept_and_missing_ones_made_again(latents, shards, base, tmp_path, capsys):
    out = shutil.copytree(latents, tmp_path / "out")
    (out / SECOND).unlink()
    (out / "records" / f".{SECOND[:-4]}.json.0123.part").touch()  # left by a killed process
    (out / f".{SECOND}.0123.part").touch()
    stamp = (out / FIRST).stat().st_mtime_ns
    encode(str(shards), out, base=base, batch_size=2)
    assert "2 of 3 shards are finished already" in capsys.readouterr().out
    assert files(out) == files(latents) and (out / FIRST).stat().st_mtime_ns == stamp


def test_the_number_of_decoders_and_the_order_of_shards_do_not_change_the_bytes(
    latents, shards, base, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")  # another order of shards
    encode(str(shards), tmp_path, base=base, batch_size=2, processes=3)
    assert files(tmp_path) == files(latents)


def test_other_settings_or_another_base_are_refused(latents, shards, base, tmp_path):
    with pytest.raises(ValueError, match=r"other settings: max_text_tokens is 256 there, 16 now\. Choose"):
        encode(str(shards), latents, base=base, max_text_tokens=16)
    other = shutil.copytree(base, tmp_path / "base")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"other settings: base is '\w+' there, '\w+' now\. Choose"):
        encode(str(shards), latents, base=other)


def test_the_second_of_two_processes_with_different_settings_is_refused_before_it_loads_weights(
    latents, shards, base, tmp_path, monkeypatch
):
    loaded = []

    def load(*args):
        loaded.append(args)
        assert len(loaded) == 1, "the second process loads weights"
        with pytest.raises(ValueError, match="is being encoded with other settings: max_text_tokens is 256 there"):
            encode(str(shards), tmp_path / "out", base=base, max_text_tokens=16)
        return Encoders(*args)

    monkeypatch.setattr("data.encode.command.Encoders", load)
    encode(str(shards), tmp_path / "out", base=base, batch_size=2)
    assert loaded and files(tmp_path / "out") == files(latents)


def test_a_run_that_fails_before_its_first_shard_does_not_reserve_the_folder(shards, base, tmp_path, monkeypatch):
    def load(*args):
        raise ValueError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("data.encode.command.Encoders", load)
        with pytest.raises(ValueError, match="out of memory"):
            encode(str(shards), tmp_path / "out", base=base)
    assert files(tmp_path / "out") == {} and not (tmp_path / "out" / "claims").exists()
    encode(str(shards), tmp_path / "out", base=base, max_text_tokens=16)


def test_a_clip_may_have_the_name_of_a_caption_entry(clips, base, tmp_path):
    _, clip, _ = clips[0]
    key = f"text-{text_digest('hello')}"
    rows = {TALL: [(key, clip, b"hello", WINDOWS[TALL]), ("other", clip, b"red disc", WINDOWS[TALL])]}
    encode(str(write_video_shards(tmp_path / "v", rows, per_shard=2)), tmp_path / "l", base=base)
    assert list(read_all(tmp_path / "l")) == [key, "other"]
    inspect(str(tmp_path / "l"), verify=True)


def test_a_folder_with_other_files_is_refused_in_one_sentence_and_not_changed(
    latents, shards, base, tmp_path, monkeypatch
):
    video = shutil.copytree(shards, tmp_path / "video")
    (tmp_path / "link").symlink_to(video)
    partial = shutil.copytree(shards, tmp_path / "partial")
    (partial / "index.json").unlink()
    renamed = shutil.copytree(latents, tmp_path / "renamed")
    for name in (FIRST, SECOND, THIRD):
        (renamed / "records" / f"{name[:-4]}.json").rename(renamed / "records" / f"1x16x16{name[7:-4]}.json")
    (tmp_path / "file").touch()
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for source, out, message in [
        (video, "video", "is the folder of the video shards themselves; expected a new folder"),
        (video, "link", "is the folder of the video shards themselves"),
        (f"video/{FIRST}", video, "is the folder of the video shards themselves"),
        (shards, video, r"holds other shards already \(format 'reblock-videos-2'\); expected a new folder"),
        (shards, partial, "holds other shards already, which `reblock encode` did not make"),
        (shards / SECOND, latents, r"holds shards made with other settings: source is '\w+' there, '\w+' now\. Choose"),
        (shards, "file", "file is a file; expected a new folder"),
        (latents, "new", "They are latents already; give the video shards"),
    ]:
        with pytest.raises(ValueError, match=message) as refused:
            encode(str(source), out, base=base)
        assert len(str(refused.value)) - len(str(tmp_path)) * 3 < 250
    # No record here has the name of one of the shards.
    (renamed / "index.json").unlink()
    with pytest.raises(ValueError, match="holds shards made with other settings: source is"):
        encode(str(shards / SECOND), renamed, base=base)
    del before["renamed/index.json"]
    assert files(tmp_path) == before


def test_some_shards_of_several_folders(latents, shards, clips, base, tmp_path, monkeypatch):
    other = Bucket(1, 32, 32)
    rows = {other: [("still", clips[0][1], b"red disc", [0])]}
    write_video_shards(tmp_path / "other", rows, per_shard=1)
    (tmp_path / "video").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    encode("{video/7x32x32-00000[01].tar,other}", "out", base=base, batch_size=2)
    assert list(read_all(tmp_path / "out")) == [f"clip-{n}" for n in range(5)] + ["still"]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [entry["name"] for entry in index["shards"]] == [FIRST, SECOND, "1x32x32-000000.tar"]
    assert (tmp_path / "out" / FIRST).read_bytes() == (latents / FIRST).read_bytes()
    # Other shards count as other settings.
    with pytest.raises(ValueError, match="other settings: source is"):
        encode("video", "out", base=base, batch_size=2)
    encode(f"{{video/{FIRST},video/{SECOND},other}}", "out", base=base, batch_size=2)
    shutil.copytree(shards, tmp_path / "again")
    with pytest.raises(ValueError, match=f"video and again both hold a shard {FIRST}, .* a folder of its own"):
        encode("{video,again}", "new", base=base)
    for name, message in [("video/9x*.tar", "matches nothing"), ("video/none.tar", "has no shards .*none.tar")]:
        with pytest.raises(ValueError, match=message):
            encode(name, "new", base=base)
    assert not (tmp_path / "new").exists()


def test_a_web_store_that_fails_twice_is_retried_and_one_that_refuses_costs_the_shard(latents, shards, base, tmp_path):
    with WebStore(shards) as store:
        store.fail(FIRST, 2)
        encode(store.url, tmp_path / "whole", base=base, batch_size=2)
        assert files(tmp_path / "whole") == files(latents)
        store.fail(SECOND, status=403)
        store.fail(f"{THIRD[:-4]}.json", status=403)
        encode(store.url, tmp_path / "part", base=base, batch_size=2, max_fault_share=0.6)
    assert (tmp_path / "part" / FIRST).read_bytes() == (latents / FIRST).read_bytes()
    found = faults_of(tmp_path / "part")
    assert [(f["shard"], f["key"]) for f in found] == [
        (SECOND, "clip-3"), (SECOND, "clip-4"), (THIRD, "#0"), (THIRD, "#1"),
    ]  # fmt: skip
    assert all("cannot be read" in fault["reason"] for fault in found)


def test_a_shard_that_another_process_has_leased_is_named_or_waited_for(latents, shards, base, tmp_path, capsys):
    lease = tmp_path / "claims" / f"{SECOND[:-4]}.json"
    lease.parent.mkdir()
    lease.write_text(json.dumps({"host": "node7", "pid": 12, "place": "elsewhere", "job": "345"}))
    encode(str(shards), tmp_path, base=base, batch_size=2, wait=False)
    printed = capsys.readouterr().out
    assert "others hold 1 shards" in printed and f"{SECOND}: process 12 on node7, job 345, last seen" in printed
    assert not (tmp_path / "index.json").exists() and not (tmp_path / SECOND).exists()
    assert lease.exists() and (tmp_path / THIRD).exists()
    # After a second without a heartbeat, the lease has expired.
    encode(str(shards), tmp_path, base=base, batch_size=2, claim_timeout=1.0)
    assert files(tmp_path) == files(latents)


def test_the_report_lists_the_stages(shards, base, tmp_path, capsys):
    encode(str(shards), tmp_path, base=base, report=True)
    printed = capsys.readouterr().out
    assert "7 clips in " in printed and "clips / s" in printed and "accelerator idle " in printed
    stages = ("waiting for decoded clips", "VAE", "text encoder", "copies between", "waiting for the writer")
    assert all(stage in printed for stage in stages) and "slowest stage: " in printed


@pytest.mark.slow
def test_the_benchmark_compares_the_stage_with_the_models_alone(base):
    result = run(device="cpu", clips=10, repeats=1, base=base)
    assert result.title.startswith("Encoding 10 clips 19x64x64") and [row[0] for row in result.rows] == [STAGE, BARE]
    assert "The stage adds " in result.notes[0] and "Accelerator idle " in result.notes[1]
