"""`reblock fit` and `reblock validate`: creates a run folder and a Lightning Trainer from a recipe."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from launch.command_parser import fault_lines
from launch.fit import requeue
from launch.fit.checks import check_combination, check_fit
from launch.fit.last_checkpoint import BestCheckpoints, LastCheckpoint
from launch.fit.lightning_private import set_collective_timeout, use_checkpoint_connector
from launch.fit.metrics_csv import MetricsPosition, loggers, rewind
from launch.fit.parser import RecipeParser, refuse_moved_names
from launch.fit.rank_consistency import RankConsistency
from launch.fit.resume import SharedCheckpoint, clear_leftovers, find_checkpoint
from launch.fit.run_record import EpochLines, VersionsFile
from launch.fit.seeds import seed_arguments
from launch.fit.stop_callback import StopOnSignal, end_stopped_run
from launch.fit.watchdog import Watchdog
from launch.flat_recipe import flatten
from launch.run_config import RunConfig, prepare_folder
from launch.signals import Stopped
from trainer.callbacks.data_faults import DataFaults
from trainer.callbacks.frozen_check import FrozenCheck
from trainer.callbacks.graft_writer import GraftWriter
from trainer.callbacks.random_state import RandomStateCheckpoint
from trainer.callbacks.throughput import ThroughputLogger
from trainer.checkpoint.io import BackgroundCheckpointIO
from trainer.module import RetrainBlocks


class SaveRecipe(SaveConfigCallback):
    """Saves config.yaml only after the checkpoint is accepted, since a refused resume must not replace the recipe."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class RecipeCLI(LightningCLI):
    """LightningCLI with a run folder. Loggers, checkpoints and records are the same for every recipe."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunConfig, "run")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only", "verbose"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        refuse_moved_names(args)
        super().parse_arguments(parser, [*args, *seed_arguments(parser, args)])

    def instantiate_classes(self) -> None:
        check_combination(self.values)
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse buries the class's own message in pages about other types that the option accepts.
            raise ValueError("\n".join(line.strip().removeprefix("- ") for line in fault_lines(str(error)))) from error

    @property
    def values(self) -> Namespace:
        """The parsed recipe: plain values and class paths."""
        return self.config.get(str(self.subcommand), self.config)

    @property
    def objects(self) -> Namespace:
        """The recipe with its classes instantiated."""
        return self.config_init.get(str(self.subcommand), self.config_init)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, as a YAML file would hold it."""
        found = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False, skip_none=False, format="yaml"))
        found = found[self.subcommand] if self.subcommand else found
        return {key: value for key, value in found.items() if key != "config"}

    @property
    def run_config(self) -> RunConfig:
        """The recipe's `run` part."""
        return self.objects.run

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run = self.run_config
        retrains = isinstance(self.model, RetrainBlocks)
        last = LastCheckpoint(run.folder.last_checkpoint, run.save_every)
        callbacks: list[Callback] = [
            *([Watchdog(run.folder, run.watchdog_s)] if run.watchdog_s else []),
            RankConsistency(self.facts),
            *(self.objects.trainer.get("callbacks") or []),
            RandomStateCheckpoint(),
            *([FrozenCheck(), ThroughputLogger(), DataFaults(), GraftWriter()] if retrains else []),
            MetricsPosition(),
            BestCheckpoints(
                dirpath=run.folder.checkpoints,
                filename="best-{step}",
                monitor="val/loss",
                save_top_k=run.keep_best,
                save_weights_only=False,
                enable_version_counter=False,
            ),
            last,  # after ModelCheckpoint, whose list of best files it saves
            StopOnSignal(last),
            VersionsFile(),
            EpochLines(),
            RichProgressBar(leave=True),
        ]
        trainer = super().instantiate_trainer(
            default_root_dir=str(run.folder.path),
            logger=loggers(run.folder, wandb=run.wandb) if self.subcommand == "fit" else False,
            callbacks=callbacks,
            plugins=[
                *(self.objects.trainer.get("plugins") or []),
                BackgroundCheckpointIO(max_failures=run.save_failures),
            ],
            **kwargs,
        )
        use_checkpoint_connector(trainer, SharedCheckpoint(trainer))
        if run.collective_timeout_s is not None:
            set_collective_timeout(trainer.strategy, timedelta(seconds=run.collective_timeout_s))
        return trainer

    def facts(self) -> dict[str, Any]:
        """Values of the recipe, which must be equal on all ranks."""
        return {name: value for name, value in flatten(self.recipe).items() if value is not None}

    def before_fit(self) -> None:
        """Checks the fit, prepares the run folder and finds the checkpoint to resume from."""
        ranks = self.trainer.num_devices * self.trainer.num_nodes
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        check_fit(self.model, self.datamodule, ranks=ranks, callbacks=callbacks)
        self._checkpoint: Path | None = None
        if not self.trainer.is_global_zero:
            return  # rank zero chooses; SharedCheckpoint broadcasts its choice once the process group exists
        prepare_folder(self.run_config)
        folder = self.run_config.folder
        clear_leftovers(folder)
        if self.run_config.resume:
            self._checkpoint = find_checkpoint(folder)
        if self._checkpoint is None:  # a run that was killed before its first checkpoint starts over
            rewind(folder, {"rows": 0, "row": {}})

    def before_validate(self) -> None:
        """Checks the validation and finds the run's last checkpoint."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        check_fit(self.model, self.datamodule, callbacks=callbacks)
        folder = self.run_config.folder
        self._checkpoint = find_checkpoint(folder)
        if self._checkpoint is None:
            raise ValueError(
                f"{folder.last_checkpoint} does not exist; expected the checkpoint of a run, whose blocks are "
                "measured. Name a run that was fitted: --run.name, --run.root."
            )

    def fit(self, **objects: Any) -> None:
        """Runs `Trainer.fit` from the checkpoint that was found; LightningCLI calls this for the subcommand `fit`."""
        self.trainer.fit(**objects, ckpt_path=self._checkpoint, weights_only=True)

    def validate(self, **objects: Any) -> None:
        """Runs `Trainer.validate`; LightningCLI calls this for the subcommand `validate`."""
        self.trainer.validate(**objects, ckpt_path=self._checkpoint, weights_only=True)


class ReadingCLI(RecipeCLI):
    """Reads a recipe for a command that does not train; sets no seed, neither in this process nor its environment."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self._seed = self.config.seed_everything
        self.config.seed_everything = False  # LightningCLI then sets no seed

    @property
    def recipe(self) -> dict[str, Any]:
        return super().recipe | {"seed_everything": self._seed}


Cli = TypeVar("Cli", bound=RecipeCLI)


def recipe_cli(args: list[str], *, run: bool, kind: type[Cli] = RecipeCLI) -> Cli:  # type: ignore[assignment]
    """Parses a recipe and instantiates its objects; with `run`, also runs the subcommand.

    Args:
        args: command-line arguments.
        run: whether the first argument is a subcommand to run.
        kind: class of the CLI; a subclass may accept more options or instantiate fewer objects.

    Raises:
        ValueError: if the recipe or its inputs are invalid.
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
        parser_kwargs={"prog": "reblock"},
        parser_class=RecipeParser,
        args=args,
        run=run,
    )


def run(argv: list[str]) -> None:
    """Runs `fit` or `validate` with its options, e.g. ["fit", "--config", "recipes/demo.yaml"]."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    requeue.mode()  # refuses a wrong value now, not at the time limit
    try:
        recipe_cli(argv, run=True)
        if torch.distributed.is_initialized():
            # The group's threads sometimes abort a successful process if they are alive when the interpreter exits.
            torch.distributed.destroy_process_group()
    except Stopped as stopped:
        end_stopped_run(stopped)
        raise
    except MisconfigurationException as error:  # Lightning raises it for invalid arguments of the Trainer
        raise ValueError(str(error)) from error
