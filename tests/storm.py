"""One rank of a storm of signals: fit after fit in one process, each ended by a real signal and gone on with.

Run as a script: `storm.py SHARDS FOLDER TRIALS`. It says `running N` when trial N trains; the parent signals, and then
writes a line to its input.
"""

import csv
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything

from data.datamodule import LatentDataModule
from launch import stop
from launch.last import LastCheckpoint
from launch.logs import MetricsFile, MetricsPosition
from launch.stopping import StopTogether
from trainer.callbacks.guard import RandomStates
from trainer.checkpoint import CheckpointFiles

#: Steps of the undisturbed run, and how many a stopped one takes after it has gone on.
WHOLE, MORE = 500, 7
EVERY_OTHER_ACCUMULATES = (1, 2)


class Steps(LightningModule):
    """Steps of a few milliseconds whose losses depend on all before them, and on the global generator."""

    def __init__(self, says: str = "") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 8))
        self.says = says

    def on_train_start(self):
        if self.says:
            print(self.says, flush=True)

    def training_step(self, batch, batch_idx):
        drawn = torch.rand(8) + batch.latents.float().mean() / 100
        loss = (self.weight @ drawn - 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.weight.square().sum() + batch.latents.float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(shards, folder: Path, *, accumulate: int, steps: int, says: str = "") -> Trainer:
    seed_everything(0, verbose=False)
    last = LastCheckpoint(folder / "checkpoints" / "last.ckpt", 50)
    together = StopTogether(last)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=steps, max_epochs=-1, default_root_dir=folder,
        logger=MetricsFile(folder), callbacks=[RandomStates(), MetricsPosition(), last, together],
        plugins=[CheckpointFiles()], use_distributed_sampler=False, reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    data = LatentDataModule(shards=shards, val_samples=8, batch_size=2, val_batch_size=2, passes=5)
    resume = str(last.path) if last.path.is_file() else None
    try:
        trainer.fit(Steps(says), datamodule=data, ckpt_path=resume, weights_only=True)
    except stop.Stopped:
        dist.barrier()  # all have asked their last question
        together.agreement.close()
        raise
    return trainer


def losses(folder: Path) -> list[tuple[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def forget_signals() -> None:
    while signal.sigtimedwait({stop.stop_signal(), signal.SIGTERM}, 0) is not None:
        pass


def trial(shards, folder: Path, number: int) -> tuple[int, bool]:
    """The step that was saved, and whether that is the one that was stopped after."""
    accumulate = EVERY_OTHER_ACCUMULATES[number % 2]
    try:
        fit(shards, folder, accumulate=accumulate, steps=10**6, says=f"running {number}")
        raise AssertionError("the fit has ended by itself")
    except stop.Stopped as stopped:
        where, status = stopped.where, stopped.code
    assert status == 75, status
    assert sys.stdin.readline() == f"sent {number}\n"  # both ranks have been signalled by now
    forget_signals()
    path = folder / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0
    fit(shards, folder, accumulate=accumulate, steps=saved + MORE)
    return saved, where == f"after step {saved}"


def main(shards: str, root: Path, trials: int) -> None:
    stop.listen("fit")
    torch.set_num_threads(1)
    whole = {}
    for accumulate in EVERY_OTHER_ACCUMULATES:
        trainer = fit(shards, root / f"whole-{accumulate}", accumulate=accumulate, steps=WHOLE)
        if trainer.is_global_zero:
            whole[accumulate] = losses(root / f"whole-{accumulate}")
            assert [step for step, _ in whole[accumulate]] == [str(step) for step in range(WHOLE)]
    for number in range(trials):
        saved, there = trial(shards, root / f"trial-{number}", number)
        if trainer.is_global_zero:
            assert saved + MORE <= WHOLE, f"trial {number} came to step {saved}, further than what it is compared with"
            expected = whole[EVERY_OTHER_ACCUMULATES[number % 2]][: saved + MORE]
            assert losses(root / f"trial-{number}") == expected, f"trial {number} differs after step {saved}"
            print(f"done {number} {saved} {int(there)}", flush=True)
    print("finished", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
