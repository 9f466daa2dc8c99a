"""Lightning data modules over shards, resumable at the exact next batch.

A run that is stopped in the middle of an epoch goes on with the batch after the last one that was trained on; those
before it are never loaded. For that, `state_dict` holds how many global batches of the current epoch are done, and
`train_dataloader` starts there. The Trainer must be built with `use_distributed_sampler=False,
reload_dataloaders_every_n_epochs=1`: the loader of each epoch has that epoch's order.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.files import settings_hash
from data.modules.epoch_position import ResumableLoader, check_trainer, leave_epoch, position
from data.modules.loader_processes import loader_context
from data.storage.store import Store
from data.stream.fault_log import FaultLog, check_cut, fault_file
from data.stream.order import ResumableBatchSampler, batch_counts, evaluation_batches, global_batches, rank_size
from data.stream.reader import ShardDataset
from data.stream.shard_index import Source, check_cache, find_shards, sample_count, warn_of_copies
from data.stream.split import Split, check_apart, everything, first_of, hold_out

log = logging.getLogger(__name__)


class ShardDataModule(LightningDataModule, ABC):
    """What all data modules share: splits, order, resume, damage.

    Args:
        shards: training shards: folders, `.tar` files, wildcards, braces, URLs.
        val_shards: validation shards; None holds out the last samples of each bucket of `shards`.
        val_samples: held-out samples if there are no `val_shards`, else how many of them are used.
        batch_size: training samples per rank and step.
        global_batch_size: training samples per step over all ranks, instead of `batch_size`.
        default_batch_size: per rank, where neither is given.
        val_batch_size: validation samples per rank and step.
        num_workers: loader processes.
        prefetch_factor: batches that each of them holds ready.
        passes: how often a nominal epoch visits each training sample.
        seed: of the order.
        max_fault_share: share of samples that may be damaged.
        cache: folder for what is read of remote shards; None keeps nothing.
        cache_bytes: its bound.
    """

    format: str

    def __init__(
        self,
        *,
        shards: str | list[str],
        val_shards: str | list[str] | None,
        val_samples: int,
        batch_size: int | None,
        global_batch_size: int | None,
        default_batch_size: int,
        val_batch_size: int,
        num_workers: int,
        prefetch_factor: int,
        passes: int,
        seed: int,
        max_fault_share: float,
        cache: str | None,
        cache_bytes: int,
    ) -> None:
        super().__init__()
        if batch_size is not None and global_batch_size is not None:
            raise ValueError(
                f"got batch_size {batch_size} (per rank) and global_batch_size {global_batch_size} (all ranks), "
                "expected one of them; leave the other out."
            )
        if batch_size is None and global_batch_size is None:
            batch_size = default_batch_size
        counts = {"val_samples": val_samples, "val_batch_size": val_batch_size, "passes": passes,
                  "prefetch_factor": prefetch_factor, "cache_bytes": cache_bytes}  # fmt: skip
        sizes = {"batch_size": batch_size, "global_batch_size": global_batch_size}
        counts |= {name: size for name, size in sizes.items() if size is not None}
        faults = [f"{name} {value}" for name, value in counts.items() if value < 1]
        if faults or num_workers < 0 or not 0 <= max_fault_share <= 1:
            given = ", ".join(faults or [f"num_workers {num_workers}, max_fault_share {max_fault_share}"])
            raise ValueError(f"got {given}; expected at least 1 of each, 0 workers or more, and a share from 0 to 1.")
        self.shards = _listed(shards)
        self.val_shards = None if val_shards is None else _listed(val_shards)
        self.val_samples = val_samples
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.passes = passes
        self.seed = seed
        self.max_fault_share = max_fault_share
        self.cache = Path(cache) if cache else None
        self.store = Store(self.cache, cache_bytes)
        self._resume: dict[str, Any] = {"epoch": 0, "batches": 0}
        self._epoch: int | None = None  # that the training loader was made for
        self._splits: tuple[Split, Split] | None = None
        self._faults: FaultLog | None = None
        self._order: str | None = None

    # -- splits --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Faults of the shards, before anything long: reads index files, and the sizes of local shards.

        Raises:
            ValueError: if shards are absent, empty, of another format, cut short, or too few to hold samples out.
            StoreError: if a store does not answer.
        """
        if self._splits is not None:
            return
        if self.cache is not None:
            check_cache(self.cache)
        found = find_shards(self.shards, self.format, self.store)
        total = sample_count(found)
        if self.val_shards is None and total <= self.val_samples:
            raise ValueError(
                f"got val_samples {self.val_samples} held out of {total} samples in {self.shards}, "
                "expected fewer; lower data.val_samples, or set data.val_shards."
            )
        apart = None if self.val_shards is None else find_shards(self.val_shards, self.format, self.store)
        self.check_sources([*found, *(apart or [])])
        dataset = self.make_dataset(found)
        if apart is None:
            splits = hold_out(dataset, self.val_samples)
        else:
            splits = everything(dataset), first_of(self.make_dataset(apart), self.val_samples)
        check_apart(*splits)
        for sources in (found, apart or []):
            warn_of_copies(sources)
        self._faults = FaultLog(total + sample_count(apart or []), self.max_fault_share)
        check_cut([*found, *(apart or [])], self.store, self._faults)
        for split in splits:
            split.dataset.faults = self._faults
        self._splits = splits

    def check_batches(self, ranks: int) -> None:
        """Whether training samples fill a global batch that so many ranks divide, before a run folder is made.

        Raises:
            ValueError: if they do not.
        """
        self.check()
        assert self._splits is not None
        batch_counts(self._splits[0].groups, self._global_size(ranks), self.passes)

    def check_sources(self, sources: Sequence[Source]) -> None:
        """Whether training and validation shards go together.

        Raises:
            ValueError: if they do not.
        """

    @abstractmethod
    def make_dataset(self, sources: Sequence[Source]) -> ShardDataset:
        """The data set over some folders."""

    def setup(self, stage: str | None = None) -> None:
        self.check()
        assert self._faults is not None
        if self.trainer and self._faults.path is None:
            self._faults.path = fault_file(Path(self.trainer.default_root_dir), self.trainer.global_rank)
        self._global_size()

    @property
    def train_split(self) -> Split:
        """Training samples."""
        self.setup()
        assert self._splits is not None
        return self._splits[0]

    @property
    def val_split(self) -> Split:
        """Held-out samples; where they come out of `shards`, their uids follow those of the first training pass."""
        self.setup()
        assert self._splits is not None
        return self._splits[1]

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def _layout(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _global_size(self, ranks: int | None = None) -> int:
        """Samples of a global batch, on the Trainer's ranks or so many.

        Raises:
            ValueError: if the ranks do not divide it.
        """
        ranks = self._layout[1] if ranks is None else ranks
        if self.global_batch_size is None:
            assert self.batch_size is not None
            return self.batch_size * ranks
        return rank_size(self.global_batch_size, ranks) * ranks

    def train_dataloader(self) -> DataLoader:
        epoch = self.trainer.current_epoch if self.trainer else 0
        if self.trainer:
            check_trainer(self.trainer)
        split, size = self.train_split, self._global_size()
        groups = split.groups
        batches = global_batches(self.seed, epoch, groups, size, passes=self.passes)
        small = [f"{group.name} ({len(group)} samples)" for group in groups if len(group) * self.passes < size]
        if small:
            log.warning("buckets that fill no global batch of %d are not trained on: %s", size, ", ".join(small))
        start = self._start(epoch, size, len(batches))
        self._epoch = epoch
        return self._loader(split, batch_sampler=ResumableBatchSampler(batches, *self._layout, start))

    def _start(self, epoch: int, size: int, batches: int) -> int:
        """The batch of an epoch to begin with.

        Raises:
            ValueError: if the checkpoint's position is one of another order, or its epoch would stay unfinished.
        """
        over = self.trainer is not None and self._epoch is None and leave_epoch(self.trainer, self._resume)
        if self._resume["epoch"] != epoch:
            return 0
        if not over:
            self._check_position(self._resume["batches"], size)
        return batches if over else self._resume["batches"]

    def _check_position(self, start: int, size: int) -> None:
        if not start:
            return
        saved = self._resume.get("global_batch_size", size)
        if saved != size:
            raise ValueError(
                f"the checkpoint was written {start} batches into an epoch with {saved} samples per global batch, this "
                f"run has {size}; keep global_batch_size (or batch_size x ranks), or resume from the end of an epoch."
            )
        if self._resume.get("order", self.order_hash()) != self.order_hash():
            raise ValueError(
                f"the checkpoint was written {start} batches into an epoch over other shards, or with another seed, "
                "passes or val_samples: what it has seen is unknown. Keep them, or resume from the end of an epoch."
            )

    def order_hash(self) -> str:
        """Changes with whatever the order of an epoch depends on, but for the global batch: shards, seed, passes."""
        if self._order is not None:
            return self._order
        split = self.train_split
        shards = [
            [entry["name"], entry.get("sha256"), entry["samples"]]
            for source in split.dataset.sources
            for entry in source.index["shards"]
        ]
        facts = {"shards": shards, "samples": len(split), "seed": self.seed, "passes": self.passes}
        self._order = settings_hash(facts)
        return self._order

    def val_dataloader(self) -> DataLoader:
        split = self.val_split
        return self._loader(split, batch_sampler=evaluation_batches(split.groups, self.val_batch_size, *self._layout))

    def _loader(self, split: Split, **how: Any) -> DataLoader:
        # Its own generator: else making an iterator would draw from the global one, and a resumed run, which makes
        # fewer iterators, would go on with other random numbers.
        return ResumableLoader(
            split,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            multiprocessing_context=loader_context() if self.num_workers else None,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            **how,
        )

    @staticmethod
    @abstractmethod
    def collate(samples: Sequence[Any]) -> Any:
        """Samples to a batch."""

    # -- resume --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: an epoch, and how many of its global batches are done, of how many."""
        if not self.trainer or self._epoch is None:
            return dict(self._resume)
        place = position(self.trainer, self._epoch)
        return {**place, "global_batch_size": self._global_size(), "order": self.order_hash()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume = dict(state)
        self._epoch = None


def _listed(names: str | Sequence[str]) -> list[str]:
    return [str(name) for name in ([names] if isinstance(names, (str, Path)) else names)]
