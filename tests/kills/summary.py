"""What a series of kills has recorded, what of it is a fault, and the table of it."""

import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.kills.comparison import Comparison


@dataclass
class KillRecord:
    """One kill and what followed it.

    Args:
        victims: ranks that got SIGKILL.
        phase: of the fit, in which the first victim was.
        writing: whether a checkpoint was half written.
        statuses: exit status of each rank; None for one that did not end.
        seconds: until the surviving ranks and their loader processes were gone.
        orphans: processes left over after that.
        damaged: checkpoints that are damaged, each with its fault.
    """

    victims: list[int]
    phase: str
    writing: bool
    statuses: list[int | None]
    seconds: float
    orphans: int
    damaged: list[str]

    def __str__(self) -> str:
        who = "all" if len(self.victims) > 1 else f"rank {self.victims[0]}"
        what = f"{self.phase}{', a checkpoint half written' if self.writing else ''}"
        return f"{who} in {what}; statuses {self.statuses}, all gone after {self.seconds:.1f} s"


@dataclass
class KilledRun:
    """A run from its first start to its end.

    Args:
        folder: the run folder.
        kills: in order.
        fallbacks: starts that resumed from previous.ckpt.
        stalled: starts that came to no step by themselves.
        from_scratch: starts from the first step, since there was no checkpoint yet.
    """

    folder: Path
    kills: list[KillRecord] = field(default_factory=list)
    fallbacks: int = 0
    stalled: int = 0
    from_scratch: int = 0


def faults_of_kills(run: KilledRun, kills: int) -> list[str]:
    """What must not follow a kill, one line each."""
    faults = [f"{run.stalled} start(s) came to a stop by themselves"] if run.stalled else []
    if len(run.kills) < kills:
        faults.append(f"the run ended after {len(run.kills)} of {kills} kills")
    for number, kill in enumerate(run.kills, 1):
        survivors = [status for rank, status in enumerate(kill.statuses) if rank not in kill.victims]
        if 0 in survivors:
            faults.append(f"after kill {number} a surviving rank ended with status 0")
        if None in survivors:
            faults.append(f"after kill {number} a surviving rank did not end")
        if kill.orphans:
            faults.append(f"after kill {number} {kill.orphans} processes were left over")
        if kill.damaged:
            faults.append(f"after kill {number} checkpoints were damaged: {kill.damaged}")
    return faults


def summary_rows(run: KilledRun, comparison: Comparison, ranks: int) -> list[tuple[str, str]]:
    """Rows of the table: what was killed, what followed, what differs from the undisturbed run."""
    kills = run.kills
    who = Counter("all ranks" if len(k.victims) == ranks else f"rank {k.victims[0]}" for k in kills)
    phases = Counter(kill.phase for kill in kills)
    survivors = {str(status) for k in kills for rank, status in enumerate(k.statuses) if rank not in k.victims}
    seconds = [kill.seconds for kill in kills] or [0.0]
    return [
        ("killed", ", ".join(f"{name} {count}" for name, count in sorted(who.items()))),
        ("in", ", ".join(f"{name} {count}" for name, count in phases.most_common())),
        ("while a checkpoint was half written", str(sum(kill.writing for kill in kills))),
        ("exit statuses of surviving ranks", ", ".join(sorted(survivors)) or "-"),
        ("all processes gone after: median (worst)", f"{statistics.median(seconds):.1f} s ({max(seconds):.1f} s)"),
        ("starts that came to a stop by themselves", str(run.stalled)),
        ("processes left over", str(sum(kill.orphans for kill in kills))),
        ("damaged files under a checkpoint's name", str(sum(len(kill.damaged) for kill in kills))),
        ("starts from the first step again (no checkpoint yet)", str(run.from_scratch)),
        ("starts from previous.ckpt", str(run.fallbacks)),
        ("steps compared, all ranks", f"{comparison.steps:,}, of these repeated {comparison.repeated:,}"),
        ("steps with other samples, sigma, noise or losses", str(len(comparison.different))),
        ("steps lost", str(len(comparison.lost))),
        ("rows of metrics.csv that differ", str(comparison.rows)),
        ("files that differ or are left over", str(len(comparison.files))),
    ]
