"""Files and intervals of the measurements."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from matplotlib.figure import Figure

from trainer.callbacks.measurement_files import (
    figure_path,
    load_arrays,
    log_figure,
    planted_heads,
    save_arrays,
    save_figure,
)


def test_arrays_come_back_and_nothing_is_left_beside(tmp_path):
    path = tmp_path / "measurements" / "sinks-base.npz"
    arrays = {"keys": np.array(["a", "längere"]), "alpha": np.linspace(0, 1, 6).reshape(2, 3), "count": np.array(3)}
    save_arrays(path, arrays)
    got = load_arrays(path)
    assert got.keys() == arrays.keys() and all(np.array_equal(got[name], arrays[name]) for name in arrays)
    assert [file.name for file in path.parent.iterdir()] == ["sinks-base.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    save_arrays(path, {"x": np.ones(2)})
    monkeypatch.setattr("data.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_arrays(path, {"x": np.zeros(2)})
    assert load_arrays(path)["x"].tolist() == [1, 1]


def test_object_arrays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got object arrays \\['odd'\\]"):
        save_arrays(tmp_path / "a.npz", {"odd": np.array([{"a": 1}]), "even": np.ones(1)})
    assert not (tmp_path / "a.npz").exists()


def test_planted_heads_are_read_from_the_base(tmp_path):
    assert planted_heads(str(tmp_path)) == set()
    fields = {
        "heads": [{"layer": 5, "head": 1, "gain": 6.0}, {"layer": 7, "head": 3, "gain": 6.0}],
        "note": "on purpose",
    }
    (tmp_path / "planted.json").write_text(json.dumps(fields))
    assert planted_heads(str(tmp_path)) == {(5, 1), (7, 3)}


def test_a_figure_is_what_savefig_writes(tmp_path):
    def figure() -> Figure:
        made = Figure(figsize=(4, 3), layout="constrained")
        for axes in made.subplots(1, 2):
            axes.plot([1, 1000], label="long enough to need room")
            axes.set(ylabel="a label", title="two\nlines")
            axes.set_yscale("log")
        made.legend(loc="outside right center")
        return made

    save_figure(tmp_path / "a.png", figure())
    figure().savefig(tmp_path / "b.png", dpi=130, facecolor="white")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_figures_reach_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = figure_path(tmp_path, "sinks", "epoch-001")
    save_figure(path, Figure())
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    log_figure(SimpleNamespace(loggers=[CSVLogger(tmp_path), logger], global_step=3), "sinks", path)
    logger.experiment.finish()
    images = list(tmp_path.rglob("media/images/figures/sinks*.png"))
    assert [image.read_bytes() for image in images] == [path.read_bytes()]
