"""The Lightning data module over shards, resumable at the exact next batch.

A run that is stopped in the middle of an epoch continues with the batch after the last one that was trained on; those
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
from data.modules.epoch_position import ResumableLoader, check_trainer, finish_epoch, training_position
from data.modules.stream_config import StreamConfig
from data.safe_fork import fork_context
from data.storage.store import Store
from data.stream.fault_log import FaultLog, check_truncation, fault_file
from data.stream.hold_out import check_disjoint, everything, first_of, hold_out
from data.stream.order import ResumableBatchSampler, batch_counts, evaluation_batches, global_batches, rank_size
from data.stream.reader import ShardReader
from data.stream.shard_index import IndexedShards, check_cache, find_shards, sample_count, warn_of_copies
from data.stream.split import Split

log = logging.getLogger(__name__)


class ShardDataModule(LightningDataModule, ABC):
    """What all data modules share: splits, order, resuming, the count of damaged samples.

    Args:
        stream: the fields of `StreamConfig`.
    """

    #: Of the index of the shards: `LATENT_FORMAT` or `VIDEO_FORMAT`.
    format: str
    #: Training samples per rank and step where the configuration gives neither batch size.
    default_batch_size = 16

    def __init__(self, **stream: Any) -> None:
        super().__init__()
        self.config = StreamConfig(**stream)
        self.store = Store(self.config.cache or None, self.config.cache_bytes)
        self._saved_position: dict[str, Any] = {"epoch": 0, "batches": 0}
        self._loader_epoch: int | None = None  # that the training loader was made for
        self._splits: tuple[Split, Split] | None = None
        self._faults: FaultLog | None = None
        self._order_hash: str | None = None

    # -- splits --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Finds faults of the shards before anything long: reads index files, and the sizes of local shards.

        Raises:
            ValueError: if shards are absent, empty, of another format, truncated, or too few to hold samples out.
            StoreError: if a store does not answer.
        """
        if self._splits is not None:
            return
        if self.config.cache:
            check_cache(Path(self.config.cache))
        training = find_shards(self.config.shards, self.format, self.store)
        total, held_out = sample_count(training), self.config.val_samples
        if self.config.val_shards is None and total <= held_out:
            raise ValueError(
                f"got val_samples {held_out} held out of {total} samples in {self.config.shards}, "
                "expected fewer; lower data.val_samples, or set data.val_shards."
            )
        validation = []
        if self.config.val_shards is not None:
            validation = find_shards(self.config.val_shards, self.format, self.store)
        self.check_shards([*training, *validation])
        reader = self.make_reader(training)
        if validation:
            splits = everything(reader), first_of(self.make_reader(validation), held_out)
        else:
            splits = hold_out(reader, held_out)
        check_disjoint(*splits)
        for shards in (training, validation):
            warn_of_copies(shards)
        self._faults = FaultLog(total + sample_count(validation), self.config.max_fault_share)
        check_truncation([*training, *validation], self.store, self._faults)
        for split in splits:
            split.reader.faults = self._faults
        self._splits = splits

    def check_batches(self, ranks: int) -> None:
        """Checks, before a run folder is made, that training samples fill a global batch that so many ranks divide.

        Raises:
            ValueError: if they do not.
        """
        self.check()
        assert self._splits is not None
        batch_counts(self._splits[0].groups, self._global_batch_size(ranks), self.config.passes)

    def check_shards(self, shards: Sequence[IndexedShards]) -> None:
        """Checks that training and validation shards fit together.

        Raises:
            ValueError: if they do not.
        """

    @abstractmethod
    def make_reader(self, shards: Sequence[IndexedShards]) -> ShardReader:
        """The reader of some shards."""

    def setup(self, stage: str | None = None) -> None:
        self.check()
        assert self._faults is not None
        if self.trainer and self._faults.path is None:
            self._faults.path = fault_file(Path(self.trainer.default_root_dir), self.trainer.global_rank)
        self._global_batch_size()

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
    def _rank_and_ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def rank_batch_size(self, ranks: int) -> int:
        """Training samples of a step on each of so many ranks.

        Raises:
            ValueError: if the ranks do not divide the global batch.
        """
        if self.config.global_batch_size is not None:
            return rank_size(self.config.global_batch_size, ranks)
        return self.config.batch_size or self.default_batch_size

    def _global_batch_size(self, ranks: int | None = None) -> int:
        """Training samples of a step, on so many ranks or the Trainer's."""
        ranks = self._rank_and_ranks[1] if ranks is None else ranks
        return self.rank_batch_size(ranks) * ranks

    def train_dataloader(self) -> DataLoader:
        epoch = self.trainer.current_epoch if self.trainer else 0
        if self.trainer:
            check_trainer(self.trainer)
        split, size, passes = self.train_split, self._global_batch_size(), self.config.passes
        groups = split.groups
        batches = global_batches(self.config.seed, epoch, groups, size, passes=passes)
        small = [f"{group.name} ({len(group)} samples)" for group in groups if len(group) * passes < size]
        if small:
            log.warning("buckets that fill no global batch of %d are not trained on: %s", size, ", ".join(small))
        start = self._first_batch(epoch, size, len(batches))
        self._loader_epoch = epoch
        sampler = ResumableBatchSampler(batches, *self._rank_and_ranks, start)
        return self._loader(split.in_epoch(self.config.seed, epoch), batch_sampler=sampler)

    def _first_batch(self, epoch: int, size: int, batches: int) -> int:
        """The batch of an epoch to begin with.

        Raises:
            ValueError: if the checkpoint's position is one of another order, or its epoch would stay unfinished.
        """
        saved = self._saved_position
        finished = self.trainer is not None and self._loader_epoch is None and finish_epoch(self.trainer, saved)
        if saved["epoch"] != epoch:
            return 0
        if finished:
            return batches
        self._check_position(saved["batches"], size)
        return saved["batches"]

    def _check_position(self, start: int, size: int) -> None:
        if not start:
            return
        saved = self._saved_position.get("global_batch_size", size)
        if saved != size:
            raise ValueError(
                f"the checkpoint was written {start} batches into an epoch with {saved} samples per global batch, this "
                f"run has {size}; keep global_batch_size (or batch_size x ranks), or resume from the end of an epoch."
            )
        if self._saved_position.get("order", self.order_hash()) != self.order_hash():
            raise ValueError(
                f"the checkpoint was written {start} batches into an epoch over other shards, or with another seed, "
                "passes or val_samples: what it has seen is unknown. Keep them, or resume from the end of an epoch."
            )

    def order_hash(self) -> str:
        """Hash of what the order of an epoch depends on, but for the global batch: shards, samples, seed, passes."""
        if self._order_hash is None:
            split = self.train_split
            shards = [
                [entry["name"], entry.get("sha256"), entry["samples"]]
                for folder in split.reader.folders
                for entry in folder.index["shards"]
            ]
            facts = {"shards": shards, "samples": len(split), "seed": self.config.seed, "passes": self.config.passes}
            self._order_hash = settings_hash(facts)
        return self._order_hash

    def val_dataloader(self) -> DataLoader:
        split = self.val_split
        batches = evaluation_batches(split.groups, self.config.val_batch_size, *self._rank_and_ranks)
        return self._loader(split, batch_sampler=batches)

    def _loader(self, split: Split, **how: Any) -> DataLoader:
        workers = self.config.num_workers
        # Its own generator: else making an iterator would draw from the global one, and a resumed run, which makes
        # fewer iterators, would go on with other random numbers.
        return ResumableLoader(
            split,
            num_workers=workers,
            prefetch_factor=self.config.prefetch_factor if workers else None,
            multiprocessing_context=fork_context() if workers else None,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            **how,
        )

    @staticmethod
    @abstractmethod
    def collate(samples: Sequence[Any]) -> Any:
        """A batch of samples."""

    # -- resume --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The training position: an epoch, how many of its global batches are done, and of how many."""
        if not self.trainer or self._loader_epoch is None:
            return dict(self._saved_position)
        position = training_position(self.trainer, self._loader_epoch)
        return {**position, "global_batch_size": self._global_batch_size(), "order": self.order_hash()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved_position = dict(state)
        self._loader_epoch = None
