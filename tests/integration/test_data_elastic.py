"""The same global sequence on any number of ranks and loader processes, whole and resumed: no loss, no repeat."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.modules.latents import LatentDataModule
from tests.support.latent_shards import write_latents
from tests.support.ranks import Ranks

SMALL, WIDE, LONG = "1x16x16", "1x16x32", "7x16x16"
#: Shards of each folder: (bucket, samples).
LAYOUTS = (
    [(SMALL, 40)],
    [(SMALL, 1)] * 20 + [(SMALL, 7)] * 3,
    [(WIDE, 9), (SMALL, 11), (WIDE, 13), (LONG, 30), (SMALL, 3)],
    [(LONG, 2), (SMALL, 37), (WIDE, 17), (SMALL, 1)],
)
HELD_OUT = 4
SHAPES = {SMALL: (2, 1, 2, 2), WIDE: (2, 1, 2, 4), LONG: (2, 2, 2, 2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [write_latents(tmp_path_factory.mktemp(f"layout{n}"), shards) for n, shards in enumerate(LAYOUTS)]


@dataclass(frozen=True)
class Seen:
    """What is compared of a batch."""

    uids: tuple[int, ...]
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    total: float


def seen(batch) -> Seen:
    return Seen(batch.uids, batch.keys, tuple(batch.latents.shape[1:]), float(batch.latents.sum() + batch.text.sum()))


def joined(parts) -> Seen:
    """A global batch of its ranks' pieces."""
    assert len({part.shape for part in parts}) == 1 and len({len(part.uids) for part in parts}) == 1
    return Seen(
        tuple(uid for part in parts for uid in part.uids), tuple(key for part in parts for key in part.keys),
        parts[0].shape, sum(part.total for part in parts),
    )  # fmt: skip


def trainer(rank: int, world: int, epoch: int, done: int, folder: Path) -> SimpleNamespace:
    """What a data module asks of a Trainer on one of several ranks."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=done, ready=done), is_last_batch=False)
    return SimpleNamespace(
        global_rank=rank, world_size=world, current_epoch=epoch, default_root_dir=str(folder),
        reload_dataloaders_every_n_epochs=1, _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
        num_training_batches=float("inf"),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=progress), epoch_progress=SimpleNamespace(current=None),
            is_resuming=False,
        ),
    )  # fmt: skip


def module(folder: str, **options) -> LatentDataModule:
    return LatentDataModule(shards=folder, val_samples=HELD_OUT, seed=3, **options)


def stretch(folder, tmp_path, *, size, world, epoch, stop=None, state=None, **options):
    """Global batches from a state (or the start) up to `stop`, and the state that a checkpoint holds then."""
    shares, states = [], []
    for rank in range(world):
        data = module(folder, global_batch_size=size, **options)
        start = 0
        if state is not None:
            data.load_state_dict(state)
            start = state["batches"]
        data.trainer = trainer(rank, world, epoch, start, tmp_path)
        data.setup("fit")
        loader = data.train_dataloader()
        mine = []
        for batch in loader:
            if stop is not None and start + len(mine) == stop:
                break
            mine.append(seen(batch))
        shares.append(mine)
        data.trainer = trainer(rank, world, epoch, start + len(mine), tmp_path)
        states.append(data.state_dict())
    assert all(state == states[0] for state in states)
    return [joined(parts) for parts in zip(*shares, strict=True)], states[0]  # strict: equally many per rank


def check_complete(folder_number, whole, size, passes):
    """Each batch of one bucket; nothing twice; what is left out is less than a batch of each bucket."""
    total = sum(count for _, count in LAYOUTS[folder_number]) - HELD_OUT
    uids = Counter(uid for batch in whole for uid in batch.uids)
    assert set(uids.values()) == {1} and set(uids) <= set(range(passes * total))
    shapes = Counter(batch.shape for batch in whole)
    held = Counter(_held[folder_number])
    for name, count in samples_of(folder_number).items():
        assert shapes[SHAPES[name]] == (count - held[SHAPES[name]]) * passes // size


#: Shapes of what each folder holds out.
_held: dict[int, list[tuple[int, ...]]] = {}


def samples_of(number: int) -> Counter:
    """Samples of each bucket."""
    samples: Counter = Counter()
    for name, count in LAYOUTS[number]:
        samples[name] += count
    return samples


@pytest.fixture(scope="module", autouse=True)
def _held_out(folders):
    for number, folder in enumerate(folders):
        data = module(folder)
        _held[number] = [tuple(data.val_split[i].latent.shape) for i in range(HELD_OUT)]


@settings(max_examples=60, deadline=None)
@given(
    number=st.sampled_from(range(len(LAYOUTS))),
    worlds=st.sampled_from([(a, b) for a in range(1, 9) for b in range(1, 9) if math.lcm(a, b) <= 14]),
    per_rank=st.integers(1, 3),
    epoch=st.integers(0, 2),
    passes=st.integers(1, 2),
    data=st.data(),
)
def test_one_sequence_on_any_ranks_whole_and_resumed(
    folders, tmp_path_factory, number, worlds, per_rank, epoch, passes, data
):
    first, second = worlds
    size = per_rank * math.lcm(first, second)
    folder, tmp = folders[number], tmp_path_factory.getbasetemp()
    options = {"size": size, "epoch": epoch, "passes": passes}
    held = Counter(_held[number])
    if all((count - held[SHAPES[name]]) * passes < size for name, count in samples_of(number).items()):
        with pytest.raises(ValueError, match="at least one full batch of one bucket"):
            stretch(folder, tmp, world=1, **options)
        return
    whole, _ = stretch(folder, tmp, world=1, **options)
    check_complete(number, whole, size, passes)
    stop = data.draw(st.integers(0, len(whole)), label="stop")
    before, state = stretch(folder, tmp, world=first, stop=stop, **options)
    after, _ = stretch(folder, tmp, world=second, state=state, **options)
    assert before + after == whole


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "others"), [(1, 4), (3, 0), (2, 3), (4, 1)])
def test_loader_processes_change_nothing(folders, tmp_path, workers, others):
    options = {"size": 6, "epoch": 1, "passes": 2}
    whole, _ = stretch(folders[2], tmp_path, world=1, **options)
    before, state = stretch(folders[2], tmp_path, world=2, stop=7, num_workers=workers, **options)
    after, _ = stretch(folders[2], tmp_path, world=3, state=state, num_workers=others, **options)
    assert before + after == whole


def test_epochs_leave_out_different_samples(folders, tmp_path):
    total = sum(count for _, count in LAYOUTS[2]) - HELD_OUT
    missing = []
    for epoch in range(3):
        whole, _ = stretch(folders[2], tmp_path, world=1, size=8, epoch=epoch)
        missing.append(set(range(total)) - {uid for batch in whole for uid in batch.uids})
    assert missing[0] != missing[1] or missing[1] != missing[2]


def test_buckets_without_a_full_batch_are_named(folders, tmp_path, caplog):
    whole, _ = stretch(folders[3], tmp_path, world=1, size=16, epoch=0)
    assert {batch.shape for batch in whole} == {(2, 1, 2, 2), (2, 1, 2, 4)}
    assert f"{LONG} (1 samples)" in caplog.text and SMALL not in caplog.text.split("trained on:")[1]


def test_ranks_that_do_not_divide_the_global_batch_are_refused_at_setup(folders, tmp_path):
    data = module(folders[0], global_batch_size=10)
    data.trainer = trainer(0, 4, 0, 0, tmp_path)
    with pytest.raises(ValueError, match=r"got global_batch_size 10 on 4 ranks.*8 or 12"):
        data.setup("fit")


def test_each_held_out_sample_counts_once_whatever_the_ranks(folders, tmp_path):
    for world in (1, 2, 3, 8):
        shares = []
        for rank in range(world):
            data = LatentDataModule(shards=folders[2], val_samples=13, val_batch_size=3)
            data.trainer = trainer(rank, world, 0, 0, tmp_path)
            shares.append(list(data.val_dataloader()))
        for parts in zip(*shares, strict=True):
            assert len({(len(part), tuple(part.latents.shape)) for part in parts}) == 1
        counted = [k for batches in shares for b in batches for k, own in zip(b.keys, b.counts, strict=True) if own]
        assert len(counted) == 13 == len(set(counted))


def test_probes_come_from_the_bucket_with_most_validation_samples(folders):
    data = LatentDataModule(shards=folders[2], val_samples=13)
    assert data.probe_bucket.name == LONG
    probes = data.probe_samples(5)
    assert {tuple(probe.latent.shape) for probe in probes} == {(2, 2, 2, 2)}
    assert [probe.key for probe in probes] == [f"clip-{i}" for i in range(57, 62)]
    assert data.latent_shapes == SHAPES


FIT = """
import json, os, sys
import torch
from lightning.pytorch import LightningModule, Trainer
from data.modules.latents import LatentDataModule

class Toy(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rows = []
    def training_step(self, batch, batch_idx):
        self.rows.append([self.current_epoch, batch_idx, list(batch.uids)])
        return (self.weight - batch.latents.mean()).square().sum()
    def validation_step(self, batch, batch_idx):
        pass
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

folder, out, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
module = Toy()
trainer = Trainer(
    accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=False, max_epochs=2,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    reload_dataloaders_every_n_epochs=1, num_sanity_val_steps=0, default_root_dir=out,
)
trainer.fit(module, LatentDataModule(shards=folder, val_samples=5, global_batch_size=6, num_workers=1, passes=2))
with open(os.path.join(out, f"rank{trainer.global_rank}.json"), "w") as file:
    json.dump({"rows": module.rows, "weight": module.weight.item()}, file)
"""


@pytest.mark.slow
def test_two_processes_train_on_what_one_trains_on(folders, tmp_path):
    """Real ranks over gloo: together they see each global batch of the run on one rank, and learn the same."""
    script = tmp_path / "fit.py"
    script.write_text(FIT)
    found = {}
    for ranks in (1, 2):
        out = tmp_path / f"ranks{ranks}"
        with Ranks(out, *[[script, folders[2], out, str(ranks)]] * ranks) as job:
            assert job.statuses() == [0] * ranks, job.output()
        found[ranks] = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    together = [[*one[:2], one[2] + other[2]] for one, other in zip(*(part["rows"] for part in found[2]), strict=True)]
    assert together == found[1][0]["rows"] and len(together) == 38
    assert {len(row[2]) for part in found[2] for row in part["rows"]} == {3}
    assert found[2][0]["weight"] == pytest.approx(found[1][0]["weight"], rel=1e-5)
