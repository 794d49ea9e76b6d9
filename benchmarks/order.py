"""The order and index at JFT-4B's size, simulated: python benchmarks/order.py

4e9 samples in 400,000 shards, read by 16 hosts in the recipe's shape (64 streams, windows of 16
shards, 4,096 rows a step). There are no images: counts, names and digests are made up. A host
computes the ids (shard, row) of its rows, from a cold start at several places of the run and then
step by step. Times are processor time. Each job runs in its own process, so that its memory can be
measured separately.

For comparison, the memory and time of plain webdataset at that size: only a list of its URLs, since
it has no order from which a step could be computed.
"""

import resource
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np

SHARDS, PER_SHARD, NAME = 400_000, 10_000, "jft-{:06d}-of-400000.tar"
STREAMS, WINDOW, BATCH, EPOCHS = 64, 16, 4096, 4.0
STEPS = 6_000  # consecutive steps that are timed: enough to cross two windows
KEY = 16  # bytes of a sample's key


def main() -> None:
    if len(sys.argv) > 1:
        {"order": simulate, "webdataset": urls}[sys.argv[1]](int(sys.argv[2]))
        return
    jobs = [("order", "16"), ("order", "1"), ("webdataset", "1")]
    said = [
        subprocess.run(
            [sys.executable, __file__, *job], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        for job in jobs
    ]
    from _turns import Report  # imports torch, which would count in a job's memory

    report = Report("order", "python benchmarks/order.py")
    report.say(f"numpy {version('numpy')}, webdataset {version('webdataset')}\n")
    report.say(f"{SHARDS * PER_SHARD:.0e} samples in {SHARDS:,} shards, batch {BATCH}")
    for lines in said:
        report.say(lines.rstrip())
    report.save()


def simulate(hosts: int) -> None:
    from nfnets_xla.data.order import Order
    from nfnets_xla.data.shards import Line, make_manifest, manifest_bytes

    before = memory()
    start = time.process_time()
    lines = (Line(NAME.format(n), PER_SHARD, 10**9, bytes(16), 18_291, 8) for n in range(SHARDS))
    manifest = make_manifest(list(lines))
    built = time.process_time() - start
    nbytes = sum(part.nbytes for part in manifest)
    print(f"\n1 of {hosts} hosts")
    print(f"manifest           {nbytes / 1e6:7.1f} MB, {nbytes / SHARDS:.0f} bytes a shard")
    print(
        f"  on disk          {len(manifest_bytes(manifest)) / 1e6:7.1f} MB (built in {built:.1f} s)"
    )
    del lines
    order = Order(manifest.counts_S.astype(np.int64), 0, STREAMS, BATCH, WINDOW, EPOCHS)
    streams = order.streams_of(0, hosts)
    for epoch in (0.0, 0.5, 2.3):
        start = time.process_time()
        order.step(round(epoch * order.steps_per_epoch), streams)
        print(f"cold, epoch {epoch:.1f}    {1e3 * (time.process_time() - start):7.1f} ms")
    first = round(2.3 * order.steps_per_epoch) + 1
    times = []
    for step in range(first, first + STEPS):
        start = time.process_time()
        order.step(step, streams)
        times.append(time.process_time() - start)
    for name, share in (("median", 0.5), ("99 %", 0.99), ("99.9 %", 0.999), ("slowest", 1.0)):
        print(f"next step, {name:7} {1e3 * float(np.quantile(times, share)):7.2f} ms")
    epoch_end = round(order.steps_per_epoch) - 1
    order.step(epoch_end, streams)
    start = time.process_time()
    order.step(epoch_end + 1, streams)
    print(f"into a new epoch   {1e3 * (time.process_time() - start):7.1f} ms")
    print(
        f"all of it          {memory() - before:7.1f} MB at the peak (with what built the manifest)"
    )
    resident = nbytes + resident_order(order)
    touched = len(streams) * (WINDOW + 1)
    sidecars = touched * PER_SHARD * (24 + KEY)
    print(
        f"resident index     {resident / 1e6:7.1f} MB (manifest, counts, 4 epochs' lines, windows)"
    )
    print(f"sidecars in use    {sidecars / 1e6:7.1f} MB ({touched} shards)")


def resident_order(order: object) -> int:
    """Bytes of all arrays that an order holds."""
    import gc

    seen: dict[int, np.ndarray] = {}
    todo: list[object] = [order]
    visited: set[int] = set()
    while todo:
        one = todo.pop()
        if id(one) in visited or isinstance(one, type):
            continue
        visited.add(id(one))
        if isinstance(one, np.ndarray):
            seen[id(one)] = one
        elif type(one).__module__ != "builtins" or isinstance(one, (tuple, list, dict)):
            todo += gc.get_referents(one)
    return sum(array.nbytes for array in seen.values())


def urls(hosts: int) -> None:
    del hosts
    from webdataset.shardlists import SimpleShardList

    before = memory()
    dataset = SimpleShardList([f"/data/{NAME.format(n)}" for n in range(SHARDS)], seed=True)
    start = time.process_time()
    next(iter(dataset))
    print("\nwebdataset")
    print(f"list of URLs       {memory() - before:7.1f} MB")
    print(f"shuffled, an epoch {1e3 * (time.process_time() - start):7.1f} ms")
    print("step n of the run: by reading all samples before it (benchmarks/resume.py)")


def memory() -> float:
    """Peak memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
