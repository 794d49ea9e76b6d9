"""How far something is that takes long, on standard error."""

import sys
import time
from collections.abc import Callable

Progress = Callable[[int, int | None], None]  # done, of how many

WIDTH = 30  # of the bar


def progress(verb: str) -> Progress:
    """A bar that is rewritten in place on a terminal, and one line a minute elsewhere."""
    started = last = time.monotonic()
    on_terminal = sys.stderr.isatty()

    def report(done: int, total: int | None) -> None:
        nonlocal last
        now, finished = time.monotonic(), done == total
        if not finished and now - last < (0.2 if on_terminal else 60):
            return
        last = now
        if total is None:  # a server need not say how much will come
            print(f"{verb} {done:,}", end="\r" if on_terminal else "\n", file=sys.stderr)
            return
        left = (now - started) * (total - done) / done
        bar = "#" * (WIDTH * done // total)
        text = f"{verb} [{bar:.<{WIDTH}}] {done:,} of {total:,}, {left / 60:.1f} minutes left"
        print(text, end="\r" if on_terminal and not finished else "\n", file=sys.stderr, flush=True)

    return report
