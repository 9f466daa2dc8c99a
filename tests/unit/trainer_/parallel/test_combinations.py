"""Strategies, precisions and settings that do not go together are refused before anything is loaded."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from trainer.module import SurgeryConfig
from trainer.parallel.strategies import ShardedStrategy


def faults(module, **options) -> str:
    """What is said against the combination; nothing if it is accepted."""
    given = SimpleNamespace(precision="32-true", gradient_clip_val=None, strategy=DDPStrategy())
    vars(given).update(options)
    try:
        module.check_trainer(given)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture
def module(make_module):
    return lambda **options: make_module(build=False, **options)


def test_real_trainers_are_accepted(module):
    for options in ({}, {"strategy": "ddp", "devices": 2}, {"precision": "bf16-mixed"}):
        module().check_trainer(Trainer(accelerator="cpu", logger=False, **{"devices": 1, **options}))
    sharded = Trainer(accelerator="cpu", devices=2, strategy=ShardedStrategy(), logger=False)
    module().check_trainer(sharded)


def test_real_trainers_are_refused(module):
    for options, said in (
        ({"precision": "bf16-true"}, "got trainer.precision 'bf16-true'"),
        ({"precision": "64-true"}, "got trainer.precision '64-true'"),
        ({"gradient_clip_val": 1.0}, "got trainer.gradient_clip_val 1.0"),
        ({"strategy": ModelParallelStrategy(), "devices": 2}, "expected trainer.parallel.strategies.ShardedStrategy"),
    ):
        trainer = Trainer(accelerator="cpu", logger=False, **{"devices": 1, **options})
        with pytest.raises(ValueError, match=said):
            module().check_trainer(trainer)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_cannot_be_right_are_refused(module, strategy):
    said = faults(module(), strategy=strategy.__new__(strategy))  # FSDP1 and DeepSpeed can be built on GPUs only
    assert f"got trainer.strategy {strategy.__name__}" in said and "recipes/cluster/fsdp2" in said


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"surgery": SurgeryConfig(last=3, train_outside=True)}, "surgery.train_outside"),
        ({"surgery": SurgeryConfig(last=2, reserved_channels=(0, 1))}, "surgery.reserved_channels"),
        ({"split_trunk": False}, "split_trunk: false"),
    ],
)
def test_what_has_no_frozen_trunk_is_not_sharded(module, options, name):
    assert f"got model.{name} with ShardedStrategy" in faults(module(**options), strategy=ShardedStrategy())
    assert faults(module(**options)) == ""


def test_every_fault_is_named_at_once(module):
    said = faults(
        module(split_trunk=False), strategy=ShardedStrategy(), precision="16-mixed", gradient_clip_val=0.5
    ).splitlines()
    assert len(said) == 3


def test_a_fit_refuses_before_it_builds(make_module, make_batch, fit):
    module = make_module(build=False)
    with pytest.raises(ValueError, match=r"model\.optim\.clip_norm"):
        fit(module, [make_batch()], gradient_clip_val=1.0)
    assert module.split_model is None


def test_unknown_places_to_shard_over_are_refused():
    with pytest.raises(ValueError, match="got shard_over 'rack', expected 'node' or 'all'"):
        ShardedStrategy(shard_over="rack")
