"""Parts of chaos.py's scenarios: processes, verdicts, the table."""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import nfnets_xla.train  # noqa: F401 (before any fork: it is most of a start)
from nfnets_xla import cli
from nfnets_xla.ledger import audit, read_ledger
from nfnets_xla.record import read_record
from tests.data.images import packed
from tests.runs import PLAIN_CPU, RECIPE, SMALL, final_state, losses

QUIET = ["data.workers=0", "trainer.tensorboard=false", "trainer.trace_samples=false"]
OFTEN = ["trainer.checkpoint_every=5", "trainer.eval_every=60", "trainer.keep_checkpoints=2"]
FIRST_LOSSES, TOLERANCE = 50, 1e-3

Wound = Callable[[], object]  # done in the child, before the command line runs


@dataclass
class Result:
    name: str
    disturbed: int  # number of disturbances
    finished: bool
    exactly_once: bool
    equal: str
    steps_lost: int
    seconds_lost: float
    note: str = ""

    @property
    def good(self) -> bool:
        return self.finished and self.exactly_once and not self.equal.startswith("no")


@dataclass
class Suite:
    folder: Path
    rng: random.Random
    settings: list[str] = field(default_factory=list)  # of every run, besides the suite's own
    results: list[Result] = field(default_factory=list)
    references: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        packed(self.folder / "train", 100, 15, 5)
        packed(self.folder / "held-out", 21, 8, 5)
        self.log = self.folder / "log.txt"

    def arguments(self, epochs: float, *more: str) -> list[str]:
        data = [f"data.{key}={self.folder / name}" for key, name in FOLDERS]
        own = [*RECIPE, *SMALL, *PLAIN_CPU, *QUIET, *OFTEN, *data, f"optim.epochs={epochs}"]
        return [*own, *self.settings, *more]

    # ---- processes ----------------------------------------------------------------------------

    def start(self, arguments: list[str], run_dir: Path, wound: Wound | None = None) -> int:
        """Returns the process's id."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            log = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.setsid()
            # After a fork this process's thread pool, with which it has compared weights, is
            # rebuilt at its first use, and aborts if two of autograd's threads are the first to use
            # it.
            torch.set_num_threads(1)
            if wound is not None:
                wound()
            sys.argv = ["nfnets-xla", *arguments, f"run_dir={run_dir}"]
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def run(self, arguments: list[str], run_dir: Path, wound: Wound | None = None) -> int:
        return ended(self.start(arguments, run_dir, wound))

    def started(self, arguments: list[str], run_dir: Path, wound: Wound | None = None) -> int:
        """A process whose first step is done, or that has ended since only the end was left."""
        before = set(run_dir.glob("ledger-*.bin"))
        pid = self.start(arguments, run_dir, wound)
        while not any(has_steps(path) for path in set(run_dir.glob("ledger-*.bin")) - before):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                assert finished(run_dir), self.log.read_text()[-3000:]
                break
            time.sleep(0.005)
        return pid

    # ---- what came of it ----------------------------------------------------------------------

    def reference(self, arguments: list[str]) -> Path:
        """The same run, undisturbed."""
        if tuple(arguments) not in self.references:
            run_dir = self.folder / f"reference-{len(self.references)}"
            assert self.run(arguments, run_dir) == 0, self.log.read_text()[-3000:]
            self.references[tuple(arguments)] = run_dir
        return self.references[tuple(arguments)]

    def judge(
        self,
        name: str,
        runs: list[Path],
        disturbed: int,
        reference: Path,
        note: str = "",
        bits: bool = True,
    ) -> None:
        records = [read_record(run_dir) for run_dir in runs]
        finished = all(record.of_kind("end") for record in records)
        audits = [audit(run_dir) for run_dir in runs]
        result = Result(
            name,
            disturbed,
            finished,
            finished and not any(found.faults for found in audits),
            "no" if not finished else self._equal(runs, reference, bits),
            sum(found.again for found in audits),  # the record's last rows are one interval late
            sum(record.seconds_lost for record in records),
            note,
        )
        self.results.append(result)
        print("ok  " if result.good else "FAIL", result, flush=True)
        for run_dir in runs if result.good else []:
            shutil.rmtree(run_dir)

    def _equal(self, runs: list[Path], reference: Path, bits: bool) -> str:
        if bits:
            whole = final_state(reference)
            same = all(
                state.keys() == whole.keys() and all(torch.equal(state[k], whole[k]) for k in whole)
                for state in map(final_state, runs)
            )
            return "bit for bit" if same else "no"
        worst = max(
            abs(a - b) / abs(b)
            for run_dir in runs
            for a, b in zip(
                losses(run_dir)[:FIRST_LOSSES], losses(reference)[:FIRST_LOSSES], strict=True
            )
        )
        return f"{'no: ' if worst > TOLERANCE else ''}losses to {worst:.0e}"


FOLDERS = (("shards", "train"), ("eval_shards", "held-out"))


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_steps(ledger: Path) -> bool:
    return bool(read_ledger(ledger)[1])


def kill(pid: int) -> bool:
    """Returns whether it was still running."""
    os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL


def finished(run_dir: Path) -> bool:
    has_record = any(run_dir.glob("run-*.jsonl"))
    return has_record and bool(read_record(run_dir).of_kind("end"))


# ---- the table --------------------------------------------------------------------------------


def rows(results: list[Result]) -> list[str]:
    yes = {True: "yes", False: "NO"}
    return [
        f"| {r.name} | {r.disturbed} | {yes[r.finished]} | {yes[r.exactly_once]} | {r.equal} | "
        f"{r.steps_lost} | {r.seconds_lost:.1f} | {r.note} |"
        for r in results
    ]


HEAD = [
    "| what is done | times | finished | every sample once | weights | steps lost | s lost | |",
    "|---|---|---|---|---|---|---|---|",
]
BEGIN, END = "<!-- written by make chaos -->", "<!-- end -->"


def write(page: Path, results: list[Result]) -> None:
    """Put the table between the page's marks; the rows of scenarios that were not run stay."""
    before, rest = page.read_text().split(BEGIN)
    old, after = rest.split(END)
    lines = [line for line in old.strip().splitlines() if line not in HEAD]
    new = {line.split("|")[1]: line for line in [*lines, *rows(results)]}
    text = "\n".join([*HEAD, *new.values()])
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
