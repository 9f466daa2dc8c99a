"""Checks before anything is loaded that all ranks have the same software, recipe, data and checkpoint."""

import hashlib
import json
import platform
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data.modules.shard_module import ShardDataModule
from launch.fit.cpu_group import CpuGroup
from launch.versions import PACKAGES
from trainer.versions import package_versions, source_digest

#: Largest number of differences to list; of further ones only the number is given.
_LISTED = 12


class RankConsistency(Callback):
    """Refuses to start if ranks differ in Python, packages, source, recipe, data or checkpoint.

    Ranks exchange digests of these facts, and the facts themselves only if digests differ.

    Args:
        facts: function that returns further facts by name, which must be equal on all ranks.
    """

    def __init__(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        self.facts = facts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        own = {**_software(), **self.facts()}
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ShardDataModule):
            own["order of the training data"] = data.order_hash()
        own = {name: str(value) for name, value in own.items()}
        group = CpuGroup()
        group.open(trainer)
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        if len(set(group.gather(digest))) > 1:
            hosts, all_facts = zip(*group.gather((socket.gethostname(), own)), strict=True)
            raise ValueError(_differences(hosts, all_facts))
        group.close()


def _software() -> dict[str, Any]:
    """Versions of Python and packages, and a digest of our source, since not every node has git to name the commit."""
    return {
        "python": platform.python_version(),
        **package_versions((*PACKAGES, "reblock")),
        "source of reblock": source_digest("trainer", "data", "launch")[:16],
    }


def _differences(hosts: tuple[str, ...], facts: tuple[dict[str, str], ...]) -> str:
    """The error message: one line for each fact that differs, with the ranks that have each value."""
    lines = []
    for name in sorted({name for own in facts for name in own}):
        ranks = defaultdict(list)
        for rank, own in enumerate(facts):
            ranks[own.get(name, "nothing")].append(rank)
        if len(ranks) > 1:
            lines.append(
                f"{name}: " + ", ".join(f"{value} on {_ranks_and_hosts(who, hosts)}" for value, who in ranks.items())
            )
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join(
        [
            "the ranks differ, expected the same program, recipe, data and checkpoint on all; use one environment and "
            "one file system for all nodes:",
            *lines[:_LISTED],
            *more,
        ]
    )


def _ranks_and_hosts(ranks: list[int], hosts: tuple[str, ...]) -> str:
    """Text that lists ranks with their hosts, at most four of them."""
    named = ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks[:4])
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"
