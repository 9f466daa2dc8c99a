"""Writes what a study found: CSV, JSON, PNG, SVG, and one self-contained page."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from data.files import atomic_file, write_json, write_text
from launch.report.charts import number
from launch.report.samples import data_uri
from launch.study.folder import StudyFolder
from launch.study.study import Findings, Study, Table, Unit
from launch.study.workbench import Workbench


def write_page(study: Study, work: Workbench, folder: StudyFolder, units: Sequence[Unit], found: Findings) -> Path:
    """Writes all files of a study's findings; returns the page."""
    for name, table in found.tables.items():
        write_text(folder.path / f"{name}.csv", _csv(table))
    for name, (_, figure) in found.figures.items():
        _save(figure, folder.path / name)
    for name, value in found.files.items():
        write_json(folder.path / name, value)
    write_json(folder.path / "findings.json", {"sentences": found.sentences, **found.values})
    environment = Environment(loader=PackageLoader("launch"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("study.html.j2").render(
        name=study.name,
        question=study.question,
        base=str(work.base),
        settings=_settings(work),
        sentences=found.sentences,
        limits=found.limits,
        tables=[
            {"name": name, "title": t.title, "columns": t.columns, "note": t.note, "rows": _cells(t.rows)}
            for name, t in found.tables.items()
        ],
        figures=[
            {"uri": data_uri(folder.path / f"{name}.svg", "image/svg+xml"), "name": name, "caption": caption}
            for name, (caption, _) in found.figures.items()
        ],
        groups=_videos(work, folder, units),
    )
    path = folder.path / "report.html"
    write_text(path, page)
    print(f"study: {path.resolve()}")
    return path


def _csv(table: Table) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
    return text.getvalue()


def _save(figure: Figure, path: Path) -> None:
    for kind in ("png", "svg"):
        with atomic_file(path.with_suffix(f".{kind}")) as temporary:
            figure.savefig(temporary, format=kind, dpi=150)


def _cells(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [[number(cell) if isinstance(cell, float) else str(cell) for cell in row] for row in rows]


def _settings(work: Workbench) -> str:
    return f"{work.use.family.title}, {work.facts.num_blocks} blocks; {work.describe()}"


def _videos(work: Workbench, folder: StudyFolder, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """Videos by (prompt, seed): the dense one, then the variants'."""
    groups = []
    for prompt, seed in sorted({(unit.prompt, unit.seed) for unit in units}):
        own = [u for u in units if (u.prompt, u.seed) == (prompt, seed) and folder.video(u).is_file()]
        if own:
            files = [("dense", work.dense_folder / f"{prompt:03d}-{seed}" / "video.mp4")]
            files += [(unit.variant, folder.video(unit)) for unit in own]
            clips = [{"title": title, "uri": data_uri(path, "video/mp4")} for title, path in files if path.is_file()]
            groups.append({"caption": work.prompts[prompt], "seed": seed, "clips": clips})
    return groups
