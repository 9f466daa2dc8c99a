"""One of two ranks of a step under DDP on gloo: writes the bytes of each bucket that it sends.

Arguments: folder, rank, cap of a bucket in MiB or null.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from launch.bench.step import make_batch
from tests.support.plans import LATENT, SMALL
from trainer.module import RetrainBlocks, SurgeryConfig


class Losses(torch.nn.Module):
    """A step's loss as the forward of a module, which is what DDP wraps."""

    def __init__(self, module: RetrainBlocks) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch, noise, sigma):
        return self.module.losses(batch, noise, sigma).mean()


def main(folder: Path, rank: int, cap_mb: int | None) -> None:
    """Two steps; the buckets of the second one, which DDP has ordered by what it saw in the first, are written."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    module = RetrainBlocks(base=str(folder / "config.json"), surgery=SurgeryConfig(last=2, init="torch"))
    module.build("cpu")
    wrapped = DistributedDataParallel(Losses(module), bucket_cap_mb=cap_mb)
    sizes: list[int] = []

    def hook(group, bucket):
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, hook)
    batch = make_batch(SMALL, LATENT, (5, 5))
    noise, sigma = torch.randn_like(batch.latents), torch.full((2,), 0.5)
    for _ in range(2):
        sizes.clear()
        wrapped(batch, noise, sigma).backward()
        module.zero_grad()
    (folder / f"sizes-{rank}.json").write_text(json.dumps(sizes))
    dist.barrier()
    # The hook's end needs the interpreter on a thread of gloo's, for which the interpreter would wait at its own end.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
