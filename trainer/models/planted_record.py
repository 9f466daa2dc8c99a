"""The record of sinks that were planted in a base. It imports no model: the report reads it too."""

import json
from pathlib import Path
from typing import Any


def read_planted(base: str | Path) -> dict[str, Any] | None:
    """The record of the sinks planted in a base, planted.json as `reblock plant` writes it; None for other bases.

    Raises:
        ValueError: if the file is no such record.
    """
    path = Path(base) / "planted.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for head in record["heads"]:
            head["layer"], head["head"] = int(head["layer"]), int(head["head"])
        if "channels" in record:
            record["channels"] = {name: int(record["channels"][name]) for name in ("constant", "marker")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of planted sinks ({type(error).__name__}: {error}), expected what `reblock plant` "
            "writes: copy it again with its base."
        ) from error
    return record
