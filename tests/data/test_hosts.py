"""Hosts are processes; killed with SIGKILL and restarted in another number, they continue."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.data.host import EPOCHS, batches, rows
from tests.data.images import packed

SAMPLES = 101  # divisible by none of the shape's numbers


def steps_done(out: Path) -> int:
    """Number of global batches, from step 0 on, that all hosts have written their parts of."""
    step = 0
    while any(len(list(out.glob(f"{step:04d}-*-of-{h}.json"))) == h for h in (1, 2, 4)):
        step += 1
    return step


def test_two_hosts_then_one_then_four_make_the_same_global_batches(tmp_path: Path) -> None:
    index, out = packed(tmp_path / "shards", SAMPLES, 9), tmp_path / "out"
    out.mkdir()
    whole = batches(index)
    killed = []
    for hosts, until in ((2, 5), (1, 11), (4, len(whole))):
        first = steps_done(out)
        arguments = [sys.executable, "-m", "tests.data.host", str(tmp_path / "shards"), str(out)]
        processes = [
            subprocess.Popen([*arguments, *map(str, (host, hosts, first, until + host))])
            for host in range(hosts)  # each host is killed one step later than the one before it
        ]
        while steps_done(out) < until:
            assert all(process.poll() in (None, 0) for process in processes)
            time.sleep(0.01)
        for process in processes:
            process.kill()
            killed.append(process.wait() == -signal.SIGKILL)
    assert all(killed[:3])  # the last four finish

    assert steps_done(out) == len(whole) == 20  # ceil(2.3 * 101 / 12)
    shown: list[tuple[str, int]] = []
    widths = set()
    for step in range(len(whole)):
        expected = rows(whole, whole[step])
        for hosts in (1, 2, 4):
            parts = [out / f"{step:04d}-{host}-of-{hosts}.json" for host in range(hosts)]
            if all(part.exists() for part in parts):
                widths.add(hosts)
                found = [row for part in parts for row in json.loads(part.read_text())]
                assert found == expected
        shown += {(name, epoch) for name, epoch, weight, _ in expected if weight}
    assert widths == {1, 2, 4}
    assert len(shown) == len(set(shown)) == round(EPOCHS * SAMPLES)
