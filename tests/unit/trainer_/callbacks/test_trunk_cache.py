"""The store of trunk outputs: the same numbers bit for bit, once per run, within its budgets, never a wrong one.

Legend: P prompts, S sigmas.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy

from data.batch import Sample
from tests.support.measured_fits import Clips, files, fit, make_trainer, measurements
from trainer.callbacks.masking import MaskingRobustness
from trainer.callbacks.measurement_files import load_arrays
from trainer.callbacks.probe_set import ProbeSet
from trainer.callbacks.sinks import SinkFrequency
from trainer.callbacks.trunk_cache import GIB, TrunkCache
from trainer.module import RetrainBlocks, SurgeryConfig

SIGMAS = (0.2, 0.7)


def probe_set(sigmas=SIGMAS, lengths=(3, 0, 3), **kwargs):
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(torch.randn(4, 2, 4, 6, generator=generator), torch.randn(n, 16, generator=generator), f"clip-{i}", i)
        for i, n in enumerate(lengths)
    ]
    return ProbeSet(samples, sigmas, **{"seed": 1} | kwargs)


def batches(**kwargs):
    return [batch for batch, _ in probe_set(**kwargs).share(0, 1)]


def build(base, **kwargs):
    surgery = kwargs.pop("surgery", SurgeryConfig(last=2, init="keep"))
    module = RetrainBlocks(base=str(base), surgery=surgery, **kwargs)
    module.build("cpu")
    return module


def tensors_of(state):
    return {"vision": state.vision, "text": state.text, "temb": state.temb, "cos": state.rope[0], "sin": state.rope[1]}


@torch.no_grad()
def states(store, module, **kwargs):
    return [store.state(module, batch) for batch in batches(**kwargs)]


def assert_equal_states(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert (one.layout, one.size) == (other.layout, other.size)
        for name, tensor in tensors_of(one).items():
            assert tensor.dtype == tensors_of(other)[name].dtype and torch.equal(tensor, tensors_of(other)[name]), name


@torch.no_grad()
def plain(module, **kwargs):
    """The trunk as the module runs it, without a store."""
    found = []
    for batch in batches(**kwargs):
        x = module.process.mix(batch.batch.latents, batch.noise, batch.sigma)
        found.append(module.trunk(x, batch.sigma, batch.batch))
    return found


# -- the same bit for bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda: SinkFrequency(layers="all"),
    lambda: SinkFrequency(layers=[0]),
    lambda: SinkFrequency(),
    lambda: MaskingRobustness(ratios=(0.3, 0.8), scopes=("retrained", "each", "all", "layer-0", "but-1")),
    lambda: MaskingRobustness(ratios=(0.3, 0.8), scopes=("all",), keys="vision", quantile="row", removed="mean"),
])  # fmt: skip
def test_measurements_are_the_same_with_and_without_a_store(base_folder, tmp_path, make):
    module = build(base_folder)
    without, in_memory, on_disk = TrunkCache(host_gib=0), TrunkCache(), TrunkCache(host_gib=0, folder=str(tmp_path))
    other_run = TrunkCache(host_gib=0, folder=str(tmp_path))
    found = []
    for store in (without, in_memory, in_memory, on_disk, other_run):
        callback = make()
        callback.trunk_cache = store
        with torch.no_grad():
            found.append([callback.observe(module, batch) for batch in batches()])
    for again in found[1:]:
        for one, other in zip(found[0], again, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one), [n for n in one if n not in other]
    run, kept = without.counts
    assert run > 0 and kept == 0
    assert in_memory.counts == (run, run)  # the second use ran nothing
    assert on_disk.counts == (run, 0) and other_run.counts == (0, run)


@pytest.mark.parametrize(("kind", "settings", "others"), [
    (SinkFrequency, {"layers": "all"}, {"layers": "all", "eps": (0.05, 0.3)}),
    (SinkFrequency, {"layers": "all"}, {"layers": [0]}),
    (MaskingRobustness, {"ratios": (0.3,), "scopes": ("all",)}, {"ratios": (0.6,), "scopes": ("all",)}),
    (MaskingRobustness, {"scopes": ("all",)}, {"scopes": ("all",), "keys": "vision"}),
    (MaskingRobustness, {"scopes": ("all",)}, {"scopes": ("all",), "quantile": "row"}),
    (MaskingRobustness, {"scopes": ("all",)}, {"scopes": ("all",), "removed": "zero"}),
    (MaskingRobustness, {"scopes": ("all",)}, {"scopes": ("layer-0",)}),
])  # fmt: skip
@torch.no_grad()
def test_other_settings_are_not_taken_for_these(base_folder, kind, settings, others):
    module, shared = build(base_folder), TrunkCache()
    first, then, alone = kind(**settings), kind(**others), kind(**others)
    first.trunk_cache, then.trunk_cache, alone.trunk_cache = shared, shared, TrunkCache(host_gib=0)
    for batch in batches():
        first.observe(module, batch)
        got, expected = then.observe(module, batch), alone.observe(module, batch)
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def test_both_measurements_share_one_pass(base_folder):
    module, store = build(base_folder), TrunkCache()
    sinks, masking = SinkFrequency(), MaskingRobustness(ratios=(0.5,), scopes=("retrained", "each"))
    sinks.trunk_cache = masking.trunk_cache = store
    with torch.no_grad():
        for callback in (sinks, masking):
            for batch in batches():
                callback.observe(module, batch)
    assert store.counts == (len(batches()), len(batches()))


@pytest.mark.parametrize("trunk_dtype", ["float32", "bfloat16"])
def test_a_kept_state_is_the_trunks_own(base_folder, tmp_path, trunk_dtype):
    module = build(base_folder, trunk_dtype=trunk_dtype)
    expected = plain(module)
    for store in (TrunkCache(), TrunkCache(host_gib=0, folder=str(tmp_path))):
        for _ in range(2):
            assert_equal_states(states(store, module), expected)
        assert store.counts == (len(expected), len(expected))


def test_a_bfloat16_trunk_takes_half_the_memory(base_folder):
    streams = {}
    for trunk_dtype in ("float32", "bfloat16"):
        store = TrunkCache()
        states(store, build(base_folder, trunk_dtype=trunk_dtype))
        streams[trunk_dtype] = sum(
            kept.tensors["vision"].numel() * kept.tensors["vision"].element_size()
            for kept in store._memory._entries.values()
            if "vision" in kept.tensors
        )
    assert streams["float32"] == 2 * streams["bfloat16"] > 0


# -- never a wrong one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"seed": 2}, {"sigmas": (0.2, 0.71)}, {"lengths": (3, 1, 3)}, {"batch_size": 1}], ids=str
)
def test_other_probes_are_not_taken_for_these(base_folder, settings):
    module, store = build(base_folder), TrunkCache()
    states(store, module)
    assert_equal_states(states(store, module, **settings), plain(module, **settings))
    assert store.counts[1] == 0


def test_another_trunk_is_not_taken_for_this_one(base_folder, make_transformer, tmp_path):
    make_transformer(seed=8).save_pretrained(tmp_path / "transformer")
    store = TrunkCache()
    others = [
        build(base_folder),
        build(tmp_path),
        build(base_folder, trunk_dtype="bfloat16"),
        build(base_folder, surgery=SurgeryConfig(last=1, init="keep")),
    ]
    for module in others:
        assert_equal_states(states(store, module), plain(module))
    assert store.counts[1] == 0


def test_another_precision_is_not_taken_for_this_one(base_folder):
    module, store = build(base_folder), TrunkCache()
    states(store, module)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_states(states(store, module), plain(module))
    assert store.counts[1] == 0


def test_retrained_weights_do_not_matter(base_folder):
    module, store = build(base_folder), TrunkCache()
    states(store, module)
    with torch.no_grad():
        for parameter in module.retrained_parameters().values():
            parameter.add_(1.0)
    assert_equal_states(states(store, module), plain(module))
    assert store.counts == (len(batches()), len(batches()))


def test_a_trunk_that_is_trained_is_not_kept(base_folder):
    module = build(base_folder, surgery=SurgeryConfig(last=3, init="keep", train_outside=True))
    store = TrunkCache()
    for _ in range(2):
        states(store, module)
    assert store.counts == (2 * len(batches()), 0) and store._memory.nbytes == 0


def test_ranks_of_a_sharded_model_keep_nothing(base_folder):
    module = build(base_folder)
    for strategy, kept in ((SingleDeviceStrategy(), True), (DDPStrategy(), True), (FSDPStrategy(), False)):
        store = TrunkCache()
        store.setup(SimpleNamespace(strategy=strategy), module, "fit")
        for _ in range(2):
            states(store, module)
        assert (store.counts[1] > 0) == kept, strategy


# -- budgets and files ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_computed_again(base_folder):
    module, whole = build(base_folder), TrunkCache()
    expected = states(whole, module, batch_size=1)
    budget = whole._memory.nbytes // 2
    store = TrunkCache(host_gib=budget / GIB)
    for _ in range(3):
        assert_equal_states(states(store, module, batch_size=1), expected)
        assert 0 < store._memory.nbytes <= budget
    run, kept = store.counts
    assert run + kept == 3 * len(expected) and 0 < kept < 2 * len(expected) and kept % 2 == 0


def test_memory_is_given_back_at_the_end(base_folder):
    module, store = build(base_folder), TrunkCache()
    states(store, module)
    assert store._memory.nbytes > 0
    store.teardown(None, module, "fit")
    assert store._memory.nbytes == 0


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # among the numbers, where the format itself sees nothing
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def empty(path):
    path.write_bytes(b"")


def exchange(path):
    other = next(p for p in sorted(path.parent.iterdir()) if p != path)
    shutil.copy(other, path)


@pytest.mark.parametrize("spoil", [flip, cut, empty, exchange])
def test_a_damaged_or_foreign_file_is_made_anew(base_folder, tmp_path, spoil, caplog):
    module = build(base_folder)
    expected = states(TrunkCache(host_gib=0, folder=str(tmp_path)), module)
    for path in sorted(tmp_path.iterdir()):
        spoil(path)
    assert_equal_states(states(TrunkCache(host_gib=0, folder=str(tmp_path)), module), expected)
    assert "made again" in caplog.text
    again = TrunkCache(host_gib=0, folder=str(tmp_path))
    assert_equal_states(states(again, module), expected)
    assert again.counts == (0, len(expected))


def test_a_folder_that_cannot_be_written_costs_no_run(base_folder, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    module, store = build(base_folder), TrunkCache(host_gib=0, folder=str(tmp_path / "file"))
    for _ in range(2):
        assert_equal_states(states(store, module), plain(module))
    assert caplog.text.count("cannot be written") == 1


def test_wrong_budgets_are_named():
    with pytest.raises(ValueError, match="got host_gib=-1"):
        TrunkCache(host_gib=-1)


# -- in a fit -------------------------------------------------------------------------------------------------------


def counted_trunk(monkeypatch):
    """Batches that the trunk of any module ran outside training."""
    seen, trunk = [], RetrainBlocks.trunk

    def count(self, x, sigma, batch):
        if not torch.is_grad_enabled() and not self.training:
            seen.append(batch.uids)
        return trunk(self, x, sigma, batch)

    monkeypatch.setattr(RetrainBlocks, "trunk", count)
    return seen


def test_one_pass_per_batch_serves_all_stages_of_a_run(tmp_path, base_folder, monkeypatch):
    kwargs = {"prompts": 3, "sigmas": (0.3, 0.7)}
    callbacks = [SinkFrequency(**kwargs), MaskingRobustness(ratios=(0.5,), scopes=("retrained", "each"), **kwargs)]
    seen = counted_trunk(monkeypatch)
    fit(tmp_path, base_folder, callbacks, limit_val_batches=0)
    groups = ProbeSet(Clips().probe_samples(3), kwargs["sigmas"], seed=1).groups()
    assert len(seen) == len(groups) > 1
    assert len(files(tmp_path, "measurements")) == 8
    assert callbacks[0].trunk_cache is callbacks[1].trunk_cache


def test_a_fit_leaves_the_same_arrays_with_and_without(tmp_path, base_folder):
    fit(tmp_path / "without", base_folder, [TrunkCache(host_gib=0), *measurements()])
    store = TrunkCache(folder=str(tmp_path / "kept"))
    fit(tmp_path / "with", base_folder, [*measurements(), store])
    assert store.counts[1] > store.counts[0] > 0
    names = files(tmp_path / "with", "measurements")
    assert names == files(tmp_path / "without", "measurements") and len(names) == 8
    for name in names:
        one, other = (load_arrays(tmp_path / run / "measurements" / name) for run in ("with", "without"))
        assert one.keys() == other.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key], err_msg=f"{name} {key}")


def test_nothing_of_it_is_in_a_checkpoint(tmp_path, base_folder):
    sizes = []
    for callbacks in ([], [TrunkCache(), *measurements()]):
        trainer = make_trainer(tmp_path / str(len(sizes)), callbacks, max_epochs=1)
        module = build(base_folder)
        trainer.fit(module, datamodule=Clips())
        path = tmp_path / f"{len(sizes)}.ckpt"
        trainer.save_checkpoint(path)
        assert torch.load(path, weights_only=True)["callbacks"] == {}
        sizes.append(path.stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 2000


def test_two_stores_are_refused(tmp_path, base_folder):
    with pytest.raises(ValueError, match="got 2 TrunkCaches"):
        fit(tmp_path, base_folder, [TrunkCache(), TrunkCache(), *measurements()])
