"""Estimates the GPU memory of validation and measurements: the head on a batch of probes, and the attention engine.

They run between steps, while the gradients of the last step still exist. All blocks of a trunk allocate the same
sizes, so only two of them are run.

Legend: B probes of a batch, N tokens, h heads, d head width, E eps values.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from data.batch import Sample
from launch.plan.fake_step import autocast, fake_batch
from launch.plan.inputs import PlanInputs
from launch.plan.operations import UsageCounter
from trainer.attention import EPS
from trainer.attention.chunked_weights import CPU_CHUNK_WEIGHTS
from trainer.callbacks.masking import MaskingRobustness
from trainer.callbacks.probe_callback import ProbeCallback
from trainer.callbacks.probe_set import ProbeSet
from trainer.callbacks.trunk_cache import GIB, TrunkCache
from trainer.models.layout import AttentionCall, dense_attention
from trainer.models.state import State
from trainer.module import RetrainBlocks

MEASUREMENT = "measurement"

#: Triton: number of weights per head that the quantile samples, and bytes per weight for values, sorted values, 64-bit
#: indices and temporary copies of the sort. Measured: docs/benchmarks.md, "extra MiB" of the quantile.
_SAMPLED, _PER_SAMPLED = 2**18, 48
#: Chunked: number of simultaneous buffers of one chunk's weights. Measured: docs/benchmarks.md, masked and quantile.
_BUFFERS = 6


def engine_bytes(gpu: bool, batch: int, heads: int, tokens: int) -> int:
    """Bytes that the attention engine allocates beyond its inputs, in the larger pass: statistics or quantile.

    Args:
        gpu: whether the Triton kernels run, on a GPU; otherwise the chunked engine does.
        batch: B, number of probes.
        heads: h, number of heads.
        tokens: N, number of tokens.
    """
    per_query = batch * heads * tokens * torch.float32.itemsize
    if gpu:
        sample = batch * heads * min(_SAMPLED, tokens**2) * _PER_SAMPLED
        # Rows: three values per query. Statistics: column sums, and counts for each eps in two buffers.
        return 3 * per_query + max(sample, (1 + 2 * len(EPS)) * per_query)
    weights = min(batch * heads * tokens**2, max(CPU_CHUNK_WEIGHTS, batch * heads * tokens))
    return _BUFFERS * weights * torch.float32.itemsize


def probe_batch(inputs: PlanInputs, callback: ProbeCallback) -> int:
    """Number of probes that are measured together."""
    sample = Sample(torch.empty(inputs.latent), torch.empty(inputs.text_tokens, inputs.text_width), "", 0)
    probes = ProbeSet([sample], callback.sigmas, seed=callback.seed, batch_size=callback.batch_size)
    return min(probes.batch_size, callback.prompts * len(callback.sigmas))


def trace_measurements(inputs: PlanInputs, counter: UsageCounter) -> int:
    """Peak bytes of gradients and activations in validation and measurements; runs in `fake_module` after a step."""
    with counter.stage(MEASUREMENT), torch.no_grad():
        if inputs.val_batch > inputs.batch:
            with autocast(inputs):
                state = _trunk(inputs, inputs.val_batch)
                inputs.module.head(state)
                del state
        for callback in inputs.callbacks:
            if isinstance(callback, ProbeCallback):
                with autocast(inputs):
                    _measure(inputs, callback)
    return counter.peak(MEASUREMENT)


def _trunk(inputs: PlanInputs, size: int) -> State:
    """Output of the trunk for a batch of `size` samples."""
    batch, noise, sigma = fake_batch(inputs, size)
    with _short_trunk(inputs.module):
        return inputs.module.trunk(inputs.module.process.mix(batch.latents, noise, sigma), sigma, batch)


@contextlib.contextmanager
def _short_trunk(module: RetrainBlocks) -> Iterator[None]:
    whole = module.split_model.run
    module.split_model.run = lambda state, start, stop: whole(state, start, min(stop, start + 2))  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.split_model.run


def _measure(inputs: PlanInputs, callback: ProbeCallback) -> None:
    """Runs a dense pass of the head with the engine in every attention, keeps the states that masking restarts from,
    and runs a second pass."""
    module, split_model, size = inputs.module, inputs.module.split_model, probe_batch(inputs, callback)

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        torch.empty(engine_bytes(inputs.gpu, size, split_model.num_heads, q.shape[2]), dtype=torch.uint8)
        return dense_attention(q, k, v, call)

    state = _trunk(inputs, size)
    starts = set(_starts(module, callback))
    kept = [state]
    with split_model.attention(dict.fromkeys(range(module.first, split_model.num_blocks), attend)):
        for layer in range(module.first, split_model.num_blocks):
            state = split_model.run(state, layer, layer + 1)
            if layer + 1 in starts:
                kept.append(state)
        velocity = split_model.finish(state)
        del state
        again = split_model.finish(split_model.run(kept[0], module.first, split_model.num_blocks))
    del velocity, again, kept


def _starts(module: RetrainBlocks, callback: ProbeCallback) -> list[int]:
    """Blocks whose input masking keeps: the first block of each of its scopes."""
    if not isinstance(callback, MaskingRobustness):
        return []
    return [layers[0] for layers in callback._layers_of(module).values()]


def host_bytes(inputs: PlanInputs, outcome: int, rope: int) -> int:
    """Bytes of host memory per process for the trunk's output on its probes; 0 for a sharded model, which caches none.

    Args:
        inputs: inputs of the plan.
        outcome: bytes of the trunk's output for one sample, as the cache stores it.
        rope: bytes of the rotary tables.
    """
    probes = [c for c in inputs.callbacks if isinstance(c, ProbeCallback)]
    if not probes or inputs.module.first == 0 or inputs.sharding.name not in ("single", "ddp"):
        return 0
    share = max(math.ceil(c.prompts * len(c.sigmas) * (1 + c.unconditional) / inputs.ranks) for c in probes)
    stores = [c for c in inputs.callbacks if isinstance(c, TrunkCache)]
    budget = stores[0].host_bytes if stores else int(5.0 * GIB)
    return min(budget, share * outcome + rope)
