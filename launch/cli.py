"""`reblock fit` and `reblock validate`: a recipe becomes a run folder and a Lightning Trainer."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from data.datamodule import LatentSource, ShardDataModule
from launch import requeue
from launch.last import LastCheckpoint
from launch.logs import MetricsPosition, loggers, rewind
from launch.record import EpochLines, VersionsFile
from launch.resume import SharedCheckpoint, clear_leftovers, find_checkpoint
from launch.same import SameEverywhere, flat
from launch.stop import Stopped
from launch.stopping import StopTogether, leave
from launch.watchdog import Watchdog
from trainer.callbacks.damage import Damage
from trainer.callbacks.guard import FrozenGuard, GraftWriter, RandomStates
from trainer.callbacks.speed import Speed
from trainer.callbacks.stages import ProbeCallback
from trainer.checkpoint import CheckpointFiles
from trainer.checkpoint_file import LAST
from trainer.module import RetrainBlocks


@dataclass(kw_only=True)
class RunConfig:
    """The run folder and what is kept in it.

    Args:
        name: name of the run; its folder is ROOT/NAME.
        root: folder that holds the runs.
        resume: go on with a run of this name from its last checkpoint; without it, an existing name is refused.
        save_every: optimiser steps between two saves of `last.ckpt`.
        save_failures: writes of checkpoints that may fail in a row, on a full disk say; one more stops the run.
        keep_best: how many checkpoints of lowest validation loss are kept.
        wandb: also log to Weights & Biases (offline unless WANDB_MODE says otherwise).
        watchdog_s: seconds in which a rank must finish a step, a validation batch, a measured batch or a checkpoint
            (the first step may take four times as long); past it all ranks leave their stacks and end. 0 turns it off.
        collective_timeout_s: seconds that a rank waits for the others in a collective, through a broken network too;
            None leaves it to the strategy (30 minutes).
    """

    name: str
    root: str = "runs"
    resume: bool = False
    save_every: int = 200
    save_failures: int = 5
    keep_best: int = 2
    wandb: bool = True
    watchdog_s: float = 1800.0
    collective_timeout_s: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if not self.name or self.name in (".", "..") or "/" in self.name:
            faults.append(f"run.name {self.name!r}, expected the name of a folder inside run.root")
        if self.save_every < 1:
            faults.append(f"run.save_every {self.save_every}, expected at least 1 step")
        if self.save_failures < 0:
            faults.append(f"run.save_failures {self.save_failures}, expected a count")
        if self.keep_best < -1:
            faults.append(f"run.keep_best {self.keep_best}, expected a count, or -1 for every checkpoint")
        if self.watchdog_s < 0 or (self.collective_timeout_s or 1) <= 0:
            faults.append(
                f"run.watchdog_s {self.watchdog_s}, run.collective_timeout_s {self.collective_timeout_s}, expected "
                "seconds, 0 for no watchdog, null for the strategy's own timeout"
            )
        if faults:
            raise ValueError(f"got {'; '.join(faults)}. Mend it in the recipe or on the command line.")

    @property
    def folder(self) -> Path:
        """ROOT/NAME."""
        return Path(self.root) / self.name

    @property
    def last(self) -> Path:
        """The checkpoint that a resumed run goes on from."""
        return self.folder / "checkpoints" / LAST


def refuse_taken(run: RunConfig) -> None:
    """Raises ValueError if the run's name is taken and `resume` is off."""
    taken = run.folder.exists() and any(run.folder.iterdir())
    if taken and not run.resume:
        raise ValueError(
            f"run {run.name!r} exists in {run.folder}; expected a new name, since nothing is overwritten. "
            "Give --run.name another name, or go on with it: --run.resume true."
        )


def prepare_folder(run: RunConfig) -> None:
    """Makes the run folder, or finds the one to resume.

    Raises:
        ValueError: if the name is taken and `resume` is off, or the folder cannot be written.
    """
    refuse_taken(run)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        probe = run.folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write the run folder {run.folder} ({error.strerror}); expected a writable place. Set --run.root."
        ) from error


def check_fit(
    model: LightningModule,
    data: LightningDataModule,
    *,
    ranks: int | None = None,
    callbacks: Sequence[Callback] = (),
    trainer: Trainer | None = None,
) -> None:
    """Everything about base, blocks, shards and probes that can be wrong, in one message, before anything is loaded.

    Args:
        model: that is fitted.
        data: that it is fitted on.
        ranks: processes that train together; None does not train.
        callbacks: of the run.
        trainer: whose strategy, precision and clipping are checked.

    Raises:
        ValueError: naming every fault.
    """
    faults: list[str] = []

    def attempt(check: Callable[[], Any]) -> None:
        try:
            check()
        except ValueError as error:
            if str(error) not in faults:
                faults.append(str(error))

    for part in (model, data):
        attempt(getattr(part, "check", lambda: None))
    if trainer is not None and isinstance(model, RetrainBlocks):
        attempt(partial(model.check_trainer, trainer))
    if not faults and isinstance(data, ShardDataModule) and ranks is not None:
        attempt(lambda: data.check_batches(ranks))
    if not faults and isinstance(data, LatentSource):
        for probes in {callback.prompts for callback in callbacks if isinstance(callback, ProbeCallback)}:
            attempt(partial(data.check_probes, probes))
        if isinstance(model, RetrainBlocks):
            for shape in data.latent_shapes.values():
                attempt(partial(model.check_data, shape, data.text_width))
    if faults:
        raise ValueError("\n".join(faults))


_ACCEPTED = "accepted here: "


class RecipeParser(LightningArgumentParser):
    """A parser whose errors say what was wrong and which keys exist, without pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        raise ValueError("\n".join([*_in_short(message), *_accepted(message, parser)])) from ex


def _in_short(message: str) -> list[str]:
    """The lines of a parser's message that name a fault, without those about a union's other types."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value type")
    return [line for line in message.splitlines() if line.strip() and not line.strip().startswith(noise)]


def _accepted(message: str, parser: LightningArgumentParser) -> list[str]:
    """For a key that does not exist: those that do, in the same part of the recipe.

    Each part has a parser of this kind of its own, whose message comes back inside the whole recipe's.
    """
    message = re.sub(r"unrecognized arguments: --([\w.]+)", r"option '\1' is not accepted", message)
    unknown = re.search(r"[Oo]ption '([\w.]+)' is not accepted|does not accept option '([\w.]+)'", message)
    if unknown is None or _ACCEPTED in message:
        return []
    group = re.search(r"Group '([\w.]+)' does not", message)
    part = group[1] if group else (unknown[1] or unknown[2]).rpartition(".")[0]
    start = f"{part}." if part else ""
    names = {a.dest.removeprefix(start).split(".")[0] for a in parser._actions if a.dest.startswith(start)}
    return [_ACCEPTED + ", ".join(sorted(names - {"help", "config", "print_config"}))]


class SaveRecipe(SaveConfigCallback):
    """Saves config.yaml once the checkpoint is accepted: a refused resume must not replace the run's recipe."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class RecipeCLI(LightningCLI):
    """LightningCLI with a run folder: loggers, checkpoints and records are the same for every recipe."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunConfig, "run")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only", "verbose"},
        }

    @property
    def run_config(self) -> RunConfig:
        """The recipe's `run` part."""
        return self._get(self.config_init, "run")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run = self.run_config
        retrains = isinstance(self.model, RetrainBlocks)
        last = LastCheckpoint(run.last, run.save_every)
        callbacks: list[Callback] = [
            *([Watchdog(run.folder, run.watchdog_s)] if run.watchdog_s else []),
            SameEverywhere(self.facts),
            *(self._get(self.config_init, "trainer").get("callbacks") or []),
            RandomStates(),
            *([FrozenGuard(), Speed(), Damage(), GraftWriter()] if retrains else []),
            MetricsPosition(),
            ModelCheckpoint(
                dirpath=run.last.parent,
                filename="best-{step}",
                monitor="val/loss",
                save_top_k=run.keep_best,
                save_weights_only=False,
                enable_version_counter=False,
            ),
            last,  # after ModelCheckpoint: it holds which files are the best
            StopTogether(last),
            VersionsFile(),
            EpochLines(),
            RichProgressBar(leave=True),
        ]
        trainer = super().instantiate_trainer(
            default_root_dir=str(run.folder),
            logger=loggers(run.folder, wandb=run.wandb) if self.subcommand == "fit" else False,
            callbacks=callbacks,
            plugins=[
                *(self._get(self.config_init, "trainer").get("plugins") or []),
                CheckpointFiles(max_failures=run.save_failures),
            ],
            **kwargs,
        )
        trainer._checkpoint_connector = SharedCheckpoint(trainer)
        if run.collective_timeout_s is not None:
            timeout = timedelta(seconds=run.collective_timeout_s)
            trainer.strategy._timeout = timeout  # type: ignore[attr-defined]  # of every strategy with more than one rank
        return trainer

    def facts(self) -> dict[str, Any]:
        """What all ranks of a job must have in common: the recipe's values."""
        config = self.config.get(self.subcommand, self.config)
        return flat(json.loads(self._parser(self.subcommand).dump(config, format="json")))

    def before_fit(self) -> None:
        """Refuses what cannot work; finds the checkpoint of a run that goes on."""
        ranks = self.trainer.num_devices * self.trainer.num_nodes
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        check_fit(self.model, self.datamodule, ranks=ranks, callbacks=callbacks, trainer=self.trainer)
        self._resume_from: Path | None = None
        if not self.trainer.is_global_zero:
            return  # rank zero decides, and tells the others once they can speak to each other
        prepare_folder(self.run_config)
        clear_leftovers(self.run_config.folder)
        if self.run_config.resume:
            self._resume_from = find_checkpoint(self.run_config.last)
        if self._resume_from is None:  # killed before its first checkpoint: it starts over
            rewind(self.run_config.folder, {"rows": 0, "row": {}})

    def before_validate(self) -> None:
        """Refuses what cannot work; takes the run's last checkpoint, where there is one."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        check_fit(self.model, self.datamodule, callbacks=callbacks, trainer=self.trainer)
        self._resume_from = find_checkpoint(self.run_config.last)
        if self._resume_from is None:
            raise ValueError(
                f"{self.run_config.last} does not exist; expected the checkpoint of a run, whose blocks are measured. "
                "Name a run that was fitted: --run.name, --run.root."
            )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        found = super()._prepare_subcommand_kwargs(subcommand)
        if self._resume_from is None:
            # Under Slurm, Lightning would look for an hpc_ckpt_N.ckpt in the run folder, whoever wrote it.
            self.trainer._checkpoint_connector._user_managed = True
        return {**found, "ckpt_path": str(self._resume_from) if self._resume_from else None, "weights_only": True}


Cli = TypeVar("Cli", bound=RecipeCLI)


def recipe_cli(args: list[str], *, run: bool, kind: type[Cli] = RecipeCLI) -> Cli:  # type: ignore[assignment]
    """The recipe's objects; with `run`, the first of `args` is the verb, and it is carried out.

    Args:
        args: as on the command line.
        run: whether there is a verb.
        kind: what reads them; another one may take more options, or make fewer objects.

    Raises:
        ValueError: if the recipe or its inputs are at fault.
    """
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveRecipe,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={
            "use_distributed_sampler": False,
            "reload_dataloaders_every_n_epochs": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
        },
        parser_kwargs={"fit": {"prog": "reblock fit"}, "validate": {"prog": "reblock validate"}} if run else {},
        parser_class=RecipeParser,
        args=args,
        run=run,
    )


def run(argv: list[str]) -> None:
    """Carries out `fit` or `validate` with its options, e.g. ["fit", "--config", "recipes/demo.yaml"]."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    requeue.mode()  # a wrong word is refused now, not when the time is up
    try:
        recipe_cli(argv, run=True)
        if torch.distributed.is_initialized():
            # Its threads, alive when the interpreter ends, now and then abort a process that has done all its work.
            torch.distributed.destroy_process_group()
    except Stopped as stopped:
        leave(stopped)
        raise
    except MisconfigurationException as error:  # Lightning's word for a Trainer that cannot be built as asked
        raise ValueError(str(error)) from error
