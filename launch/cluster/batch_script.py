"""The text of a batch script: what it is made of, and how values of the user's are quoted in it.

A script is read twice: by sbatch, which takes the #SBATCH lines with quoting rules of its own, and by bash. Whatever
comes from the user goes through `directive` for the one and `shlex.quote` for the other.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from launch.run_folder import RunFolder

#: A comment, or an option of sbatch with its value; None for one that takes none.
Line = str | tuple[str, str | None]

_PLAIN = re.compile(r"[A-Za-z0-9_@:,./+=\[\]%^*-]+")
_WIDTH = 116


@dataclass(frozen=True, kw_only=True)
class DirectiveGroup:
    """#SBATCH lines that belong together, under a heading."""

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True, kw_only=True)
class BatchScript:
    """What one script is made of.

    Args:
        stage: encode, fit or export.
        title: what it does, in one line.
        written: when.
        versions: of what it was submitted with, in one line.
        by_hand: how it is submitted again, lines of comment.
        path: of the script.
        groups: what is asked of Slurm.
        modules: to load.
        setup: lines of shell, as they are.
        env: of the tasks.
        ranks: whether its tasks are ranks of one training.
        run: the run folder.
        signal: that announces the end of the time to the tasks.
        stops: what they do on the signal, for a comment; empty if they ignore it.
        verb: what is run, for a heading.
        job_id: how the shell writes what `scontrol requeue` takes.
        max_requeues: by the script.
        wait_seconds: as `Submission.wait_seconds`.
        srun: srun's options, in the shell's own spelling.
        command: what srun runs, in the shell's own spelling: one line of the script each.
    """

    stage: str
    title: str
    written: str
    versions: str
    by_hand: Sequence[str]
    path: Path
    groups: Sequence[DirectiveGroup]
    modules: Sequence[str]
    setup: Sequence[str]
    env: Mapping[str, str | int]
    ranks: bool
    run: RunFolder
    signal: str
    stops: str = ""
    verb: str
    job_id: str = "$SLURM_JOB_ID"
    max_requeues: int
    wait_seconds: int
    srun: Sequence[str]
    command: Sequence[str] = field(default_factory=list)


def quote_directive(value: str) -> str:
    """A value as sbatch reads it in a #SBATCH line: inside double quotes, a backslash takes the next character as is.

    Raises:
        ValueError: for a line break, which nothing can quote there.
    """
    if "\n" in value or "\r" in value:
        raise ValueError(f"got {value!r} for a line of a script, expected text without line breaks.")
    if _PLAIN.fullmatch(value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def directive(line: Line) -> str:
    """A comment or a #SBATCH line."""
    if isinstance(line, str):
        return f"# {line}"
    name, value = line
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={quote_directive(value)}"


def file_pattern(path: str) -> str:
    """A path for an option that takes a file name pattern: its own percent signs stay what they are."""
    return path.replace("%", "%%")


def render(script: BatchScript) -> str:
    """The script's text."""
    environment = Environment(
        loader=PackageLoader("launch"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters |= {
        "directive": directive,
        "sh": lambda word: shlex.quote(str(word)),
        "dashes": lambda title: title + "-" * max(3, _WIDTH - len(title)),
    }
    return re.sub(r"\n{3,}", "\n\n", environment.get_template("job.sbatch.j2").render(script=script))
