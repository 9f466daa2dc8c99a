"""Measurements inside a real fit: which stages, what they leave, and that training is as without them."""

import re
import shutil
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from tests.support.measured_fits import Clips, files, fit, make_module, make_trainer, measurements
from trainer.callbacks.masking import MaskingRobustness
from trainer.callbacks.measurement_files import load_arrays
from trainer.callbacks.probe_callback import measurement_mode
from trainer.callbacks.probe_set import ProbeSet
from trainer.callbacks.sinks import SinkFrequency
from trainer.models.layout import dense_attention


class Losses(Callback):
    """Keeps the losses, every submodule's mode and a draw from torch's random state, at every step."""

    def __init__(self):
        self.losses, self.modes, self.draws = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes.append([part.training for part in pl_module.modules()])
        self.draws.append(torch.rand(1).item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class Told(Logger):
    """Keeps what it is told."""

    name = version = "told"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def named(self, prefix):
        return {
            name: (step, value) for step, row in self.rows for name, value in row.items() if name.startswith(prefix)
        }


STAGES = ("base", "epoch-000", "epoch-001", "epoch-002")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, base_folder):
    """A fit of two epochs with both measurements: run folder, module, what the logger was told, the steps."""
    root, told, steps = tmp_path_factory.mktemp("measured"), Told(), Losses()
    return root, fit(root, base_folder, [*measurements(drawn=True), steps], logger=told), told, steps


def test_training_is_bit_for_bit_as_without(tmp_path, base_folder, measured):
    _, module, _, steps = measured
    without = Losses()
    plain = fit(tmp_path, base_folder, [without])
    assert steps.losses == without.losses and len(without.losses) == 8
    assert steps.draws == without.draws and steps.modes == without.modes
    for name, parameter in module.retrained_parameters().items():
        assert torch.equal(parameter, plain.retrained_parameters()[name]), name
        assert torch.equal(module.ema.average[name], plain.ema.average[name]), name


def test_every_stage_leaves_arrays_figures_and_scalars(measured):
    root, _, told, _ = measured
    expected = sorted(f"{kind}-{stage}.npz" for kind in ("sinks", "masking") for stage in STAGES)
    assert files(root, "measurements") == expected
    figures = files(root, "figures")
    assert {f"{kind}-{stage}.png" for kind in ("sinks", "masking") for stage in STAGES} <= set(figures)
    assert set(told.named("base/")) >= {"base/sinks/heads", "base/masking/retrained/auc"}
    assert [step for step, row in told.rows if "masking/dense_loss" in row] == [0, 4, 8]
    last = load_arrays(root / "measurements" / "masking-epoch-002.npz")
    assert told.named("masking/")["masking/dense_loss"] == (8, pytest.approx(float(last["dense_loss"])))


def test_base_is_measured_with_its_own_weights_and_epochs_with_the_average(measured):
    root, module, _, _ = measured
    read = {stage: load_arrays(root / "measurements" / f"masking-{stage}.npz") for stage in STAGES}
    assert read["base"]["distortion"][0].min() > 0  # the base's blocks do something
    assert read["epoch-000"]["distortion"][0].max() == 0  # fresh ones are the identity
    assert read["epoch-002"]["distortion"][0].min() > 0

    def dense_loss():
        callback = measurements()[1]
        probes = ProbeSet(Clips().probe_samples(3), callback.sigmas, seed=callback.seed)
        with torch.no_grad():
            found = [callback.observe(module, batch)["dense_loss"] for batch, _ in probes.share(0, 1)]
        return torch.cat(found).double().mean().item()

    with module.evaluation_weights():
        assert dense_loss() == pytest.approx(float(read["epoch-002"]["dense_loss"]), rel=1e-6)
    assert dense_loss() != pytest.approx(float(read["epoch-002"]["dense_loss"]), rel=1e-5)  # the last raw weights


def test_finished_stages_are_not_measured_again_but_are_told_again(tmp_path, base_folder, measured, monkeypatch):
    first, second = measured[2], Told()
    shutil.copytree(measured[0] / "measurements", tmp_path / "measurements")
    for kind in (MaskingRobustness, SinkFrequency):
        monkeypatch.setattr(kind, "observe", lambda *a: pytest.fail("measured again"))
    fit(tmp_path, base_folder, measurements(), logger=second)
    for prefix in ("base/", "sinks/", "masking/"):
        assert first.named(prefix) == second.named(prefix)


def test_a_resumed_fit_neither_measures_nor_tells_what_lies_behind(tmp_path, base_folder):
    told = Told()
    trainer = make_trainer(tmp_path, [measurements()[1]], max_epochs=1)
    trainer.fit(make_module(base_folder), datamodule=Clips())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    (tmp_path / "measurements" / "masking-epoch-000.npz").unlink()
    trainer = make_trainer(tmp_path, [measurements()[1]], logger=told)
    trainer.fit(make_module(base_folder), datamodule=Clips(), ckpt_path=tmp_path / "one.ckpt", weights_only=False)
    assert files(tmp_path, "measurements") == [f"masking-{s}.npz" for s in ("base", "epoch-001", "epoch-002")]
    assert told.named("base/") == {} and [step for step, row in told.rows if "masking/dense_loss" in row] == [8]


def test_validate_measures_under_its_own_name_every_time(tmp_path, base_folder):
    module = make_module(base_folder)
    make_trainer(tmp_path, measurements()).validate(module, datamodule=Clips(), verbose=False)
    assert files(tmp_path, "measurements") == ["masking-validate.npz", "sinks-validate.npz"]
    (tmp_path / "measurements" / "sinks-validate.npz").write_bytes(b"stale")
    make_trainer(tmp_path, measurements()[:1]).validate(module, datamodule=Clips(), verbose=False)
    assert load_arrays(tmp_path / "measurements" / "sinks-validate.npz")["layers"].tolist() == [1, 2]


def test_settings_say_which_stages(tmp_path, base_folder):
    fit(tmp_path, base_folder, [measurements(base_stage=False, every_n_epochs=2)[0]], max_epochs=3)
    assert files(tmp_path, "measurements") == [f"sinks-epoch-{n}.npz" for n in ("000", "002", "003")]


@pytest.mark.slow
def test_each_says_its_share_of_the_epoch_without_the_other_measurements(tmp_path, base_folder, monkeypatch, caplog):
    observe = SinkFrequency.observe
    monkeypatch.setattr(SinkFrequency, "observe", lambda *a: time.sleep(0.2) or observe(*a))  # a slow measurement
    with caplog.at_level("INFO"):
        fit(tmp_path, base_folder, measurements(), max_epochs=1)
    said = [record.message for record in caplog.records if "passes of the trunk" in record.message]
    assert [line.split(":")[0] for line in said if "of the previous epoch's" in line] == [
        "sinks at epoch-001", "masking at epoch-001",
    ]  # fmt: skip
    number = re.compile(r"probes, ([\d.]+) s, (\d+)% of the previous epoch's ([\d.]+) s")
    seconds, shares, epochs = zip(*(map(float, m.groups()) for m in map(number.search, said) if m), strict=True)
    assert epochs[0] == epochs[1] and seconds[0] > 0.5
    for spent, share, epoch in zip(seconds, shares, epochs, strict=True):
        assert (spent - 0.05) / (epoch + 0.05) - 0.01 < share / 100 < (spent + 0.05) / (epoch - 0.05) + 0.01


def test_probes_without_captions_are_a_measurement_of_their_own(tmp_path, base_folder, measured, monkeypatch):
    root, _, only_conditional, _ = measured
    told = Told()
    for kind in (SinkFrequency, MaskingRobustness):
        draw = kind.figures  # each takes half a second; those of one stage are looked at
        monkeypatch.setattr(kind, "figures", lambda *a, draw=draw: draw(*a) if a[-1].startswith("base") else {})
    fit(tmp_path, base_folder, measurements(drawn=True, unconditional=True), logger=told)
    expected = [f"{group}{kind}-{stage}.npz" for group in ("", "unconditional-") for kind in ("sinks", "masking")
                for stage in STAGES]  # fmt: skip
    assert files(tmp_path, "measurements") == sorted(expected)
    assert not any("unconditional" in name for name in files(root, "measurements"))
    assert {f"unconditional-{kind}-base.png" for kind in ("sinks", "masking")} <= set(files(tmp_path, "figures"))
    # The conditional ones are as without the option, the others differ from them.
    assert told.named("masking/") == only_conditional.named("masking/")
    losses = {
        prefix: told.named(prefix)[f"{prefix}masking/dense_loss"]
        for prefix in ("", "unconditional/", "base/", "base/unconditional/")
    }
    assert len(set(losses.values())) == 4
    for kind in ("sinks", "masking"):
        one, other = (
            load_arrays(tmp_path / "measurements" / f"{group}{kind}-base.npz") for group in ("", "unconditional-")
        )
        assert one.keys() == other.keys() and one["keys"].tolist() == other["keys"].tolist()
        assert one["caption_ids"].tolist() == other["caption_ids"].tolist()
    assert other["dense_loss"] == pytest.approx(losses["base/unconditional/"][1])
    monkeypatch.setattr(MaskingRobustness, "observe", lambda *a: pytest.fail("measured again"))
    fit(tmp_path, base_folder, measurements(unconditional=True))


def test_a_measurement_that_raises_leaves_no_trace(tmp_path, base_folder, monkeypatch):
    module, trainer = make_module(base_folder), make_trainer(tmp_path, measurements())
    monkeypatch.setattr("trainer.callbacks.sinks.sink_statistics", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, datamodule=Clips())
    assert not (tmp_path / "measurements").exists()
    assert all(processor.attend is dense_attention for processor in module.split_model._processors.values())


def test_observing_restores_modes_and_random_state_also_when_something_raises():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    module[1].eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    def measure():
        with measurement_mode(module, torch.device("cpu")):
            assert not module.training and not torch.is_grad_enabled()
            torch.rand(100)
            raise KeyError

    with pytest.raises(KeyError):
        measure()
    assert (module.training, module[0].training, module[1].training) == (True, True, False)
    assert torch.is_grad_enabled() and torch.equal(torch.rand(3), expected)


def test_data_without_held_out_samples_is_refused_before_anything_is_loaded(tmp_path):
    module = make_module("does/not/exist")
    with pytest.raises(ValueError, match="expected a data module with probe_samples"):
        make_trainer(tmp_path, measurements()).fit(module, train_dataloaders=Clips().train_dataloader())


@pytest.mark.slow
def test_two_ranks_give_the_arrays_of_one(tmp_path, base_folder):
    fit(tmp_path / "one", base_folder, measurements(), max_epochs=1, limit_train_batches=1)
    two = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    fit(tmp_path / "two", base_folder, measurements(), max_epochs=1, limit_train_batches=1, **two)
    for name in ("sinks-base.npz", "masking-base.npz", "sinks-epoch-001.npz", "masking-epoch-001.npz"):
        one, other = (load_arrays(tmp_path / ranks / "measurements" / name) for ranks in ("one", "two"))
        assert one.keys() == other.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key], err_msg=f"{name} {key}")
