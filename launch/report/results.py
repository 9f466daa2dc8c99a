"""Reads the results of a run from its files; every value in the report comes from here."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.report.comparisons import MaskingComparison, SinkComparison
from launch.report.stages import Head, MaskingStage, SinkStage
from launch.run_folder import RunFolder
from trainer.models.planted_record import read_planted


@dataclass(frozen=True)
class RunResults:
    """The results of a run. A result that the run lacks is None, NaN or empty.

    Args:
        run: the run folder.
        config: text of config.yaml.
        base: name of the base in the recipe.
        planted_record: content of the base's planted.json.
        planted: entries of planted.json, one for each planted head.
        sinks: sink measurement of each stage, in the order of stages.
        masking: masking measurement of each stage, in the order of stages.
        metrics: rows of metrics.csv.
        fingerprint: content of fingerprint.json.
        versions: content of versions.json.
        samples: entries of samples/samples.json whose files exist.
        unconditional_sinks: as `sinks`, on the probes without their captions.
        unconditional_masking: as `masking`, likewise.
    """

    run: RunFolder
    config: str | None
    base: str | None
    planted_record: dict[str, Any] | None
    planted: Sequence[dict[str, Any]]
    sinks: Mapping[str, SinkStage]
    masking: Mapping[str, MaskingStage]
    metrics: Sequence[Mapping[str, str]]
    fingerprint: dict[str, Any] | None
    versions: dict[str, Any] | None
    samples: Sequence[dict[str, Any]] = field(default_factory=tuple)
    unconditional_sinks: Mapping[str, SinkStage] = field(default_factory=dict)
    unconditional_masking: Mapping[str, MaskingStage] = field(default_factory=dict)

    @property
    def without_captions(self) -> "RunResults | None":
        """The same run with the measurements on probes without captions; None if none were made."""
        if not self.unconditional_sinks and not self.unconditional_masking:
            return None
        return replace(self, sinks=self.unconditional_sinks, masking=self.unconditional_masking)

    @property
    def planted_heads(self) -> list[Head]:
        """(layer, head) of every planted sink."""
        return [(int(entry["layer"]), int(entry["head"])) for entry in self.planted]

    @property
    def before(self) -> SinkStage | None:
        """Sinks of the base's own weights."""
        return self.sinks.get("base")

    @property
    def after(self) -> SinkStage | None:
        """Sinks after the last measured epoch of training."""
        return self.sinks.get(last_epoch(self.sinks) or "")

    @property
    def untrained(self) -> SinkStage | None:
        """Sinks of the retrained blocks as they start, before the first step."""
        return self.sinks.get("epoch-000")

    @property
    def masking_untrained(self) -> MaskingStage | None:
        """Masking of the retrained blocks as they start, before the first step."""
        return self.masking.get("epoch-000")

    @property
    def masking_before(self) -> MaskingStage | None:
        """Masking of the base's own weights."""
        return self.masking.get("base")

    @property
    def base_dense_loss(self) -> float:
        """Dense loss of the base's own weights on the probes of masking; NaN if it was not measured."""
        return self.masking_before.dense_loss if self.masking_before else math.nan

    @property
    def masking_after(self) -> MaskingStage | None:
        """Masking after the last measured epoch of training."""
        return self.masking.get(last_epoch(self.masking) or "")

    @cached_property
    def sink_comparison(self) -> SinkComparison:
        """Sinks before and after."""
        return SinkComparison(self.before, self.after)

    @cached_property
    def masking_comparison(self) -> MaskingComparison:
        """Masking before and after."""
        return MaskingComparison(self.masking_before, self.masking_after)

    @property
    def found_before(self) -> int:
        """Number of planted heads whose frequency was 1.0 at every sigma before training."""
        before = self.before
        if before is None:
            return 0
        return sum(bool((before.select(before.frequency, head) == 1.0).all()) for head in self.planted_heads)

    @property
    def others_before(self) -> list[Head]:
        """Sink heads before training that were not planted."""
        return [head for head in self.before.flagged if head not in self.planted_heads] if self.before else []

    @property
    def planted_after(self) -> list[Head]:
        """Planted heads that are sinks after training."""
        return [head for head in self.after.flagged if head in self.planted_heads] if self.after else []

    @property
    def others_after(self) -> list[Head]:
        """Sink heads after training that were not planted."""
        return [head for head in self.after.flagged if head not in self.planted_heads] if self.after else []

    @property
    def frozen_equal(self) -> bool | None:
        """Whether the frozen weights stayed bit-identical; None if no fingerprint was taken."""
        return None if self.fingerprint is None else bool(self.fingerprint.get("equal"))

    @property
    def val_loss(self) -> float:
        """Validation loss of the EMA weights at the end of training; NaN if there is none."""
        values = self.series("val/loss")[1]
        return values[-1] if values else math.nan

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a column of metrics.csv, without empty cells."""
        rows = [(row.get("step"), row.get(name)) for row in self.metrics]
        pairs = [(float(step), float(value)) for step, value in rows if step and value]
        return [step for step, _ in pairs], [value for _, value in pairs]


def last_epoch(stages: Mapping[str, Any]) -> str | None:
    """The last stage `epoch-NNN`, without epoch-000; None if there is none."""
    epochs = [stage for stage in stages if stage.startswith("epoch-") and int(stage.removeprefix("epoch-")) > 0]
    return max(epochs, key=lambda stage: int(stage.removeprefix("epoch-")), default=None)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _base(run: RunFolder) -> str | None:
    """`model.base` of the resolved recipe, with or without a class_path for the model."""
    model = run.read_config().get("model") if run.config.is_file() else None
    return (model.get("init_args") or model).get("base") if isinstance(model, dict) else None


def _read_sinks(run: RunFolder, kind: str) -> dict[str, SinkStage]:
    return {stage: SinkStage(stage, arrays) for stage, arrays in run.read_measurements(kind).items()}


def _read_masking(run: RunFolder, kind: str) -> dict[str, MaskingStage]:
    found = run.read_measurements(kind)
    base_loss = float(found["base"]["dense_loss"]) if "base" in found else math.nan
    return {stage: MaskingStage(stage, arrays, base_loss) for stage, arrays in found.items()}


def read_results(run: RunFolder) -> RunResults:
    """Reads a run folder.

    Args:
        run: run folder of `reblock fit`.

    Raises:
        ValueError: if the folder is missing or has neither a config nor metrics.
    """
    if not run.config.is_file() and not run.metrics.is_file():
        raise ValueError(
            f"{run.path} holds neither config.yaml nor metrics.csv; expected a folder that `reblock fit` wrote."
        )
    base = _base(run)
    planted = read_planted(base) if base else None
    samples = _read_json(run.samples_index) or []
    return RunResults(
        run=run,
        config=run.config.read_text(encoding="utf-8") if run.config.is_file() else None,
        base=base,
        planted_record=planted,
        planted=(planted or {}).get("heads") or [],
        sinks=_read_sinks(run, "sinks"),
        masking=_read_masking(run, "masking"),
        metrics=run.read_metrics()[1],
        fingerprint=run.read_fingerprint(),
        versions=run.read_versions(),
        samples=[entry for entry in samples if (run.samples / entry["file"]).is_file()],
        unconditional_sinks=_read_sinks(run, "unconditional-sinks"),
        unconditional_masking=_read_masking(run, "unconditional-masking"),
    )
