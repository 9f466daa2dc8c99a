"""Whether runs start from one base: figures against the base's loss, and its intervals, mean nothing otherwise."""

from collections.abc import Sequence

import numpy as np

from launch.compare.measured import same_probes
from launch.flat_recipe import flatten
from launch.report.results import RunResults

#: Largest difference of one base's loss on a probe between runs, as a share of its mean loss. Precisions and devices
#: differ by less: bfloat16 changes a velocity by under 1 %, and its squared error by less.
TOLERATED_LOSS = 0.01

#: Values of the recipe on which the fingerprint of the frozen weights depends beside the base.
_FINGERPRINTED = ("model.init_args.surgery.", "model.init_args.trunk_dtype", "trainer.precision")


def check_bases(runs: Sequence[RunResults]) -> None:
    """Checks that all runs start from the base of the first.

    Compares fingerprints of the frozen weights where the same weights are frozen, and the base's loss on every probe,
    which every run measures before its first step, where the probes have the same names. Other losses mean another base
    or other clips.

    Raises:
        ValueError: if a run differs from the first.
    """
    first = runs[0]
    for other in runs[1:]:
        names = f"{first.run.path} and {other.run.path}"
        hashes = [str((results.fingerprint or {}).get("before") or "")[:16] for results in (first, other)]
        if all(hashes) and hashes[0] != hashes[1] and _frozen_alike(first, other):
            raise ValueError(
                f"got {names} with frozen weights of fingerprints {hashes[0]}... and {hashes[1]}..., expected runs on "
                "one base. Compare runs of one base; `reblock report` shows each by itself."
            )
        if (largest := _largest_difference(first, other)) > TOLERATED_LOSS:
            raise ValueError(
                f"got {names}, whose bases' losses on a probe differ by {100 * largest:.1f} % of the mean, expected at "
                f"most {100 * TOLERATED_LOSS:g} %: the bases differ, or the clips under these names do. Compare runs "
                "of one base and one set of held-out clips."
            )


def _frozen_alike(one: RunResults, other: RunResults) -> bool:
    """Whether both recipes freeze the same weights, in the same dtype."""

    def chosen(results: RunResults) -> dict[str, object]:
        values = flatten(results.run.read_config())
        return {name: v for name, v in values.items() if name.startswith(_FINGERPRINTED) and not name.endswith(".seed")}

    return chosen(one) == chosen(other)


def _largest_difference(one: RunResults, other: RunResults) -> float:
    """Of the base's loss on a probe, as a share of the mean loss; 0 where the probes cannot be compared."""
    stages = one.masking_before, other.masking_before
    if stages[0] is None or stages[1] is None or not all("dense_loss" in stage.tables for stage in stages if stage):
        return 0.0
    if not same_probes(stages[0].arrays, stages[1].arrays):
        return 0.0
    losses = [np.asarray(stage.tables["dense_loss"], np.float64) for stage in stages if stage]
    return float(np.abs(losses[1] - losses[0]).max() / losses[0].mean())
