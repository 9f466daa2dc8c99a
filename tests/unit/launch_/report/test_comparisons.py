"""A change is told only where its paired interval excludes zero."""

from pathlib import Path

import numpy as np
import pytest

from launch.report.comparisons import NOISE, Change
from launch.report.results import read_results
from launch.report.summary import key_figures, sentences
from launch.run_folder import RunFolder
from tests.support.reported_run import PROMPTS, write_masking, write_sinks


def rewrite(run: Path, name: str, **changes) -> None:
    """Replaces arrays of a file; None takes one out."""
    path = run / "measurements" / f"{name}.npz"
    arrays = {**np.load(path), **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


def results(run: Path):
    return read_results(RunFolder(run))


def verdict(run: Path, label: str) -> str:
    (found,) = [figure.verdict for figure in key_figures(results(run)) if label in figure.label]
    return found


@pytest.mark.parametrize(
    ("interval", "words"),
    [((0.1, 0.3), "higher by 0.2 [0.1, 0.3]"), ((-0.1, 0.5), f"{NOISE} [−0.1, 0.5]"), ((0.0, 0.5), f"{NOISE} [0, 0.5]"),
     (None, f"{NOISE} (no prompts)")],
)  # fmt: skip
def test_the_words_of_a_change(interval, words):
    assert Change(0.5, 0.7, interval, "no prompts").words == words
    assert NOISE == "no difference that can be told from noise"


def test_a_change_is_told_with_its_interval(run: Path):
    comparison = results(run).masking_comparison
    ratio, loss = comparison.change("critical_ratio"), comparison.dense_loss
    assert ratio.direction == 1 and ratio.interval[0] < 0.654 - 0.123 < ratio.interval[1]
    assert loss.direction == -1 and loss.interval == pytest.approx((-0.0426, -0.0374), abs=1e-3)
    said = " ".join(sentences(results(run)))
    assert "0.123 before, 0.654 after, higher by 0.531 [" in said and "0.45 before, 0.41 after, lower by 0.04 [" in said
    assert verdict(run, "critical ratio") == "good"
    # The dense loss of the two alone: intervals that overlap.
    assert results(run).masking_before.dense_loss_interval[0] < results(run).masking_after.dense_loss_interval[1]


def test_the_relative_loss_is_a_quotient_of_means_with_its_interval(run: Path):
    """The made-up losses of all probes are in the same proportion, so every resample says 0.41 / 0.45 - 1."""
    relative = results(run).masking_comparison.relative_loss
    assert relative.after == pytest.approx(0.41 / 0.45 - 1)
    assert relative.interval == pytest.approx((0.41 / 0.45 - 1,) * 2, abs=1e-6) and relative.direction == -1
    said = " ".join(sentences(results(run)))
    assert "(−8.9 % [−8.9 %, −8.9 %])" in said
    after = np.load(run / "measurements" / "masking-epoch-002.npz")["dense_loss_by_probe"]
    spread = after * np.where(np.arange(PROMPTS) % 2, 0.8, 1.2)[:, None]
    rewrite(run, "masking-epoch-002", dense_loss_by_probe=spread)
    relative = results(run).masking_comparison.relative_loss
    assert relative.direction == 0 and relative.interval[0] < -0.089 < relative.interval[1]
    rewrite(run, "masking-epoch-002", dense_loss_by_probe=None)
    relative = results(run).masking_comparison.relative_loss
    assert relative.interval is None and relative.reason == "the run kept no figures of every probe"


def test_a_worse_ratio_is_bad_news(run: Path):
    write_masking(run, "epoch-002", 0.05, 0.45)
    assert verdict(run, "critical ratio") == "bad"


def test_a_change_within_noise_is_none(run: Path):
    """The mean r* rises, but half of the prompts say the opposite."""
    base = np.load(run / "measurements" / "masking-base.npz")
    factor = np.where(np.arange(PROMPTS) % 2, 0.2, 1.7)[:, None, None, None]
    increase = (base["loss_by_probe"] - base["dense_loss_by_probe"][..., None, None]) * factor
    rewrite(run, "masking-epoch-002", loss_by_probe=base["dense_loss_by_probe"][..., None, None] + increase,
            dense_loss_by_probe=base["dense_loss_by_probe"])  # fmt: skip
    change = results(run).masking_comparison.change("critical_ratio")
    assert change.after > change.before and change.interval[0] < 0 < change.interval[1]
    assert verdict(run, "critical ratio") == "" and f"0.654 after, {NOISE} [" in " ".join(sentences(results(run)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"loss_by_probe": None}, "the run kept no figures of every probe"),
     ({"caption_ids": None}, "the run kept no figures of every probe"),
     ({"caption_ids": np.arange(PROMPTS) % 5}, "5 prompts give no interval, 6 would"),
     ({"keys": np.array([f"other-{i}" for i in range(PROMPTS)])}, "the stages differ in keys"),
     ({"sigmas": np.array([0.1, 0.2])}, "the stages differ in sigmas"),
     ({"scopes": np.array(["retrained", "layer-05"])}, "the stages differ in scopes")],
)  # fmt: skip
def test_without_an_interval_no_change_is_told(run: Path, changes: dict, reason: str):
    rewrite(run, "masking-epoch-002", **changes)
    assert results(run).masking_comparison.change("critical_ratio").words == f"{NOISE} ({reason})"
    assert verdict(run, "critical ratio") == "" and f"0.654 after, {NOISE} ({reason})" in " ".join(
        sentences(results(run))
    )


def test_a_blank_ratio_is_not_compared(run: Path):
    write_masking(run, "epoch-002", 0.9, 0.45, uniform=0.001)
    reason = "not measured: the uniform control costs nothing"
    assert results(run).masking_comparison.change("critical_ratio_of_base").words == f"not compared: {reason}"
    assert verdict(run, "critical ratio") == ""
    assert f"0.123 before, blank after ({reason})" in " ".join(sentences(results(run)))
    assert "0.12 → blank" in [figure.value for figure in key_figures(results(run))]


def test_a_difference_of_rounding_is_none_though_every_prompt_has_it(run: Path):
    """The loss of every probe is higher by the same share, so the interval leaves out zero."""
    for share, direction in ((1e-6, 0), (1e-3, 1)):
        write_masking(run, "epoch-002", 0.123 / (1 + share), 0.45 * (1 + share))
        compared = results(run).masking_comparison
        for change in (compared.dense_loss, compared.relative_loss):
            assert change.interval is not None and 0 < change.interval[0] <= change.interval[1]
            assert change.direction == direction, (share, change)
        assert compared.change("critical_ratio").direction == -direction


def test_sinks_are_gone_only_where_that_can_be_told(run: Path):
    write_sinks(run, "epoch-002", {})
    assert verdict(run, "still sinks") == "good"
    assert results(run).sink_comparison.change((4, 1)).interval == pytest.approx((-1.0, -0.54), abs=0.02)
    assert "after against before: lower: layer 4 head 1, layer 5 head 0." in " ".join(sentences(results(run)))
    write_sinks(run, "epoch-002", {(4, 1): 0.875})  # one prompt of eight less
    assert verdict(run, "still sinks") == ""
    assert f"{NOISE}: layer 4 head 1; lower: layer 5 head 0." in " ".join(sentences(results(run)))


def test_sinks_without_caption_numbers_are_not_compared(run: Path):
    write_sinks(run, "epoch-002", {}, captions=False)
    assert verdict(run, "still sinks") == ""
    assert f"{NOISE} (the run kept no caption numbers): layer 4" in " ".join(sentences(results(run)))


def test_flagged_heads_are_compared_where_none_were_planted(run: Path):
    (run.parent.parent / "base" / "planted.json").unlink()
    assert "after against before: lower: layer 4 head 1, layer 5 head 0." in " ".join(sentences(results(run)))


def test_probes_without_captions_are_told_apart(run: Path):
    assert "Without captions" not in " ".join(sentences(results(run)))
    before = sentences(results(run))
    folder = run / "measurements"
    for stage in ("base", "epoch-002"):
        for kind in ("sinks", "masking"):
            (folder / f"unconditional-{kind}-{stage}.npz").write_bytes((folder / f"{kind}-{stage}.npz").read_bytes())
    rewrite(run, "unconditional-masking-base", critical_ratio=np.array([0.321, 0.5]))
    write_sinks(run, "unconditional", {(4, 0): 1.0})
    (folder / "sinks-unconditional.npz").rename(folder / "unconditional-sinks-epoch-002.npz")
    said = sentences(results(run))
    bare = [line for line in said if line.startswith("Without captions: ")]
    assert [line for line in said if line not in bare] == before
    assert bare[0] == "Without captions: flagged before: layer 4 head 1, layer 5 head 0; flagged after: layer 4 head 0."
    assert "lower: layer 4 head 1, layer 5 head 0" in bare[1] and "0.321 before, 0.654 after" in bare[2]
