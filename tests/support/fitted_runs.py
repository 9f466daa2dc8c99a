"""Runs of a recipe on one rank or several, through the whole command."""

from pathlib import Path

from launch.run_folder import RunFolder
from tests.support.ranks import ROOT, reblock


def fit(recipe: Path, name: str, *options: str, ranks: int = 1, strategy: str = "ddp") -> RunFolder:
    """The run of that name beside a recipe, after one more fit.

    Args:
        recipe: a file, whose `run.root` is `runs` beside it.
        name: of the run.
        options: of the command.
        ranks: processes.
        strategy: the overlay in recipes/cluster for more than one.
    """
    overlay = [f"--config={ROOT}/recipes/cluster/{strategy}.yaml"] if ranks > 1 else []
    arguments = ["fit", "--config", recipe, *overlay, "--run.name", name, f"--trainer.devices={ranks}", *options]
    with reblock(recipe.parent / f"{name}-logs", *arguments, ranks=ranks) as processes:
        assert processes.statuses() == [0] * ranks, processes.output()
    return RunFolder(recipe.parent / "runs" / name)
