"""The recipe's parser: short error messages, and refusal of class paths of earlier versions."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from launch.command_parser import explain
from launch.fit.moved_names import MOVED


class RecipeParser(LightningArgumentParser):
    """A parser that raises its errors as ValueErrors with a short message."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(explain(message, getattr(ex, "subcommand_parser", None) or self)) from ex


def class_at(path: str) -> type:
    """The class that a recipe's `class_path` names.

    Raises:
        ValueError: if there is no such class.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError):
        found = None
    if not isinstance(found, type):
        raise ValueError(f"got class path {path!r}, expected MODULE.CLASS of a class that exists.")
    return found


def refuse_moved_names(args: Sequence[str]) -> None:
    """Refuses class paths of earlier versions in a command line and in the recipes that it names.

    Args:
        args: the command line.

    Raises:
        ValueError: if there are any; gives the new path of each.
    """
    found = [("the command line", argument.rpartition("=")[2]) for argument in args]
    for path in _recipes(args):
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser will report the fault
        found += [(str(path), word) for word in _strings(recipe)]
    lines = [
        f"{place} names {word}, which is now {MOVED[word]}" for place, word in dict.fromkeys(found) if word in MOVED
    ]
    if lines:
        raise ValueError("\n".join([*lines, "Write the new class path instead; its arguments are the same."]))


def _recipes(args: Sequence[str]) -> Iterator[Path]:
    for position, argument in enumerate(args):
        option, equals, value = argument.partition("=")
        if option == "--config":
            yield from (Path(name) for name in ([value] if equals else args[position + 1 : position + 2]))


def _strings(value: Any) -> Iterator[str]:
    """Yields every string in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
