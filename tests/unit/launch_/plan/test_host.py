"""Host memory of the trunk's outcome on the probes, against what a `TrunkCache` really keeps."""

import contextlib
from pathlib import Path

import pytest
import torch

from data.batch import Sample
from launch.plan import estimate
from tests.support.plans import CLIP, LATENT, SMALL, recipe
from trainer.callbacks.probe_set import ProbeSet
from trainer.callbacks.trunk_cache import TrunkCache
from trainer.module import RetrainBlocks, SurgeryConfig

OVERLAYS = Path(__file__).resolve().parents[4] / "recipes" / "cluster"
SIGMAS = [0.25, 0.75]


def planned(folder, *options, trunk_dtype="float32", unconditional=False, **trainer):
    probes = {"prompts": 3, "sigmas": SIGMAS, "unconditional": unconditional}
    callbacks = [{"class_path": "trainer.callbacks.sinks.SinkFrequency", "init_args": probes}]
    args = recipe(folder, model={"trunk_dtype": trunk_dtype}, trainer={"callbacks": callbacks} | trainer)
    return estimate([*args, *options, *CLIP]).host


@torch.no_grad()
def kept(folder, trunk_dtype, precision, groups=(False,)):
    """Bytes in a store that has seen all probes, their captions as long as they may be."""
    module = RetrainBlocks(
        base=str(folder / "config.json"), surgery=SurgeryConfig(last=2, init="torch"), trunk_dtype=trunk_dtype
    )
    module.build("cpu")
    # Zero in a base that was never trained: no angles, nothing to keep.
    module.split_model.transformer.pos_frequencies.normal_()
    samples = [
        Sample(torch.randn(LATENT), torch.randn(SMALL["max_sequence_length"], SMALL["text_embed_dim"]), f"clip-{i}", i)
        for i in range(3)
    ]
    store = TrunkCache()
    precision_context = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    with precision_context:
        for unconditional in groups:
            for batch, _ in ProbeSet(samples, SIGMAS, seed=1, unconditional=unconditional).share(0, 1):
                store.state(module, batch)
    return store._memory.nbytes


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("trunk_dtype", ["float32", "bfloat16"])
def test_host_memory_is_what_a_store_keeps(tmp_path, trunk_dtype, precision):
    plan = planned(tmp_path, trunk_dtype=trunk_dtype, precision=precision)
    assert plan == kept(tmp_path, trunk_dtype, precision) > 0


def test_probes_without_captions_are_kept_too(tmp_path):
    """As large as those with captions at most."""
    plan = planned(tmp_path, unconditional=True, precision="32-true")
    both = kept(tmp_path, "float32", "32-true", groups=(False, True))
    assert kept(tmp_path, "float32", "32-true") < both <= plan


def test_a_sharded_model_keeps_nothing(tmp_path):
    hosts = {
        name: planned(tmp_path, "--config", str(OVERLAYS / f"{name}.yaml"), devices=2)
        for name in ("ddp", "fsdp2", "fsdp2_head")
    }
    assert hosts["ddp"] > 0 and hosts["fsdp2"] == hosts["fsdp2_head"] == 0
