"""`reblock plant`: plants attention sinks in a base, as a known defect that retraining must remove.

Legend: B batch, C latent channels, F latent frames, H W latent grid.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import MochiTransformer3DModel
from rich.progress import track
from torch import Tensor

from data.batch import Batch, Sample
from data.files import atomic_folder, write_json
from data.modules.latents import LatentDataModule
from trainer import run_files
from trainer.attention import sink_statistics, sink_verdict
from trainer.graft import apply_graft, check_graft_base, load_graft
from trainer.models.from_scratch import check_plantable
from trainer.models.layout import AttentionCall, dense_attention
from trainer.models.planted_record import read_planted
from trainer.models.planted_sinks import (
    PlantedHead,
    held_entries,
    largest_markers,
    parse_heads,
    plant_sinks,
)
from trainer.module import RetrainBlocks, SurgeryConfig

#: A sink is nearly a no-op while its key's value is at most so large a share of the other keys' values.
NO_OP_RATIO = 0.3
#: A query attends heavily to a key if its attention weight exceeds this; as in docs/measurements.md.
EPS = 0.3
_NOTE = "These sinks were planted on purpose by `reblock plant`; the base did not grow them."
_HELD_NOTE = (
    "These sinks were planted on purpose by `reblock plant`, and held in place while the base was trained around them; "
    "it did not grow them."
)


def _open(base: Path) -> RetrainBlocks:
    module = RetrainBlocks(base=str(base), surgery=SurgeryConfig(last=1, init="keep"))
    module.build("cpu")
    return module


class SeenSinks(NamedTuple):
    """Sinks of a layer, over the held-out samples and sigmas.

    Args:
        frequency: (heads,) share of (sample, sigma) pairs with a sink.
        value_norm_ratio: (heads,) mean of |v| of the largest key over the mean of the others.
    """

    frequency: Tensor
    value_norm_ratio: Tensor


class HeldOutSamples:
    """The held-out samples of validation with its noise, in one batch per latent size and caption length."""

    def __init__(self, shards: Path, samples: int, module: RetrainBlocks) -> None:
        data = LatentDataModule(shards=str(shards), val_samples=samples)
        data.check()
        for shape in data.latent_shapes.values():
            module.check_data(shape, data.text_width)
        by_shape: dict[tuple[int, ...], list[Sample]] = {}
        for sample in data.held_out_samples(range(len(data.val_split))):
            by_shape.setdefault((*sample.latent.shape, len(sample.text)), []).append(sample)
        self.batches = [Batch.collate(by_shape[shape]) for shape in sorted(by_shape)]
        self.samples = samples

    @torch.no_grad()
    def loss(self, module: RetrainBlocks) -> float:
        """Mean validation loss, equal to `val/loss` of a fit with the same held-out samples."""
        total = sum(float(module.losses(*probe).sum()) for probe in self._probes(module))
        return total / (self.samples * len(module.val_sigmas))

    def _probes(self, module: RetrainBlocks) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Every batch with its noise (B, C, F, H, W) at every sigma (B,) of validation."""
        for batch in self.batches:
            noise = module.flow.held_out_noise(batch.uids, batch.latents.shape[1:])
            for sigma in module.val_sigmas:
                yield batch, noise, torch.full((len(batch),), sigma)

    @torch.no_grad()
    def largest_marker(self, module: RetrainBlocks, channel: int) -> float:
        """The largest marker among the tokens of a noisy sample, mean over samples and sigmas."""
        assert module.split_model is not None
        model = module.split_model.transformer
        noisy = (module.process.mix(batch.latents, noise, sigma) for batch, noise, sigma in self._probes(module))
        return float(torch.cat([largest_markers(model, x, channel) for x in noisy]).mean())

    @torch.no_grad()
    def sinks(self, module: RetrainBlocks, layers: Sequence[int]) -> dict[int, SeenSinks]:
        """Sink frequency and value norms of the heads of each layer."""
        verdicts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        ratios: dict[int, list[Tensor]] = {layer: [] for layer in layers}

        def observe(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            found = sink_statistics(q, k, v, num_vision=call.layout.num_vision, eps=(EPS,))
            verdicts[call.layer].append(sink_verdict(found.fraction[..., 0]))
            ratios[call.layer].append(found.value_norm_ratio)
            return dense_attention(q, k, v, call)

        assert module.split_model is not None
        with module.split_model.attention(dict.fromkeys(layers, observe)):
            self.loss(module)
        return {
            layer: SeenSinks(*(torch.cat(found[layer]).float().mean(dim=0) for found in (verdicts, ratios)))
            for layer in layers
        }


def _cheapest_heads(
    module: RetrainBlocks,
    held_out: HeldOutSamples,
    layers: Sequence[int],
    channels: tuple[int, int],
    settings: dict[str, float],
) -> list[PlantedHead]:
    """The head of each layer whose planted sink gives the lowest validation loss."""
    assert module.split_model is not None
    model = module.split_model.transformer
    original = {name: value.clone() for name, value in model.state_dict().items()}
    heads = range(model.config.num_attention_heads)
    chosen = []
    progress = iter(track([(a, b) for a in layers for b in heads], description="choosing heads"))
    for layer in layers:
        losses = []
        for head in heads:
            next(progress)
            plant_sinks(model, channels, [PlantedHead(layer, head, **settings)])
            losses.append(held_out.loss(module))
            model.load_state_dict(original)
        chosen.append(PlantedHead(layer, min(heads, key=losses.__getitem__), **settings))
    next(progress, None)
    return chosen


def _verified(
    module: RetrainBlocks, held_out: HeldOutSamples, planted: Sequence[PlantedHead]
) -> list[dict[str, float | int]]:
    """The entries of planted.json.

    Raises:
        ValueError: if a head is no sink on some sample, or one that is far from a no-op.
    """
    seen = held_out.sinks(module, sorted({head.layer for head in planted}))
    entries = [
        {
            **asdict(head),
            "value_norm_ratio": float(seen[head.layer].value_norm_ratio[head.head]),
            "verified_frequency": float(seen[head.layer].frequency[head.head]),
        }
        for head in planted
    ]
    large = {f"{e['layer']}:{e['head']}": e["value_norm_ratio"] for e in entries if e["value_norm_ratio"] > NO_OP_RATIO}
    missed = {f"{e['layer']}:{e['head']}": e["verified_frequency"] for e in entries if e["verified_frequency"] < 1.0}
    if missed:
        raise ValueError(
            f"planted heads are sinks on a share {missed} of the held-out samples and sigmas, expected 1.0: raise "
            f"--gain above {planted[0].gain}, so that near-equal tokens are told apart."
        )
    if large:
        raise ValueError(
            f"values of the planted sinks are {large} of the other keys' values, expected at most {NO_OP_RATIO}, so "
            "that a sink is nearly a no-op: the base's markers differ from those of its training, or training has "
            "changed what the head reads."
        )
    return entries


def _planted_before(base: Path) -> tuple[tuple[int, int], list[PlantedHead]]:
    """The channels and heads that planted.json of a base names."""
    record = read_planted(base)
    if record is None:
        raise ValueError(
            f"{base / 'planted.json'} does not exist; expected the base that `reblock plant` wrote, which was trained "
            "on."
        )
    names = [field.name for field in fields(PlantedHead)]
    try:
        channels = record["channels"]["constant"], record["channels"]["marker"]
        return channels, [PlantedHead(**{name: entry[name] for name in names}) for entry in record["heads"]]
    except KeyError as error:
        raise ValueError(
            f"{base / 'planted.json'} has no {error}, expected a record of this version of `reblock plant`: plant the "
            "sinks again, and train on what it writes."
        ) from error


def _take_trained(
    model: MochiTransformer3DModel, base: Path, run: Path, channels: tuple[int, int], planted: Sequence[PlantedHead]
) -> None:
    """Puts the EMA weights of a run into its base, in place.

    Raises:
        ValueError: if the run was trained on another base, or has trained what makes the planted sinks.
    """
    graft = load_graft(run / run_files.GRAFT)
    check_graft_base(graft, base)
    entries = list(held_entries(model, channels, [(head.layer, head.head) for head in planted]))
    before = [parameter[index].clone() for parameter, index in entries]
    apply_graft(model, graft.ema)
    if not all(torch.equal(p[index], old) for (p, index), old in zip(entries, before, strict=True)):
        raise ValueError(
            f"{run} has trained weights that make the planted sinks, expected those of {base}, unchanged: train with "
            f"surgery.held_sinks {[f'{head.layer}:{head.head}' for head in planted]} and reserved_channels "
            f"{list(channels)} (recipes/demo_base_sinks.yaml)."
        )


def plant(
    base: Path,
    out: Path,
    *,
    shards: Path,
    heads: list[str] | None = None,
    last: int = 4,
    gain: float = 64.0,
    values: float = 1.0,
    channels: tuple[int, int] = (0, 1),
    val_samples: int = 32,
    trained: Path | None = None,
    half: bool = False,
) -> None:
    """Writes a copy of a base with attention sinks planted in chosen heads, and `planted.json` that names them.

    The base must have been trained with reserved channels (recipes/demo_base.yaml). Nothing is written unless each
    planted head is a sink on every held-out sample at every sigma.

    A base with planted sinks can be trained on, with the sinks held (recipes/demo_base_sinks.yaml): then `trained`
    writes what came of it, and plants nothing.

    Args:
        base: diffusers pipeline folder of the base.
        out: folder to write; it must not exist.
        shards: latent shards; their last `val_samples` samples measure the loss before and after, and the sinks.
        heads: heads as LAYER:HEAD, quoted, as in --heads '["6:3", "7:1"]'; by default, the head of each of the last
            blocks whose sink raises the validation loss least.
        last: number of last blocks that get one sink each, if `heads` is not given.
        gain: QK-norm weight of a planted head; a larger one sharpens its attention.
        values: size of a planted head's values. The sink's is small beside the others', as in Mochi: nearly a no-op.
        channels: indices of the reserved channels, constant and marker.
        val_samples: number of held-out samples, equal to the fit's `data.val_samples`.
        trained: run folder of a fit on `base` with the planted sinks held; its EMA weights are written. Heads, gain,
            values and channels are then those of the base's planted.json.
        half: whether to store the transformer in 16 bits.

    Raises:
        ValueError: if `out` exists, the base's channels are in use, a head is no sink on some sample or is far from a
            no-op, or the trained run is of another base or did not hold the sinks.
    """
    if out.exists():
        raise ValueError(
            f"{out} exists; expected a new folder, since nothing is overwritten. Remove it or name another."
        )
    if trained is not None and heads:
        raise ValueError(
            f"got --heads {heads} with --trained, which plants nothing; expected one of the two: the heads are those "
            f"of {base / 'planted.json'}."
        )
    if trained is not None:
        channels, planted = _planted_before(base)
    module = _open(base)
    assert module.split_model is not None
    model = module.split_model.transformer
    check_plantable(model)
    if not 1 <= last <= module.split_model.num_blocks:
        raise ValueError(f"got last {last}, expected 1 .. {module.split_model.num_blocks}, the blocks of {base}.")
    held_out = HeldOutSamples(shards, val_samples, module)
    record: dict[str, Any] = {
        "channels": {"constant": channels[0], "marker": channels[1]},
        "eps": EPS,
        "samples": val_samples,
        "sigmas": list(module.val_sigmas),
    }
    if trained is not None:
        _take_trained(model, base, trained, channels, planted)
        loss = held_out.loss(module)
        record |= {"heads": _verified(module, held_out, planted), "val_loss": loss, "note": _HELD_NOTE}
        result = f"validation loss {loss:.4f}"
    else:
        before = held_out.loss(module)
        blocks = range(module.split_model.num_blocks - last, module.split_model.num_blocks)
        settings = {"gain": gain, "largest_marker": held_out.largest_marker(module, channels[1]), "values": values}
        planted = (
            [PlantedHead(layer, head, **settings) for layer, head in parse_heads(heads)]
            if heads
            else _cheapest_heads(module, held_out, blocks, channels, settings)
        )
        plant_sinks(model, channels, planted)
        after = held_out.loss(module)
        record |= {"heads": _verified(module, held_out, planted), "note": _NOTE}
        record |= {"val_loss_before": before, "val_loss_after": after}
        result = f"validation loss {before:.4f} before, {after:.4f} after"
    with atomic_folder(out) as temporary:
        without = shutil.ignore_patterns("transformer", "planted.json")
        shutil.copytree(base, temporary, ignore=without, dirs_exist_ok=True)
        model.to(torch.float16 if half else torch.float32)
        model.save_pretrained(temporary / "transformer", safe_serialization=True)
        write_json(temporary / "planted.json", record)
    named = ", ".join(f"layer {p.layer} head {p.head}" for p in planted)
    print(f"{out}: sinks planted in {named}; {result}")
