"""Renders a batch script, with quotes around the user's values.

Two programs read a script: sbatch, with its own quoting rules for #SBATCH lines, and bash. Every value of the user
passes through `directive` for sbatch and `shlex.quote` for bash.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from launch.run_folder import RunFolder

#: A comment, or an option of sbatch with its value; None for an option without a value.
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
    """Content of one batch script.

    Args:
        stage: encode, fit or export.
        title: purpose of the script in one line.
        written: date and time of the submission.
        versions: versions of the submitted software in one line.
        by_hand: lines of comment that explain how to submit the script again.
        path: path of the script.
        groups: #SBATCH lines in groups.
        modules: environment modules to load.
        setup: lines of shell, which are copied verbatim.
        env: environment variables of the tasks.
        ranks: whether the tasks are ranks of one training run.
        run: the run folder.
        signal: signal that announces the time limit to the tasks.
        stops: what the tasks do on the signal, for a comment; empty if they ignore it.
        verb: name of the program, for a heading.
        job_id: shell expression for the argument of `scontrol requeue`.
        max_requeues: largest number of requeues by the script.
        wait_seconds: seconds as in `Submission.wait_seconds`.
        srun: options of srun, quoted for the shell.
        command: lines of the command that srun runs, quoted for the shell.
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
    """Quotes a value for a #SBATCH line, where a backslash inside double quotes escapes the next character.

    Raises:
        ValueError: if the value has a line break, which cannot be quoted there.
    """
    if "\n" in value or "\r" in value:
        raise ValueError(f"got {value!r} for a line of a script, expected text without line breaks.")
    if _PLAIN.fullmatch(value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def directive(line: Line) -> str:
    """Renders a comment or a #SBATCH line."""
    if isinstance(line, str):
        return f"# {line}"
    name, value = line
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={quote_directive(value)}"


def file_pattern(path: str) -> str:
    """Escapes the percent signs of a path for an option that takes a file name pattern."""
    return path.replace("%", "%%")


def render(script: BatchScript) -> str:
    """Text of the script."""
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
