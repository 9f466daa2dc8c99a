"""Runs one optimiser step of the real module on fake tensors, and counts its operations and allocated bytes.

The module is built on the meta device. Its tensors are then replaced by fake ones on the CPU, since torch applies
autocast to those but not to meta tensors; a GPU runs the same operators in the same dtypes. So the counts follow the
code, even after changes.

Legend: B batch, C channels, F latent frames, H W latent grid, L text tokens, D text width.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from data.batch import Batch
from launch.plan.inputs import PlanInputs
from launch.plan.operations import Allocation, UsageCounter, make_empty
from trainer.ema import Ema
from trainer.models.state import State
from trainer.module import RetrainBlocks
from trainer.optimizer import adamw

TRUNK, HEAD, BACKWARD, UPDATE = "trunk", "head", "backward", "update"


@dataclass(frozen=True)
class StepTrace:
    """Counts of one optimiser step on one rank.

    Args:
        flops: operations of a micro-batch by stage: trunk, head, backward (with recomputed activations).
        allocations: memory in use at each allocation of the last micro-batch and the update after it.
        parts: bytes of weights, gradients, optimiser state and averages after the first step.
        outcome: bytes of the trunk's output, with text and modulation, in the dtypes that the trunk computes in. A
            `TrunkCache` stores these; the head gets its own dtype.
        rope: bytes of the rotary tables, which all samples share.
    """

    flops: dict[str, int]
    allocations: list[Allocation]
    parts: dict[str, int]
    outcome: int
    rope: int


@contextlib.contextmanager
def fake_module(inputs: PlanInputs) -> Iterator[UsageCounter]:
    """Builds `inputs.module` from fake tensors, and counts bytes and operations inside the context."""
    inputs.module.stock_attention = False  # diffusers' own processor reads caption lengths, which fake tensors lack
    inputs.module.build("meta")
    split_model = inputs.module.split_model
    assert split_model is not None
    inputs.module.train()
    with warnings.catch_warnings(), FakeTensorMode(), UsageCounter() as counter:
        warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")
        make_empty(split_model)
        teacher = inputs.module.teacher
        if teacher is not None:
            make_empty(teacher)
        for block in (*split_model.blocks, *(teacher.blocks if teacher else ())):
            block.__dict__.pop("forward", None)  # restores the uncompiled forward
        inputs.module.ema = Ema(inputs.module.retrained_parameters(), decay=inputs.module.ema_decay)
        counter.assign("weights", [*split_model.parameters(), *split_model.buffers()])
        counter.assign("teacher", teacher.parameters() if teacher else ())
        counter.assign("ema", inputs.module.ema.average.values())
        yield counter


def fake_batch(inputs: PlanInputs, size: int) -> tuple[Batch, Tensor, Tensor]:
    """A batch with captions of full length, its noise (B, C, F, H, W) and its sigma (B,)."""
    batch = Batch(
        latents=torch.empty(size, *inputs.latent),
        text=torch.empty(size, inputs.text_tokens, inputs.text_width),
        text_mask=torch.empty(size, inputs.text_tokens, dtype=torch.bool),
        text_lengths=(inputs.text_tokens,) * size,
        keys=("",) * size,
        uids=tuple(range(size)),
        counts=(True,) * size,
        pooled=None if inputs.pooled_width is None else torch.empty(size, inputs.pooled_width),
    )
    return batch, torch.empty(size, *inputs.latent), torch.empty(size)


def autocast(inputs: PlanInputs) -> contextlib.AbstractContextManager:
    """The autocast context that Lightning's precision plugin applies to a step's forward pass."""
    return contextlib.nullcontext() if inputs.autocast is None else torch.autocast("cpu", inputs.autocast)


def trace_step(inputs: PlanInputs, counter: UsageCounter) -> StepTrace:
    """Runs a step inside `fake_module`, in the order of Lightning's loop. It is the second one: states exist."""
    module = inputs.module
    retrained = module.retrained_parameters()
    for p in retrained.values():
        p.grad = torch.empty_like(p)  # from the previous step: Lightning clears gradients after the forward pass
        p.register_post_accumulate_grad_hook(lambda p: counter.assign("gradients", [p.grad]))
    optimizer = adamw(retrained, module.optim, fused=inputs.gpu)
    optimizer.step()
    counter.assign("optimiser", [v for state in optimizer.state.values() for v in state.values()])
    counter.assign("gradients", [p.grad for p in retrained.values() if p.grad is not None])
    parts = {part: counter.parts.get(part, 0) for part in ("weights", "teacher", "gradients", "optimiser", "ema")}

    batch, noise, sigma = fake_batch(inputs, inputs.batch)
    handed: list[Any] = []
    widths: list[list[int]] = []

    def staged(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with counter.stage(name):
                found = run(*args)
            if name == TRUNK:
                outcome = sum(t.numel() * min(t.element_size(), w) for t, w in zip(_own(found), widths[0], strict=True))
                handed.append((outcome, _bytes(*found.rope)))
            return found

        return call

    with autocast(inputs), _in_stages(module, staged), _noting_widths(module, widths):
        # Of the phases of the run, the one with most work.
        phase = max(module.phases, key=lambda phase: phase.cost)
        loss = module.objective_losses(batch, noise, sigma, phase).mean()
        loss = loss * (loss - loss + 1).detach()
    if inputs.accumulate == 1:
        optimizer.zero_grad()  # otherwise gradients of earlier micro-batches remain
    staged(BACKWARD, loss.backward)()
    del loss
    with counter.stage(UPDATE):
        parameters = list(retrained.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, module.optim.clip_norm or 1.0, norm)
        optimizer.step()
        module.ema.update()
    return StepTrace(dict(counter.flops), list(counter.allocations), parts, *handed[0])


@contextlib.contextmanager
def _in_stages(module: RetrainBlocks, staged: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Inside the context, the module's trunk and head run within their stage, the teacher within the head's."""
    stages = {"trunk": TRUNK, "head": HEAD, "taught": HEAD, "taught_velocity": HEAD, "block_losses": HEAD}
    for name, stage in stages.items():
        setattr(module, name, staged(stage, getattr(module, name)))
    try:
        yield
    finally:
        for name in stages:
            delattr(module, name)


def _own(state: State) -> tuple[Tensor, ...]:
    """The tensors that differ between samples."""
    return state.vision, state.text, state.temb


@contextlib.contextmanager
def _noting_widths(module: RetrainBlocks, widths: list[list[int]]) -> Iterator[None]:
    """Inside the context, appends to `widths` the bytes per element of each output of the blocks, the trunk's first."""
    whole = module.split_model.run

    def run(*args: Any) -> State:
        state = whole(*args)
        widths.append([t.element_size() for t in _own(state)])  # only sizes: tensors would stay alive
        return state

    module.split_model.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.split_model.run


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
