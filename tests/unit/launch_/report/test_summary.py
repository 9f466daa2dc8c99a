"""The summary says what the files of a run say, bad news too."""

import json
from pathlib import Path

import numpy as np

from launch.report.results import read_results
from launch.report.summary import key_figures, sentences
from launch.run_folder import RunFolder
from tests.support.reported_run import EPS, HEADS, LAYERS, PLANTED, SIGMAS, write_sinks


def test_the_results_are_those_of_the_files(run: Path):
    found = read_results(RunFolder(run))
    assert found.planted_heads == list(PLANTED)
    assert found.found_before == 2
    assert found.others_before == []
    assert found.after.stage == "epoch-002"
    assert found.planted_after == []
    assert found.masking_before.value("critical_ratio") == 0.123
    assert found.masking_after.value("critical_ratio") == 0.654
    assert found.val_loss == 0.41
    assert found.frozen_equal is True


def test_bad_news_is_told(run: Path):
    write_sinks(run, "base", {(4, 1): 1.0, (5, 0): 0.9, (5, 2): 1.0})
    write_sinks(run, "epoch-010", {(4, 1): 1.0, (4, 0): 0.92})
    (run / "fingerprint.json").write_text(json.dumps({"before": "a", "after": "b", "equal": False}))
    found = read_results(RunFolder(run))
    assert found.found_before == 1
    assert found.others_before == [(5, 2)]
    assert found.after.stage == "epoch-010"
    assert found.planted_after == [(4, 1)]
    assert found.others_after == [(4, 0)]
    said = " ".join(sentences(found))
    assert "1 of 2 planted heads found" in said
    assert "Flagged too, though not planted: layer 5 head 2 (mean frequency 1.00)" in said
    assert "still sinks: layer 4 head 1; their highest frequency at any noise level is 1.00" in said
    assert "CHANGED during training" in said
    assert [figure.verdict for figure in key_figures(found)[:2]] == ["bad", "bad"]


def test_what_reinitialisation_does_is_not_said_of_training(run: Path):
    said = " ".join(sentences(read_results(RunFolder(run))))
    assert (
        "before the first step: 0 of 2 planted heads are sinks then, 0 after training; the dense loss is 0.99 then, "
        "0.41 after training. Sinks that are gone before the first step were removed by re-initialisation, not by "
        "training, and training brought none back." in said
    )
    write_sinks(run, "epoch-002", {(4, 1): 1.0})
    said = " ".join(sentences(read_results(RunFolder(run))))
    assert "0 of 2 planted heads are sinks then, 1 after training" in said and "brought none back" not in said


def test_blocks_that_were_not_reinitialised_start_with_their_sinks(run: Path):
    write_sinks(run, "epoch-000", dict.fromkeys(PLANTED, 1.0))
    said = " ".join(sentences(read_results(RunFolder(run))))
    assert "2 of 2 planted heads are sinks then, 0 after training" in said and "re-initialisation" not in said


def test_many_passing_sinks_are_summed_up(run: Path):
    write_sinks(run, "epoch-002", dict.fromkeys([(layer, head) for layer in LAYERS for head in range(HEADS)], 0.25))
    wide = {
        "frequency": np.full((SIGMAS, len(LAYERS), 9, len(EPS)), 0.25),
        "consistent": np.zeros((len(LAYERS), 9), bool),
    }
    path = run / "measurements" / "sinks-epoch-002.npz"
    np.savez(path, **{**np.load(path), **wide})
    assert "16 heads have a sink in some prompts only (mean frequency at most 0.25)" in " ".join(
        sentences(read_results(RunFolder(run)))
    )


def test_an_untrained_run_has_no_after(run: Path):
    for path in (run / "measurements").glob("*-epoch-00[12].npz"):
        path.unlink()
    found = read_results(RunFolder(run))
    assert found.after is None
    assert "Sinks after training were not measured." in sentences(found)
    assert "0.9" not in " ".join(figure.value for figure in key_figures(found))  # epoch-000 is no result
