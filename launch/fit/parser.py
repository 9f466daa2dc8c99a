"""The recipe's parser, with errors for people."""

import importlib
import re
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

_ACCEPTED = "accepted here: "


def class_at(path: str) -> type:
    """The class that a recipe's `class_path` names.

    Raises:
        ValueError: if there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError):
        found = None
    if not isinstance(found, type):
        raise ValueError(f"got class path {path!r}, expected MODULE.CLASS of a class that exists.")
    return found


class RecipeParser(LightningArgumentParser):
    """A parser whose errors say what was wrong and which keys exist, without pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        raise ValueError("\n".join([*in_short(message), *_accepted(message, parser)])) from ex


def in_short(message: str) -> list[str]:
    """The lines of a parser's message that name a fault, without those about a union's other types."""
    noise = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "- Expected a <class 'NoneType'>",
        "Given value type",
        "Given value: Namespace(",
    )
    return [line for line in message.splitlines() if line.strip() and not line.strip().startswith(noise)]


def _accepted(message: str, parser: LightningArgumentParser) -> list[str]:
    """For a key that does not exist: those that do, in the same part of the recipe.

    Each part has a parser of this kind of its own, whose message comes back inside the whole recipe's.
    """
    message = re.sub(r"unrecognized arguments: --([\w.]+)", r"option '\1' is not accepted", message)
    unknown = re.search(r"[Oo]ption '([\w.]+)' is not accepted|does not accept option '([\w.]+)'", message)
    if unknown is None or _ACCEPTED in message:
        return []
    group = re.search(r"Group '([\w.]+)' does not", message)
    part = group[1] if group else (unknown[1] or unknown[2]).rpartition(".")[0]
    start = f"{part}." if part else ""
    names = {a.dest.removeprefix(start).split(".")[0] for a in parser._actions if a.dest.startswith(start)}
    return [_ACCEPTED + ", ".join(sorted(names - {"help", "config", "print_config"}))]
