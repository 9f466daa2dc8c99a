"""One run on many ranks: which part of the model each rank holds, and the check that all loaded the same base.

DDP: every rank holds the whole model. FSDP2: each rank holds a part of every block; a block is gathered while it runs.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from data.base_folder import resolve_base
from trainer.ema import Ema
from trainer.models.split_model import SplitModel
from trainer.parallel.sharded_tensors import local_tensor, shard_like
from trainer.surgery import frozen_fingerprint


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose checkpoints are those of the other strategies: one file of full tensors, which any of them resumes.

    Lightning's own class numbers the optimiser's state by all parameters, frozen ones included. It gathers the frozen
    trunk at every checkpoint, and it does not read files through the run's `CheckpointIO`.

    Args:
        shard_over: `node`: the ranks of a node share one copy of the model, and nodes exchange gradients only. `all`:
            all ranks share one copy.
        shard_trunk: also shard the frozen trunk. If not, only the retrained blocks are sharded, with their gradients,
            optimiser state and averages; every rank holds the whole trunk, and it is never communicated.
        process_group_backend: nccl, gloo, or None to choose by device.
        timeout: of a collective: a rank that waits longer for another fails.
    """

    def __init__(
        self,
        *,
        shard_over: Literal["node", "all"] = "node",
        shard_trunk: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )
        if shard_over not in ("node", "all"):
            raise ValueError(f"got shard_over {shard_over!r}, expected 'node' or 'all'.")
        self.shard_over = shard_over
        self.shard_trunk = shard_trunk

    def setup_environment(self) -> None:
        # The sizes of Lightning's two mesh dimensions: copies of the model, and ranks that share one.
        if self.shard_over == "all":
            self._data_parallel_size, self._tensor_parallel_size = 1, self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def shard_mesh(self) -> DeviceMesh:
        """(ranks that share a copy,), or (copies, ranks that share one)."""
        return self.device_mesh if self.device_mesh.size(0) > 1 else self.device_mesh["tensor_parallel"]

    # `trainer.checkpoint.content` puts full tensors into a checkpoint, which is then restored as under any strategy.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return own.state_dict()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        for name, value in checkpoint["state_dict"].items():
            local_tensor(own[name].detach()).copy_(shard_like(value, own[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.load_state_dict(_distribute_state(state, parameters))


def _distribute_state(state: Mapping[str, Any], parameters: list[torch.Tensor]) -> dict[str, Any]:
    """An optimiser's state of full tensors, sharded as `parameters` are."""

    def own_part(value: Any, like: torch.Tensor) -> Any:
        if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
            return value  # counters of steps have no dimension
        mesh, placements = like.device_mesh, like.placements
        return DTensor.from_local(
            shard_like(value, like), mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    entries = {
        index: {key: own_part(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def build_device(strategy: Strategy, base: str) -> torch.device:
    """The device that a base is loaded on: the CPU where the model is sharded, since it need not fit on one device.

    Random weights (`base` is a config.json) depend on the device that draws them: they are drawn on the rank's own.
    """
    if isinstance(strategy, ShardedStrategy) and strategy.shard_trunk and resolve_base(base).is_dir():
        return torch.device("cpu")
    return strategy.root_device


def shard_blocks(split_model: SplitModel, mesh: DeviceMesh, first: int) -> None:
    """Shards the blocks from `first` on over the ranks of `mesh`; all other weights are frozen and on every rank.

    A block is gathered when it runs and freed after it, also in the trunk. Weights are communicated in their own dtype,
    gradients in float32: the arithmetic is that of DDP.
    """
    blocks = split_model.blocks[first:]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    inside = {id(p) for block in blocks for p in block.parameters()}
    # The root shards no weights of its own. It makes the blocks share streams, so that the next one is gathered while a
    # block runs.
    fully_shard(split_model, mesh=mesh, ignored_params={p for p in split_model.parameters() if id(p) not in inside})
    register_fsdp_forward_method(split_model, "run")


def distribute(module: Any, strategy: Strategy) -> None:
    """Gives every rank its part of a module that was built; does nothing the second time.

    Args:
        module: RetrainBlocks.
        strategy: of the run. Only `ShardedStrategy` changes the module.

    Raises:
        ValueError: if the ranks loaded different bases.
    """
    if isinstance(module.split_model, FSDPModule):
        return
    if isinstance(strategy, DDPStrategy):
        # DDP would send the frozen trunk, 20 GB, from the first rank to all others at the start.
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
    if isinstance(strategy, ShardedStrategy):
        module._base_fingerprint = frozen_fingerprint(
            module.split_model.transformer
        )  # of what this rank loaded, before it is sharded
        shard_blocks(module.split_model, strategy.shard_mesh, 0 if strategy.shard_trunk else module.first)
        module.ema = Ema(module.retrained_parameters(), decay=module.ema_decay)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        check_same_base(module.base, module.base_fingerprint)


def check_same_base(base: str, fingerprint: str) -> None:
    """Raises ValueError on every rank if ranks loaded different frozen weights; names those unlike rank 0."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, fingerprint)
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise ValueError(
            f"base {base} is another one on ranks {odd} (fingerprint {found[odd[0]][:16]}...) than on rank 0 "
            f"({found[0][:16]}...), expected the same weights everywhere. Copy it to every node again, or load it "
            "from a file system that all nodes share."
        )
