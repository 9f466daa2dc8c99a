"""Ranks that are not the same program on the same job are refused before anything is loaded, and told what differs."""

import shutil
from pathlib import Path

import pytest
import yaml

from data.bucket import Bucket
from launch.bench.stream import write_shards
from tests.kills.tiny_fit import SAMPLES, fit_arguments, write_recipe
from tests.support.ranks import Ranks


@pytest.fixture
def home(tmp_path) -> Path:
    """A node's folder, in which all paths of the recipe are relative."""
    path = write_recipe(tmp_path / "node0", epochs=1, ranks=2)
    recipe = yaml.safe_load(path.read_text())
    recipe["run"]["root"] = "runs"
    recipe["model"]["init_args"]["base"] = "config.json"
    recipe["data"]["init_args"]["shards"] = "latents"
    path.write_text(yaml.safe_dump(recipe))
    return path.parent


@pytest.mark.slow
def test_other_packages_recipes_and_data_on_a_rank_are_refused(home):
    other = home.with_name("node1")
    shutil.copytree(home, other)
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["model"]["init_args"]["optim"]["lr"] = 0.004
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(other / "latents")
    write_shards(other / "latents", SAMPLES + 4, Bucket(7, 32, 32), 18, None)
    package = other / "webdataset-9.9.9.dist-info"  # Python looks for packages in a program's folder
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 9.9.9\n")
    command = ["-c", "from launch.main import main; main()", *fit_arguments(Path("recipe.yaml"), "tiny")]
    job = Ranks(home.parent / "logs", command, command, homes={0: home, 1: other})
    with job:
        assert job.statuses(240) == [2, 2], job.output()
    for log in job.logs:
        said = log.read_text()
        assert "error: the ranks differ, expected the same program, recipe, data and checkpoint on all" in said
        assert "model.init_args.optim.lr: 0.003 on rank 0 (" in said and "0.004 on rank 1 (" in said
        assert "webdataset: " in said and "9.9.9 on rank 1 (" in said
        assert "order of the training data: " in said
        assert "Traceback" not in said
    assert not (home / "runs" / "tiny" / "config.yaml").exists()
