"""What a checkpoint holds of the module: the retrained blocks and their averages, never the frozen weights.

All tensors are full ones, whatever the strategy, so that a run resumes under any other.
"""

from typing import TYPE_CHECKING, Any

from trainer.parallel.sharded_tensors import gather_full

if TYPE_CHECKING:
    from trainer.module import RetrainBlocks

#: Prefixes of a name in the diffusers transformer: in the file's `state_dict`, and in the module's. The file format
#: keeps its names, whatever the attributes are called.
_IN_FILE, _IN_MODULE = "room.model.", "split_model.transformer."


def save_module_state(module: "RetrainBlocks", checkpoint: dict[str, Any], *, keep: bool) -> None:
    """Adds the module's part to a checkpoint that Lightning saves. Collective: all ranks call it.

    Args:
        module: whose weights.
        checkpoint: gets `state_dict`, `optimizer_states` of full tensors, and `reblock`.
        keep: whether this rank writes the checkpoint; on the others tensors are empty.
    """
    trained = {_IN_FILE + name: p for name, p in module.retrained_parameters().items()}
    checkpoint["state_dict"] = gather_full(trained, keep=keep)
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = gather_full(checkpoint["optimizer_states"], keep=keep)
    checkpoint["reblock"] = {
        "blocks": list(module.blocks),
        "base_fingerprint": module.base_fingerprint,
        "ema": gather_full(module.ema.state_dict(), keep=keep),
        "skipped": [module.skipped, module.skipped_in_row],
    }


def load_module_state(module: "RetrainBlocks", checkpoint: dict[str, Any]) -> None:
    """Restores averages and counters, and renames `state_dict` as the module does, for Lightning to load.

    Raises:
        ValueError: if the checkpoint belongs to other blocks or another base.
    """
    saved = checkpoint.get("reblock")
    if saved is None:
        raise ValueError("the checkpoint was not written by Reblock; expected one from this run's checkpoints/.")
    if tuple(saved["blocks"]) != module.blocks:
        raise ValueError(
            f"the checkpoint retrains blocks {saved['blocks']}, this run blocks {list(module.blocks)}; "
            "resume with the recipe that wrote it, or start a run of another name."
        )
    if saved["base_fingerprint"] != module.base_fingerprint:
        raise ValueError(
            f"the checkpoint belongs to a base with fingerprint {saved['base_fingerprint'][:16]}..., this run's "
            f"base {module.base} has {module.base_fingerprint[:16]}...; point `model.base` at its own base."
        )
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {_IN_MODULE + name.removeprefix(_IN_FILE): value for name, value in weights.items()}
    module.ema.load_state_dict(saved["ema"])
    module.skipped, module.skipped_in_row = saved["skipped"]
