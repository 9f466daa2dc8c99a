"""Short error messages for unknown options: the fault, the nearest name and all names that exist.

jsonargparse would print pages of usage, and would only say of a nested option that it is not accepted.
"""

import difflib
import re
from typing import NoReturn

from jsonargparse import ArgumentParser

_ACCEPTED = "accepted here: "

#: Prefixes of lines that name no fault: alternatives of a union type, and values that are whole recipes.
_NOISE = (
    "Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value type",
    "Given value: Namespace(", "Given value: NestedArg(", "Given value: {", "Given value: [{",
    "Subclass types expect one of", "- a class path (str)", "- a dict with", "- a dict without",
)  # fmt: skip

#: Options that every parser has.
_EVERYWHERE = {"help", "config", "print_config", "print_shtab"}


class CommandParser(ArgumentParser):
    """A parser that raises its errors as ValueErrors with a short message."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(explain(message, self)) from ex


def explain(message: str, parser: ArgumentParser) -> str:
    """Shortens a parser's message; for an unknown option, adds the options that exist.

    Args:
        message: error message of jsonargparse.
        parser: parser that raised the error.
    """
    return "\n".join([*fault_lines(message), *accepted(message, parser)])


def fault_lines(message: str) -> list[str]:
    """The lines of a parser's message that name a fault."""
    return [line for line in message.splitlines() if line.strip() and not line.strip().startswith(_NOISE)]


def accepted(message: str, parser: ArgumentParser) -> list[str]:
    """For an unknown option, lines with the nearest name and all names in the same part of the recipe.

    A class in a recipe has its own parser, whose message becomes part of the whole recipe's message.

    Args:
        message: error message of jsonargparse.
        parser: parser that raised the error.
    """
    key = _unknown_option(message)
    if key is None or _ACCEPTED in message:
        return []
    known = {action.dest for action in parser._actions}
    words = key.split(".")
    # The longest prefix of the option that is a part of the recipe; the next word is the unknown one.
    depth = len(words) - 1
    while depth and not any(name.startswith(".".join(words[:depth]) + ".") for name in known):
        depth -= 1
    start = "".join(f"{word}." for word in words[:depth])
    names = {name.removeprefix(start).split(".")[0] for name in known if name.startswith(start)} - _EVERYWHERE
    near = difflib.get_close_matches(words[depth], sorted(names), 1)
    return [*(f"nearest name: {start}{name}" for name in near), _ACCEPTED + ", ".join(sorted(names))]


def _unknown_option(message: str) -> str | None:
    """Dotted name of the unknown option in a message, or None."""
    for pattern in (
        r"[Uu]nrecognized arguments: --(?P<key>[\w.-]+)",
        r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'",
        r"does not accept option '(?P<key>[\w.]+)'",
        r"[Oo]ption '(?P<key>[\w.]+)' is not accepted",
    ):
        found = re.search(pattern, message)
        if found:
            group = found.groupdict().get("group")
            return f"{group}.{found['key']}" if group else found["key"]
    return None
