"""Asked to stop: SIGTERM, SIGINT, or a machine's notice that it will go.

The first time, the training is to save after the step in hand, and end. A thread ends the process
at once, without saving, if nothing is new since the last checkpoint, at a second signal, or when
`grace` seconds are over. In every case the exit code is 75: a launcher is to give the same command
again, which goes on. What does not go on ends as a signal ends any command: 130 or 143.

Python runs signal handlers between two instructions of the main thread, and that may be in a
compilation for minutes. The interpreter itself notes each signal in a pipe as soon as it comes
(`signal.set_wakeup_fd`), and the thread reads the pipe. Standard library only, so that it can start
before anything else is imported.
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
FOLLOWED = "NFNETS_XLA_FOLLOWED"  # environment: the process without which this one ends, too
NO_NOTICE = ("NONE", "FALSE")  # Google's metadata server, of maintenance-event and of preempted


class Preemption:
    def __init__(self, grace: float = 25.0) -> None:
        """`grace` is less than the 30 s that clusters give."""
        self.grace = grace
        self.reason: str | None = None  # by whom the training was asked to stop
        self.unsaved = False  # whether steps have been done since the last checkpoint
        self.resumes = True  # whether the same command goes on from what is saved
        self.pass_on: Callable[[], None] | None = None  # to the process that does the work for us
        self._signalled = False
        self._deadline = float("inf")

    def start(self) -> None:
        """From the main thread, once, and for the rest of the process's life."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for number in SIGNALS:
            signal.signal(number, _noted)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True, name="signals").start()
        if os.environ.get(FOLLOWED) == str(os.getppid()):
            threading.Thread(target=self._follow, daemon=True, name="followed").start()

    def poll(self, notice: str) -> None:
        """Watch a file, or what an http(s) address answers, for a notice that the machine will go.

        What is there now does not count: it has ended the last start.
        """
        threading.Thread(target=self._poll, args=(notice,), daemon=True, name="notice").start()

    def __reduce__(self) -> tuple[type["Preemption"], tuple[float]]:
        """In another process it is another one: a launcher's plugin may send a job there."""
        return Preemption, (self.grace,)

    def ask(self, reason: str, number: int | None = None) -> None:
        """`number` is of the signal, if it is one. Only a second signal ends what is being saved:
        a machine that will go says so, and then sends one."""
        if (pass_on := self.pass_on) is not None:  # a sweep may take it away meanwhile
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
            if number in SIGNALS:  # others have handlers, too
                self.ask(signal.Signals(number).name, number)

    def _poll(self, notice: str) -> None:
        before = announced(notice)
        while True:
            time.sleep(POLL_SECONDS)
            now = announced(notice)
            if now is None:  # it is asked again; what was said before still holds
                continue
            if now and not before and self.reason is None:
                self.ask(f"{notice} announces maintenance")
                os.write(self._write, b"\0")  # no signal: the other thread is to see the deadline
            before = now

    def _follow(self) -> None:
        """A sweep that is killed cannot say so to the run that it has started."""
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
    """Whether maintenance is; None if an address could not be asked."""
    at_address = notice.startswith(("http://", "https://"))
    try:
        if at_address:
            asked = urllib.request.Request(notice, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(asked, timeout=POLL_SECONDS) as answer:
                text = answer.read(1000).decode(errors="replace")
        else:
            text = Path(notice).read_text(errors="replace")
    except (OSError, HTTPException):  # no server, or none in order; no file is no notice
        return None if at_address else False
    return text.strip().upper() not in NO_NOTICE


def _noted(_number: int, _frame: object) -> None:
    """The thread has it from the pipe."""


def _say(text: str) -> None:
    """Not by print, whose lock the main thread may hold."""
    os.write(2, f"nfnets-xla: {text}\n".encode())
