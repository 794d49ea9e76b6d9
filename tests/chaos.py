"""Runs are killed, starved and given wrong data, and must end like the undisturbed run.

    python -m tests.chaos [--short] [--seed N] [--only NAME] [--write docs/reliability.md]

Every start runs the command line in its own process, forked from this one, which has done the
imports. After each scenario we check three things: the run has finished; its ledger proves that
every sample was shown exactly once; and weights, momentum and average are those of the undisturbed
run, to the bit (across device counts: the first 50 losses, to 1e-3).
"""

import argparse
import ctypes
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from nfnets_xla import checkpoint, record
from nfnets_xla.record import read_record
from tests.chaos_suite import FOLDERS, HEAD, Suite, Wound, ended, finished, kill, rows, write
from tests.data.server import Fault, serving
from tests.runs import UNOPTIMISED, xla
from tests.shallow import SHALLOW, register_shallow

CAP_DAC_OVERRIDE = 1 << 1  # linux/capability.h: lets root write where the mode forbids it


# ---- scenarios --------------------------------------------------------------------------------


def kills(suite: Suite, count: int, epochs: float = 16) -> None:
    arguments, done, runs = suite.arguments(epochs), 0, []
    while done < count:
        runs.append(suite.folder / f"kills-{len(runs)}")
        while done < count and not finished(runs[-1]):
            pid = suite.started(arguments, runs[-1])
            time.sleep(suite.rng.uniform(0, 2))
            done += kill(pid)
    if not finished(runs[-1]):
        suite.run(arguments, runs[-1])
    note = f"{len(runs)} runs of {round(epochs * 100 / 16)} steps"
    suite.judge("SIGKILL after the first step", runs, done, suite.reference(arguments), note)


def kills_while_starting(suite: Suite, count: int) -> None:
    arguments, run_dir = suite.arguments(2), suite.folder / "starting"
    kill(suite.started(arguments, run_dir))
    began = time.monotonic()
    kill(suite.started(arguments, run_dir))
    usual = time.monotonic() - began
    for _ in range(count):
        pid = suite.start(arguments, run_dir)
        time.sleep(suite.rng.uniform(0, usual))
        kill(pid)
    suite.run(arguments, run_dir)
    suite.judge("SIGKILL while starting", [run_dir], count, suite.reference(arguments))


def two_machines(suite: Suite, count: int) -> None:
    """Train one run in its one folder from two machines; each starts again when it was overtaken,
    until both have seen the end. Now and then one of them is stopped for a while."""

    def elsewhere() -> None:
        record._machine = lambda: "elsewhere"

    arguments, run_dir = suite.arguments(16), suite.folder / "two"
    wounds: dict[int, Wound | None] = {}
    for wound in (None, elsewhere):
        wounds[suite.started(arguments, run_dir, wound)] = wound
    overtaken = 0
    while wounds:
        for pid, wound in list(wounds.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                del wounds[pid]
                if code := ended(pid):
                    assert code == 75, suite.log.read_text()[-3000:]
                    overtaken += 1
                    wounds[suite.start(arguments, run_dir, wound)] = wound
            elif suite.rng.random() < 0.3 and overtaken < count:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(suite.rng.uniform(0, 1))
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)
    assert overtaken, "neither was ever behind"
    reference, note = suite.reference(arguments), "exit code 75 of the one behind"
    suite.judge("two machines train it at once", [run_dir], overtaken, reference, note)


def kills_on_devices(suite: Suite, count: int) -> None:
    """Without SAM and mixing, whose graphs take longest to compile. Two seconds are a few steps."""
    os.environ["XLA_FLAGS"] = UNOPTIMISED
    plain = ["optim.sam_rho=null", "data.mix=none", "trainer.checkpoint_every=2"]

    def on(devices: int) -> list[str]:
        return suite.arguments(8.5, *plain, *xla(devices))

    run_dir = suite.folder / "devices"
    for number in range(count):
        pid = suite.started(on((1, 2, 4)[number % 3]), run_dir)
        time.sleep(suite.rng.uniform(0, 2))
        kill(pid)
        if finished(run_dir):
            break
    suite.run(on(4), run_dir)
    starts = len(read_record(run_dir).headers) - 1
    reference = suite.reference(on(1))
    suite.judge("SIGKILL on 1, 2, 4 XLA devices in turn", [run_dir], starts, reference, bits=False)


def requests_to_stop(suite: Suite, count: int) -> None:
    arguments, run_dir = suite.arguments(8), suite.folder / "stopped"
    codes = []
    for _ in range(count):
        pid = suite.started(arguments, run_dir)
        time.sleep(suite.rng.uniform(0, 0.7))
        os.kill(pid, signal.SIGTERM)
        codes.append(ended(pid))
    suite.run(arguments, run_dir)
    assert set(codes) <= {0, 75}, codes
    stopped = codes.count(75)
    suite.judge("SIGTERM", [run_dir], stopped, suite.reference(arguments), "exit code 75")


def remote_reads(suite: Suite) -> None:
    """Half of all answers are refused, cut or too short, and one stops half-way for a minute."""
    kinds: list[Fault] = [503, "cut", 429, "short", 500]
    for name, faults, note in (
        ("half of all remote reads fail", lambda _, n: kinds[n // 2 % 5] if n % 2 else None, ""),
        ("a read hangs", lambda _, n: "stall" if n == 9 else None, "given up after 60 s"),
    ):
        run_dir = suite.folder / "remote"
        with serving(suite.folder, faults) as server:
            there = [f"data.{key}={server.url}/{name}" for key, name in FOLDERS]
            cache = [f"data.cache_dir={suite.folder / 'cache'}", "data.cache_bytes=2e6"]
            suite.run(suite.arguments(2, *there, *cache), run_dir)
            failed = server.failed.total()
        shutil.rmtree(suite.folder / "cache")
        suite.judge(name, [run_dir], failed, suite.reference(suite.arguments(2)), note)


def damage(suite: Suite) -> None:
    """Damages the newest checkpoint after a kill; the run resumes from the one before."""
    arguments = suite.arguments(3)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[suite.rng.randrange(len(data))] ^= 1 << suite.rng.randrange(8)
        path.write_bytes(data)

    for name, wound in (
        ("truncated", lambda path: os.truncate(path, suite.rng.randrange(path.stat().st_size))),
        ("with one bit flipped", flip),
        ("deleted", Path.unlink),
    ):
        run_dir = suite.folder / "damaged"
        root = run_dir / "checkpoints"
        pid = suite.started(arguments, run_dir)
        while len(list(root.glob("*/manifest.json"))) < 2:
            time.sleep(0.005)
        kill(pid)
        newest = checkpoint.latest(root)[0]
        assert newest is not None
        wound(suite.rng.choice(sorted(newest.folder.iterdir())))
        suite.run(arguments, run_dir)
        note = "from the one before"
        assert read_record(run_dir).headers[1]["resumed_from"] < newest.step
        reference = suite.reference(arguments)
        suite.judge(f"a checkpoint's file {name}", [run_dir], 1, reference, note)


def full_disk(suite: Suite) -> None:
    """The disk is full in the middle of a file at every other checkpoint."""
    arguments, run_dir = suite.arguments(3), suite.folder / "full"

    def wound() -> None:
        write, calls = checkpoint.save_file, [0]

        def save_file(tensors: dict, path: Path) -> None:
            calls[0] += 1
            write(tensors, path)
            if calls[0] % 4 == 2:
                os.truncate(path, path.stat().st_size // 2)
                raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)}")

        checkpoint.save_file = save_file

    code = suite.run(arguments, run_dir, wound)
    failed = len(read_record(run_dir).of_kind("checkpoint_failed"))
    if code:
        suite.run(arguments, run_dir)
    reference = suite.reference(arguments)
    suite.judge("the disk is full in the midst of a save", [run_dir], failed, reference)


def read_only(suite: Suite) -> None:
    """Without root's right to write anyway, the process cannot save its end. The folder is
    read-only from the first step on: before it the run would be refused."""
    arguments, run_dir = suite.arguments(3), suite.folder / "read-only"
    root = run_dir / "checkpoints"
    kill(suite.started(arguments, run_dir))
    process = suite.started(arguments, run_dir, without_override)
    root.chmod(0o555)
    code = ended(process)
    root.chmod(0o755)
    failed = len(read_record(run_dir).of_kind("checkpoint_failed"))
    suite.run(arguments, run_dir)
    note = f"exit code {code}, then repeated"
    reference = suite.reference(arguments)
    suite.judge("the folder of checkpoints is read-only", [run_dir], failed, reference, note)


def without_override() -> None:
    """capset(2): drop CAP_DAC_OVERRIDE, if the process has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(head, data) == 0:
        data[0] &= ~CAP_DAC_OVERRIDE
        libc.capset(head, data)


def clock(suite: Suite) -> None:
    """The clock runs backwards, an hour per second."""
    arguments, run_dir = suite.arguments(3, "trainer.keep_every_hours=1"), suite.folder / "clock"

    def wound() -> None:
        began, real = time.time(), time.time
        time.time = lambda: began - 3600 * (real() - began)

    kill(suite.started(arguments, run_dir, wound))
    suite.run(arguments, run_dir, wound)
    suite.judge("the clock runs backwards", [run_dir], 2, suite.reference(suite.arguments(3)))


def worker(suite: Suite) -> None:
    """The run ends with an error, and resumes when the command is repeated."""
    arguments, run_dir = suite.arguments(3, "data.workers=1"), suite.folder / "worker"
    pid = suite.started(arguments, run_dir)
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    code = ended(pid)
    suite.run(arguments, run_dir)
    note = f"exit code {code}, then repeated"
    suite.judge(
        "a loader worker is killed", [run_dir], 1, suite.reference(suite.arguments(3)), note
    )


SHORT: dict[str, Callable[[Suite], None]] = {
    "kills": lambda suite: kills(suite, 3, epochs=3),
    "starting": lambda suite: kills_while_starting(suite, 1),
    "full": full_disk,
}
LONG: dict[str, Callable[[Suite], None]] = {
    "kills": lambda suite: kills(suite, 80),
    "starting": lambda suite: kills_while_starting(suite, 10),
    "term": lambda suite: requests_to_stop(suite, 10),
    "devices": lambda suite: kills_on_devices(suite, 20),
    "two": lambda suite: two_machines(suite, 10),
    "damage": damage,
    "full": full_disk,
    "read-only": read_only,
    "clock": clock,
    "worker": worker,
    "remote": remote_reads,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=LONG, default=list(LONG))
    parser.add_argument("--write", type=Path, help="put the table between this page's marks")
    given = parser.parse_args()
    torch.set_num_threads(1)
    register_shallow()
    with tempfile.TemporaryDirectory() as folder:
        settings = SHALLOW if given.short else []
        suite = Suite(Path(folder), random.Random(given.seed), settings)
        scenarios = SHORT if given.short else LONG
        for name in scenarios:
            if name in given.only:
                scenarios[name](suite)
                if given.write:  # at once, so that results are kept whatever happens later
                    write(given.write, suite.results)
    print("\n".join([*HEAD, *rows(suite.results)]))
    sys.exit(0 if all(result.good for result in suite.results) else 1)


if __name__ == "__main__":
    main()
