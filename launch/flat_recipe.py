"""A recipe as values by dotted name."""

from collections.abc import Mapping
from typing import Any


def flatten(config: Any, name: str = "") -> dict[str, Any]:
    """Flattens a nested config into values by dotted name."""
    if isinstance(config, Mapping) and config:
        parts = ((f"{name}.{key}" if name else str(key), value) for key, value in config.items())
    elif isinstance(config, list) and config:
        parts = ((f"{name}.{index}", value) for index, value in enumerate(config))
    else:
        return {name: config}
    return {key: value for part, below in parts for key, value in flatten(below, part).items()}
