"""A real Slurm on this machine for tests: slurmctld and two nodes, each with its own network, processes and host name.

`slurm-lab.sh` beside this file starts and stops it; the fixture `lab` in `conftest.py` holds one for the whole session.
Every wait is for a condition, with a limit in seconds.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.fork_server import ROOT, popen

SCRIPT = Path(__file__).with_name("slurm-lab.sh")

#: Where `slurm-lab.sh` looks for programs: daemons lie outside the PATH of some shells.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])

#: The program `reblock`. It does not free what was imported in the end, which would take longer than the command.
_REBLOCK = """
import os, sys, traceback
from launch.main import main
status = 0
try:
    main()
except SystemExit as end:
    status = end.code or 0
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""

#: Job states that nothing but a requeue follows.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def why_not() -> str | None:
    """Why no lab can be brought up here, or None."""
    if os.uname().sysname != "Linux":
        return "a Slurm lab needs Linux (network and process namespaces)"
    if os.geteuid() != 0:
        return "a Slurm lab needs root, to make namespaces"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name, path=PATH) is None]
    if missing:
        return (
            f"a Slurm lab needs {', '.join(missing)}: `bash tests/cluster/slurm-lab.sh install` as root, or `make test`"
        )
    return None


class Lab:
    """A cluster of `node1` and `node2`, 4 CPUs (advertised, not real) and 2 fake GPUs each, partition `debug`.

    Its jobs preempt those of the partitions `graceful` (60 s to end in) and `graceless`.

    Args:
        settings: environment of `slurm-lab.sh`, see there; e.g. SLURM_LAB_NODE_TIMEOUT="20".
    """

    nodes = ("node1", "node2")

    def __init__(self, **settings: str) -> None:
        # Unix sockets lie in it, whose paths are limited to 107 bytes: pytest's own folders are too deep.
        self.folder = Path(tempfile.mkdtemp(prefix="rb-", dir="/tmp"))
        self._settings = settings
        try:
            self._script("up", "-n", str(len(self.nodes)), "-c", "4", "-g", "2")
        except BaseException:
            self.down()
            raise
        # Takes the lab down if this process is killed: its end of the pipe closes then.
        self._guard = subprocess.Popen(
            ["bash", "-c", 'read -r _; bash "$0" down -d "$1"; rm -rf -- "$1"', str(SCRIPT), str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def down(self) -> None:
        """Cancels all jobs and stops everything; leaves no process and no file."""
        self._script("down")
        guard = getattr(self, "_guard", None)
        if guard is not None:
            guard.communicate(timeout=120)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _script(self, verb: str, *options: str) -> None:
        done = subprocess.run(
            ["bash", str(SCRIPT), verb, "-d", str(self.folder), *options],
            env=os.environ | self._settings, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, f"slurm-lab.sh {verb}: {done.stderr}"

    # -- commands ------------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with Slurm's commands talking to the lab; nothing of a job around the tests."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI_"))}
        return own | {"SLURM_CONF": str(self.folder / "conf" / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 60, cwd: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command where a user would: on the log-in node, which is this machine. `more` is added to its
        environment. A failure raises AssertionError with what it wrote."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment | more, cwd=cwd, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def reblock(
        self, *arguments: str | Path, check: bool = True, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs `reblock` as `run` does, in a process that has no imports to do (`tests.support.fork_server`): on the
        log-in node it does little else. Jobs start it anew. What concerns its start or its end needs `run`."""
        command = [sys.executable, "-c", _REBLOCK, *arguments]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = popen(command, env=self.environment | {"PYTHONPATH": str(ROOT)}, cwd=cwd, stdout=out, stderr=err)
            try:
                status = process.wait(timeout=240)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
            out.seek(0)
            err.seek(0)
            done = subprocess.CompletedProcess(["reblock", *map(str, arguments)], status, out.read(), err.read())
        assert status == 0 or not check, f"{done.args} gave {status}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, script: Path | str, *options: str, cwd: Path | None = None, **more: str) -> int:
        """`sbatch OPTIONS SCRIPT`: the job's id. Text with a line break is a script itself, written into the lab."""
        if isinstance(script, str) and "\n" in script:
            handle, name = tempfile.mkstemp(prefix="job-", suffix=".sbatch", dir=self.folder)
            with os.fdopen(handle, "w") as file:
                file.write(script)
            script = Path(name)
        printed = self.run("sbatch", "--parsable", *options, script, cwd=cwd or self.folder, **more).stdout
        return int(printed.split(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """The fields that `scontrol show job` gives: JobState, Restarts, NodeList, ExitCode, StdOut, Reason, ...

        Of an array, those of its first task; name one as `"ID_TASK"`.
        """
        line = self.run("scontrol", "--oneliner", "show", "job", str(job)).stdout.splitlines()[0]
        return {m[1]: m[2] for m in re.finditer(r"(\S+?)=(.*?)(?= [A-Za-z/:_]+=|$)", line.strip())}

    def state(self, job: int | str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.job(job)["JobState"]

    def output(self, job: int | str) -> str:
        """What the batch script has written to its StdOut, or that there is no such file."""
        path = Path(self.job(job).get("StdOut", "/nonexistent"))
        return path.read_text() if path.is_file() else f"(no file {path})"

    def wait(self, job: int | str, *states: str, timeout: float = 120) -> str:
        """Waits until a job is in one of `states`; fails at once where it has ended in another."""

        def reached() -> bool:
            found = self.state(job)
            assert found in states or found not in ENDED, f"job {job} is {found}, not {states}\n{self.output(job)}"
            return found in states

        self.until(reached, f"job {job} in {states}", timeout=timeout, says=lambda: self._says(job))
        return self.state(job)

    def _says(self, job: int | str) -> str:
        fields = self.job(job)
        return f"{fields['JobState']} {fields.get('Reason')}\n{self.output(job)[-3000:]}"

    @staticmethod
    def until(
        condition: Callable[[], object], what: str, *, timeout: float = 120, says: Callable[[], str] = lambda: ""
    ) -> None:
        """Waits for a condition, looking ten times a second."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"not within {timeout:.0f} s: {what}\n{says()}"
            time.sleep(0.1)

    def cancel_all(self) -> None:
        """Cancels every job and waits until the nodes are empty."""
        queue = self.run("squeue", "--noheader", "--format=%A").stdout.split()
        if queue:
            self.run("scancel", "--full", *sorted(set(queue)), check=False)
            self.run("scancel", *sorted(set(queue)), check=False)
        self.until(lambda: not self.run("squeue", "--noheader").stdout.strip(), "an empty queue")

    # -- nodes ---------------------------------------------------------------------------------------------------

    def init_pid(self, node: str) -> int:
        """The node's first process, by its number on this machine; when it is killed, all of the node's end."""
        outer = int((self.folder / "pids" / f"node-{node}").read_text().split()[0])
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def on(self, node: str, *command: str | Path, **options) -> subprocess.CompletedProcess[str]:
        """Runs a command on a node: its network, processes, host name. Options as `run`."""
        inside = ("nsenter", "-t", str(self.init_pid(node)), "-m", "-u", "-p", "-n")
        return self.run(*inside, *command, **options)

    def processes(self, node: str, *words: str) -> list[int]:
        """Processes of a node whose command line holds all the words, by their numbers on this machine."""
        mine, found = os.readlink(f"/proc/{self.init_pid(node)}/ns/pid"), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line and os.readlink(path / "ns" / "pid") == mine and all(word in line for word in words):
                    found.append(int(path.name))
        return sorted(found)

    def pending(self, number: signal.Signals, *words: str) -> bool:
        """Whether on each node a process whose command line holds all the words has got the signal and blocks it."""

        def has(pid: int) -> bool:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in lines if line.startswith("ShdPnd"))

        return all(any(map(has, self.processes(node, *words))) for node in self.nodes)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to the node's slurmd alone; its job steps live on. `start_slurmd` or `heal` start it again."""
        for pid in self.processes(node, "slurmd", "-N", node):
            os.kill(pid, signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        """Starts the node's slurmd if it does not run."""
        if not self.processes(node, "slurmd", "-N", node):
            self.on(node, "setsid", "slurmd", "-f", self.folder / "conf" / "slurm.conf", "-N", node)

    def kill_node(self, node: str) -> None:
        """As if the power failed: every process of the node ends, and none has a last word. `start_nodes` or `heal`
        start it again."""
        if self._has_networks:
            self.cut(node)
        os.kill(self.init_pid(node), signal.SIGKILL)

    def start_nodes(self) -> None:
        """Starts nodes that are dead, and connects all."""
        if self._has_networks:
            self.mend(*self.nodes)
        self._script("up")

    def sends_again(self, node: str) -> int:
        """How often in a row the kernel has sent a packet of the node anew, in vain, each time after twice the wait."""
        return max(map(int, re.findall(r"\bbackoff:(\d+)", self.on(node, "ss", "-tni").stdout)), default=0)

    def cut(self, *nodes: str) -> None:
        """Cuts nodes off: of one, the cable is pulled; of several, no packet passes between them, while each still
        reaches Slurm's controller. Nothing is closed: packets are lost. Skips the test where nodes have no network of
        their own. `heal` mends it."""
        self._link(*nodes, change=("down",) if len(nodes) == 1 else ("type", "bridge_slave", "isolated", "on"))

    def mend(self, *nodes: str) -> None:
        """Undoes `cut`."""
        self._link(*nodes, change=("up",))
        self._link(*nodes, change=("type", "bridge_slave", "isolated", "off"))

    def _link(self, *nodes: str, change: Sequence[str]) -> None:
        if not self._has_networks:
            import pytest

            pytest.skip("nodes have no network of their own here: network namespaces are not allowed")
        for node in nodes:
            self.run("ip", "link", "set", f"sl{self._tag}v{self.nodes.index(node) + 1}", *change)

    @property
    def _has_networks(self) -> bool:
        return self.parameters["ISOLATION"] == "netns"

    @property
    def _tag(self) -> str:
        import hashlib

        return hashlib.sha1(str(self.folder).encode()).hexdigest()[:6]  # as the script names its devices

    @property
    def parameters(self) -> dict[str, str]:
        """What the script chose: ISOLATION, PORT, SUBNET, RUN, ..."""
        lines = (self.folder / "params").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def heal(self) -> None:
        """Everything runs and is connected again: networks mended, dead nodes and slurmds started, all jobs cancelled,
        nodes idle. What a test that breaks something does last (the fixture `lab_to_break` does it)."""
        for node in self.nodes:
            with contextlib.suppress(OSError, IndexError):  # the whole node is dead: started below
                self.start_slurmd(node)
        self.start_nodes()
        self.cancel_all()
        for node in self.nodes:
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        ready = {"idle"}
        self.until(
            lambda: set(self.run("sinfo", "-h", "-N", "-o", "%T").stdout.split()) == ready,
            "idle nodes",
            says=lambda: self.run("sinfo", "-N", "-l").stdout,
        )
