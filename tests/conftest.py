"""Tiny Mochi transformers, batches and modules. All builders are deterministic by seed.

Legend: B batch, C channels, F latent frames, H W latent grid, L text tokens, D text width.
"""

import copy
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import MochiTransformer3DModel
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from data.batch import Batch, Sample
from trainer.module import OptimConfig, RetrainBlocks, SurgeryConfig

# A script's background job ignores Ctrl-C, and so would every process that the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tiny tensors gain nothing from threads, and pytest-xdist's workers would fight over the cores.
torch.set_num_threads(1)

#: The pooled caption always has 8 heads, so text_embed_dim is a multiple of 8.
TINY = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "pooled_projection_dim": 8,
    "in_channels": 4,
    "qk_norm": "rms_norm",
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "activation_fn": "swiglu",
    "max_sequence_length": 16,
}


def _transformer(seed: int = 0, **config) -> MochiTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MochiTransformer3DModel(**{**TINY, **config})
        for name, parameter in model.named_parameters():
            # diffusers leaves frequencies zero and norm weights one, where a mix-up could not be seen.
            if "norm_" in name and parameter.ndim == 1 or name == "pos_frequencies":
                torch.nn.init.normal_(parameter, 0.0 if name == "pos_frequencies" else 1.0, 0.2)
    return model


def _batch(
    lengths: Sequence[int] = (3, 0, 5), *, grid: tuple[int, int, int] = (2, 4, 6), pad: int = 0, seed: int = 0,
    channels: int = TINY["in_channels"], text_width: int = TINY["text_embed_dim"], uids: Sequence[int] | None = None,
) -> Batch:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    samples = [
        Sample(
            latent=torch.randn(channels, *grid, generator=generator),
            text=torch.randn(length, text_width, generator=generator),
            key=f"clip-{index}",
            uid=index if uids is None else uids[index],
        )
        for index, length in enumerate(lengths)
    ]
    batch = Batch.collate(samples)
    batch.text = torch.nn.functional.pad(batch.text, (0, 0, 0, pad))
    batch.text_mask = torch.nn.functional.pad(batch.text_mask, (0, pad))
    return batch


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restores the environment after each test.

    Commands and libraries set variables in it. Programs that later tests start would inherit them, and could not be
    forked then (`tests.support.fork_server`).
    """
    before = dict(os.environ)
    yield
    own = "PYTEST_CURRENT_TEST"  # pytest's
    for name in (os.environ.keys() | before.keys()) - {own}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Which tests share a worker of pytest-xdist (`--dist loadgroup`): those of one file, so that a run which several
    of them look at is made once, and all that take the Slurm lab, also by way of another fixture, so that there is one.
    Groups with the most slow tests come first, or one worker would be left with them at the end.
    """
    groups = {}
    for item in items:
        lab = "_session_lab" in getattr(item, "fixturenames", ())
        groups[item] = "lab" if lab else item.location[0]
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    slow = Counter(groups[item] for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[groups[item]])
    yield
    # pytest-xdist writes the group into the node id, and with a pytest that does not let it, groups nothing silently.
    if getattr(config.option, "loadgroup", False) and not all("@" in item.nodeid for item in items):
        raise pytest.UsageError(
            f"got pytest {pytest.__version__}, whose tests pytest-xdist cannot group; expected that of constraints.txt"
        )


@pytest.fixture(scope="session")
def make_transformer() -> Callable[..., MochiTransformer3DModel]:
    """(seed, **config) -> a tiny transformer with every parameter away from its default."""
    return _transformer


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """(lengths, grid, pad, seed, ...) -> a batch with captions of those lengths and `pad` columns of extra padding."""
    return _batch


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    """Fields of the tiny transformer's config."""
    return {"_class_name": "MochiTransformer3DModel", **TINY}


@pytest.fixture
def config_json(tmp_path: Path, tiny_config: dict) -> Path:
    """A bare config.json: a base with random weights."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config))
    return path


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a transformer in it, as diffusers saves it. Not to be written to."""
    folder = tmp_path_factory.mktemp("base")
    _transformer(seed=7).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def make_module(base_folder):
    """RetrainBlocks on the tiny base, built on the CPU."""

    def make(*, build=True, blocks=(1, 2), init="torch", optim=None, base=base_folder, **options):
        surgery = options.pop("surgery", SurgeryConfig(blocks=list(blocks), init=init))
        module = RetrainBlocks(base=str(base), surgery=surgery, optim=optim or OptimConfig(warmup_steps=1), **options)
        if build:
            module.build("cpu")
        return module

    return make


@pytest.fixture
def fit(tmp_path):
    """Trains a module on batches and returns the Trainer."""

    def run(module, batches, *, callbacks=(), resume=None, **options):
        options = {"max_steps": len(batches), "max_epochs": 1, "log_every_n_steps": 1, **options}
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=list(callbacks), num_sanity_val_steps=0,
            **options,
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume)
        return trainer

    return run


class Recorder(Callback):
    """What each optimiser step left behind."""

    def __init__(self):
        self.weights, self.average, self.metrics, self.updates, self.adam = [], [], [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights.append({n: p.detach().clone() for n, p in module.retrained_parameters().items()})
        self.average.append({n: a.clone() for n, a in module.ema.average.items()})
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.updates.append(module.ema.updates)
        self.adam.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))


@pytest.fixture
def make_recorder() -> type[Recorder]:
    """A callback that keeps what each training batch left behind."""
    return Recorder
