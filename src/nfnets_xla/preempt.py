"""Requests to stop: SIGTERM, SIGINT, or a notice that the machine will shut down.

At the first request, training saves after the current step and ends. A thread ends the process at
once, without saving, if nothing is new since the last checkpoint, at a second signal, or after
`grace` seconds. In every case the exit code is 75, at which a launcher should repeat the command,
which resumes. A command that cannot resume ends as a signal ends any command: with 130 or 143.

Python runs signal handlers between two instructions of the main thread, which may be inside a
compilation for minutes. But the interpreter writes each signal to a pipe as soon as it arrives
(`signal.set_wakeup_fd`), and the thread reads that pipe. This module uses only the standard
library, so that it can start before anything else is imported.
"""

import os
import select
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from nfnets_xla.exits import START_AGAIN

SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 5.0
FOLLOWED = "NFNETS_XLA_FOLLOWED"  # environment variable: the parent; if it ends, so do we
NO_NOTICE = ("NONE", "FALSE")  # Google's metadata server: maintenance-event, preempted


class Preemption:
    def __init__(self, grace: float = 25.0) -> None:
        """The default `grace` is less than the 30 s that clusters usually give."""
        self.grace = grace
        self.reason: str | None = None  # why training was asked to stop
        self.unsaved = False  # whether there were steps since the last checkpoint
        self.resumes = True  # whether the same command would resume
        self.pass_on: Callable[[], None] | None = None  # forwards a request to a child process
        self._signalled = False
        self._deadline = float("inf")

    def start(self) -> None:
        """Call once, from the main thread; it stays active until the process ends."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for number in SIGNALS:
            signal.signal(number, _noted)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True, name="signals").start()
        if os.environ.get(FOLLOWED) == str(os.getppid()):
            threading.Thread(target=self._follow, daemon=True, name="followed").start()

    def poll(self, notice: str) -> None:
        """Watch a file or http(s) address for a notice that the machine will shut down.

        A notice that is there already does not count: the last start ended because of it.
        """
        threading.Thread(target=self._poll, args=(notice,), daemon=True, name="notice").start()

    def __reduce__(self) -> tuple[type["Preemption"], tuple[float]]:
        """Pickled as a new object: a launcher plugin may send a job to another process."""
        return Preemption, (self.grace,)

    def ask(self, reason: str, number: int | None = None) -> None:
        """Ask to stop; `number` is that of the signal, if it is one. Only a second signal ends the
        process while it saves: a machine announces its shutdown and then sends a first one."""
        if (pass_on := self.pass_on) is not None:  # read once: a sweep may reset it meanwhile
            self.reason = reason
            pass_on()
            return
        before, again = self.reason, self._signalled and number is not None
        self._signalled = self._signalled or number is not None
        if not self.resumes and number is not None:
            self._end(reason, 128 + number)
        if again:
            self._end(f"{reason} after {before}")
        if before is not None:
            return
        if not self.unsaved:
            self._end(f"{reason}; nothing is new since the last checkpoint")
        self._deadline = time.monotonic() + self.grace
        self.reason = reason
        _say(f"{reason}: saving after this step; a second signal ends it at once")

    def _watch(self) -> None:
        while True:
            left = self._deadline - time.monotonic()
            wait = None if left == float("inf") else max(0.0, left)
            if not select.select([self._read], [], [], wait)[0]:
                self._end(f"not saved in {self.grace:g} s")
            number = os.read(self._read, 1)[0]
            if number in SIGNALS:  # other signals are written to the pipe, too
                self.ask(signal.Signals(number).name, number)

    def _poll(self, notice: str) -> None:
        before = announced(notice)
        while True:
            time.sleep(POLL_SECONDS)
            now = announced(notice)
            if now is None:  # no answer: keep the last one, and ask again
                continue
            if now and before is False and self.reason is None:  # None: it may have stood before
                self.ask(f"{notice} announces maintenance")
                os.write(self._write, b"\0")  # wakes the other thread to see the deadline
            before = now

    def _follow(self) -> None:
        """Ask to stop when the parent, a sweep, is gone: a killed one cannot say so."""
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        self.ask("the sweep is gone")
        os.write(self._write, b"\0")

    def _end(self, why: str, code: int = START_AGAIN) -> None:
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # the cursor, which a live display has hidden
        _say(f"{why}: ending with {code}")
        os._exit(code)


def announced(notice: str) -> bool | None:
    """Whether maintenance is announced; None if an address did not answer."""
    at_address = notice.startswith(("http://", "https://"))
    try:
        if at_address:
            asked = urllib.request.Request(notice, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(asked, timeout=POLL_SECONDS) as answer:
                text = answer.read(1000).decode(errors="replace")
        else:
            text = Path(notice).read_text(errors="replace")
    except (OSError, HTTPException):  # a missing file means no notice
        return None if at_address else False
    return text.strip().upper() not in NO_NOTICE


def _noted(_number: int, _frame: object) -> None:
    """Does nothing: the thread reads the signal from the pipe."""


def _say(text: str) -> None:
    """Without print, whose lock the main thread may hold."""
    os.write(2, f"nfnets-xla: {text}\n".encode())
