"""Resuming after a kill, beside webdataset's own ways: python benchmarks/resume.py

Time: a new process is asked for the batch at 1, 50 and 99 % of an epoch; the clock starts when its
imports are done. Ours loads the index and computes the order at that step; webdataset, which cannot
start at a step, iterates over what was shown (it reads and groups the tars, but decodes nothing).
Both read local files that are in the page cache.

Exactness: one epoch is shown by a process that is killed with SIGKILL half-way and started again,
with the same number of loader workers or with another (1, then 2). How many samples of the epoch
are not shown, and how many more than once? webdataset is run once as in its manual (`shardshuffle`,
`shuffle`, and again from the start), and once seeded and skipping.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.compat import WebDataset, WebLoader
from webdataset.shardlists import split_by_worker

from nfnets_xla.data.index import build_index
from nfnets_xla.data.order import Order
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.shards import ShardIndex

SAMPLES, PER_SHARD, IMAGE, BATCH = 32_000, 500, 8_000, 64
PLACES = (0.01, 0.5, 0.99)


def main() -> None:
    if len(sys.argv) > 1:
        job, folder, start, stop, workers = sys.argv[1:]
        show(job, Path(folder), int(start), int(stop), int(workers))
        return
    from _turns import Report  # imports torch, which the measured processes do without

    report = Report("resume", "python benchmarks/resume.py")
    report.say(f"numpy {version('numpy')}, webdataset {version('webdataset')}\n")
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder))
        report.say(
            f"{SAMPLES:,} samples of {IMAGE:,} bytes in shards of {PER_SHARD}, batch {BATCH}"
        )
        report.say(
            "\nseconds to the batch at      " + "".join(f"{place:>8.0%}" for place in PLACES)
        )
        for job in ("ours", "skipping"):
            seconds = [first_batch(job, folder, int(place * SAMPLES / BATCH)) for place in PLACES]
            report.say(f"{TITLES[job]:29}" + "".join(f"{each:8.2f}" for each in seconds))
        report.say("\nof an epoch, killed half-way   workers   not shown   more than once")
        for job, then in (("ours", 2), ("skipping", 1), ("skipping", 2), ("again", 2)):
            missing, repeated = killed(job, folder, then)
            shares = f"{missing / SAMPLES:12.1%}{repeated / SAMPLES:17.1%}"
            report.say(f"{TITLES[job]:29}{'1, then ' + str(then):>11}{shares}")
    report.save()


TITLES = {
    "ours": "ours",
    "skipping": "webdataset, seeded, skipping",
    "again": "webdataset, plain",
}


def make_shards(folder: Path) -> None:
    rng = np.random.default_rng(0)
    samples = ((f"{n:06d}", rng.bytes(IMAGE), "jpg", n % 10) for n in range(SAMPLES))
    pack_samples(samples, folder, samples_per_shard=PER_SHARD)
    build_index(folder)


# ---- one process ------------------------------------------------------------------------------


def show(job: str, folder: Path, start: int, stop: int, workers: int) -> None:
    """Print the keys of batches `start` to `stop`, one line per batch, as soon as it is made."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    batches = ours(folder, start, stop) if job == "ours" else theirs(job, folder, start, workers)
    for keys in islice(batches, stop - start):
        if began:
            print(time.perf_counter() - began, file=sys.stderr)
            began = 0.0
        print(*keys, flush=True)


def ours(folder: Path, start: int, stop: int) -> Iterator[list[str]]:
    """Workers only decide which process makes a batch; here this process makes all of them."""
    index = ShardIndex.load(folder)
    order = Order(index.counts, 0, 16, BATCH, 4, 1.0)
    for step in range(start, stop):
        rows = order.step(step)
        keys = []
        for shard, row in zip(rows.shard.tolist(), rows.row.tolist(), strict=True):
            index.read(shard, row)
            keys.append(index.sample_id(shard, row).partition("/")[2])
        yield keys


def theirs(job: str, folder: Path, start: int, workers: int) -> Iterator[list[str]]:
    seeded: dict[str, Any] = {"seed": 1} if job == "skipping" else {}
    urls = sorted(map(str, folder.glob("*.tar")))
    dataset = WebDataset(urls, shardshuffle=len(urls), workersplitter=split_by_worker, **seeded)
    keys = dataset.shuffle(1000, **seeded).to_tuple("__key__", "jpg").batched(BATCH, partial=False)
    loader: Any = WebLoader(keys.map(first), batch_size=None, num_workers=workers)
    yield from islice(iter(loader), start if job == "skipping" else 0, None)


def first(batch: Any) -> list[str]:
    return list(batch[0])


# ---- measuring --------------------------------------------------------------------------------


def command(job: str, folder: str, start: int, stop: int, workers: int) -> list[str]:
    return [sys.executable, __file__, job, folder, *map(str, (start, stop, workers))]


def first_batch(job: str, folder: str, step: int) -> float:
    seconds = []
    for _ in range(3):
        ran = subprocess.run(
            command(job, folder, step, step + 1, 0), capture_output=True, text=True, check=True
        )
        seconds.append(float(ran.stderr.split()[-1]))
    return float(np.median(seconds))


def killed(job: str, folder: str, then: int) -> tuple[int, int]:
    """Numbers of samples of the epoch that were not shown, and that were shown more than once."""
    steps = SAMPLES // BATCH
    shown: Counter[str] = Counter()
    done = 0
    for workers, until in ((1, steps // 2), (then, steps)):
        arguments = command(job, folder, done, steps, workers)
        with subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            while done < until:
                line = process.stdout.readline()
                if not line:
                    break  # the process ran out of samples before the epoch was over
                shown.update(line.split())
                done += 1
            os.killpg(process.pid, signal.SIGKILL)
    return SAMPLES - len(shown), sum(count > 1 for count in shown.values())


if __name__ == "__main__":
    main()
