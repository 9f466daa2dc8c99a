"""Memory against measured peaks: real steps on a CPU, each in a process of its own, and the benchmark's on a GPU."""

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import BaseContext

import pytest
import torch

from launch.bench.host_memory import host_peak
from launch.bench.step import make_batch
from launch.plan import estimate
from launch.plan.counts import Parameters
from launch.plan.memory import memory_of
from launch.plan.operations import Allocation, UsageCounter
from launch.plan.sharding import Sharding
from tests.support.plans import SMALL, recipe
from trainer.module import OptimConfig, RetrainBlocks, SurgeryConfig

GIB = 2**30


def added_by_a_step(base, config, latent, checkpoint_head):
    """Bytes that a second step adds to the memory of this process at its peak, above weights, states and averages."""
    with suppress(AttributeError):  # another C library; glibc gives buffers of 1 MiB and more back once they are freed
        ctypes.CDLL(None).mallopt(-3, 2**20)
    torch.set_num_threads(1)
    module = RetrainBlocks(
        base=base, surgery=SurgeryConfig(last=2, init="torch"), optim=OptimConfig(warmup_steps=1),
        checkpoint_head=checkpoint_head,
    )  # fmt: skip
    module.build("cpu")
    optimizer = module.configure_optimizers()["optimizer"]
    batch = make_batch(config, latent, (config["max_sequence_length"],))
    noise, sigma = torch.randn_like(batch.latents), torch.full((1,), 0.5)

    def step():
        loss = module.losses(batch, noise, sigma).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(module.retrained_parameters().values()), 1.0)
        optimizer.step()
        module.ema.update()

    step()  # libraries set themselves up; the optimiser's state and the gradients are there
    before = host_peak(reset=True)
    step()
    return host_peak() - before


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """New processes that share the imports of one: each has the memory of its own step alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers", "trainer.module", "launch.bench.step", "launch.plan"])
    return context


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "clip", "checkpoint_head"),
    [(8, (121, 160, 224), False), (8, (121, 160, 224), True), (4, (121, 224, 256), False)],
)
def test_a_step_adds_what_is_measured_within_a_tenth(tmp_path, processes, heads, clip, checkpoint_head):
    """In float32: where bfloat16 is mixed in, a CPU's kernels work on float32 copies, as a GPU's (below) do not."""
    config = SMALL | {"num_attention_heads": heads, "num_layers": 3}
    model = {"surgery": {"last": 2, "init": "torch"}, "checkpoint_head": checkpoint_head}
    sizes = [f"--{name}={value}" for name, value in zip(("frames", "height", "width"), clip, strict=True)]
    plan = estimate([*recipe(tmp_path, config=config, model=model, data={"batch_size": 1}), *sizes])
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        base = str(tmp_path / "config.json")
        measured = pool.submit(added_by_a_step, base, config, plan.latent, checkpoint_head).result(timeout=250)
    # The batch itself, and the gradients of the step before, are there before and after.
    assert measured > 100e6
    assert plan.parts["activations"] == pytest.approx(measured, rel=0.1)


#: Recipe -> clip, GiB of `reblock bench full` with the flow loss (docs/benchmarks.md), millions of parameters: all,
#: retrained.
MEASURED = {
    "mochi_last4": ((163, 480, 848), 46.1, (10_027.7, 792.8)),
    "wan_1.3b_last4": ((81, 480, 832), 10.4, (1_419.0, 185.8)),
    "wan_14b_last4": ((81, 480, 832), 62.6, (14_288.5, 1_405.6)),
    "hunyuan_last4": ((129, 544, 960), 56.1, (12_821.0, 566.4)),
    "cogvideox_5b_last4": ((49, 480, 720), 22.9, (5_570.3, 528.8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MEASURED)
def test_a_full_model_takes_what_was_measured_on_a_gpu(recipe):
    clip, peak, parameters = MEASURED[recipe]
    sizes = [f"--{name}={value}" for name, value in zip(("frames", "height", "width"), clip, strict=True)]
    plan = estimate([
        "--config", f"recipes/{recipe}.yaml", "--trainer.devices", "1", "--data.global_batch_size", "1",
        "--trainer.strategy", "auto", "--trainer.callbacks", "[]", "--model.objective", '[{"flow": 1.0}]',
        "--model.caption_dropout", "0", *sizes,
    ])  # fmt: skip
    assert plan.strategy == "single"
    assert plan.bytes_per_gpu / GIB == pytest.approx(peak, rel=0.06)  # fused kernels take less than their parts
    counted = plan.parameters.retrained + plan.parameters.frozen, plan.parameters.retrained
    assert tuple(round(count / 1e6, 1) for count in counted) == parameters


def test_a_ledger_counts_each_storage_once_and_until_it_is_freed():
    with UsageCounter() as counter:
        kept = torch.empty(1000)
        counter.assign("weights", [kept])
        with counter.stage("work"):
            made = torch.empty(500) * 2
            view = made.view(10, 50)
            del made
            assert counter.parts["activations"] == 2000 and counter.peak("work") == 4000
            view.mul_(2)
            del view
        assert counter.parts == {"activations": 0, "weights": 4000}
    assert counter.peak() == counter.peak("work") == 4000 and counter.peak("another") == 0


COUNTED = Parameters(
    retrained=100, frozen=1000, outside=80, trunk=600, head=400, gradients=400, largest_gradients=200,
    sizes=(200, 200), block_sizes=(150, 150, 150, 150, 200, 200), first=4,
)  # fmt: skip
ALL = {"weights": 1080, "teacher": 60, "gradients": 400, "optimiser": 800, "ema": 400}
MOMENTS = [Allocation("trunk", 400, 300), Allocation("backward", 100, 900), Allocation("update", 400, 10)]


def held(sharding, nodes=2, per_node=4, **options):
    options = {"sixteen_bit": True, **options}
    return memory_of(sharding, COUNTED, ALL, MOMENTS, 1100, nodes, per_node, **options)


def test_a_gpu_alone_and_ddp():
    single, ddp = held(Sharding("single"), 1, 1), held(Sharding("ddp"))
    # The peak is in the backward pass, where not all gradients are there yet.
    assert single.parts == {**ALL, "buffers": 0, "activations": 600, "measurement": 700}
    assert single.total == 2740 + 700
    assert ddp.total == single.total + 400
    assert held(Sharding("ddp", bucket_views=True)).total == single.total


def test_fsdp2_spreads_blocks_gradients_states_and_averages():
    found = held(Sharding("fsdp2"))
    assert found.parts == {
        "weights": 80 + 250, "teacher": 60,
        "gradients": 100, "optimiser": 200, "ema": 100, "buffers": 2 * 200 + 2 * 200,
        "activations": 825, "measurement": 700,
    }  # fmt: skip
    assert held(Sharding("fsdp2", over_node=False)).parts["weights"] == 80 + 125


def test_fsdp2_of_the_head_alone_keeps_the_trunk_on_every_rank():
    found = held(Sharding("fsdp2", shard_trunk=False))
    assert found.parts == {
        "weights": 80 + 600 + 400 // 4, "teacher": 60,
        "gradients": 100, "optimiser": 200, "ema": 100, "buffers": 2 * 200 + 2 * 200,
        "activations": 825, "measurement": 700,
    }  # fmt: skip
    # A trunk with larger blocks than the head's, and a head of one block: only what is spread is gathered.
    wide = replace(COUNTED, trunk=900, head=200, block_sizes=(300, 300, 300, 200), first=3)
    buffers = {
        spread: memory_of(
            Sharding("fsdp2", shard_trunk=spread), wide, ALL, MOMENTS, 1100, 2, 4, sixteen_bit=True
        ).parts["buffers"]
        for spread in (True, False)
    }  # fmt: skip
    assert buffers == {True: 2 * 300 + 2 * 200, False: 200 + 2 * 200}


def test_zero_keeps_16_bits_and_spreads_stage_by_stage():
    one, two, three = (held(Sharding(f"zero{stage}")).parts for stage in (1, 2, 3))
    assert one["weights"] == two["weights"] == 80 + 600 + 200
    assert (one["gradients"], two["gradients"], three["gradients"]) == (200, 25, 25)
    assert one["optimiser"] == two["optimiser"] == three["optimiser"] == 150  # 12 bytes of 100 numbers, on 8 ranks
    assert (one["ema"], two["ema"], three["ema"]) == (400, 400, 50)
    assert three["weights"] == 880 // 8
    assert one["teacher"] == three["teacher"] == 60
    assert held(Sharding("zero1"), sixteen_bit=False).parts["optimiser"] == 100
