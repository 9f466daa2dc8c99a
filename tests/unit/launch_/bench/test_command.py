"""The benchmarks run, compare equal work, and refuse what does not exist."""

import pytest

from launch.bench import step as bench_step
from launch.bench.command import bench
from launch.bench.full_size import latent_shape
from trainer.models.load import read_config

TINY = {**bench_step.CONFIG, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "text_embed_dim": 16}


def test_unknown_names_list_what_exists():
    with pytest.raises(ValueError, match=r"got benchmark 'stp', expected one of: step .*; full .*"):
        bench("stp")


def test_step_compares_equal_work():
    measured = bench_step.compare(TINY, (12, 2, 4, 4), (3, 2), last=2, device="cpu", repeats=2)
    assert list(measured) == list(bench_step.VARIANTS)
    assert all(len(m.seconds) == 2 and min(m.seconds) > 0 and m.saved > 0 for m in measured.values())
    assert measured[bench_step.TRAP].saved > 2 * measured[bench_step.TRUNK_HEAD].saved


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own():
    held = bytearray(300 * 2**20)  # a parent's peak must not show in the child
    added = bench_step.added_memory(
        bench_step.TRUNK_HEAD, {**TINY, "attention_head_dim": 32}, (12, 2, 32, 32), (3, 2), last=2, device="cpu"
    )
    assert len(held) and 5 * 2**20 < added < 200 * 2**20


def test_variants_with_other_losses_are_not_compared(monkeypatch):
    monkeypatch.setattr(bench_step.Variant, "_stock", lambda self, x, sigma, batch: 2 * x)
    with pytest.raises(RuntimeError, match="different losses"):
        bench_step.compare(TINY, (12, 2, 4, 4), (3, 2), last=2, device="cpu", repeats=1)


def test_full_prints_seconds_and_memory_for_each_length(tmp_path, capsys, config_json):
    bench("full", device="cpu", config_json=config_json, frames=[7, 19], height=32, width=32, text_tokens=5, steps=2,
          last=1)  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("step 0") + out.count("step 1") == 4
    assert "8 + 5" in out and "16 + 5" in out and "torch" in out


def test_full_size_config_and_latents():
    config = read_config("recipes/mochi1_transformer.json")
    assert config["num_layers"] == 48 and config["num_attention_heads"] * config["attention_head_dim"] == 3072
    tokens = {37: 11_130, 85: 23_850, 163: 44_520}
    for frames, want in tokens.items():
        shape = latent_shape(12, frames, 480, 848)
        assert shape[1] * shape[2] * shape[3] // 4 == want
    for clip in ((36, 480, 848), (37, 481, 848), (37, 480, 840), (0, 16, 16)):
        with pytest.raises(ValueError, match=r"6k \+ 1 frames and multiples of 16"):
            latent_shape(12, *clip)


def test_full_size_parameters(tmp_path):
    """The published counts: about 10 B in all, 792.8 M in the last four blocks."""
    from trainer.models.load import load_transformer

    model = load_transformer("recipes/mochi1_transformer.json", device="meta")
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.transformer_blocks]
    assert round(sum(blocks) / 1e9, 2) == 9.93 and round(sum(blocks[-4:]) / 1e6, 1) == 792.8
    assert len(set(blocks[:-1])) == 1 and blocks[-1] < blocks[0]
