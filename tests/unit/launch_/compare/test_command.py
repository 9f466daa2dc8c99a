"""Runs side by side: what the page says of them, with which intervals, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch.compare.command import compare
from launch.compare.groups import group_runs
from launch.compare.measured import Figure, difference, measure_base, measure_runs, one_scope, retrained_layers
from launch.compare.page import figure_text
from launch.main import main
from launch.report.results import read_results
from launch.run_folder import RunFolder
from tests.support.pages import PageText
from tests.support.reported_run import PLANTED, PROMPTS, write_masking, write_planted_base, write_run, write_sinks

BLOCKS = (4, 5)


def make_run(folder: Path, base: Path, *, seed: int = 0, dense: float = 0.41, critical: float = 0.654,
             sinks: dict | None = None, init: str = "dit", val_loss: float = 0.41) -> Path:  # fmt: skip
    """A run that ended at these figures."""
    run = write_run(folder, base)
    surgery = {"last": 2, "init": init, "seed": seed}
    recipe = {"model": {"class_path": "x.Y", "init_args": {"base": str(base), "surgery": surgery}},
              "run": {"name": folder.name}, "seed_everything": seed}  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    write_masking(run, "epoch-002", critical, dense)
    write_sinks(run, "epoch-002", sinks or {})
    metrics = (run / "metrics.csv").read_text().replace(",0.41,2.0", f",{val_loss},2.0")
    (run / "metrics.csv").write_text(metrics)
    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_planted_base(tmp_path / "base")


@pytest.fixture
def runs(tmp_path: Path, base: Path) -> dict[str, Path]:
    """A run of two seeds, and a control with planted sinks still there."""
    return {
        "retrained-0": make_run(tmp_path / "retrained-0", base, seed=0, dense=0.41, val_loss=0.41),
        "retrained-1": make_run(tmp_path / "retrained-1", base, seed=1, dense=0.43, val_loss=0.44),
        "keep": make_run(
            tmp_path / "keep", base, init="keep", dense=0.36, sinks=dict.fromkeys(PLANTED, 1.0), val_loss=0.36
        ),
    }


def measured(*runs: Path):
    results = [read_results(RunFolder(run)) for run in runs]
    return measure_runs(results, BLOCKS, PLANTED)


def test_the_page_says_what_was_measured(runs, tmp_path, capsys):
    out = tmp_path / "page" / "compare.html"
    out.parent.mkdir()
    main(["compare", *map(str, runs.values()), "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[-1] == f"comparison: {out.resolve()}"
    page = PageText(out.read_text())
    assert page.open == []
    for part in (
        "The reference is retrained (2 runs).",
        "Heads whose sinks are followed: layer 4 head 1, layer 5 head 0.",
        "retrained (2 runs): 0, 0 of 2 followed heads are sinks, 0, 0 others; loss on the probes 0.42, against the "
        "base lower by 0.03 [",
        "keep: 2 of 2 followed heads are sinks, 0 others; loss on the probes 0.36, against the base lower by 0.09 [",
        "retrained-0, retrained-1 8 the reference",
        "keep keep 8 surgery.init: keep instead of dit",
        "base, no training n/a",  # no run validates its base
        "0.425; runs 0.41 to 0.44",
        "validation loss keep no difference that can be told from noise (one number per run, so no interval over",
        "loss on the probes keep lower by 0.06 [",
        "sink frequency of the followed heads keep higher by 1 [",
        "one run on a side",
        "a red <circle>", "retrained-0: retrained", "keep: retrained, masked",
    ):  # fmt: skip
        assert part in page.text, f"{part!r} is not in: {page.text}"
    # The base was sampled by every run, and is shown once.
    assert page.text.count("a red <circle>") == 1 and page.text.split("Samples")[1].count(" base ") == 1


def test_runs_of_one_recipe_that_cannot_be_averaged_are_refused(runs, base, tmp_path):
    rows = (runs["retrained-1"] / "metrics.csv").read_text()
    (runs["retrained-1"] / "metrics.csv").write_text(re.sub(r"(?m)^8,", "7,", rows))
    with pytest.raises(ValueError, match=r"retrained-0, retrained-1, that are at steps \d+, \d+; expected"):
        compare(runs["retrained-0"], runs["retrained-1"], out=tmp_path / "x.html")
    other = make_run(tmp_path / "retrained-2", base, seed=2)
    path = other / "measurements" / "masking-epoch-002.npz"
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"keys": np.array([f"other-{i}" for i in range(len(arrays["keys"]))])})
    with pytest.raises(ValueError, match=r"got runs of one recipe that differ in keys of the probes; expected"):
        compare(runs["retrained-0"], other, out=tmp_path / "x.html")


def test_a_run_without_a_figure_shows_beside_the_spread_of_the_others():
    assert figure_text(Figure(0.7, (0.6, float("nan"), 0.8))).endswith("; runs 0.6 to 0.8, 1 blank")
    assert figure_text(Figure(0.7, (0.6, 0.8))).endswith("; runs 0.6 to 0.8")


def test_sink_heads_are_not_counted_where_the_layers_are_unknown(runs):
    results = [read_results(RunFolder(runs["keep"]))]
    figure = measure_runs(results, (), PLANTED).figures["sink_heads"]
    assert np.isnan(figure.value) and "which layers" in figure.reason


def test_seeds_of_a_recipe_are_one_group(runs):
    groups = group_runs([read_results(RunFolder(run)) for run in runs.values()])
    assert [group.names for group in groups] == [["retrained-0", "retrained-1"], ["keep"]]
    assert groups[1].differs_from(groups[0]) == ["surgery.init: keep instead of dit"]


def test_two_runs_of_one_seed_are_no_two_seeds(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs["keep"], copy)
    with pytest.raises(ValueError, match="of one recipe with seeds 0, 0, 0; 0, 0, 0, expected another seed_everything"):
        compare(runs["keep"], copy, out=tmp_path / "c.html")
    with pytest.raises(ValueError, match="keep twice, expected each run once"):
        compare(runs["keep"], runs["retrained-0"], runs["keep"], out=tmp_path / "c.html")
    with pytest.raises(ValueError, match=r"got 1 run .*keep.*, expected two or more"):
        compare(runs["keep"], out=tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def set_seeds(run: Path, **given: int) -> None:
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["model"]["init_args"]["seed"], recipe["data"] = given["model"], {"init_args": {"seed": given["data"]}}
    recipe["model"]["init_args"]["surgery"]["seed"] = given["surgery"]
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))


def test_seeds_given_by_hand_count_not_the_one_that_they_replace(runs, tmp_path):
    for name, data in (("retrained-0", 5), ("retrained-1", 6)):
        set_seeds(runs[name], model=3, data=data, surgery=4)
    page = PageText(compare(*runs.values(), out=tmp_path / "c.html").read_text())
    assert "retrained (2 runs): runs share seed 3, surgery.seed 4, so an interval over seeds leaves out" in page.text
    set_seeds(runs["retrained-1"], model=3, data=5, surgery=4)
    with pytest.raises(ValueError, match=r"with seeds 3, 4, 5; 3, 4, 5, expected another seed_everything"):
        compare(*runs.values(), out=tmp_path / "d.html")


def test_runs_on_other_bases_are_refused(runs, tmp_path):
    write_masking(runs["keep"], "base", 0.123, 0.4541)  # others have 0.45, and the largest probe is 1.1 times the mean
    with pytest.raises(
        ValueError, match=r"bases' losses on a probe differ by 1\.0 % of the mean, expected at most 1 %"
    ):
        compare(*runs.values(), out=tmp_path / "c.html")
    write_masking(runs["keep"], "base", 0.123, 0.4536)
    assert compare(*runs.values(), out=tmp_path / "c.html").is_file()


def test_frozen_weights_of_one_recipe_have_one_fingerprint(runs, tmp_path):
    other = {"before": "cd" * 32, "after": "cd" * 32, "equal": True}
    (runs["keep"] / "fingerprint.json").write_text(json.dumps(other))  # another init: alike, and yet other weights
    assert compare(*runs.values(), out=tmp_path / "c.html").is_file()
    (runs["retrained-1"] / "fingerprint.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"frozen weights of fingerprints abababababababab\.\.\. and cdcd"):
        compare(*runs.values(), out=tmp_path / "d.html")


def test_a_measurement_cut_short_is_named(runs, tmp_path):
    path = runs["keep"] / "measurements" / "masking-base.npz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"masking-base\.npz is damaged or truncated"):
        compare(*runs.values(), out=tmp_path / "c.html")


def test_a_group_is_the_mean_over_its_runs_of_every_probe(runs):
    pair, first, second = measured(runs["retrained-0"], runs["retrained-1"]), measured(runs["retrained-0"]), measured(
        runs["retrained-1"])  # fmt: skip
    figure = pair.figures["dense_loss"]
    assert figure.by_run == pytest.approx((0.41, 0.43)) and figure.value == pytest.approx(0.42)
    alone = [each.masking[0].tables["loss"] for each in (first, second)]
    np.testing.assert_allclose(pair.mean_masking.tables["loss"], np.mean(alone, axis=0), rtol=1e-6)
    assert first.figures["dense_loss"].over_prompts[0] < 0.41 < first.figures["dense_loss"].over_prompts[1]


def test_differences_over_prompts_and_over_seeds(runs, tmp_path, base):
    pair = measured(runs["retrained-0"], runs["retrained-1"])
    keep = measured(runs["keep"])
    one = difference("dense_loss", pair, keep)
    assert one.over_runs is None and one.over_prompts.direction == -1
    # Probes are 0.9 to 1.1 times the mean, so the paired difference lies within a tenth of itself.
    low, high = one.over_prompts.interval
    assert -0.066 < low < -0.06 < high < -0.054
    other = [make_run(tmp_path / f"sham-{seed}", base, seed=seed, init="normal", dense=dense)
             for seed, dense in ((0, 0.50), (1, 0.54))]  # fmt: skip
    both = difference("dense_loss", pair, measured(*other))
    # By hand: difference 0.52 - 0.42; variances 0.0002 and 0.0008, two degrees of freedom, t = 4.303.
    half = 4.303 * (0.0005 * (1 / 2 + 1 / 2)) ** 0.5
    assert both.over_runs.interval == pytest.approx((0.1 - half, 0.1 + half), abs=2e-5)
    assert both.over_runs.direction == 1 and both.over_prompts.direction == 1


def test_sinks_are_followed_where_the_base_has_them(runs):
    keep, pair = measured(runs["keep"]), measured(runs["retrained-0"], runs["retrained-1"])
    assert keep.figures["sink_frequency"].value == 1.0 and keep.figures["sink_heads"].by_run == (2.0,)
    # Counted in the reference's layers alone: runs measure others as well.
    results = [read_results(RunFolder(runs["keep"]))]
    assert measure_runs(results, BLOCKS[:1], PLANTED).figures["sink_heads"].by_run == (1.0,)
    assert measure_runs(results, (3, 4), PLANTED).figures["sink_heads"].reason == "not measured in these layers"
    change = difference("sink_frequency", keep, pair).over_prompts
    assert change.direction == -1 and change.interval[0] >= -1 and change.verdict(-1) == "good"
    results = read_results(RunFolder(runs["keep"]))
    base = measure_base(results, BLOCKS, PLANTED)
    assert base.figures["sink_frequency"].value == 1.0 and np.isnan(base.figures["val_loss"].value)


def test_heads_outside_the_measured_layers_are_not_counted_as_healed(runs):
    results = [read_results(RunFolder(runs["keep"]))]
    missing = measure_runs(results, BLOCKS, ((3, 1),)).figures["sink_frequency"]
    assert np.isnan(missing.value) and missing.reason == "not measured in these layers"


def with_layers(run: Path, layers: dict[str, list[int]]) -> None:
    """Says of every masking measurement which layers its scopes mask, and what they are called."""
    for path in (run / "measurements").glob("masking-*.npz"):
        arrays = dict(np.load(path))
        masked = np.zeros((len(layers), 6), bool)
        for row, chosen in zip(masked, layers.values(), strict=True):
            row[chosen] = True
        np.savez(path, **arrays | {"scopes": np.array(list(layers)), "scope_layers": masked})


def test_the_same_layers_are_compared_whatever_their_scope_is_called(runs):
    with_layers(runs["retrained-0"], {"retrained": [4, 5], "layer-04": [4]})
    with_layers(runs["keep"], {"retrained": [2, 3], "last-2": [4, 5]})
    reference, sham = (read_results(RunFolder(runs[name])) for name in ("retrained-0", "keep"))
    assert retrained_layers(reference) == [4, 5] and retrained_layers(sham) == [2, 3]
    # The second scope of the made-up run has r* = 0.77, the first 0.654.
    assert one_scope(sham.masking_after, [4, 5]).value("critical_ratio") == pytest.approx(0.77)
    assert one_scope(sham.masking_after, [2, 3]).value("critical_ratio") == pytest.approx(0.654)
    assert one_scope(sham.masking_after, [1]) is None
    figure = measure_runs([sham], [1], PLANTED).figures["critical_ratio"]
    assert np.isnan(figure.value) and "not measured in these layers" in figure.reason


def test_other_probes_are_not_paired(runs):
    for path in (runs["keep"] / "measurements").glob("*.npz"):
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {"keys": np.array([f"other-{i}" for i in range(PROMPTS)])})
    for name in ("dense_loss", "sink_frequency", "critical_ratio_of_base"):
        change = difference(name, measured(runs["retrained-0"]), measured(runs["keep"])).over_prompts
        assert change.interval is None and "keys" in change.reason, name


def test_a_blank_ratio_is_said_to_be_blank(runs, tmp_path):
    write_masking(runs["keep"], "epoch-002", 0.9, 0.36, uniform=0.0001)
    figure = measured(runs["keep"]).figures["critical_ratio_of_base"]
    assert np.isnan(figure.value) and "uniform control costs nothing" in figure.reason
    page = PageText(compare(runs["retrained-0"], runs["keep"], out=tmp_path / "c.html").read_text())
    assert (
        "r* at 1 % of the base's loss keep not compared: not measured: the uniform control costs nothing" in page.text
    )
    assert " blank " in page.text.split("Figures after the last epoch")[1]


def test_a_run_without_measurements_is_compared_in_what_it_has(runs, tmp_path):
    shutil.rmtree(runs["keep"] / "measurements")
    (runs["keep"] / "samples" / "samples.json").write_text(json.dumps([]))
    page = PageText(compare(runs["retrained-0"], runs["keep"], out=tmp_path / "c.html").read_text())
    assert "keep: nothing was measured at the end." in page.text and "0.36" in page.text
