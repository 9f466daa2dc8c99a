"""Recipes that name a class where an earlier version had it are refused with its new name."""

import pytest
import yaml

from launch import main as command
from launch.fit.moved_names import MOVED
from launch.fit.parser import class_at, refuse_moved_names


@pytest.mark.parametrize("old", MOVED)
def test_each_new_name_exists_and_each_old_one_does_not(old):
    assert class_at(MOVED[old]).__name__ == MOVED[old].rpartition(".")[2]
    with pytest.raises(ValueError, match="a class that exists"):
        class_at(old)


def refusal(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main([*argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("old", MOVED)
def test_each_old_name_is_refused_with_the_new_one(old, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("REBLOCK_TRACEBACK", raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": old, "init_args": {}}]}}))
    said = refusal(capsys, "fit", "--config", str(path))
    assert said.startswith("error:") and f"{path} names {old}, which is now {MOVED[old]}\n" in said
    said = refusal(capsys, "fit", f"--data.class_path={old}")
    assert f"the command line names {old}, which is now {MOVED[old]}\n" in said


def test_a_run_of_an_earlier_version_is_not_resumed_but_told_all_its_old_names(tmp_path, capsys):
    config = tmp_path / "runs" / "old" / "config.yaml"
    config.parent.mkdir(parents=True)
    strategy, data = "trainer.sharding.ShardedStrategy", "data.datamodule.LatentDataModule"
    recipe = {
        "run": {"name": "old", "root": str(tmp_path / "runs")},
        "trainer": {"strategy": {"class_path": strategy}},
        "data": {"class_path": data},
    }
    config.write_text(yaml.safe_dump(recipe))
    for verb in ("fit", "validate", "plan", "submit"):
        said = refusal(capsys, verb, "--config", str(config), *(["--run.resume", "true"] if verb == "fit" else []))
        assert all(f"{old}, which is now {MOVED[old]}" in said for old in (strategy, data)), verb
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]


def test_files_that_are_no_recipes_are_left_to_the_parser(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    refuse_moved_names(["fit", "--config", str(broken), "--config=nowhere.yaml", "--config", str(tmp_path), "--config"])
