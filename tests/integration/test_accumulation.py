"""The last step of an epoch may have fewer micro-batches than the others: its gradient is the mean over its own."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from data.batch import Batch
from data.modules.latents import LatentDataModule
from data.stream.order import global_batches
from launch.run_folder import RunFolder
from tests.support.fitted_runs import fit
from trainer.module import OptimConfig, RetrainBlocks, SurgeryConfig
from trainer.optimizer import adamw, learning_rate

#: 32 samples to train on, two to a micro-batch: five steps of an epoch have three micro-batches, the last one has one.
SIZE, ACCUMULATE, EPOCHS = 2, 3, 2
OPTIM = {"lr": 0.003, "warmup_steps": 5, "eps": 1e-4}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_recipe) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("windows"), measure=False, epochs=EPOCHS)
    content = yaml.safe_load(path.read_text())
    data = content["data"]["init_args"]
    del data["batch_size"]
    data["global_batch_size"] = SIZE
    content["run"]["save_every"] = 100
    content["trainer"]["accumulate_grad_batches"] = ACCUMULATE
    content["model"]["init_args"] |= {"caption_dropout": 0.0, "optim": OPTIM}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def by_hand(whole_base, shards) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Gradient norms of all steps, and the weights after them, of a loop over the same micro-batches."""
    module = RetrainBlocks(base=str(whole_base), surgery=SurgeryConfig(last=2), caption_dropout=0.0)
    module.build("cpu")
    split = LatentDataModule(shards=str(shards), val_samples=8, global_batch_size=SIZE).train_split
    weights, optim, norms = module.retrained_parameters(), OptimConfig(**OPTIM), []
    optimizer = adamw(weights, optim, fused=False)
    schedule = learning_rate(optimizer, optim, lambda: math.inf)
    for epoch in range(EPOCHS):
        visits = global_batches(0, epoch, split.groups, SIZE).flatten().tolist()
        for first in range(0, len(visits), ACCUMULATE * SIZE):
            batch = Batch.collate([split[visit] for visit in visits[first : first + ACCUMULATE * SIZE]])
            noise = module.flow.noise(epoch, batch.uids, batch.latents.shape[1:])
            module.losses(batch, noise, module.flow.sigma(epoch, batch.uids)).mean().backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), optim.clip_norm)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return norms, {name: value.detach() for name, value in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "strategy", "stop"),
    [(1, "ddp", None), (2, "ddp", None), (2, "fsdp2", None), (1, "ddp", 4), (2, "ddp", 9)],
    ids=["one", "ddp", "fsdp2", "one-resumed", "ddp-resumed"],
)
def test_steps_are_those_of_a_loop_by_hand(recipe, by_hand, ranks, strategy, stop):
    """Also where the epoch was cut and went on before its last step."""
    name, how = f"{strategy}-{ranks}-{stop}", {"ranks": ranks, "strategy": strategy}
    if stop:
        fit(recipe, name, f"--trainer.max_steps={stop}", **how)
    run: RunFolder = fit(recipe, name, "--run.resume=true", **how)
    norms = [float(row["train/grad_norm"]) for row in run.read_metrics()[1] if row.get("train/grad_norm")]
    assert len(norms) == EPOCHS * 6 and norms == pytest.approx(by_hand[0], rel=1e-4)
    saved = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    for weight, want in by_hand[1].items():
        torch.testing.assert_close(saved[f"room.model.{weight}"], want, rtol=1e-3, atol=1e-5)
