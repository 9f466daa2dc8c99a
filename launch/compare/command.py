"""`reblock compare`: one page and table of runs side by side, such as a run and its controls, or several seeds."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from data.files import write_text
from launch.compare import page
from launch.compare.bases import check_bases
from launch.compare.groups import group_runs
from launch.compare.measured import FIGURES, followed_heads, measure_base, measure_runs, retrained_layers
from launch.report.results import read_results
from launch.run_folder import RunFolder


def compare(*runs: Path, out: Path = Path("compare.html")) -> Path:
    """Writes one self-contained HTML page about several runs, and prints its table of figures.

    Runs whose recipes differ in names and seeds alone form a group. The first run's group is the reference: the others
    are compared with it, paired by prompt, and over seeds where both sides have several runs.

    Args:
        runs: run folders of `reblock fit`, the reference first.
        out: file to write.

    Returns:
        Path of the file.

    Raises:
        ValueError: if fewer than two runs are given, one is no run folder or is given twice, or two runs of a recipe
            have the same seed, have come to different steps or were measured on different probes, or if the runs
            start from different bases.
    """
    if len(runs) < 2:
        raise ValueError(f"got {len(runs)} run ({', '.join(map(str, runs))}), expected two or more to compare.")
    results = [read_results(RunFolder(run)) for run in runs]
    groups = group_runs(results)
    check_bases(results)
    reference = groups[0].runs[0]
    layers, heads = retrained_layers(reference) or [], followed_heads(reference)
    comparison = page.Comparison(
        groups,
        [measure_runs(group.runs, layers, heads) for group in groups],
        measure_base(reference, layers, heads),
        layers,
    )
    environment = Environment(loader=PackageLoader("launch"), autoescape=True, undefined=StrictUndefined)
    write_text(out, environment.get_template("compare.html.j2").render(_page(comparison)))
    _print_table(comparison)
    print(f"comparison: {out.resolve()}")
    return out


def _page(comparison: page.Comparison) -> dict[str, Any]:
    charts = {"loss": page.loss_chart(comparison), "critical": page.critical_chart(comparison)}
    return {
        "names": comparison.names,
        "sentences": page.sentences(comparison),
        "recipes": page.recipe_rows(comparison),
        "figure_names": [title for title, _ in FIGURES.values()],
        "figures": page.figure_rows(comparison),
        "differences": page.difference_rows(comparison),
        "charts": {name: Markup(chart) if chart else None for name, chart in charts.items()},
        "layers": ", ".join(map(str, comparison.layers)) or "not on record",
        "samples": page.samples(comparison),
    }


def _print_table(comparison: page.Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = page.figure_rows(comparison)
    table = Table("figure", *(row.name for row in rows), title="Figures after the last epoch", title_justify="left")
    for index, (title, _) in enumerate(FIGURES.values()):
        table.add_row(title, *(row.cells[index][0] for row in rows))
    console = Console()
    if not console.is_terminal:
        console = Console(width=60 + 40 * len(rows))  # a file has no width of its own
    console.print(table)
