"""Base class of the measurements: runs them at each stage of a fit, without an effect on training.

Legend: P prompts, S sigmas, B probes of a batch.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor

from trainer.callbacks import measurement_files
from trainer.callbacks.probe_set import SIGMAS, ProbeBatch, ProbeSet, ProbeSource
from trainer.callbacks.rank_errors import raise_on_all_ranks
from trainer.callbacks.trunk_cache import TrunkCache

if TYPE_CHECKING:
    from trainer.module import RetrainBlocks


@contextlib.contextmanager
def measurement_mode(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without autograd.

    On exit, also after an exception, restores the mode of each submodule and torch's random state.
    """
    modes = {part: part.training for part in module.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            module.eval()
            yield
        finally:
            for part, training in modes.items():
                part.training = training


class _Group(NamedTuple):
    """Probes that are measured together, and what that adds to the names of files and scalars and to titles."""

    files: str
    scalars: str
    title: str


CONDITIONAL = _Group("", "", "")
UNCONDITIONAL = _Group("unconditional-", "unconditional/", ", without captions")


class ProbeCallback(Callback, ABC):
    """A measurement on the probe set. It observes and never changes training.

    Stages: `base` (the base's own weights, before the first step), `epoch-000` (EMA weights, before the first step),
    `epoch-NNN` (EMA weights after the N-th epoch), `validate` (`trainer.validate`). A stage whose arrays are already
    in the run folder is not measured again, except `validate`.

    Args:
        prompts: number of held-out samples.
        sigmas: noise levels, each in 0 .. 1.
        seed: seed of the probes' noise. It is independent of `seed_everything`: all runs have the same probes.
        batch_size: number of probes measured together; None chooses it by the size of a latent.
        base_stage: whether to measure the base's own weights too.
        every_n_epochs: interval between measurements in epochs; the last epoch is always measured.
        unconditional: whether to measure every stage also on the probes without their captions, as a measurement of its
            own: files `unconditional-KIND-STAGE`, scalars under `unconditional/`.
    """

    #: Name of the measurement in file names, and prefix of its scalars.
    kind: str

    def __init__(
        self,
        *,
        prompts: int,
        sigmas: tuple[float, ...] = SIGMAS,
        seed: int = 1234,
        batch_size: int | None = None,
        base_stage: bool = True,
        every_n_epochs: int = 1,
        unconditional: bool = False,
    ) -> None:
        if min(prompts, every_n_epochs, batch_size or 1) < 1:
            raise ValueError(
                f"got prompts={prompts}, every_n_epochs={every_n_epochs}, batch_size={batch_size}; expected 1 or more."
            )
        if not sigmas or not all(0.0 <= sigma <= 1.0 for sigma in sigmas):
            raise ValueError(f"got sigmas={tuple(sigmas)}, expected one or more noise levels, each from 0 to 1.")
        self.prompts = prompts
        self.sigmas = tuple(sigmas)
        self.seed = seed
        self.batch_size = batch_size
        self.base_stage = base_stage
        self.every_n_epochs = every_n_epochs
        self.unconditional = unconditional
        self._probes: dict[bool, ProbeSet] = {}
        self.trunk_cache = self._default_cache = TrunkCache()
        self._first_probe_callback: ProbeCallback = self
        self._epoch_start = 0.0
        self._epoch_seconds: float | None = None
        #: Functions to call after each measured batch, equally often on every rank. A function must raise on all ranks
        #: or on none; an exception ends the measurement.
        self.after_batch: list[Callable[[], None]] = []

    # -- what a measurement defines -----------------------------------------------------------------------------------

    @abstractmethod
    def check(self, module: "RetrainBlocks") -> None:
        """Raises ValueError if the settings do not fit the model."""

    @abstractmethod
    def observe(self, module: "RetrainBlocks", probes: ProbeBatch) -> dict[str, Tensor]:
        """Measures one batch and returns tensors (B, ...) by name; gets the trunk's output from `trunk_cache`."""

    @abstractmethod
    def summarise(
        self, module: "RetrainBlocks", probes: ProbeSet, tables: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Computes the arrays of the .npz file.

        Args:
            module: the measured module.
            probes: the probe set of the measurement.
            tables: results of `observe` for all probes, (P, S, ...) float64 by name.
        """

    @abstractmethod
    def scalars(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Values for the loggers, by name without the prefix `kind`."""

    @abstractmethod
    def figures(self, module: "RetrainBlocks", arrays: Mapping[str, np.ndarray], stage: str) -> dict[str, Figure]:
        """Figures by name; the file is called NAME-STAGE.png. `stage` is for titles."""

    # -- when it is measured -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        source = getattr(trainer, "datamodule", None)
        if not isinstance(source, ProbeSource):
            raise ValueError(
                f"{type(self).__name__} needs held-out samples; got data from {type(source).__name__}, expected a data "
                "module with probe_samples(count). Take the callback out of the recipe or use the latent data module."
            )
        self._source = source
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        caches = [callback for callback in callbacks if isinstance(callback, TrunkCache)]
        if len(caches) > 1:
            raise ValueError(
                f"got {len(caches)} TrunkCaches, expected one for all measurements: keep one in the recipe."
            )
        self._first_probe_callback = next(callback for callback in callbacks if isinstance(callback, ProbeCallback))
        self.trunk_cache = caches[0] if caches else self._first_probe_callback._default_cache
        self.trunk_cache.setup(trainer, pl_module, stage)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trunk_cache.teardown(trainer, pl_module, stage)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fresh = trainer.global_step == 0
        if self.base_stage:
            self._run_stage(trainer, pl_module, "base", log=fresh)
        if fresh:
            self._run_stage(trainer, pl_module, "epoch-000")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_seconds = time.monotonic() - self._epoch_start
        done = trainer.current_epoch + 1
        if done % self.every_n_epochs == 0 or done == trainer.max_epochs:
            self._run_stage(trainer, pl_module, f"epoch-{done:03d}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._run_stage(trainer, pl_module, "validate", again=True)

    def _run_stage(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, *, again: bool = False, log: bool = True
    ) -> None:
        """Measures, saves and logs a stage, also without captions if asked for.

        Args:
            trainer: Trainer of the fit.
            pl_module: the `RetrainBlocks` to measure.
            stage: name of the stage, as in file names.
            again: whether to measure even if the stage's arrays exist.
            log: whether to log the stage's scalars.
        """
        for group in (CONDITIONAL, UNCONDITIONAL) if self.unconditional else (CONDITIONAL,):
            self._run_group(trainer, cast("RetrainBlocks", pl_module), stage, group, again=again, log=log)

    def _run_group(
        self, trainer: Trainer, module: "RetrainBlocks", stage: str, group: _Group, *, again: bool, log: bool
    ) -> None:
        path = measurement_files.measurement_path(trainer.default_root_dir, group.files + self.kind, stage)
        started, before = time.monotonic(), self.trunk_cache.counts
        with raise_on_all_ranks(trainer) as check_ranks:
            measured = path.is_file() and not again
            check_ranks()
            # Rank zero decides for all ranks, since different decisions would end in a deadlock.
            measured = trainer.strategy.broadcast(measured)
            arrays = None if measured else self._measure(trainer, module, stage, group, check_ranks)
            if not trainer.is_global_zero:
                return
            if arrays is not None:
                self._save(trainer, module, stage, group, arrays)
            if log:
                # Old stages are logged too: the loggers of a resumed run may have lost this step.
                scalars = self.scalars(measurement_files.load_arrays(path) if arrays is None else arrays)
                prefix = ("base/" if stage == "base" else "") + group.scalars + self.kind
                measurement_files.log_scalars(trainer, {f"{prefix}/{name}": v for name, v in scalars.items()})
        if arrays is not None:
            self._report_cost(stage, group, started, before)

    def _measure(
        self,
        trainer: Trainer,
        module: "RetrainBlocks",
        stage: str,
        group: _Group,
        check_ranks: Callable[[], None],
    ) -> dict[str, np.ndarray] | None:
        """Measures a stage. Returns its arrays on rank zero and None on the other ranks."""
        self.check(module)
        weights = module.base_weights if stage == "base" else module.evaluation_weights
        with measurement_mode(module, module.device), weights(), trainer.precision_plugin.val_step_context():
            probes = self._read_probes(module, group)
            shape = (len(probes.samples), len(probes.sigmas))
            tables: dict[str, Tensor] = {}
            for batch, counts in probes.share(trainer.global_rank, trainer.world_size):
                for name, found in self.observe(module, batch.to(module.device)).items():
                    table = tables.setdefault(name, found.new_zeros(*shape, *found.shape[1:], dtype=torch.float64))
                    if counts:
                        table[list(batch.prompts), list(batch.strata)] = found.double()
                check_ranks()  # after every batch, so that a failure on one rank stops the others soon
                for call in self.after_batch:
                    call()
            # Each probe counts on one rank only; the tables of the other ranks hold zeros for it.
            gathered = {name: trainer.strategy.reduce(table, reduce_op="sum") for name, table in tables.items()}
            if not trainer.is_global_zero:
                return None
            return self.summarise(module, probes, {name: table.cpu().numpy() for name, table in gathered.items()})

    def _read_probes(self, module: "RetrainBlocks", group: _Group) -> ProbeSet:
        dropped = group is UNCONDITIONAL
        if dropped not in self._probes:
            samples = self._source.probe_samples(self.prompts)
            kind = module.split_model.own_facts.empty_caption
            self._probes[dropped] = ProbeSet(
                samples, self.sigmas, seed=self.seed, batch_size=self.batch_size, unconditional=dropped,
                keep_lengths=kind == "zeros", empty=module.empty_caption if dropped and kind == "encoded" else None,
            )  # fmt: skip
        return self._probes[dropped]

    def _save(
        self,
        trainer: Trainer,
        module: "RetrainBlocks",
        stage: str,
        group: _Group,
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        """Writes figures and arrays into the run folder, and logs the figures."""
        for name, figure in self.figures(module, arrays, stage + group.title).items():
            drawn = measurement_files.figure_path(trainer.default_root_dir, group.files + name, stage)
            measurement_files.save_figure(drawn, figure)
            measurement_files.log_figure(trainer, group.scalars + name, drawn)
        path = measurement_files.measurement_path(trainer.default_root_dir, group.files + self.kind, stage)
        measurement_files.save_arrays(path, arrays)  # last, since this file marks the stage as complete

    def _report_cost(self, stage: str, group: _Group, started: float, before: tuple[int, int]) -> None:
        """Prints one line with the stage's duration on rank zero, and the trunk's runs and cache hits."""
        spent = time.monotonic() - started
        run, cached = (count - earlier for count, earlier in zip(self.trunk_cache.counts, before, strict=True))
        # The first probe callback's time of the epoch; the other callbacks' times include earlier measurements.
        share, epoch = "", self._first_probe_callback._epoch_seconds
        if stage not in ("base", "epoch-000", "validate") and epoch is not None:
            share = f", {spent / epoch:.0%} of the previous epoch's {epoch:.1f} s"
        probes = len(self._probes[group is UNCONDITIONAL])
        line = f"{group.files}{self.kind} at {stage}: {probes} probes, {spent:.1f} s{share}"
        rank_zero_info(f"{line} (passes of the trunk: {run} run, {cached} cached)")
