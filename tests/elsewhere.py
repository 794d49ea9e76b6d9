"""The command line as if run on another machine with the same folders: python -m tests.elsewhere
..."""

from nfnets_xla import record
from nfnets_xla.cli import main

if __name__ == "__main__":
    record._machine = lambda: "elsewhere"  # names the machine's own lock
    main()
