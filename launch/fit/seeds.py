"""One seed for a run: those that a recipe leaves out follow its `seed_everything`."""

import os
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

#: Of the retrained blocks' first weights, of sigma, noise and caption dropout, and of the order of the samples. Not
#: those of measurements: runs of several seeds are compared on the same probes.
SEEDS = ("model.init_args.seed", "model.init_args.surgery.seed", "data.init_args.seed")


def seed_arguments(parser: ArgumentParser, args: Sequence[str]) -> list[str]:
    """Options for the seeds that neither the command line nor its recipes give.

    As options of the command line, what `--print_config` shows and config.yaml keeps holds them too.

    Args:
        parser: of the recipe.
        args: the command line.

    Returns:
        None where `seed_everything` is false; then classes have their own defaults.
    """
    asked = [argument for argument in args if argument.partition("=")[0] != "--print_config"]
    try:
        whole, given = (_recipe(parser.parse_args(asked, defaults=defaults)) for defaults in (True, False))
    except ValueError:
        return []  # the parser says what is wrong with them
    seed = whole.seed_everything
    if seed is False:
        return []
    if seed is True:  # Lightning's word for the seed of its environment
        seed = os.environ.get("PL_GLOBAL_SEED", 0)
    return [f"--{name}={seed}" for name in SEEDS if name in whole and name not in given]


def _recipe(config: Namespace) -> Namespace:
    """The recipe, without the verb that it may be under."""
    return config[config.subcommand] if "subcommand" in config else config
