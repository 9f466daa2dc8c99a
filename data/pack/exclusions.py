"""Lists of clips that are not packed, or that are duplicates: `filtered.jsonl` and `duplicates.jsonl`."""

import json
from collections import Counter
from pathlib import Path

from data.files import atomic_file
from data.pack.journal import ClipJournal
from data.pack.plan import PackPlan
from data.pack.probe_source import faults_of
from data.shards.format import Fault


def write_exclusions(out: Path, journal: ClipJournal, plan: PackPlan) -> tuple[list[Fault], Counter[str]]:
    """Writes both lists; returns the faults in the journal, and the number of clips that each filter excluded."""
    faults: list[Fault] = []
    filtered = Counter[str]()
    with atomic_file(out / "filtered.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for _, _, line in journal.lines():
            faults += faults_of([line])
            if "filtered" in line:
                filtered[line["filtered"]] += 1
                row = {"key": line["key"], "filter": line["filtered"], "reason": line["reason"]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with atomic_file(out / "duplicates.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for duplicate in plan.duplicates:
            row = {"key": duplicate.key, "same_as": duplicate.same_as, "kind": duplicate.kind}
            # The keys of a.mov and a.mp4 are equal, their sources are not.
            row |= {
                "source": journal.line(*duplicate.line)["source"],
                "first": journal.line(*duplicate.first_line)["source"],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return faults, filtered
