"""`reblock bench checkpoint` measures real saves of a real fit, in the background and in the foreground."""

import pytest

from launch.bench import checkpoint as bench_checkpoint
from launch.bench import step as bench_step

TINY = {**bench_step.CONFIG, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "text_embed_dim": 16}


@pytest.mark.slow
def test_what_a_slow_disk_costs_shows_in_the_foreground_and_not_in_the_background(monkeypatch):
    fsync, slow = bench_checkpoint.time.sleep, 0.5
    monkeypatch.setattr("trainer.checkpoint.file.os.fsync", lambda descriptor: fsync(slow))
    found = bench_checkpoint.measure(TINY, (12, 2, 4, 4), (3, 2), last=2, device="cpu", rounds=2)
    times = {mode: found[mode] for mode in bench_checkpoint.MODES}
    assert all(len(t.save) == len(t.whole) == 2 for t in times.values()) and found["bytes"] > 10_000
    assert min(times[bench_checkpoint.FOREGROUND].save) > slow
    assert min(times[bench_checkpoint.BACKGROUND].save) < slow
    assert min(times[bench_checkpoint.BACKGROUND].written) > slow
    assert max(times[bench_checkpoint.NONE].save) < 0.1
