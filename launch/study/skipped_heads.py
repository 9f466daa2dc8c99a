"""Which heads a study of skipped heads leaves out: the sinks, and as many random others as a control."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from launch.study.sink_records import Head, head_names
from trainer.attention.interventions import skip_heads
from trainer.models.layout import AttentionFunction
from trainer.models.planted_sinks import parse_heads

SINKS, SAME, OTHER = "sinks", "same", "other"

#: Draws tried for a control that differs from those before it.
_TRIES = 50

#: What each kind of heads is called.
TITLES: Mapping[str, str] = {
    SINKS: "sink heads", SAME: "random others, same layers", OTHER: "random others, layers without sinks",
}  # fmt: skip


def read_sink_heads(path: Path) -> list[Head]:
    """The sink heads of a `findings.json` of the study of sinks: those of any pass.

    Raises:
        ValueError: if the file is none, or damaged.
    """
    expected = "expected the findings.json of `reblock study sinks`"
    if not path.is_file():
        raise ValueError(f"got sinks {path}, which is no file; {expected}.")
    try:
        by_pass = json.loads(path.read_text())["sink_heads"]
        return sorted({head for names in by_pass.values() for head in parse_heads(names)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"got sinks {path} without readable sink_heads ({error}), {expected}.") from error


def check_heads(sinks: Sequence[Head], layers: Sequence[int], heads: Sequence[int]) -> None:
    """Checks that heads are different ones of those studied.

    Raises:
        ValueError: if they are not.
    """
    wrong = [head for head in sinks if head[0] not in layers or head[1] not in heads]
    if wrong or len(set(sinks)) < len(sinks):
        raise ValueError(
            f"got sink heads {', '.join(head_names(sinks))}, expected different ones of the studied layers "
            f"{list(layers)} and heads {list(heads)}."
        )


def heads_of(variant: str, sinks: Sequence[Head], layers: Sequence[int], heads: Sequence[int], seed: int) -> list[Head]:
    """The heads that a variant skips.

    A control takes heads without a sink. `same-I`: in each layer, as many as it has sinks. `other-I`: as many as there
    are sinks, of all layers without any. Where there are too few, all of them (`shortfalls`). All prompts have the same
    draws, which differ from each other as long as there are other heads to draw.

    Args:
        variant: `sinks`, `same-I` or `other-I`.
        sinks: the sink heads.
        layers: the studied layers.
        heads: the studied heads.
        seed: of the draws.
    """
    kind, _, draw = variant.partition("-")
    if kind == SINKS:
        return sorted(sinks)
    rng, pools = np.random.default_rng((seed, (SAME, OTHER).index(kind))), _pools(kind, sinks, layers, heads)
    found: list[list[Head]] = []
    for _ in range(_TRIES * (int(draw) + 1)):
        drawn = sorted(pool[i] for pool, wanted in pools for i in rng.permutation(len(pool))[:wanted])
        if drawn not in found:
            found.append(drawn)
        if len(found) > int(draw):
            return drawn
    return found[int(draw) % len(found)]


def _pools(
    kind: str, sinks: Sequence[Head], layers: Sequence[int], heads: Sequence[int]
) -> list[tuple[list[Head], int]]:
    """Heads that a control may take, and how many of them it wants."""
    of_layer = Counter(layer for layer, _ in sinks)
    if kind == OTHER:
        return [([(layer, head) for layer in layers if not of_layer[layer] for head in heads], len(sinks))]
    return [
        ([(layer, head) for head in heads if (layer, head) not in sinks], of_layer[layer])
        for layer in layers if of_layer[layer]
    ]  # fmt: skip


def shortfalls(sinks: Sequence[Head], layers: Sequence[int], heads: Sequence[int]) -> list[str]:
    """What controls are short of, in words."""
    found = []
    for layer, (pool, wanted) in zip(
        sorted({layer for layer, _ in sinks}), _pools(SAME, sinks, layers, heads), strict=True
    ):
        if len(pool) < wanted:
            found.append(
                f"Layer {layer} has {wanted} sink heads and {len(pool)} others, so the control of the same layers "
                f"skips {wanted - len(pool)} fewer there."
            )
    ((pool, wanted),) = _pools(OTHER, sinks, layers, heads)
    if len(pool) < wanted:
        found.append(
            f"Studied layers without sinks have {len(pool)} heads, so the control of other layers skips "
            f"{wanted - len(pool)} fewer."
        )
    return found


def skip(heads: Sequence[Head]) -> dict[int, AttentionFunction]:
    """Attention by layer in which the outputs of these heads are 0 before the output projection."""
    layers = sorted({layer for layer, _ in heads})
    return {layer: skip_heads([head for own, head in heads if own == layer]) for layer in layers}
