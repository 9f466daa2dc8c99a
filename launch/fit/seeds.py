"""One seed for a run: seeds that a recipe does not give follow its `seed_everything`."""

import os
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

#: Seeds that follow: of sigma, noise and caption dropout; of the retrained blocks' initial weights; of the order of the
#: samples. Seeds of measurements do not, since runs of several seeds are compared on the same probes.
SEEDS = ("model.init_args.seed", "model.init_args.surgery.seed", "data.init_args.seed")


def seed_arguments(parser: ArgumentParser, args: Sequence[str]) -> list[str]:
    """Options for the seeds that neither the command line nor its recipes give and that have another value by default.

    Since they are options of the command line, `--print_config` and config.yaml show them too.

    Args:
        parser: parser of the recipe.
        args: command line.
    """
    asked = [argument for argument in args if argument.partition("=")[0] != "--print_config"]
    try:
        whole = _recipe(parser.parse_args(asked))
        seed = whole.seed_everything
        if seed is False:
            return []
        if seed is True:  # Lightning's word for the seed of its environment
            seed = os.environ.get("PL_GLOBAL_SEED", 0)
        others = [name for name in SEEDS if name in whole and whole[name] != seed]
        # Parsing takes longer than all else before the first step of a small fit: not again unless a seed differs.
        given = _recipe(parser.parse_args(asked, defaults=False)) if others else ()
    except ValueError:
        return []  # the parser says what is wrong with them
    return [f"--{name}={seed}" for name in others if name not in given]


def _recipe(config: Namespace) -> Namespace:
    """The recipe itself, which is nested under the verb if there is one."""
    return config[config.subcommand] if "subcommand" in config else config
