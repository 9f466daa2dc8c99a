"""One contract for every callback: it observes only, leaves nothing behind in a fit that fails, works on two ranks."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from tests.support import callback_contract as contract
from tests.support.ranks import Ranks

CLASSES = contract.callback_classes()
#: A callback that is not found is not tested: these have to be.
KNOWN = {"SinkFrequency", "MaskingRobustness", "TrunkCache", "FrozenCheck", "RandomStateCheckpoint", "GraftWriter",
         "ThroughputLogger", "DataFaults", "LastCheckpoint", "MetricsPosition"}  # fmt: skip


@pytest.fixture(scope="module")
def without(tmp_path_factory, base_folder):
    """fault -> what a fit without callbacks saw and left."""
    return {
        fault: contract.watched_fit(tmp_path_factory.mktemp("without"), base_folder, [], fault)
        for fault in ("", "training", "validation")
    }


def test_callbacks_are_found():
    assert CLASSES.keys() >= KNOWN
    assert set(contract.MAKE) <= CLASSES.keys(), "made here, but not there any longer"


@pytest.mark.parametrize("name", CLASSES)
def test_it_observes_only(tmp_path, base_folder, without, name):
    found = contract.watched_fit(tmp_path, base_folder, contract.make(CLASSES[name], tmp_path))
    assert len(found["steps"]) == 2 * (2 * 3 + 1) + 1
    assert found == without[""]


@pytest.mark.parametrize("fault", ["training", "validation"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_fault_in_the_fit_finds_everything_as_it_was(tmp_path, base_folder, without, name, fault):
    found = contract.watched_fit(tmp_path, base_folder, contract.make(CLASSES[name], tmp_path), fault)
    assert f"a fault in {fault}" in found["raised"]
    assert found == without[fault]


@pytest.mark.slow
def test_all_of_them_on_two_ranks(tmp_path, base_folder):
    """One fit with all of them, beside one without: the same bit for bit on each rank."""
    script = [contract.__file__, tmp_path, base_folder]
    with Ranks(tmp_path, script, script) as ranks:
        assert ranks.statuses() == [0, 0], ranks.said()
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for rank in found:
        assert set(rank["callbacks"]) == CLASSES.keys()
        assert rank["with"] == rank["without"]
    assert found[0]["with"]["weights"] == found[1]["with"]["weights"]
    assert {"graft.safetensors", "fingerprint.json", "measurements"} <= {p.name for p in (tmp_path / "with").iterdir()}


# -- the contract catches what it is for -----------------------------------------------------------------------------


class Draws(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        torch.rand(1)


class Evaluates(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.split_model.eval()


class Writes(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.split_model.transformer.proj_out.bias.add_(1e-6)  # a frozen weight


class Scales(Callback):
    def on_after_backward(self, trainer, pl_module):
        for parameter in pl_module.retrained_parameters().values():
            parameter.grad.mul_(1 + 1e-6)


class Hooks(Callback):
    def on_validation_start(self, trainer, pl_module):
        self.hook = pl_module.split_model.transformer.norm_out.register_forward_hook(lambda *_: None)

    def on_validation_end(self, trainer, pl_module):
        self.hook.remove()


@pytest.mark.parametrize("kind", [Draws, Evaluates, Writes, Scales])
def test_a_callback_that_changes_training_is_caught(tmp_path, base_folder, without, kind):
    assert contract.watched_fit(tmp_path, base_folder, [kind()]) != without[""]


def test_a_hook_that_a_fault_leaves_behind_is_caught(tmp_path, base_folder, without):
    assert contract.watched_fit(tmp_path, base_folder, [Hooks()], "validation") != without["validation"]
