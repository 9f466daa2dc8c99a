"""What all data modules over shards are configured with."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class StreamConfig:
    """Which shards are read, and how they are batched.

    Data modules take these fields as keyword arguments of their own, so a recipe gives them under `data.init_args`.

    Args:
        shards: training shards: folders, `.tar` files in them, wildcards, braces, or URLs of such.
        val_shards: validation shards; None holds out the last samples of each bucket of `shards`.
        val_samples: held-out samples if there are no `val_shards`, else how many of them are used; each bucket has its
            share of them.
        batch_size: training samples per rank and step; if `global_batch_size` is not given either, 16 latents or 8
            clips.
        global_batch_size: training samples per step over all ranks, instead of `batch_size`: the sequence of global
            batches is then the same on any number of ranks.
        val_batch_size: validation samples per rank and step.
        num_workers: loader processes per rank; those that read clips decode them.
        prefetch_factor: batches that each loader process reads ahead.
        passes: how often a nominal epoch visits each training sample; visits of one sample have different uids.
        seed: of the order of the training samples, and of draws from their posterior. Held-out samples do not depend on
            it.
        max_fault_share: share of samples that may be damaged, 0 to 1; they are named in the run's `faults.jsonl`.
        cache: local folder that caches what is read of remote shards; None caches nothing.
        cache_bytes: upper bound of the cache.

    Raises:
        ValueError: if both batch sizes are given, or a number is out of its range.
    """

    shards: str | list[str]
    val_shards: str | list[str] | None = None
    val_samples: int = 16
    batch_size: int | None = None
    global_batch_size: int | None = None
    val_batch_size: int = 16
    num_workers: int = 0
    prefetch_factor: int = 2
    passes: int = 1
    seed: int = 0
    max_fault_share: float = 0.01
    cache: str | None = None
    cache_bytes: int = 64 << 30

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.global_batch_size is not None:
            raise ValueError(
                f"got batch_size {self.batch_size} (per rank) and global_batch_size {self.global_batch_size} (all "
                "ranks), expected one of them; leave the other out."
            )
        names = ("val_samples", "val_batch_size", "passes", "prefetch_factor", "cache_bytes", "batch_size",
                 "global_batch_size")  # fmt: skip
        counts = {name: getattr(self, name) for name in names}
        faults = [f"{name} {value}" for name, value in counts.items() if value is not None and value < 1]
        if faults or self.num_workers < 0 or not 0 <= self.max_fault_share <= 1:
            given = ", ".join(faults or [f"num_workers {self.num_workers}, max_fault_share {self.max_fault_share}"])
            raise ValueError(f"got {given}; expected at least 1 of each, 0 workers or more, and a share from 0 to 1.")
