"""The benchmarks run, compare equal work, and refuse what does not exist."""

import importlib
import inspect

import pytest

from launch.bench import step as bench_step
from launch.bench.command import BENCHMARKS, run

TINY = {**bench_step.CONFIG, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "text_embed_dim": 16}


def test_unknown_names_list_what_exists():
    with pytest.raises(ValueError, match=r"got benchmark 'stp', expected one of: step .*; full .*"):
        run(["bench", "stp"])


def test_kills_are_a_make_target():
    with pytest.raises(ValueError, match="expected `make kills`"):
        run(["bench", "kills", "--kills", "3"])


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_benchmarks(capsys, arguments):
    run(["bench", *arguments])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and what in said for name, (_, what) in BENCHMARKS.items())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_says_what_each_option_means(capsys, name):
    with pytest.raises(SystemExit) as stop:
        run(["bench", name, "--help"])
    said = capsys.readouterr().out
    options = inspect.signature(importlib.import_module(BENCHMARKS[name][0]).run).parameters
    assert stop.value.code == 0 and len(options) > 1
    for option in options:
        shown = said.partition(f"\n  --{option} ")[2].partition("\n  --")[0]
        assert "(type:" in shown and len(shown.partition("(type:")[0].split()) > 1, option


def test_an_option_of_another_benchmark_is_refused():
    with pytest.raises(ValueError, match=r"unrecognized arguments: --clips 5\naccepted here: device, repeats"):
        run(["bench", "step", "--clips", "5"])


def test_step_compares_equal_work():
    measured = bench_step.compare(TINY, (12, 2, 4, 4), (3, 2), last=2, device="cpu", repeats=2)
    assert list(measured) == list(bench_step.VARIANTS)
    assert all(len(m.seconds) == 2 and min(m.seconds) > 0 and m.saved > 0 for m in measured.values())
    saved = {name: cost.saved for name, cost in measured.items()}
    assert saved[bench_step.TRAP] > 2 * saved[bench_step.TRUNK_HEAD]
    # A teacher has no graph; with `blocks` beside another loss the retrained blocks run twice, each with its own.
    velocity, blocks, both = (saved[name] for name in list(bench_step.OBJECTIVES)[3:])
    assert velocity == pytest.approx(saved[bench_step.TRUNK_HEAD], rel=0.1)
    assert both == pytest.approx(blocks + velocity, rel=0.15)


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own():
    held = bytearray(300 * 2**20)  # a parent's peak must not show in the child
    added = bench_step.added_memory(
        bench_step.TRUNK_HEAD, {**TINY, "attention_head_dim": 32}, (12, 2, 32, 32), (3, 2), last=2, device="cpu"
    )
    assert len(held) and 5 * 2**20 < added < 200 * 2**20


def test_variants_with_other_losses_are_not_compared(monkeypatch):
    right = bench_step.StepVariant._stock_loss
    monkeypatch.setattr(bench_step.StepVariant, "_stock_loss", lambda self: 2 * right(self))
    with pytest.raises(RuntimeError, match="different losses"):
        bench_step.compare(TINY, (12, 2, 4, 4), (3, 2), last=2, device="cpu", repeats=1)


def test_full_prints_seconds_and_memory_for_each_length(tmp_path, capsys, config_json):
    run(f"bench full --device cpu --config_json {config_json} --frames [7,19] --height 32 --width 32 --text_tokens 5 "
        "--steps 2 --last 1".split())  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("step 0") + out.count("step 1") == 4
    assert "8 + 5" in out and "16 + 5" in out and "torch" in out


def test_full_refuses_a_clip_that_the_family_does_not_take():
    with pytest.raises(ValueError, match=r"got frames 36, expected 6 k \+ 1"):
        run(["bench", "full", "--device", "cpu", "--frames", "[36]"])
    wan = "recipes/transformers/wan_1.3b.json"
    with pytest.raises(ValueError, match=r"got frames 83, expected 4 k \+ 1 for Wan 2.1"):
        run(["bench", "full", "--device", "cpu", "--config_json", wan, "--frames", "[83]"])
