"""One seed for a run: what follows `seed_everything`, what a recipe gives itself, and what no seed changes."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
import yaml

from data.batch import Batch
from launch.cluster.submit import SubmitCLI
from launch.fit.cli import RecipeCLI, recipe_cli
from tests.support.fitted_runs import fit
from trainer.callbacks.probe_callback import ProbeCallback
from trainer.callbacks.probe_set import ProbeSet
from trainer.graft import load_graft

OWN = ("--model.surgery.seed=7", "--model.init_args.seed=8", "--data.seed=9")


@pytest.fixture
def recipe(tmp_path, write_recipe) -> Path:
    return write_recipe(tmp_path)


def read(recipe: Path, *options: str, kind: type[RecipeCLI] = RecipeCLI) -> RecipeCLI:
    return recipe_cli([f"--config={recipe}", *options], run=False, kind=kind)


def seeds(cli: RecipeCLI) -> tuple[int, int, int]:
    """Of first weights, noise and order; config.yaml states those that the objects have."""
    model, data = cli.recipe["model"]["init_args"], cli.recipe["data"]["init_args"]
    found = (cli.model.surgery.seed, cli.model.flow.seed, cli.datamodule.config.seed)
    assert found == (model["surgery"]["seed"], model["seed"], data["seed"])
    return found


def draws(cli: RecipeCLI) -> dict[str, torch.Tensor]:
    """What is drawn for a run, before its first step."""
    model, data = cli.model, cli.datamodule
    model.build("cpu")
    weights = [p.detach().flatten() for p in model.retrained_parameters().values()]
    probes = next(callback for callback in cli.trainer.callbacks if isinstance(callback, ProbeCallback))
    samples = data.probe_samples(probes.prompts)
    (batch, _), *_ = ProbeSet(samples, probes.sigmas, seed=probes.seed).share(0, 1)
    held_out = Batch.collate(data.held_out_samples(range(len(data.val_split))))
    return {
        "weights": torch.cat(weights), "order": torch.tensor(data.train_dataloader().batch_sampler.batches),
        "sigma": model.flow.sigma(0, range(8)), "noise": model.flow.noise(0, range(8), (4,)),
        "probes": batch.noise, "probed": batch.batch.latents, "held out": held_out.latents,
        "held-out noise": model.flow.held_out_noise(held_out.uids, (4,)),
    }  # fmt: skip


def test_all_seeds_follow_one(recipe):
    assert seeds(read(recipe)) == (0, 0, 0)
    assert seeds(read(recipe, "--seed_everything=5")) == (5, 5, 5)


def test_explicit_seeds_win(recipe):
    assert seeds(read(recipe, "--seed_everything=5", *OWN)) == (7, 8, 9)
    assert seeds(read(recipe, "--seed_everything=5", OWN[1])) == (5, 8, 5)
    content = yaml.safe_load(recipe.read_text())
    content["model"]["init_args"]["surgery"]["seed"] = 0  # the default, but given
    recipe.write_text(yaml.safe_dump(content))
    assert seeds(read(recipe, "--seed_everything=5")) == (0, 5, 5)


def test_a_runs_own_config_keeps_its_seeds(recipe, tmp_path):
    resolved = tmp_path / "config.yaml"
    resolved.write_text(yaml.safe_dump(read(recipe, "--seed_everything=5", OWN[0]).recipe))
    assert seeds(read(resolved)) == seeds(read(resolved, "--seed_everything=6")) == (7, 5, 5)


def test_no_seed_and_the_environments_seed(recipe, monkeypatch):
    assert seeds(read(recipe, "--seed_everything=false")) == (0, 0, 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert seeds(read(recipe, "--seed_everything=true")) == (3, 3, 3)


def test_a_submitted_recipe_and_a_printed_one_state_the_seeds(recipe):
    given = ["--seed_everything=5", OWN[0]]
    submitted = recipe_cli([f"--config={recipe}", *given], run=False, kind=SubmitCLI).recipe
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        recipe_cli(["fit", f"--config={recipe}", *given, "--print_config"], run=True)
    for found in (submitted, yaml.safe_load(said.getvalue())):
        model, data = found["model"]["init_args"], found["data"]["init_args"]
        assert (model["surgery"]["seed"], model["seed"], data["seed"]) == (7, 5, 5)
        assert found["seed_everything"] == 5


def test_what_two_seeds_draw(recipe):
    zero, same, other = (draws(read(recipe, f"--seed_everything={seed}")) for seed in (0, 0, 5))
    assert all(torch.equal(zero[name], same[name]) for name in zero)
    changed = {name for name in zero if not torch.equal(zero[name], other[name])}
    assert changed == {"weights", "order", "sigma", "noise"}


@pytest.mark.slow
def test_two_seeds_train_two_grafts(recipe):
    grafts = []
    for seed in (0, 5):
        options = (f"--seed_everything={seed}", "--trainer.max_steps=2", "--trainer.callbacks=[]")
        run = fit(recipe, f"seed-{seed}", *options)
        saved = yaml.safe_load((run.path / "config.yaml").read_text())
        assert saved["model"]["init_args"]["seed"] == saved["data"]["init_args"]["seed"] == seed
        grafts.append(load_graft(run.path / "graft.safetensors").raw)
    assert all(
        not torch.equal(grafts[0][n], grafts[1][n]) for n, p in grafts[0].items() if p.ndim == 2 and "norm" not in n
    )
