"""A forked process that another thread's lock stops before its first line is replaced, and nothing is done twice."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: As the fault does: inside the fork, before Python code of the caller runs; it stops the first `stopped` children.
STOPPED = """
import os, signal, sys
from pathlib import Path
from data import safe_fork

safe_fork._START_TIMEOUT = 0.3
folder, stopped = Path(sys.argv[1]), int(sys.argv[2])

def stop():
    (folder / f"fork-{os.getpid()}").touch()
    if len(list(folder.glob("fork-*"))) <= stopped:
        signal.pause()

"""


def run(folder: Path, stopped: int, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STOPPED + textwrap.dedent(script), str(folder), str(stopped)], capture_output=True,
        text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def gone(folder: Path) -> bool:
    return not any(Path(f"/proc/{path.name.removeprefix('fork-')}").exists() for path in folder.glob("fork-*"))


@pytest.mark.slow
def test_the_processes_of_a_loader_start(tmp_path):
    done = run(tmp_path, 2, """
        from data.modules.epoch_position import ResumableLoader
        os.register_at_fork(after_in_child=stop)
        loader = ResumableLoader(range(6), num_workers=2, multiprocessing_context=safe_fork.fork_context())
        print([int(batch) for batch in loader])
    """)  # fmt: skip
    assert done.returncode == 0 and done.stdout == "[0, 1, 2, 3, 4, 5]\n", done.stderr
    assert len(list(tmp_path.glob("fork-*"))) == 4 and gone(tmp_path)


def test_the_processes_of_a_loader_end_with_their_parent(tmp_path):
    """At once: not when they next look for it themselves."""
    done = run(tmp_path, 0, """
        from torch.utils.data._utils import worker
        from data.modules.epoch_position import ResumableLoader
        assert worker.MP_STATUS_CHECK_INTERVAL == 5
        worker.MP_STATUS_CHECK_INTERVAL = 900  # seconds; `run` waits until nobody holds the output, but not so long
        os.register_at_fork(after_in_child=stop)
        batches = iter(ResumableLoader(range(6), num_workers=2, multiprocessing_context=safe_fork.fork_context()))
        next(batches)
        os.kill(os.getpid(), signal.SIGKILL)
    """)  # fmt: skip
    assert done.returncode == -9, done.stderr
    assert len(list(tmp_path.glob("fork-*"))) == 2


def test_children_that_never_start_are_an_error_and_none_is_left(tmp_path):
    done = run(tmp_path, 10**6, """
        safe_fork._ATTEMPTS = 3
        os.register_at_fork(after_in_child=stop)
        try:
            safe_fork.fork()
        except RuntimeError as error:
            print(error)
    """)  # fmt: skip
    assert done.stdout == "3 forked processes in a row did not start within 0 s each\n", done.stderr
    assert len(list(tmp_path.glob("fork-*"))) == 3 and gone(tmp_path)


def test_a_child_whose_parent_died_at_the_fork_ends(tmp_path):
    """The parent is killed while its child is on its way: the child does nothing."""
    done = run(tmp_path, 0, """
        parent = os.getpid()
        os.register_at_fork(after_in_child=lambda: os.kill(parent, signal.SIGKILL))
        if safe_fork.fork() == 0:
            (folder / "done").touch()
            os._exit(0)
    """)  # fmt: skip
    assert done.returncode == -9
    assert not (tmp_path / "done").exists()


def test_its_exit_code_is_the_childs(tmp_path):
    done = run(tmp_path, 0, """
        pid = safe_fork.fork()
        if pid == 0:
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)  # fmt: skip
    assert done.stdout == "7\n", done.stderr
