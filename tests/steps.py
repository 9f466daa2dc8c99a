"""A callback that writes down each optimiser step of a fit on any number of ranks."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback


class Steps(Callback):
    """`steps.jsonl` in the run folder: step, loss over the global batch, gradient norm, averaging updates."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        if trainer.is_global_zero:
            norm = float(trainer.callback_metrics["train/grad_norm"])
            line = {"step": trainer.global_step, "loss": float(loss), "norm": norm, "ema": pl_module.ema.updates}
            with (Path(trainer.default_root_dir) / "steps.jsonl").open("a") as file:
                file.write(json.dumps(line | {"threads": torch.get_num_threads()}) + "\n")
