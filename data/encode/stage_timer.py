"""How long each stage of encoding takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

#: Stages in which a model runs, and the stages around them.
VAE, TEXT = "VAE", "text encoder"
COPY = "copies between host and device"
CLIPS, WRITER = "waiting for decoded clips", "waiting for the writer"
MODEL_STAGES = (VAE, TEXT)


class StageTimer:
    """Wall seconds per stage, of one thread. Stages do not nest.

    Args:
        device: used by the stages. The timer waits for a CUDA device at the end of each stage, because a call only
            queues its work.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time of a `with` block to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.startswith("cuda"):
                torch.cuda.synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass
class EncodeTimings:
    """How long encoding took, by stage.

    Args:
        clips: number of encoded clips.
        wall: seconds, from the loaded models to the last complete shard.
        seconds: per stage, of the thread that runs the models.
    """

    clips: int = 0
    wall: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: "EncodeTimings") -> "EncodeTimings":
        names = [*self.seconds, *(name for name in other.seconds if name not in self.seconds)]
        seconds = {name: self.seconds.get(name, 0.0) + other.seconds.get(name, 0.0) for name in names}
        return EncodeTimings(self.clips + other.clips, self.wall + other.wall, seconds)

    @property
    def idle(self) -> float:
        """Share of the wall time in which no model ran, 0 to 1."""
        return 1 - sum(self.seconds.get(name, 0.0) for name in MODEL_STAGES) / self.wall if self.wall else 0.0

    def print_table(self) -> None:
        """Prints the stages, the rate, and the slowest stage."""
        if not self.clips:
            print("nothing was encoded here, so there is nothing to report")
            return
        table = Table(title="Where the time went", title_justify="left")
        for title in ("stage", "s", "share"):
            table.add_column(title, justify="left" if title == "stage" else "right")
        rest = self.wall - sum(self.seconds.values())
        for name, seconds in [*self.seconds.items(), ("everything else", rest)]:
            table.add_row(name, f"{seconds:.2f}", f"{seconds / self.wall:.1%}")
        console = Console(width=100)
        console.print(table)
        print(
            f"{self.clips} clips in {self.wall:.2f} s: {self.clips / self.wall:.2f} clips / s, from the loaded models "
            f"to the last shard in its place.\n"
            f"accelerator idle {self.idle:.1%}: the share of that time in which no model call ran.\n"
            f"slowest stage: {max(self.seconds, key=lambda name: self.seconds[name])}"
        )
