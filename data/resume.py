"""Lightning data modules over shards, resumable at the exact next batch.

A run that is stopped in the middle of an epoch goes on with the batch after the last one that was trained on; those
before it are never loaded. For that, `state_dict` holds how many global batches of the current epoch are done, and
`train_dataloader` starts there. The Trainer must be built with `use_distributed_sampler=False,
reload_dataloaders_every_n_epochs=1`: the loader of each epoch has that epoch's order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Subset

from data.order import ResumableBatchSampler, epoch_order, evaluation_indices
from data.shards import read_index
from data.stream import ShardDataset


class _Loader(DataLoader):
    """A loader that Lightning recognises as resumable; its position is kept by the data module, in one place."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ShardDataModule(LightningDataModule):
    """What both data modules share: splits, order, resume.

    Args:
        shards: folder (or folders) of training shards.
        val_shards: folder of validation shards; None takes the last `val_samples` of `shards`.
        val_samples: held-out samples if there are no `val_shards`, else how many of them are used.
        batch_size: training samples per rank and step.
        val_batch_size: validation samples per rank and step.
        num_workers: loader processes.
        passes: how often a nominal epoch visits each training sample.
        seed: of the order.
    """

    format: str

    def __init__(
        self,
        *,
        shards: str | list[str],
        val_shards: str | None,
        val_samples: int,
        batch_size: int,
        val_batch_size: int,
        num_workers: int,
        passes: int,
        seed: int,
    ) -> None:
        super().__init__()
        if min(val_samples, batch_size, val_batch_size, passes) < 1 or num_workers < 0:
            raise ValueError(
                f"got val_samples {val_samples}, batch_size {batch_size}, val_batch_size {val_batch_size}, passes "
                f"{passes}, num_workers {num_workers}; expected at least 1 of each, and 0 workers or more."
            )
        self.shards = [Path(shard) for shard in ([shards] if isinstance(shards, str) else shards)]
        self.val_shards = None if val_shards is None else Path(val_shards)
        self.val_samples = val_samples
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.passes = passes
        self.seed = seed
        self._resume = {"epoch": 0, "batches": 0}
        self._splits: tuple[Split, Split] | None = None

    # -- splits --------------------------------------------------------------------------------------------------

    def check(self) -> list[dict[str, Any]]:
        """Faults of the shards, before anything long: reads index files only.

        Raises:
            ValueError: if shards are absent, empty, of another format, or too few to hold samples out.
        """
        if not self.shards:
            raise ValueError("got no shards, expected at least one folder of them; set data.shards.")
        folders = self.shards + ([self.val_shards] if self.val_shards else [])
        indices = [read_index(folder, self.format) for folder in folders]
        total = sum(shard["samples"] for index in indices[: len(self.shards)] for shard in index["shards"])
        if self.val_shards is None and total <= self.val_samples:
            raise ValueError(
                f"got val_samples {self.val_samples} held out of {total} samples in {[str(s) for s in self.shards]}, "
                "expected fewer; lower data.val_samples, or set data.val_shards."
            )
        return indices

    def make_dataset(self, folders: Sequence[Path]) -> ShardDataset:
        """The data set over some folders."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        self.check()
        if self._splits is None:
            self._splits = self._split()

    def _split(self) -> tuple["Split", "Split"]:
        dataset = self.make_dataset(self.shards)
        if self.val_shards is None:
            end = len(dataset) - self.val_samples
            return Split(dataset, range(end)), Split(dataset, range(end, len(dataset)))
        held_out = self.make_dataset([self.val_shards])
        return Split(dataset, range(len(dataset))), Split(held_out, range(min(self.val_samples, len(held_out))))

    @property
    def train_split(self) -> "Split":
        """Training samples, after `setup`."""
        self.setup()
        assert self._splits is not None
        return self._splits[0]

    @property
    def val_split(self) -> "Split":
        """Held-out samples, after `setup`; the uid of a sample is its number in its data set."""
        self.setup()
        assert self._splits is not None
        return self._splits[1]

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def _layout(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader:
        self.setup()
        epoch = self.trainer.current_epoch if self.trainer else 0
        if self.trainer:
            _check_trainer(self.trainer)
        rank, world_size = self._layout
        split = self.train_split
        order = epoch_order(self.seed, epoch, split.shard_sizes, passes=self.passes)
        start = self._resume["batches"] if self._resume["epoch"] == epoch else 0
        sampler = ResumableBatchSampler(order, self.batch_size, rank, world_size, start)
        self._check_layout(start, sampler.global_size)
        return self._loader(split, batch_sampler=sampler)

    def _check_layout(self, start: int, global_size: int) -> None:
        saved = self._resume.get("global_batch_size", global_size)
        if start and saved != global_size:
            raise ValueError(
                f"the checkpoint was written {start} batches into an epoch with {saved} samples per global batch, this "
                f"run has {global_size}; keep batch_size x ranks, or resume from the end of an epoch."
            )

    def val_dataloader(self) -> DataLoader:
        mine = evaluation_indices(len(self.val_split), *self._layout)
        return self._loader(Subset(self.val_split, mine), batch_size=self.val_batch_size)

    def _loader(self, dataset: Dataset, **how: Any) -> DataLoader:
        # Its own generator: else making an iterator would draw from the global one, and a resumed run, which makes
        # fewer iterators, would go on with other random numbers.
        return _Loader(
            dataset,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            **how,
        )

    @staticmethod
    def collate(samples: Sequence[Any]) -> Any:
        """Samples to a batch."""
        raise NotImplementedError

    # -- resume --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Where training stands: the epoch, and how many of its global batches are done."""
        if not self.trainer:
            return dict(self._resume)
        # Loaders run ahead and `ready` counts a batch that is still being worked on: `processed` alone is done.
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        size = self.batch_size * self._layout[1]
        return {"epoch": self.trainer.current_epoch, "batches": done, "global_batch_size": size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = dict(state)


class Split(Dataset):
    """Part of a data set.

    Visit i is the part's sample i % size; its uid is the number of the part's first sample plus i, so that several
    passes over the data differ in what is keyed by it.

    Args:
        dataset: the whole.
        numbers: samples of this part.
    """

    def __init__(self, dataset: ShardDataset, numbers: range) -> None:
        self.dataset = dataset
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, visit: int) -> Any:
        number = self.numbers[visit % len(self.numbers)]
        return self.dataset.get(number, uid=self.numbers.start + visit, among=self.numbers)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples per shard that belong to this part, from the first shard on; the part starts with the data set."""
        left = len(self)
        sizes = []
        for size in self.dataset.shard_sizes:
            sizes.append(min(size, left))
            left -= sizes[-1]
        return [size for size in sizes if size]


def _check_trainer(trainer: Trainer) -> None:
    reload, replaced = (
        trainer.reload_dataloaders_every_n_epochs,  # type: ignore[attr-defined]
        trainer._accelerator_connector.use_distributed_sampler,
    )
    if reload != 1 or (replaced and trainer.world_size > 1):
        raise ValueError(
            f"got a Trainer with reload_dataloaders_every_n_epochs={reload}, use_distributed_sampler={replaced}; "
            "expected 1 and False: each epoch has its own order, and the data module splits it over the ranks."
        )
