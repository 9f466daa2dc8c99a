"""One optimiser step of the module itself, on tensors without content: its operations and the bytes alive in it.

The module is built on the meta device. Its tensors are then fake ones that say they lie on a CPU, for torch applies
autocast to those but not to meta tensors; on a GPU the same operators run, in the same dtypes. What is counted is thus
what the code does, whatever it is changed to.

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
from trainer.models.mochi import State
from trainer.module import RetrainBlocks
from trainer.optimizer import adamw

TRUNK, HEAD, BACKWARD, UPDATE = "trunk", "head", "backward", "update"


@dataclass(frozen=True)
class StepTrace:
    """What one optimiser step does on one rank.

    Args:
        flops: operations of a micro-batch by stage: trunk, head, backward (recomputed activations included).
        allocations: what was alive, in the last micro-batch and the update after it.
        parts: bytes of weights, gradients, optimiser state and averages once all are there.
        outcome: bytes of what the trunk hands on, text and modulation included, in the dtypes that it computed in: so
            a `TrunkCache` keeps it, though the head takes it in its own.
        rope: bytes of the rotary tables, the same for every sample.
    """

    flops: dict[str, int]
    allocations: list[Allocation]
    parts: dict[str, int]
    outcome: int
    rope: int


@contextlib.contextmanager
def fake_module(inputs: PlanInputs) -> Iterator[UsageCounter]:
    """Inside, `inputs.module` is built of tensors without content, whose bytes and operations are counted."""
    inputs.module.stock_attention = False  # diffusers' own processor asks the device for lengths: it needs content
    inputs.module.build("meta")
    split_model = inputs.module.split_model
    assert split_model is not None
    inputs.module.train()
    with warnings.catch_warnings(), FakeTensorMode(), UsageCounter() as counter:
        warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")
        make_empty(split_model)
        for block in split_model.transformer.transformer_blocks:
            block.__dict__.pop("forward", None)  # as it is written, whatever compiles it
        inputs.module.ema = Ema(inputs.module.retrained_parameters(), decay=inputs.module.ema_decay)
        counter.assign("weights", [*split_model.parameters(), *split_model.buffers()])
        counter.assign("ema", inputs.module.ema.average.values())
        yield counter


def fake_batch(inputs: PlanInputs, size: int) -> tuple[Batch, Tensor, Tensor]:
    """A batch of captions of full length, its noise and its sigma."""
    batch = Batch(
        latents=torch.empty(size, *inputs.latent),
        text=torch.empty(size, inputs.text_tokens, inputs.text_width),
        text_mask=torch.empty(size, inputs.text_tokens, dtype=torch.bool),
        text_lengths=(inputs.text_tokens,) * size,
        keys=("",) * size,
        uids=tuple(range(size)),
        counts=(True,) * size,
    )
    return batch, torch.empty(size, *inputs.latent), torch.empty(size)


def autocast(inputs: PlanInputs) -> contextlib.AbstractContextManager:
    """As Lightning's precision plugin has it round a step's forward pass."""
    return contextlib.nullcontext() if inputs.autocast is None else torch.autocast("cpu", inputs.autocast)


def trace_step(inputs: PlanInputs, counter: UsageCounter) -> StepTrace:
    """Runs a step in `fake_module`, in the order of Lightning's loop, from the second step on: states are there."""
    module = inputs.module
    retrained = module.retrained_parameters()
    for p in retrained.values():
        p.grad = torch.empty_like(p)  # of the step before: Lightning clears them after the forward pass
        p.register_post_accumulate_grad_hook(lambda p: counter.assign("gradients", [p.grad]))
    optimizer = adamw(retrained, module.optim, fused=inputs.gpu)
    optimizer.step()
    counter.assign("optimiser", [v for state in optimizer.state.values() for v in state.values()])
    counter.assign("gradients", [p.grad for p in retrained.values() if p.grad is not None])
    parts = {part: counter.parts[part] for part in ("weights", "gradients", "optimiser", "ema")}

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
        loss = module.losses(batch, noise, sigma).mean()
        loss = loss * (loss - loss + 1).detach()
    if inputs.accumulate == 1:
        optimizer.zero_grad()  # else the gradients of the micro-batches before stay
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
    """Inside, the module's own trunk and head tell when they run."""
    module.trunk, module.head = staged(TRUNK, module.trunk), staged(HEAD, module.head)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.trunk, module.head


def _own(state: State) -> tuple[Tensor, ...]:
    """What is each sample's own."""
    return state.vision, state.text, state.temb


@contextlib.contextmanager
def _noting_widths(module: RetrainBlocks, widths: list[list[int]]) -> Iterator[None]:
    """Inside, `widths` gets the bytes a number of each tensor that blocks hand on, the trunk's first."""
    whole = module.split_model.run

    def run(*args: Any) -> State:
        state = whole(*args)
        widths.append([t.element_size() for t in _own(state)])  # not the tensors: they would stay alive
        return state

    module.split_model.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.split_model.run


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
