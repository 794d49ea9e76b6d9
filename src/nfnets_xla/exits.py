"""How a run ends without being finished, for whoever started it."""

START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on
INTERRUPTED = 130  # by Ctrl-C, as shells have it: a command that has nothing to go on with
TERMINATED = 143  # by SIGTERM, likewise


class Interrupted(Exception):
    """The run ends now, and the same command would go on from its newest checkpoint."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, to a command that has nothing to go on with: all is cleaned up as after Ctrl-C."""


class HostLost(Interrupted):
    """Another process of the run has ended. What is on the devices may wait for it for ever: no one
    may wait for that, not even at the end of the process."""


class Unreachable(ValueError):
    """An address did not answer for as long as requests are repeated. The request itself may be
    right."""


class Failed(Exception):
    """Exit code 1: nothing is wrong with what was asked for, and it did not come out."""


class CellFailed(Failed):
    """A run of a sweep ended with an error. The others are run, and then the exit code is 1."""
