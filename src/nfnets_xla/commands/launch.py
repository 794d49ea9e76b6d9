"""`nfnets-xla launch ...`: a run on Cloud TPU, from the queue to its last step, through `gcloud`.

    nfnets-xla launch watch my_run.yaml --dry-run     # prints the commands, runs none of them
    nfnets-xla launch watch my_run.yaml               # all of it, again after each pre-emption

A run is one file (recipes/launch/): the slice, what is installed on it, and the command that every
worker runs. Nothing is kept on this machine: what there is to know is asked of the queued resource
and of its workers, so that any step may be repeated, from anywhere. See docs/cloud_tpu.md.
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from nfnets_xla.arguments import Parser
from nfnets_xla.exits import Failed

SHARE = "/mnt/share"  # where it is mounted, by install.sh and after a reboot by run.sh
FOLDER = "nfnets-xla"  # of a worker's home: the library, its log, the state of the run
SCRIPTS = ("install.sh", "run.sh")
# https://cloud.google.com/tpu/docs/queued-resources; those not named here are on the way to ACTIVE.
GONE = ("SUSPENDED", "FAILED")  # never become ACTIVE again: to be deleted and asked for anew
GOING = ("SUSPENDING", "DELETING")
ABSENT = "NOT_FOUND"  # what gcloud says of one that does not exist
DAY = 24 * 3600  # seconds
ANSWERS_IN = 600  # seconds, or a question has failed
# A connection to a worker that is gone ends after two minutes; by itself it would after two hours.
CONNECTED = [
    f"-o{option}"
    for option in ("ServerAliveInterval=15", "ServerAliveCountMax=8", "ConnectTimeout=30")
]
FAILURES_IN_A_ROW = 10  # of `watch`: the network may be down, or a slice go while it is asked

# A line per worker. A lock that is held is a run that lives: no way to end leaves it behind.
ASK_WORKERS = f"""cd {FOLDER} 2> /dev/null && test -x venv/bin/nfnets-xla && test -e run.sh \
|| {{ echo "worker $(hostname): empty"; exit 0; }}; \
if ! flock -n lock true; then echo "worker $(hostname): running"; \
elif test -s exit; then echo "worker $(hostname): exit $(cat exit)"; \
else echo "worker $(hostname): stopped"; fi"""
ANSWER = re.compile(r"worker (\S+): (empty|running|stopped|exit \d+)")


@dataclass(frozen=True)
class Launch:
    """One file of recipes/launch/."""

    name: str  # of the queued resource and of its node
    project: str
    zone: str
    accelerator_type: str  # v4-8 is one host of four chips
    runtime_version: str
    spot: bool
    share: (
        str  # HOST:/FOLDER, over NFS: holds run_dir, because a pre-empted worker's disks are gone
    )
    wheel: str  # a file of this machine
    lock: str  # requirements-tpu.lock, of this machine
    run: list[str]  # arguments of nfnets-xla

    def check(self, command: str) -> None:
        """Raises ValueError for mistakes that would only show once the slice is paid for. Commands
        that end the cost are never refused."""
        if command in (*INSTALLING, "start"):
            self._check_run()
        if command in INSTALLING:
            self._check_files()

    @staticmethod
    def needed(command: str) -> Collection[str]:
        """The settings without which there is nothing to be told: not more than where the slice is
        for a command that neither installs nor starts, and may be given on another machine."""
        if command in (*INSTALLING, "start"):
            return [field.name for field in fields(Launch)]
        return ("name", "project", "zone")

    def _check_run(self) -> None:
        run_dirs = [part.partition("=")[2] for part in self.run if part.startswith("run_dir=")]
        if not run_dirs or not run_dirs[-1].startswith(f"{SHARE}/"):
            raise ValueError(
                f"run has run_dir={run_dirs[-1] if run_dirs else None}; it must lie under {SHARE}, "
                "because a pre-empted worker's own disks are gone"
            )

    def _check_files(self) -> None:
        for key in ("wheel", "lock"):
            if not Path(getattr(self, key)).is_file():
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, and there is no such file here: see "
                    '"What is needed first" in docs/cloud_tpu.md'
                )


class RunFailed(Failed):
    """The run ended by itself, with an error."""


@dataclass
class Slice:
    """A queued resource and its workers, as gcloud sees them."""

    settings: Launch
    dry_run: bool
    every: float  # seconds between two questions

    def create(self) -> None:
        wanted = self.settings
        self._queue(
            "create",
            f"--node-id={wanted.name}",
            f"--accelerator-type={wanted.accelerator_type}",
            f"--runtime-version={wanted.runtime_version}",
            *(["--spot"] if wanted.spot else []),
        )

    def delete(self) -> None:
        self._queue("delete", "--force")  # with its node

    def state(self, *, in_dry_run: str) -> str:
        try:
            answer = self._queue("describe", "--format=value(state.state)", ask=True)
        except Failed as error:
            if ABSENT in str(error):
                return ABSENT
            raise
        return in_dry_run if self.dry_run else answer.strip()

    def wait(self) -> None:
        """Wait until the slice is ACTIVE."""
        state = self._until(
            lambda state: state == "ACTIVE" or state in (*GONE, *GOING, ABSENT), in_dry_run="ACTIVE"
        )
        if state != "ACTIVE":
            raise Failed(
                f"{self.settings.name} is {state}: `nfnets-xla launch resume` requests it again"
            )

    def settled(self) -> str:
        """The state of the slice, after waiting for a deletion in progress."""
        return self._until(lambda state: state not in GOING, in_dry_run="SUSPENDED")

    def _until(self, over: Callable[[str], bool], *, in_dry_run: str) -> str:
        said = ""
        while not over(state := self.state(in_dry_run=in_dry_run)):
            if state != said:
                print(f"{self.settings.name}: {state}", flush=True)
            said = state
            time.sleep(self.every)
        return state

    def install(self) -> None:
        """Install on all workers. It keeps what is there already, so it can be repeated."""
        wheel, lock = Path(self.settings.wheel), Path(self.settings.lock)
        self._on_workers(f"mkdir -p {FOLDER}")
        with ExitStack() as open_files:
            scripts = [open_files.enter_context(_shipped(name)) for name in SCRIPTS]
            sources = [str(path) for path in (wheel, lock, *scripts)]
            node = f"{self.settings.name}:{FOLDER}/"
            flags = [f"--scp-flag={option}" for option in CONNECTED]
            self._gcloud("tpu-vm", "scp", *sources, node, "--worker=all", *flags)
        arguments = shlex.join([wheel.name, lock.name, self.settings.share, SHARE])
        self._on_workers(f"cd {FOLDER} && bash install.sh {arguments}")

    def start(self) -> None:
        """Start the run on all workers, in the background. Workers that run already continue."""
        command = shlex.join(["bash", "run.sh", self.settings.share, SHARE, *self.settings.run])
        self._on_workers(
            f"cd {FOLDER} && rm -f exit && "
            f"{{ setsid nohup {command} >> run.log 2>&1 < /dev/null & }}"
        )

    def stop(self) -> None:
        """Ask the run to save and end; it is not restarted until `start`."""
        self._on_workers(
            f"cd {FOLDER} && touch stop && "
            "if flock -n lock true; then test -s exit || echo 75 > exit; "  # there is none to ask
            "elif test -e pid; then kill -TERM $(cat pid); fi"
        )

    def workers(self) -> dict[str, str]:
        """{host: what its run does}; empty in a dry run."""
        return dict(ANSWER.findall(self._on_workers(ASK_WORKERS, ask=True)))

    def logs(self, worker: int) -> None:
        self._on_workers(f"tail -n 100 -F {FOLDER}/run.log", worker=str(worker))

    def _on_workers(self, command: str, *, worker: str = "all", ask: bool = False) -> str:
        to = (self.settings.name, f"--worker={worker}", f"--command={command}")
        flags = [f"--ssh-flag={option}" for option in CONNECTED]
        return self._gcloud("tpu-vm", "ssh", *to, *flags, ask=ask)

    def _queue(self, verb: str, *options: str, ask: bool = False) -> str:
        return self._gcloud("queued-resources", verb, self.settings.name, *options, ask=ask)

    def _gcloud(self, *arguments: str, ask: bool = False) -> str:
        """Print and run a command; or, with `ask`, run a query silently and return its answer."""
        where = (f"--project={self.settings.project}", f"--zone={self.settings.zone}", "--quiet")
        command = ["gcloud", "compute", "tpus", *arguments, *where]
        if self.dry_run or not ask:
            print(shlex.join(command), flush=True)
        if self.dry_run:
            return ""
        try:
            ran = subprocess.run(
                command,
                stdout=subprocess.PIPE if ask else None,
                stderr=subprocess.PIPE if ask else None,
                text=True,
                check=False,
                timeout=ANSWERS_IN if ask else None,
            )
        except subprocess.TimeoutExpired:
            raise Failed(
                f"gcloud {' '.join(arguments[:2])} has not answered in {ANSWERS_IN} s"
            ) from None
        except FileNotFoundError:
            raise ValueError(
                "there is no gcloud on the PATH: install Google Cloud's command line tools, or add "
                "--dry-run to see what would be run"
            ) from None
        if ran.returncode:
            why = f": {' '.join(ran.stderr.split())}" if ask else ""
            raise Failed(f"gcloud {' '.join(arguments[:2])} ended with {ran.returncode}{why}")
        return ran.stdout if ask else ""


def _shipped(name: str) -> AbstractContextManager[Path]:
    return as_file(files("nfnets_xla.recipes") / "launch" / name)


# ---- from any state to a run that has finished --------------------------------------------------


def resume(tpu: Slice) -> bool:
    """Start or restart the run, in whatever state it is; returns whether it has finished.

    The command is repeated as it is: the run goes on from its newest checkpoint. Raises RunFailed
    if it ended by itself with an error, which repeating would only repeat.
    """
    state = tpu.settled()
    if state in GONE:
        tpu.delete()
    if state in (*GONE, ABSENT):
        tpu.create()
    if state != "ACTIVE":
        tpu.wait()
    states = tpu.workers()
    failed = {host: now for host, now in states.items() if now not in _NO_FAILURE}
    if failed:
        host, now = min(failed.items())
        raise RunFailed(
            f"the run ended on {len(failed)} of {len(states)} workers ({host}: {now}): see "
            "`nfnets-xla launch logs`, and `start` it again"
        )
    if tpu.dry_run or "empty" in states.values():
        tpu.install()
    if tpu.dry_run or any(now in ("empty", "stopped") for now in states.values()):
        tpu.start()
    return bool(states) and all(now == "exit 0" for now in states.values())


_NO_FAILURE = ("empty", "running", "stopped", "exit 0")


def watch(tpu: Slice) -> None:
    """`resume`, again and again, until the run has finished."""
    failures = 0
    while True:
        try:
            if resume(tpu):
                print(f"{tpu.settings.name}: finished. `nfnets-xla launch delete` ends its cost")
                return
            failures = 0
        except Failed as error:
            failures += 1
            if isinstance(error, RunFailed) or failures == FAILURES_IN_A_ROW:
                raise
            print(f"nfnets-xla: {error}; trying again", file=sys.stderr, flush=True)
        if tpu.dry_run:
            return
        time.sleep(tpu.every)


def status(tpu: Slice) -> None:
    state = tpu.state(in_dry_run="ACTIVE")
    if not tpu.dry_run:
        print(f"{tpu.settings.name}: {state}")
    if state == "ACTIVE":
        for host, now in sorted(tpu.workers().items()):
            print(f"  {host}: {now}")


# ---- the command line ---------------------------------------------------------------------------

COMMANDS: dict[str, tuple[Callable[[Slice], Any], str]] = {
    "create": (Slice.create, "request the slice, as a queued resource"),
    "wait": (Slice.wait, "wait until the slice is ready"),
    "install": (Slice.install, "mount the share and install the library, on all workers"),
    "start": (Slice.start, "start the run on all workers"),
    "status": (status, "print the state of the slice and of its workers"),
    "resume": (
        resume,
        "start or restart the run, creating the slice if needed",
    ),
    "watch": (watch, "start the run, and resume it until it has finished"),
    "stop": (Slice.stop, "ask the run to save and stop"),
    "delete": (Slice.delete, "delete the slice; files on the share are kept"),
}
INSTALLING = ("create", "install", "resume", "watch")  # those that come to it, now or later


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    if given.command == "example":
        with find(given.settings) as file:
            print(file.read_text(encoding="utf-8"), end="")
        return
    settings = read(given.settings, given.overrides, Launch.needed(given.command))
    settings.check(given.command)
    if not 0 < given.every <= DAY:
        raise ValueError(
            f"--every is {given.every:g}; it must be seconds, greater than 0 and at most {DAY:,}"
        )
    tpu = Slice(settings, given.dry_run, given.every)
    if given.command == "logs":
        tpu.logs(given.worker)
    else:
        COMMANDS[given.command][0](tpu)


def parse(arguments: Sequence[str]) -> Any:
    top, commands = parsers()
    if arguments and arguments[0] in commands:  # KEY=VALUE may come after options, too
        return commands[arguments[0]].parse_intermixed_args(list(arguments[1:]))
    return top.parse_args(arguments)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    top = Parser(
        prog="nfnets-xla launch",
        description="Run on Cloud TPU, through gcloud (docs/cloud_tpu.md).",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    purposes = {name: purpose for name, (_, purpose) in COMMANDS.items()}
    purposes |= {
        "logs": "follow the run's log",
        "example": "print a settings file, to copy and fill in",
    }
    for name, purpose in purposes.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.set_defaults(command=name)
        command.add_argument("settings", help=f"a YAML file, or one of {', '.join(shipped())}")
        if name == "example":
            continue
        command.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="override a setting of the file"
        )
        command.add_argument(
            "--dry-run", action="store_true", help="print the gcloud commands without running them"
        )
        command.add_argument("--every", type=float, default=60, help="seconds between queries")
        if name == "logs":
            command.add_argument("--worker", type=int, default=0, help="number of the worker")
    return top, commands.choices


def read(given: str, overrides: list[str], needed: Collection[str]) -> Launch:
    """The settings of a file, or of a shipped one, with overrides; those that are not set and not
    `needed` are empty."""
    from nfnets_xla.compose import read_settings

    with find(given) as file:
        return read_settings(Launch, file, overrides, needed)


def shipped() -> list[str]:
    names = (file.name for file in (files("nfnets_xla.recipes") / "launch").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def find(settings: str) -> AbstractContextManager[Path]:
    if settings in shipped():
        return _shipped(f"{settings}.yaml")
    if not Path(settings).is_file():
        raise ValueError(
            f"there is no settings file {settings!r}: give a file, or one of {', '.join(shipped())}"
        )
    return as_file(Path(settings))
