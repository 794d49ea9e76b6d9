"""Processes that need no imports: they are forked from one that has imported everything.

Importing torch and Lightning takes nine seconds of a core, and the tests start some hundred
processes. Each is a normal process (own memory, signals, exit and death), except that its modules
are already loaded. Nothing but imports has happened before the fork. If an import has started a
thread, which a fork does not copy, the process imports everything itself.

Tests of starting itself, such as tests/test_preempt.py, use `python -m nfnets_xla`.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02


class Warm:
    """The part of subprocess.Popen that tests need."""

    def __init__(self, module: str, arguments: list[str], environment: dict[str, str], log: Path):
        self._source = _source("trainer.device=xla" in arguments)
        start = [module, *arguments]
        self.pid: int = _ask(self._source, start=start, environment=environment, log=str(log))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self._source, poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        began = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def _source(xla: bool) -> subprocess.Popen[str]:
    """Ends with this process, because its input is then closed. One for runs that start torch_xla,
    with their own settings, and one for those where Lightning only asks it for devices."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.warm", *(() if xla else ("torch_xla",))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # read when the libraries are loaded
    )


def _ask(source: subprocess.Popen[str], **request: Any) -> Any:
    assert source.stdin is not None
    assert source.stdout is not None
    source.stdin.write(json.dumps(request) + "\n")
    source.stdin.flush()
    return json.loads(source.stdout.readline())


# ---- the process that is forked from -----------------------------------------------------------


def serve() -> dict[str, Any] | None:
    """Answers until its input ends. In a child process it returns what the child is to run."""
    while line := os.read(0, 2**16):  # a request is one line, and the next waits for its answer
        while not line.endswith(b"\n"):
            line += os.read(0, 2**16)
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                return request
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        os.write(1, json.dumps(answer).encode() + b"\n")
    return None


def become(request: dict[str, Any], has_all: bool) -> None:
    """`has_all` says whether a fork has everything: threads are not copied."""
    log = os.open(request["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for mine, theirs in ((0, nothing), (1, log), (2, log)):
        os.dup2(theirs, mine)
    os.closerange(3, max(log, nothing) + 1)
    if not has_all:
        command = [sys.executable, "-m", "tests.warm", "--run", *request["start"]]
        os.execve(sys.executable, command, request["environment"])
    os.environ.clear()
    os.environ.update(request["environment"])
    run_module(request["start"])


def run_module(start: list[str]) -> None:
    module, *sys.argv[1:] = start
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import nfnets_xla.evaluate
    import nfnets_xla.train  # noqa: F401
    from nfnets_xla import xla
    from tests.shallow import register_shallow

    if sys.argv[1:] == ["torch_xla"]:
        xla.stay_out()
        with suppress(ModuleNotFoundError):  # as on a machine with a GPU and a newer torch
            import torch_xla  # noqa: F401

    register_shallow()
    alone = len(os.listdir("/proc/self/task")) == 1
    if sys.argv[1:2] == ["--run"]:
        run_module(sys.argv[2:])
    elif (request := serve()) is not None:
        become(request, alone)
