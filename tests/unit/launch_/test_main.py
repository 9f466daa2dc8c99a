"""The `reblock` command: dispatch, argument parsing, errors, and whose packages it runs."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from launch import main as command


def _echo(src: Path, out: Path, *, base: Path, clips: int = 96, captions: list[str] | None = None) -> None:
    """Echoes its arguments.

    Args:
        src: folder that is read.
        out: folder that is written.
        base: pipeline folder.
        clips: how many.
        captions: texts.
    """
    if clips < 1:
        raise ValueError(f"got clips {clips}, expected at least 1.")
    if clips == 13:
        raise OSError("disk full")
    if clips == 14:
        clips /= 0
    if clips == 15:
        raise KeyboardInterrupt
    print(src, out, base, clips, captions)


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("echo_command")
    module.echo = _echo
    module.run = lambda argv: print("raw", argv)
    monkeypatch.setitem(sys.modules, "echo_command", module)
    monkeypatch.setitem(command.COMMANDS, "echo", ("echo_command:echo", "prints"))
    monkeypatch.setitem(command.COMMANDS, "fit", ("echo_command:run", "prints"))
    monkeypatch.delenv("REBLOCK_TRACEBACK", raising=False)


def _reblock(folder: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).parent / "reblock"
    if not script.is_file():
        pytest.skip("reblock is not installed: pip install -e .")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run([script, *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_required_arguments_are_positional_and_keyword_only_ones_options(echo, capsys):
    command.main(["echo", "a", "b", "--base", "c", "--clips=5", "--captions", '["x, y", "z"]'])
    assert capsys.readouterr().out == "a b c 5 ['x, y', 'z']\n"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ([], []),
        (["--allow-pipe"], ["--allow_pipe=true"]),
        (["--verify", "shards"], ["--verify=true", "shards"]),
        (["--verify", "--deadline", "3"], ["--verify=true", "--deadline", "3"]),
        (["--verify", "False"], ["--verify", "False"]),
        (["--verify=false", "a-b", "--shard-bytes=5-0"], ["--verify=false", "a-b", "--shard_bytes=5-0"]),
    ],
)
def test_a_switch_may_stand_alone_and_hyphens_are_taken(given, taken):
    assert command.spelled_out(given, {"--verify", "--allow_pipe"}) == taken


def test_a_missing_option_is_named(echo, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["echo", "a", "b"])
    assert stop.value.code == 2
    assert "base" in capsys.readouterr().err


def test_help_comes_from_the_docstring(echo, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["echo", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for text in (
        "reblock echo",
        "Echoes its arguments.",
        "folder that is read.",
        "--clips CLIPS",
        "default: 96",
        "src out",
    ):
        assert text in said


def test_libraries_do_not_advertise(caplog):
    command.quieten_libraries()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("💡 Tip: For seamless cloud logging, try installing something")
        logger.info("GPU available: False")
    assert caplog.messages == ["GPU available: False"]


def test_fit_reads_its_own_arguments(echo, capsys):
    command.main(["fit", "--config", "x.yaml"])
    assert capsys.readouterr().out == "raw ['fit', '--config', 'x.yaml']\n"


def test_a_value_error_is_one_line_and_code_2(echo, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["echo", "a", "b", "--base", "c", "--clips", "0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: got clips 0, expected at least 1.\n"


def test_the_traceback_can_be_had(echo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REBLOCK_TRACEBACK", "1")
    with pytest.raises(ValueError, match="got clips 0"):
        command.main(["echo", "a", "b", "--base", "c", "--clips", "0"])


def test_a_full_disk_is_one_line(echo, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["echo", "a", "b", "--base", "c", "--clips", "13"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: disk full\n"


def test_other_errors_propagate(echo):
    with pytest.raises(ZeroDivisionError):
        command.main(["echo", "a", "b", "--base", "c", "--clips", "14"])


def test_an_interruption_is_one_line(echo, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["echo", "a", "b", "--base", "c", "--clips", "15"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nstopped.\n"


def test_an_unknown_command_lists_what_exists(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["fti"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "'fti'" in said
    assert all(name in said for name in command.COMMANDS)


def test_usage_lists_every_command(capsys):
    command.main([])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and text in said for name, (_, text) in command.COMMANDS.items())


def _defines(target: str) -> bool:
    """Whether the module is there and defines the function; read, not imported."""
    module, name = target.split(":")
    spec = importlib.util.find_spec(module)
    return spec is not None and f"\ndef {name}(" in Path(str(spec.origin)).read_text()


def test_every_listed_command_exists():
    assert [name for name, (target, _) in command.COMMANDS.items() if not _defines(target)] == []


def test_starting_imports_no_heavy_package():
    heavy = "torch", "lightning", "diffusers", "transformers"
    code = f"import sys, launch.main; sys.exit(any(name in sys.modules for name in {heavy!r}))"
    root = Path(command.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_what_a_command_prints_ends_with_its_own_words():
    """Without a report of leaks by triton's bindings, whose objects are left out of garbage collection."""
    pytest.importorskip("triton")
    code = "import sys, launch.main\nlaunch.main._import_for_good('triton')\nprint('said', file=sys.stderr)"
    root = Path(command.__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "said\n")


@pytest.mark.parametrize("own, policy", [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_that_wait_do_not_spin_unless_the_user_says_so(own, policy):
    code = "import os, sys\nfrom launch.main import main\nsys.argv = ['reblock', 'none']\ntry:\n    main()\n" + (
        "except SystemExit:\n    print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | own
    root = Path(command.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{policy} False\n"


def test_folders_in_the_current_directory_do_not_shadow_ours(tmp_path: Path):
    for name in ("data", "trainer", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    done = _reblock(tmp_path, "synth", "--help")
    assert done.returncode == 0, done.stderr
    assert "--clips" in done.stdout


def test_a_foreign_trainer_package_is_named(tmp_path: Path):
    foreign = tmp_path / "elsewhere" / "trainer"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    done = _reblock(tmp_path, "synth", "--help", PYTHONPATH=str(foreign.parent))
    assert done.returncode == 2
    assert f"'trainer' from {foreign}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version(tmp_path: Path):
    assert _reblock(tmp_path, "--version").stdout == "reblock 0.1.0\n"


def test_options_from_a_file_give_way_to_the_command_line(echo, capsys, tmp_path):
    (tmp_path / "options.yaml").write_text("base: c\nclips: 5\ncaptions: [x]\n")
    command.main(["echo", "a", "b", "--config", str(tmp_path / "options.yaml"), "--clips", "6"])
    assert capsys.readouterr().out == "a b c 6 ['x']\n"


def test_an_unknown_option_in_a_file_is_named(echo, capsys, tmp_path):
    (tmp_path / "options.yaml").write_text("base: c\nclipz: 5\n")
    with pytest.raises(SystemExit):
        command.main(["echo", "a", "b", "--config", str(tmp_path / "options.yaml")])
    assert "clipz" in capsys.readouterr().err


def test_what_a_command_imports_is_left_out_of_garbage_collection(tmp_path):
    (tmp_path / "looks.py").write_text(
        "import gc\nduring = gc.isenabled()\n"
        "def run(argv): print(argv, during, gc.isenabled(), gc.get_freeze_count() > 0)\n"
    )
    code = "from launch import main as m; m.COMMANDS['fit'] = ('looks:run', ''); m.main()"
    path = os.pathsep.join([str(tmp_path), str(Path(command.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code, "fit"], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "['fit'] False True True\n"), done.stderr
