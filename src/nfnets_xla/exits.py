"""Exit codes and exceptions for a run that ends unfinished."""

START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong; the same command resumes
INTERRUPTED = 130  # by Ctrl-C, as in shells: a command that cannot resume
TERMINATED = 143  # by SIGTERM, likewise


class Interrupted(Exception):
    """The run ends now; the same command would resume from its newest checkpoint."""


class Terminated(KeyboardInterrupt):
    """SIGTERM to a command that cannot resume: cleans up as after Ctrl-C."""


class HostLost(Interrupted):
    """Another process of the run has ended. Work on the devices may wait for it forever, so nothing
    may wait for the devices, not even when this process exits."""


class Unreachable(ValueError):
    """An address did not answer while requests were retried. The request may still be correct."""


class Failed(Exception):
    """Exit code 1: the request was correct, but the work failed."""


class CellFailed(Failed):
    """A run of a sweep failed. The others still run, and then the exit code is 1."""
