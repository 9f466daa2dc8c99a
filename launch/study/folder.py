"""The folder of a study's results under one set of options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import atomic_file, settings_hash, sha256, write_json
from data.video.write import write_video
from launch.study.study import Arrays, Measured, Results, Study, Unit
from launch.study.workbench import Workbench, weights_identity


def _identity(value: Any) -> Any:
    """What tells an option's value from another: of a file its contents, of a base its weights."""
    if isinstance(value, Mapping):
        return {name: _identity(part) for name, part in value.items()}
    path = Path(value) if isinstance(value, str | Path) else None
    if path is not None and path.is_file():
        return [str(value), sha256(path)]
    if path is not None and path.is_dir():
        return [str(value), weights_identity(path)]
    return str(value)


@dataclass(frozen=True)
class StudyFolder:
    """Results of a study under one set of options.

    Args:
        path: of the folder.
        fps: of its videos.
    """

    path: Path
    fps: int

    @classmethod
    def of(cls, study: Study, work: Workbench, options: dict) -> "StudyFolder":
        """The folder of these options; results of others have folders of their own."""
        said = work.settings | {"study": study.name, "layers": work.layers, "heads": work.config.heads}
        said |= {"options": {name: _identity(value) for name, value in options.items()}}
        path = work.config.out / study.name / settings_hash(said)
        if not (path / "study.json").is_file():
            write_json(path / "study.json", said)
        return cls(path, work.sampling.fps)

    def result(self, unit: Unit) -> Path:
        """The file of a unit's figures; where it is, the unit is done."""
        return self.path / "results" / f"{unit.key}.npz"

    def video(self, unit: Unit) -> Path:
        """The file of a unit's video."""
        return self.path / "videos" / f"{unit.key}.mp4"

    def keep(self, unit: Unit, measured: Measured) -> None:
        """Writes a unit's video, then its figures."""
        if measured.video is not None:
            write_video(self.video(unit), measured.video, self.fps)
        with atomic_file(self.result(unit)) as temporary, temporary.open("wb") as file:
            np.savez(file, **measured.arrays)  # type: ignore[arg-type]  # none is called allow_pickle

    def results(self, units: Sequence[Unit]) -> Results:
        """The figures of units that are done."""
        return Results({unit: self.arrays(unit) for unit in units})

    def arrays(self, unit: Unit) -> Arrays:
        """A unit's figures."""
        with np.load(self.result(unit), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
