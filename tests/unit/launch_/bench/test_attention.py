"""The attention benchmark: every column is a number, its errors react to wrong results, bad options are refused."""

import math
import re

import pytest
import torch

from launch.bench import attention as bench_attention
from launch.bench import attention_errors
from launch.bench.result import show

NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?")


def numbers(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.mark.slow
def test_every_row_is_said_at_once_with_every_column(capsys):
    show(bench_attention.run(device="cpu", tokens=(64,), heads=2, head_dim=16, repeats=2, backends=("chunked",)))
    printed = capsys.readouterr()
    rows = [line.split(" | ") for line in printed.err.splitlines() if " | " in line]
    assert [row[2] for row in rows] == list(bench_attention.OPERATIONS)
    for _, tokens, _, ms, ratio, rounds, extra, error in rows:
        columns = [numbers(text) for text in (tokens, ms, ratio, rounds, extra, error)]
        assert all(columns) and all(math.isfinite(number) for column in columns for number in column)
        assert numbers(tokens) == [64] and numbers(rounds) == [2] and min(numbers(ms)) >= 0 and min(numbers(extra)) >= 0
    errors = {row[2]: numbers(row[-1]) for row in rows}
    apart = errors[bench_attention.STATISTICS] + errors[bench_attention.QUANTILE]
    for sums, different, rank in (apart, errors[bench_attention.BOTH]):
        assert sums < 1e-5 and different == 0
        # The order statistic's index is rounded down, so that much less than the ratio lies below.
        assert -1 / 64**2 <= rank <= 1e-12
    assert errors[bench_attention.MASKED][0] < 1e-5 and errors[bench_attention.DENSE][0] < 1e-5
    assert "2 heads x 16, float32" in printed.out and "triton" in printed.out and "64 tokens: default" in printed.out


@pytest.fixture
def measured():
    """Inputs, and the engine's results on them."""
    x = bench_attention.make_inputs(96, 2, 16, "float32", "cpu")
    mass, counts = bench_attention.all_statistics(x, "chunked")[:2]
    thresholds, out = bench_attention.nine_quantiles(x, "chunked")[0], bench_attention.masked(x, "chunked")[0]
    dense = bench_attention.dense_forward(x, bench_attention.CHOSEN)[0]
    return x, {"mass": mass, "counts": counts, "thresholds": thresholds, "out": out, "dense": dense}


def test_errors_of_right_results_are_small_in_slices_of_any_size(measured, monkeypatch):
    x, found = measured
    whole = bench_attention.errors(x, **found)
    assert 0 < whole["sums"] < 1e-5 and whole["counts"] == 0 and abs(whole["rank"]) <= 1 / 96**2
    assert 0 < whole["output"] < 1e-5 and 0 < whole["dense"] < 1e-5
    monkeypatch.setitem(attention_errors._SLICE, "cpu", 2 * 96 * 7)  # 96 is not a multiple of 7
    assert bench_attention.errors(x, **found) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "spoil", "key", "low", "high"),
    [
        ("mass", lambda t: t * 1.01, "sums", 0.0099, 0.0101),
        ("counts", lambda t: t + (torch.arange(96) == 5).int(), "counts", 10, 10),  # 2 heads, 5 eps
        ("thresholds", lambda t: torch.cat([t[..., :1], t[..., 2:], t[..., -1:]], dim=-1), "rank", 0.099, 0.101),
        ("thresholds", lambda t: t * 0, "rank", -0.9, -0.9),
        ("out", lambda t: t + (torch.arange(96) == 95)[:, None] * 0.5, "output", 0.499, 0.501),
        ("out", lambda t: t * math.nan, "output", math.nan, math.nan),
        ("dense", lambda t: t - 0.25, "dense", 0.249, 0.251),
    ],
)
def test_an_error_shows_where_a_result_is_wrong_and_only_there(measured, name, spoil, key, low, high):
    x, found = measured
    right, wrong = bench_attention.errors(x, **found), bench_attention.errors(x, **{**found, name: spoil(found[name])})
    assert (math.isnan(low) and math.isnan(wrong[key])) or low <= wrong[key] <= high
    assert {k: v for k, v in wrong.items() if k != key} == {k: v for k, v in right.items() if k != key}


def test_the_expected_median_removes_about_half():
    x = bench_attention.make_inputs(512, 4, 64, "float32", "cpu")
    realised = bench_attention.masked(x, "chunked")[1]
    # The sums of peaked heads mostly fall short of their expected value: weights are larger, and fewer are removed.
    assert realised[0, 0].sub(0.5).abs() < 0.05 and 0.3 < realised.min() <= realised.max() < 0.55


@pytest.mark.slow
def test_memory_is_that_of_the_operation():
    held = bytearray(300 * 2**20)  # a parent's peak must not show in the child
    x = bench_attention.make_inputs(1500, 1, 16, "float32", "cpu")
    dense = bench_attention.added_bytes(bench_attention.STATISTICS, "dense", x, "float32") / 2**20
    chunked = bench_attention.added_bytes(bench_attention.DENSE, bench_attention.CHOSEN, x, "float32") / 2**20
    # The dense back end holds logits and weights in float64, 17 MiB each, and some copies of them.
    assert len(held) and 34 < dense < 150 and chunked < 10


@pytest.mark.parametrize(("tokens", "heads"), [(40, 3), (41, 1)])
def test_above_the_reference_one_head_is_compared(monkeypatch, tokens, heads):
    seen, errors = [], bench_attention.errors
    monkeypatch.setattr(bench_attention, "_REFERENCE", 40)
    monkeypatch.setattr(bench_attention, "added_bytes", lambda *_: 0)  # takes processes
    monkeypatch.setattr(bench_attention, "errors", lambda x, *rest: seen.append(x.q.shape[1]) or errors(x, *rest))
    x = bench_attention.make_inputs(tokens, 3, 8, "float32", "cpu")
    rows = list(bench_attention.measure(x, "chunked", bench_attention.CHOSEN, repeats=3, dtype="float32"))
    assert seen == [heads, heads] and {row[5] for row in rows} == {"3"}


def test_what_would_not_fit_is_measured_only_if_asked_for():
    lengths = ("cpu", (4096, 64), ("dense", "chunked"))
    asked = [("dense", 64), ("chunked", 64), ("chunked", 4096)]
    assert bench_attention.measured_lengths(*lengths, all=False) == asked
    assert ("dense", 4096) in bench_attention.measured_lengths(*lengths, all=True)


def test_the_device_chooses_what_is_not_given(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_attention, "make_inputs", lambda *given: asked.append(given) or torch.zeros(0))
    monkeypatch.setattr(bench_attention, "dense_kernels", lambda x: {bench_attention.CHOSEN: 1.0})
    monkeypatch.setattr(bench_attention, "measure", lambda x, backend, *_, **__: [[backend]])
    result = bench_attention.run(device="cpu")
    assert asked == [(n, 4, 128, "float32", "cpu") for n in (2048, 4096, 8192, 2048)]
    assert result.rows == [["chunked"]] * 3 + [["dense"]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backends": ["tritn"]}, "got backend 'tritn', expected 'dense', 'chunked', 'triton'"),
        ({"backends": ["dense"], "tokens": [4096]}, "Give --all true"),
        ({"backends": []}, "none of which"),
        ({"tokens": [64, 0]}, r"got tokens \[64, 0\] .* at least 1"),
        ({"tokens": []}, "at least 1"),
        ({"heads": 0}, "'heads': 0"),
        ({"head_dim": -1}, "'head_dim': -1"),
        ({"repeats": 0}, "'repeats': 0"),
        ({"dtype": "float8"}, "got dtype 'float8', expected one of float32, bfloat16, float16"),
        ({"device": "tpu"}, "got device 'tpu', expected cpu, or cuda"),
    ],
)
def test_bad_options_are_refused_before_any_work(monkeypatch, given, says):
    monkeypatch.setattr(bench_attention, "make_inputs", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=says):
        bench_attention.run(**{"device": "cpu", **given})
