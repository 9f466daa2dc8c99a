"""Processes that skip the imports of torch, Lightning and diffusers: for `launch.fit.cli` 11 s of a core of an EPYC.

`popen` starts a Python program as `subprocess.Popen` does. A server, an interpreter of its own that has imported
everything, forks for each program; the child gets the arguments, environment, current directory, files and session
that a new interpreter would have, runs the program as `__main__` and ends as an interpreter ends. The two servers are
used in turn. Each has its own seed for the hashes of strings, as any two interpreters have, so ranks of one job, and a
run and the run it is compared with, still iterate over sets in different orders.

What concerns the start itself (signals while Python imports, which packages are found) must not use this.
"""

import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "torch", "lightning.pytorch", "matplotlib.figure", "transformers", "diffusers.pipelines.mochi.pipeline_mochi",
    "launch.fit.cli", "data.encode.command", "data.pack.command", "torch.distributed.fsdp",
)  # fmt: skip
#: Variables that the interpreter or a library reads once, when it is loaded, begin so.
EARLY = ("PYTHON", "OMP_", "MKL_", "KMP_", "GOMP_", "TORCH", "CUDA_", "HF_", "LD_", "TRITON_")
#: Of one message: arguments and environment.
MESSAGE_BYTES = 1 << 20


def popen(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO | None = None,
    stderr: int | IO | None = None,
    start_new_session: bool = False,
    text: bool = False,
) -> "Process":
    """Starts `[sys.executable, "-c", CODE, ...]` or `[sys.executable, SCRIPT, ...]`.

    Arguments are those of `subprocess.Popen`, which is used where no server can stand in: on another system than Linux,
    and for an environment in which an interpreter would start or import otherwise.
    """
    command = list(map(str, command))
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    server = next(_servers()) if sys.platform == "linux" and command[0] == sys.executable else None
    if server is None or early(env) != server.early:
        return subprocess.Popen(
            command, env=env, cwd=cwd, start_new_session=start_new_session, text=text, **streams  # type: ignore[call-overload]
        )  # fmt: skip
    return Forked(server, command, dict(env), cwd, start_new_session, text, streams)


def early(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that has its effect before a program begins."""
    return {name: value for name, value in environment.items() if name.startswith(EARLY)}


@functools.cache
def _servers() -> "itertools.cycle[Server]":
    return itertools.cycle([Server(), Server()])


class Server:
    """One server; it ends when this process closes its end of the connection, at the latest when it ends itself."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.early = early(environment)
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._lock = threading.Lock()
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], env=environment, cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=self._said, stderr=self._said, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip

    def ask(self, request: dict[str, Any], files: Sequence[int] = ()) -> Any:
        """What the server answers, or the child that it forks for a program."""
        with self._lock:
            socket.send_fds(self._connection, [json.dumps(request).encode()], files)
            answer = self._connection.recv(MESSAGE_BYTES)
        if not answer:
            self._said.seek(0)
            raise RuntimeError(f"the fork server has ended: {self._said.read()[-3000:]}")
        return json.loads(answer)


class Forked:
    """A program that a server has started; `subprocess.Popen` as far as tests use it."""

    def __init__(
        self,
        server: Server,
        command: list[str],
        env: dict[str, str],
        cwd: Path | None,
        session: bool,
        text: bool,
        streams: dict[str, int | IO | None],
    ) -> None:
        self.args, self.returncode, self._server = command, None, server
        self.stdin = self.stdout = self.stderr = None
        with contextlib.ExitStack() as theirs:
            files = []
            for number, (name, wanted) in enumerate(streams.items()):
                if wanted == subprocess.PIPE:
                    ends = os.pipe()
                    own, child = (ends[1], ends[0]) if name == "stdin" else ends
                    mode = ("w" if name == "stdin" else "r") + ("" if text else "b")
                    setattr(self, name, open(own, mode))  # noqa: SIM115
                    theirs.callback(os.close, child)
                elif wanted == subprocess.DEVNULL:
                    child = os.open(os.devnull, os.O_RDWR)
                    theirs.callback(os.close, child)
                elif wanted == subprocess.STDOUT:
                    child = files[1]
                else:
                    child = number if wanted is None else wanted if isinstance(wanted, int) else wanted.fileno()
                files.append(child)
            request = {"argv": command[1:], "env": env, "cwd": str(cwd or Path.cwd()), "session": session}
            self.pid = server.ask(request, files)
        self._pidfd = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """The exit status, or None while the program runs."""
        if self.returncode is None and self._has_ended(0.0):
            self.returncode = self._server.ask({"reap": self.pid})
            os.close(self._pidfd)
        return self.returncode

    def _has_ended(self, seconds: float | None) -> bool:
        """Waits so long, or for ever, for the program's end: a look that costs the server nothing."""
        ends = select.poll()
        ends.register(self._pidfd, select.POLLIN)
        return bool(ends.poll(None if seconds is None else max(0.0, seconds) * 1000))

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once the program has ended.

        Raises:
            subprocess.TimeoutExpired: if it has not within `timeout` seconds.
        """
        if self.returncode is None:
            self._has_ended(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal unless the program is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


#: What `popen` gives.
Process = subprocess.Popen | Forked


# -- in the server ---------------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> dict[str, Any]:
    """Answers requests for ever; what it returns, in a forked child, is the program to run."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)  # asked only where it has ended
            connection.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
        elif os.fork() == 0:
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            if request["session"]:
                os.setsid()
            connection.send(json.dumps(os.getpid()).encode())
            connection.close()
            return request
        for file in files:
            os.close(file)


def become(request: dict[str, Any]) -> None:
    """Runs the program: its end, or its exception, is this process's."""
    import multiprocessing.process

    import numpy as np
    import torch

    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    # As in a new interpreter; Python's own generator does so by itself.
    np.random.seed()  # noqa: NPY002
    torch.default_generator.seed()
    program, *arguments = request["argv"]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if program == "-c":
        code, *arguments = arguments
        sys.argv[:], sys.path[0] = ["-c", *arguments], ""
        compiled = compile(code, "<string>", "exec")
    else:
        sys.argv[:], sys.path[0] = [program, *arguments], str(Path(program).resolve().parent)
        module.__file__ = program
        compiled = compile(Path(program).read_bytes(), program, "exec")
    exec(compiled, module.__dict__)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        gc.disable()  # there is no garbage to find yet
        for name in PRELOADED:
            importlib.import_module(name)
        threads = os.listdir("/proc/self/task")
        if len(threads) > 1:
            raise RuntimeError(f"got {len(threads)} threads after the imports, expected one: a fork would lose them.")
        gc.collect()
        # Children share the pages of what was imported and leave it out of their collections, the one at their end too:
        # that alone would take as long as the rest of a short fit. What a program itself makes is collected as ever.
        gc.freeze()
        gc.enable()
        program = serve(connection)
    own_main = sys.modules["__main__"]  # kept alive below its successor
    become(program)
