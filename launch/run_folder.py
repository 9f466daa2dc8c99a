"""The run folder: paths and readers of all files of a run."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer import run_files

if TYPE_CHECKING:
    import numpy as np

    from trainer.graft import Graft

#: Columns of metrics.csv that legitimately differ between two runs of one recipe.
TIMING_COLUMNS = ("train/samples_per_s", "train/tokens_per_s")


@dataclass(frozen=True)
class RunFolder:
    """Paths and readers of a run's files. A path does not imply that the file exists.

    Readers return None, or an empty collection, for a file that does not exist.

    Args:
        path: path of the folder, ROOT/NAME.
    """

    path: Path

    # -- written by `reblock fit` --------------------------------------------------------------------------------------

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The table of logged values, with one row per logged step."""
        return self.path / "metrics.csv"

    @property
    def versions(self) -> Path:
        """Versions of packages, git commit, hardware and command of the last start."""
        return self.path / "versions.json"

    @property
    def fingerprint(self) -> Path:
        """Fingerprints of the frozen weights before and after training."""
        return self.path / run_files.FINGERPRINT

    @property
    def graft(self) -> Path:
        """The graft; it exists once training has ended."""
        return self.path / run_files.GRAFT

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / run_files.CHECKPOINTS

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint from which a run resumes."""
        return self.checkpoints / run_files.LAST

    @property
    def previous_checkpoint(self) -> Path:
        """The previous checkpoint, for resuming if the last one is damaged."""
        return self.checkpoints / run_files.PREVIOUS

    @property
    def measurements(self) -> Path:
        """Folder of the measurements' arrays, KIND-STAGE.npz."""
        return self.path / run_files.MEASUREMENTS

    @property
    def figures(self) -> Path:
        """Folder of the measurements' figures, KIND-STAGE.png."""
        return self.path / run_files.FIGURES

    def stacks(self, rank: int) -> Path:
        """File for the stacks of a rank that the watchdog ends."""
        return self.path / "stacks" / f"rank-{rank}.txt"

    def faults(self, rank: int = 0) -> Path:
        """The list of damaged samples that a rank has found."""
        from data.stream.fault_log import fault_file

        return fault_file(self.path, rank)

    # -- written by other commands -------------------------------------------------------------------------------------

    @property
    def report(self) -> Path:
        """The page that `reblock report` writes."""
        return self.path / "report.html"

    @property
    def comparison(self) -> Path:
        """The page of `reblock compare` about the run and its controls, if it was written here: the report links it."""
        return self.path / "compare.html"

    @property
    def samples(self) -> Path:
        """Folder of the videos that `reblock sample` writes for the report."""
        return self.path / "samples"

    @property
    def samples_index(self) -> Path:
        """Index of these videos, with caption, seed and variant of each."""
        return self.samples / "samples.json"

    @property
    def pipeline(self) -> Path:
        """The diffusers pipeline folder that `reblock submit` has `reblock export` write by default."""
        return self.path / "pipeline"

    # -- written by `reblock submit` -----------------------------------------------------------------------------------

    def script(self, stage: str) -> Path:
        """The batch script of a stage (encode, fit, export); that of the fit is `job.sbatch`."""
        return self.path / ("job.sbatch" if stage == "fit" else f"{stage}.sbatch")

    @property
    def logs(self) -> Path:
        """Folder of the logs of batch scripts and their tasks."""
        return self.path / "logs"

    @property
    def job_config(self) -> Path:
        """The resolved recipe that a job reads, in contrast to `config`, which the fit writes."""
        return self.path / "job" / "config.yaml"

    @property
    def job_versions(self) -> Path:
        """Versions of the submitted software."""
        return self.path / "job" / "versions.json"

    @property
    def job_changes(self) -> Path:
        """Changes of the submitted code since its commit, as a patch."""
        return self.path / "job" / "changes.diff"

    @property
    def job_list(self) -> Path:
        """The list of queued jobs, one line of JSON per job."""
        return self.path / "job" / "jobs.jsonl"

    @property
    def idle_starts(self) -> Path:
        """Number of consecutive starts without a new checkpoint, which the batch script counts."""
        return self.path / "job" / "idle-starts"

    # -- readers -------------------------------------------------------------------------------------------------------

    def read_config(self) -> dict[str, Any]:
        """The resolved recipe that the fit wrote, or else the one for the job.

        Skips a file that is no YAML mapping, for example one that is being written or was edited by hand.
        """
        for path in (self.config, self.job_config):
            try:
                found = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError):
                continue
            if isinstance(found, dict):
                return found
        return {}

    def read_metrics(self) -> tuple[list[str], list[dict[str, str]]]:
        """Columns and rows of metrics.csv, with cells as text; a row that is being written may lack its last cells."""
        if not self.metrics.is_file():
            return [], []
        with self.metrics.open(newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)

    def read_measurements(self, kind: str) -> dict[str, dict[str, "np.ndarray"]]:
        """Arrays of all measurements of a kind, by stage (base, epoch-000, ..., validate) and then by name."""
        from trainer.callbacks.measurement_files import load_arrays

        paths = sorted(self.measurements.glob(f"{kind}-*.npz"))
        return {path.stem.removeprefix(f"{kind}-"): load_arrays(path) for path in paths}

    def read_graft(self) -> "Graft":
        """Reads the graft.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        from trainer.graft import load_graft

        return load_graft(self.graft)

    def read_fingerprint(self) -> dict[str, Any] | None:
        """Content of fingerprint.json: {"before": hash, "after": hash, "equal": whether they are equal}."""
        return _read_json(self.fingerprint)

    def read_versions(self) -> dict[str, Any] | None:
        """Content of versions.json, the result of `launch.versions.versions`."""
        return _read_json(self.versions)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
