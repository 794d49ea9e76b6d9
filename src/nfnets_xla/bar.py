"""Progress of long work, on standard error."""

import sys
import time
from collections.abc import Callable

Progress = Callable[[int, int | None], None]  # done, of how many

WIDTH = 30  # of the bar


def progress(verb: str) -> Progress:
    """A bar that is rewritten in place on a terminal, and one line a minute elsewhere."""
    last = time.monotonic()
    begun: tuple[float, int] | None = None  # time and count at the start: a download may resume
    on_terminal = sys.stderr.isatty()

    def report(done: int, total: int | None) -> None:
        nonlocal begun, last
        now, finished = time.monotonic(), done == total
        if begun is None or done < begun[1]:  # or restarted: a server without ranges
            begun = (now, done)
        if not finished and now - last < (0.2 if on_terminal else 60):
            return
        last = now
        if not total:  # None if the server does not say; an empty file has 0
            print(f"{verb} {done:,}", end="\r" if on_terminal else "\n", file=sys.stderr)
            return
        bar = "#" * (WIDTH * done // total)
        text = f"{verb} [{bar:.<{WIDTH}}] {done:,} of {total:,}"
        since, from_there = now - begun[0], done - begun[1]
        if from_there:
            text += f", {since * (total - done) / from_there / 60:.1f} minutes left"
        print(text, end="\r" if on_terminal and not finished else "\n", file=sys.stderr, flush=True)

    return report
