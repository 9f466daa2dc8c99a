"""One of several ranks that validate on 1 to 7 held-out samples: `validations.py FOLDER BASE SHARDS RANKS`.

Writes what each validation logged to FOLDER/validations-RANK.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from data.modules.latents import LatentDataModule
from trainer.module import RetrainBlocks, SurgeryConfig

HELD_OUT = range(1, 8)


def validated(base: str, shards: str, **trainer: Any) -> dict[str, dict[str, float]]:
    """Held-out samples -> name -> figure."""
    found = {}
    for samples in HELD_OUT:
        data = LatentDataModule(shards=shards, val_samples=samples, batch_size=1, val_batch_size=2)
        module = RetrainBlocks(base=base, surgery=SurgeryConfig(last=2, init="torch"), val_sigmas=(0.25, 0.75))
        made = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, reload_dataloaders_every_n_epochs=1, **trainer,
        )  # fmt: skip
        found[str(samples)] = made.validate(module, data, verbose=False)[0]
    return found


def main(folder: Path, base: str, shards: str, ranks: int) -> None:
    torch.set_num_threads(1)
    found = validated(base, shards, devices=ranks, strategy="ddp")
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    (folder / f"validations-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4]))
