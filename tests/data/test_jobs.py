"""A command that is told to stop leaves no worker behind, and prints one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from nfnets_xla.data.jobs import map_jobs
from nfnets_xla.data.pack import pack_samples
from tests.data.images import encoded

# Jobs that a shell starts with & ignore SIGINT, and so do all their children.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
PROGRAM = f"{HEARS}; from nfnets_xla.cli import main; main()"


def busy(parent: int) -> set[int]:
    """Its children that have a shard open."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return {int(child) for child in children if reads_a_shard(child)}


def reads_a_shard(pid: str) -> bool:
    try:
        return any(os.readlink(f).endswith(".tar") for f in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # a file was closed meanwhile
        return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text() != ""  # empty once it has ended
    except (FileNotFoundError, ProcessLookupError):
        return False


def ignores_ctrl_c(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], base=16)
    return bool(ignored >> signal.SIGINT - 1 & 1)


@pytest.mark.parametrize(
    ("number", "to_all", "code"), [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)]
)
def test_workers_end_with_the_command(tmp_path: Path, number: int, to_all: bool, code: int) -> None:
    """`kill` and systemd signal the command alone, a terminal each of its processes."""
    image = encoded(Image.new("RGB", (4000, 4000)), "PNG")  # slow to decode
    samples = ((f"{n}", image, "png", 0) for n in range(200))
    pack_samples(samples, tmp_path / "shards", samples_per_shard=100)
    command = [sys.executable, "-c", PROGRAM, "shards", "lint", str(tmp_path / "shards")]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*command, "--jobs=2"], stdout=said, stderr=said, start_new_session=True
        )
    workers: set[int] = set()
    try:
        while len(workers := busy(process.pid)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        assert all(ignores_ctrl_c(worker) for worker in workers)  # else some print a traceback
        (os.killpg if to_all else os.kill)(process.pid, number)
        assert process.wait() == code
        assert not any(map(is_alive, workers))
        assert (tmp_path / "said").read_text() == "nfnets-xla: interrupted\n"
    finally:
        if process.poll() is None or any(map(is_alive, workers)):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_every_item_is_done_once_in_order_and_told() -> None:
    told: list[tuple[int, int]] = []
    items = [*range(-40, 0)]
    done = map_jobs(abs, items, on_progress=lambda *progress: told.append(progress))
    assert [*done] == [*range(40, 0, -1)]
    assert told == [(16, 40), (32, 40), (40, 40)]
    assert [*map_jobs(abs, [-1, -2], jobs=-1)] == [1, 2]
    for jobs in (0, -2):
        with pytest.raises(ValueError, match=f"jobs is {jobs}; it must be 1 or more, or -1"):
            next(map_jobs(abs, items, jobs=jobs))
